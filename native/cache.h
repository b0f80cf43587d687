// Keys and values as they lie in memory, and how attention over a long text is put together from segments.
//
// Segments begin at multiples of kSegment whatever the text's length, and are merged in order: so results do not depend
// on how many threads share the work.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "matrices.h"

namespace pennyweight {

// How keys and values are kept. FP8 is E4M3.
enum class Cache : int { float16 = 0, fp8 = 1, float32 = 2 };

constexpr std::size_t bytes_of(Cache cache) { return cache == Cache::fp8 ? 1 : cache == Cache::float16 ? 2 : 4; }

// What the queries of one key-value head look at: up to kSegment positions [first, last) of a cache of `blocks` blocks of
// 16 positions, used as a ring. Keys lie block by block transposed (head_dim, 16), so that 16 dot products need no sums
// across lanes; values lie position by position (16, padded value_dim).
struct Cached {
    static constexpr int kBlock = 16;
    static constexpr int kSegment = 512;  // positions that are looked at in one go
    static constexpr int kScratch = 4 * (kSegment + 2 * kBlock);

    const void* keys = nullptr;
    const void* values = nullptr;
    Cache cache = Cache::float16;
    int head_dim = 0, value_dim = 0;
    int blocks = 0;
    int first = 0, last = 0;
    float scale = 1;
    float* scratch = nullptr;  // kScratch floats

    static int padded(int value_dim) { return round_up(value_dim, kBlock); }
};

// Of a softmax over some positions: the largest score, and the sum of e^(score - largest).
struct Share {
    float most = 0, total = 0;
};

// out (n) = the softmax over all positions times values, from that over `count` segments: share[s * stride] and
// mixed + s * mixed_stride. `sink`, if not null, is a logit that takes part and has no value.
inline void merge(const Share* share, std::ptrdiff_t stride, const float* mixed, std::ptrdiff_t mixed_stride, int count,
                  const float* sink, int n, float* out) {
    float most = sink ? *sink : -INFINITY, total = 0;
    for (int s = 0; s < count; s++) most = std::max(most, share[s * stride].most);
    const auto weight = [&](int s) { return share[s * stride].total * std::exp(share[s * stride].most - most); };
    for (int s = 0; s < count; s++) total += weight(s);
    if (sink) total += std::exp(*sink - most);
    for (int s = 0; s < count; s++) {
        const float part = weight(s) / total;
        for (int d = 0; d < n; d++) out[d] = (s ? out[d] : 0.0f) + part * mixed[s * mixed_stride + d];
    }
}

}  // namespace pennyweight
