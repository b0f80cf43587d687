// What every instruction set shares of products with Zigzag: sixteen columns at a time, and what becomes of them.
#pragma once

#include <algorithm>
#include <cstring>

#include "matrices.h"

namespace pennyweight {
// Unnamed: each kernel file is compiled for other instructions, and the linker must not let one use another's copy.
namespace {

constexpr int kStep = Zigzag::kStep;  // in four quads
constexpr int kMaxGroups = 1024;  // of a slice: taller tiles are worked on in several
constexpr int kMaxTokens = 32;    // that share one look at a column

// Activations times scales in 8 bits, with one float for every group of rows: of so many tokens that kMaxGroups groups
// hold them all, and they stay in the first level of cache beside the weights.
struct Folded {
    int groups = 0;  // of each token
    // Of token t: four codes (one per column of a quad) for each quad and group; then per group the scale, -8 times the
    // sum of the codes, 17 times that (where the sum of whole bytes, low + 16 high, starts), and what minima add.
    alignas(64) std::int32_t table[8 * kMaxGroups];

    std::int32_t* quad(int t, int q) { return table + (8 * t + q) * groups; }
    float* scale(int t) { return reinterpret_cast<float*>(table + (8 * t + 4) * groups); }
    std::int32_t* minus8(int t) { return table + (8 * t + 5) * groups; }
    std::int32_t* minus136(int t) { return table + (8 * t + 6) * groups; }
    float* bias(int t) { return reinterpret_cast<float*>(table + (8 * t + 7) * groups); }
};

// Scales of eight groups (Scales::super) in bytes, group 0 lowest: of 6 bits, to be multiplied by float16 d and dmin.
struct Super {
    std::uint64_t scales, minima;
    std::uint32_t factors;  // d in the low half, dmin in the high one

    explicit Super(const std::uint8_t* at) {
        std::uint32_t word[4];
        std::memcpy(word, at, sizeof word);
        const std::uint32_t low = word[3] & 0x0f0f0f0f, high = word[3] >> 4 & 0x0f0f0f0f;
        scales = (word[1] & 0x3f3f3f3f) | std::uint64_t(low | (word[1] >> 2 & 0x30303030)) << 32;
        minima = (word[2] & 0x3f3f3f3f) | std::uint64_t(high | (word[2] >> 2 & 0x30303030)) << 32;
        factors = word[0];
    }
};

// Rows of a tile that are worked on together: whole units, and so few that the tables of all tokens fit.
struct Slice {
    int first, last;         // units
    int first_group, groups;  // `groups` rounded up to 16

    Slice(const Zigzag& w, int tokens, int first_unit, int last_unit) : first(first_unit) {
        const int per_unit = Zigzag::kUnitRows / w.group, room = kMaxGroups / tokens / 16 * 16;
        last = std::min(last_unit, first + std::max(1, room / per_unit));
        first_group = first * per_unit;
        groups = round_up((last - first) * per_unit, 16);
    }
};

// The chunks of one step and, to be prefetched, of the next. A step that is not full takes its last column again,
// with an activation of zero.
struct Step {
    const std::uint8_t *chunk[kStep], *next[kStep];
    int columns;

    Step(const std::uint8_t* tile, std::size_t chunk_bytes, const std::int32_t* index, int count, int start)
        : columns(std::min(kStep, count - start)) {
        fill(chunk, tile, chunk_bytes, index, count, start);
        fill(next, tile, chunk_bytes, index, count, start + kStep);
    }

    static void fill(const std::uint8_t** at, const std::uint8_t* tile, std::size_t chunk_bytes, const std::int32_t* index,
                     int count, int start) {
        if (start + kStep <= count)
            for (int c = 0; c < kStep; c++) at[c] = tile + index[start + c] * chunk_bytes;
        else
            for (int c = 0; c < kStep; c++) at[c] = tile + index[std::min(start + c, count - 1)] * chunk_bytes;
    }

    // A step's activations of one token; those of a step that is not full are copied to `room`, with zeros behind.
    const float* of(const float* value, float* room) const {
        if (columns == kStep) return value;
        for (int c = 0; c < kStep; c++) room[c] = c < columns ? value[c] : 0.0f;
        return room;
    }
};

// Brings the next step's chunks into the second level of cache (the first would overflow), a line of four chunks at a
// time: no prefetcher follows columns that are picked, but the list tells what comes. Requests have to be spread evenly
// over all that is done in a step, tables included: a core keeps a few dozen in flight, and memory idles when none are.
class Ahead {
public:
    Ahead(const Step& step, std::size_t at, int units) : next_(step.next), at_(at), quads_(4 * units) {}

    // `count` quads of lines.
    void fetch(int count) {
        for (const int end = std::min(done_ + count, quads_); done_ < end; done_++) {
            const std::uint8_t* const* chunk = next_ + done_ % 4 * 4;
            const std::size_t at = at_ + done_ / 4 * 64;
            for (int c = 0; c < 4; c++) __builtin_prefetch(chunk[c] + at, 0, 2);
        }
    }

private:
    const std::uint8_t* const* next_;
    std::size_t at_;
    int quads_, done_ = 0;
};

// The loops around what an instruction set does itself: `fold` makes the tables of a step, `times` adds its products.
// `Table` is Folded, or what an instruction set prefers: it has `groups` and `bias`.
template <Scales kScales, class Table, class Fold, class Times>
void each_step(const Zigzag& w, int tile, int first, int last, const std::int32_t* index, const float* const* value,
               int tokens, int count, float* y, std::ptrdiff_t stride, Fold&& fold, Times&& times) {
    Table folded;  // on the stack: of what is thread-local the compiler asks the address again and again
    const std::uint8_t* base = w.data + tile * w.tile_bytes();
    const std::size_t chunk_bytes = w.chunk_bytes();
    for (int from = 0; from < tokens; from += kMaxTokens) {
        const int n = std::min(kMaxTokens, tokens - from);
        for (int unit = first; unit < last;) {
            const Slice slice(w, n, unit, last);
            unit = slice.last;
            float* out = y + from * stride + Zigzag::kUnitRows * (slice.first - first);
            const int rows = Zigzag::kUnitRows * (slice.last - slice.first);
            folded.groups = slice.groups;
            for (int t = 0; t < n; t++) {
                for (int r = 0; r < rows; r++) out[t * stride + r] = 0;
                if constexpr (kScales != Scales::symmetric)
                    for (int g = 0; g < slice.groups; g++) folded.bias(t)[g] = 0;
            }
            for (int start = 0; start < count; start += kStep) {
                const Step step(base, chunk_bytes, index, count, start);
                Ahead ahead(step, w.scale_bytes() + 64 * slice.first, slice.last - slice.first);
                fold(step, slice, value + from, start, n, folded, ahead);
                for (int c = 0; c < kStep; c++)
                    for (int g = slice.first_group; g < slice.first_group + slice.groups; g += 32)
                        for (int part = 0; part < (kScales == Scales::affine ? 2 : 1); part++)
                            __builtin_prefetch(step.next[c] + 2 * (g + part * w.groups()), 0, 2);
                times(step, slice, folded, n, out, ahead);
            }
            if constexpr (kScales != Scales::symmetric)
                for (int t = 0; t < n; t++)
                    for (int g = 0; g < rows / w.group; g++)
                        for (int r = 0; r < w.group; r++) out[t * stride + g * w.group + r] += folded.bias(t)[g];
        }
    }
}

}  // namespace
}  // namespace pennyweight
