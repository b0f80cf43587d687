// What every instruction set shares of products with Zigzag: sixteen picked columns at a time, and what becomes of them.
#pragma once

#include <algorithm>

#include "matrices.h"

namespace pennyweight {

constexpr int kStep = 16;         // columns at a time, in four quads
constexpr int kMaxGroups = 1024;  // of a tile; pack.cpp refuses more

// Activations times scales in 8 bits, with one float for every group of rows.
struct Folded {
    alignas(64) std::int32_t quad[kStep / 4][kMaxGroups];  // four codes, one per column of a quad
    alignas(64) float scale[kMaxGroups];
    alignas(64) std::int32_t minus8[kMaxGroups];  // -8 times the sum of the codes
    alignas(64) float bias[kMaxGroups];           // what minima add, summed over all steps
};

// The chunks of one step and, to be prefetched, of the next. A step that is not full takes its last column again, with
// an activation of zero.
struct Step {
    const std::uint8_t *chunk[kStep], *next[kStep];
    float x[kStep];

    Step(const std::uint8_t* tile, std::size_t chunk_bytes, const std::int32_t* index, const float* value, int count,
         int start) {
        for (int c = 0; c < kStep; c++) {
            chunk[c] = tile + index[std::min(start + c, count - 1)] * chunk_bytes;
            next[c] = tile + index[std::min(start + kStep + c, count - 1)] * chunk_bytes;
            x[c] = start + c < count ? value[start + c] : 0.0f;
        }
    }
};

}  // namespace pennyweight
