// Keys and values as they lie in memory, and how attention over a long text is put together from segments.
//
// In 8 bits every head of every position has a scale of its own, so that nothing depends on what else is kept. Models have
// channels of keys a hundred times as large as the rest (Qwen2.5's biases), which a scale alone would leave the rest nothing
// of. So keys and queries are spread first: a Hadamard transform, which changes no dot product, gives all channels a part of
// the large ones (as QuaRot does, arXiv:2404.00456). Values are averages over positions and stay as they are.
//
// Segments begin at multiples of kSegment whatever the text's length, and are merged in order: so results do not depend
// on how many threads share the work.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "matrices.h"

namespace pennyweight {

// How keys and values are kept: as floats, or as codes that a bfloat16 scale multiplies.
enum class Cache : int { float16 = 0, int8 = 1, float32 = 2 };

// Of n numbers of one head and position, their scale included.
constexpr std::size_t bytes_of(Cache cache, int n) {
    return cache == Cache::int8 ? n + 2 : (cache == Cache::float16 ? 2 : 4) * std::size_t(n);
}

// n floats as codes of 8 bits, the i-th to at(i), and their scale, a bfloat16. What is not finite makes that a NaN.
template <class At>
std::uint16_t encode(const float* x, int n, At&& at) {
    float most = 0;
    bool finite = true;
    for (int i = 0; i < n; i++) {
        most = std::max(most, std::fabs(x[i]));
        finite = finite && std::isfinite(x[i]);
    }
    // Rounded up, so that no code is above 127. What is too small for that is nothing.
    const std::uint16_t scale = std::uint16_t((std::bit_cast<std::uint32_t>(most / 127) + 0xffff) >> 16);
    const bool any = finite && most > 0x1p-100f;
    const float inverse = any ? 1 / std::bit_cast<float>(std::uint32_t(scale) << 16) : 0;
    for (int i = 0; i < n; i++) at(i) = any ? std::int8_t(std::nearbyint(x[i] * inverse)) : 0;
    return finite ? any ? scale : 0 : 0x7fc0;
}

// Signs of Rudin and Shapiro: neither a constant nor anything regular is left in one channel by a transform behind them.
constexpr auto kSigns = [] {
    std::array<float, 256> signs{};
    for (unsigned i = 0; i < signs.size(); i++) signs[i] = std::popcount(i & i >> 1) % 2 ? -1 : 1;
    return signs;
}();

// x (n) times an orthogonal matrix that makes sums and differences of all channels: Hadamard's with signs, for n a power of
// two; else that for the largest in n, of the first channels and then of the last. Dot products of two vectors stay what
// they were.
inline void spread(float* x, int n) {
    const int part = int(std::bit_floor(unsigned(n)));
    const float scale = 1 / std::sqrt(float(part));
    for (float* at : {x, x + n - part}) {
        for (int i = 0; i < part; i++) at[i] *= scale * kSigns[i % kSigns.size()];
        for (int width = 1; width < part; width *= 2)
            for (int i = 0; i < part; i += 2 * width)
                for (int j = i; j < i + width; j++) {
                    const float a = at[j], b = at[j + width];
                    at[j] = a + b;
                    at[j + width] = a - b;
                }
        if (part == n) break;
    }
}

// What the queries of one key-value head look at: up to kSegment positions [first, last) of a cache of `blocks` blocks of
// 16 positions, used as a ring. Keys lie block by block transposed (head_dim, 16), so that 16 dot products need no sums
// across lanes; values lie position by position (16, padded value_dim). Codes of 8 bits lie in pairs, as products of 16-bit
// integers take them: keys by two channels (head_dim / 2, 16, 2), a last odd channel as before, values by two positions
// (8, padded value_dim, 2). The 16 scales of a block come behind its codes.
struct Cached {
    static constexpr int kBlock = 16;
    static constexpr int kSegment = 512;  // positions that are looked at in one go
    static constexpr int kQueries = 8;  // and by how many queries at once, at most
    static constexpr int kScores = kSegment + 2 * kBlock;  // of a query, over whole blocks

    const std::uint8_t* keys = nullptr;
    const std::uint8_t* values = nullptr;
    Cache cache = Cache::float16;
    int head_dim = 0, value_dim = 0;
    int blocks = 0;
    int first = 0, last = 0;
    float scale = 1, cap = 0;  // of scores; a cap above 0: cap tanh(score / cap)
    float* scratch = nullptr;  // scratch_floats(head_dim)

    // For scores, and for queries and weights as integers of 16 bits.
    static constexpr std::size_t scratch_floats(int head_dim) {
        return kQueries * (kScores + kScores / 2 + std::size_t(head_dim + 1) / 2);
    }

    // Where in a block the code of a channel and a place lies.
    static constexpr std::size_t key_at(int d, int place, int head_dim) {
        const bool alone = d == head_dim - 1 && d % 2 == 0;
        return std::size_t(d / 2) * 2 * kBlock + (alone ? place : 2 * place + d % 2);
    }
    static constexpr std::size_t value_at(int d, int place, int padded) {
        return std::size_t(place / 2) * 2 * padded + 2 * d + place % 2;
    }

    static int padded(int value_dim) { return round_up(value_dim, kBlock); }
    static constexpr std::size_t block_bytes(Cache cache, int n) { return kBlock * bytes_of(cache, n); }
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
