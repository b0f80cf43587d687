// Operations on floats that every instruction set does alike, written once over a vector type V of its kernel file.
//
// V has: kWidth lanes; load, load_half (float16), load_brain (bfloat16), broadcast, store, store_half, store_short (as 16-bit
// integers, rounded to nearest); fma(a, b, c) = a b + c; mul, add, sub, div, min, max; sum over the lanes; nearest (to even)
// and times_two_to(v, n) = v 2^n for whole n. And integers: Pairs, two numbers of 16 bits a lane, from 8 bits (load_pairs),
// from kWidth numbers of 8 bits, each with a zero behind it (load_alone), or the same two in all lanes (broadcast_pair);
// Sums, 32 bits a lane: dot(a, b, sums) adds both products of a lane, and floats_of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernels.h"

namespace pennyweight::ops {

// e^x within 2 ulp: x = n ln 2 + r, a polynomial in r, times 2^n. x is taken as at least -87. Minima and maxima have the
// constant first, here and below: a NaN stays one.
template <class V>
inline V exponential(V x) {
    x = V::max(V::broadcast(-87.0f), x);
    x = V::min(V::broadcast(88.0f), x);
    const V n = V::nearest(V::mul(x, V::broadcast(1.44269504f)));
    V r = V::fma(n, V::broadcast(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
    r = V::fma(n, V::broadcast(2.12194440e-4f), r);
    V p = V::broadcast(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = V::fma(p, r, V::broadcast(c));
    return V::times_two_to(p, n);
}

// Up to kWidth elements, the rest zero; and back. Vectors at the end of a row must not touch what lies behind it.
template <class V>
inline V load_some(const float* x, int n) {
    if (n >= V::kWidth) return V::load(x);
    alignas(64) float few[V::kWidth] = {};
    std::memcpy(few, x, sizeof(float) * n);
    return V::load(few);
}

template <class V>
inline void store_some(V v, float* x, int n) {
    if (n >= V::kWidth) return v.store(x);
    alignas(64) float few[V::kWidth];
    v.store(few);
    std::memcpy(x, few, sizeof(float) * n);
}

template <class V>
inline float largest(V v) {
    alignas(64) float lanes[V::kWidth];
    v.store(lanes);
    return *std::max_element(lanes, lanes + V::kWidth);
}

template <class V>
void rms_norm(const float* x, const float* weight, float epsilon, int n, float* out) {
    V squares = V::broadcast(0);
    for (int i = 0; i < n; i += V::kWidth) {
        const V v = load_some<V>(x + i, n - i);
        squares = V::fma(v, v, squares);
    }
    const V factor = V::broadcast(1.0f / std::sqrt(squares.sum() / float(n) + epsilon));
    for (int i = 0; i < n; i += V::kWidth)
        store_some<V>(V::mul(V::mul(load_some<V>(x + i, n - i), factor), load_some<V>(weight + i, n - i)), out + i,
                      n - i);
}

template <class V>
void rotate(float* head, const float* cosine, const float* sine, int half) {
    for (int i = 0; i < half; i += V::kWidth) {
        const V a = load_some<V>(head + i, half - i), b = load_some<V>(head + half + i, half - i);
        const V c = load_some<V>(cosine + i, half - i), s = load_some<V>(sine + i, half - i);
        store_some<V>(V::sub(V::mul(a, c), V::mul(b, s)), head + i, half - i);
        store_some<V>(V::fma(a, s, V::mul(b, c)), head + half + i, half - i);
    }
}

// g / (1 + e^-x)
template <class V>
inline V sigmoid_times(V g, V x) {
    return V::div(g, V::add(V::broadcast(1.0f), exponential<V>(V::sub(V::broadcast(0.0f), x))));
}

template <class V, Activation kActivation>
void gate(const float* gates, const float* ups, int n, float* out) {
    for (int i = 0; i < n; i += V::kWidth) {
        V g = load_some<V>(gates + i, n - i), u = load_some<V>(ups + i, n - i);
        if constexpr (kActivation == Activation::silu) g = sigmoid_times<V>(g, g);
        if constexpr (kActivation == Activation::gelu_tanh) {  // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
            const V inner = V::fma(V::mul(g, g), V::broadcast(0.044715f), V::broadcast(1.0f));
            g = sigmoid_times<V>(g, V::mul(V::mul(g, inner), V::broadcast(1.59576912f)));  // 2 sqrt(2 / pi)
        }
        if constexpr (kActivation == Activation::relu2) g = V::mul(g, V::max(V::broadcast(0.0f), g));
        if constexpr (kActivation == Activation::clamped) {
            const V limit = V::broadcast(7.0f);
            g = V::min(limit, g);
            g = sigmoid_times<V>(g, V::mul(g, V::broadcast(1.702f)));
            u = V::add(V::max(V::broadcast(-7.0f), V::min(limit, u)), V::broadcast(1.0f));
        }
        store_some<V>(V::mul(g, u), out + i, n - i);
    }
}

template <class V>
void add(float* x, const float* y, int n) {
    for (int i = 0; i < n; i += V::kWidth)
        store_some<V>(V::add(load_some<V>(x + i, n - i), load_some<V>(y + i, n - i)), x + i, n - i);
}

// 1 - 2 / (1 + e^2x), within 1e-7
template <class V>
inline V tangent(V x) {
    const V one = V::broadcast(1.0f);
    return V::sub(one, V::div(V::broadcast(2.0f), V::add(one, exponential<V>(V::add(x, x)))));
}

template <class V>
void cap(float* x, float scale, float bound, int n) {
    const V by = V::broadcast(bound > 0 ? scale / bound : scale), most = V::broadcast(bound);
    for (int i = 0; i < n; i += V::kWidth) {
        const V v = V::mul(load_some<V>(x + i, n - i), by);
        store_some<V>(bound > 0 ? V::mul(most, tangent<V>(v)) : v, x + i, n - i);
    }
}

template <class V>
void to_half(const float* x, int n, std::uint16_t* out) {
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) V::load(x + i).store_half(out + i);
    for (; i < n; i++) out[i] = to_float16(x[i]);
}

// Rows of weights times tokens in float32. Two sums per row and token, of even and odd vectors, whatever is done beside.
template <class V, Wide::Type kType, int kRows, int kTokens>
inline void wide_block(const std::uint8_t* rows, std::size_t row_bytes, int cols, const float* const* x, float* y,
                       std::ptrdiff_t stride) {
    constexpr int kBytes = kType == Wide::Type::float32 ? 4 : 2;
    const auto load = [](const std::uint8_t* at) {
        if constexpr (kType == Wide::Type::float32) return V::load(reinterpret_cast<const float*>(at));
        else if constexpr (kType == Wide::Type::float16) return V::load_half(reinterpret_cast<const std::uint16_t*>(at));
        else return V::load_brain(reinterpret_cast<const std::uint16_t*>(at));
    };
    V total[kRows][kTokens][2];
    for (auto& row : total)
        for (auto& token : row) token[0] = token[1] = V::broadcast(0);
    int i = 0;
    for (; i + 2 * V::kWidth <= cols; i += 2 * V::kWidth) {
        // The same stream 4 KiB ahead: the hardware prefetcher stops at every page.
        if (kRows == 1) __builtin_prefetch(rows + kBytes * i + 4096, 0, 3);
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            const int at = i + side * V::kWidth;
            V w[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) w[r] = load(rows + r * row_bytes + kBytes * at);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; t++) {
                const V value = V::load(x[t] + at);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; r++) total[r][t][side] = V::fma(w[r], value, total[r][t][side]);
            }
        }
    }
    for (; i < cols; i += V::kWidth) {
        const int few = std::min(V::kWidth, cols - i);
        for (int r = 0; r < kRows; r++) {
            alignas(64) std::uint8_t last[4 * V::kWidth] = {};
            std::memcpy(last, rows + r * row_bytes + kBytes * i, kBytes * few);
            for (int t = 0; t < kTokens; t++)
                total[r][t][0] = V::fma(load(last), load_some<V>(x[t] + i, few), total[r][t][0]);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int t = 0; t < kTokens; t++) y[t * stride + r] = V::add(total[r][t][0], total[r][t][1]).sum();
}

// One token takes row after row, as memory is read fastest. Apart from what many tokens need, for the registers' sake.
template <class V, Wide::Type kType>
[[gnu::noinline]] void wide_one(const Wide& w, const float* x, float* y, int first, int last) {
    for (int r = first; r < last; r++) wide_block<V, kType, 1, 1>(w.data + r * w.row_bytes(), 0, w.cols, &x, y + r, 0);
}

// Some rows and tokens at a time, as many as registers hold.
template <class V, Wide::Type kType, int kRows, int kTokens>
[[gnu::noinline]] void wide_many(const Wide& w, const float* const* x, int count, float* y, std::ptrdiff_t stride,
                                 int first) {
    const std::uint8_t* rows = w.data + first * w.row_bytes();
    int t = 0;
    for (; t + kTokens <= count; t += kTokens)
        wide_block<V, kType, kRows, kTokens>(rows, w.row_bytes(), w.cols, x + t, y + t * stride + first, stride);
    for (; t < count; t++) wide_block<V, kType, kRows, 1>(rows, w.row_bytes(), w.cols, x + t, y + t * stride + first, stride);
}

// Many tokens go in blocks that stay in the second level of cache while all rows pass by.
template <class V, Wide::Type kType>
void wide_times_as(const Wide& w, const float* const* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    constexpr int kRows = V::kWidth == 16 ? 4 : 2, kTokens = V::kWidth == 16 ? 3 : 2;
    const int together = std::max(kTokens, (1 << 17) / w.cols / kTokens * kTokens);
    for (int from = 0; from < count; from += together) {
        const int n = std::min(together, count - from);
        float* to = y + from * stride;
        int r = first;
        for (; n > 1 && r + kRows <= last; r += kRows) wide_many<V, kType, kRows, kTokens>(w, x + from, n, to, stride, r);
        for (int t = 0; t < n; t++) wide_one<V, kType>(w, x[from + t], to + t * stride, r, last);
    }
}

template <class V>
void wide_times(const Wide& w, const float* const* x, int count, float* y, std::ptrdiff_t stride, int first, int last) {
    auto* run = w.type == Wide::Type::float32   ? wide_times_as<V, Wide::Type::float32>
                : w.type == Wide::Type::float16 ? wide_times_as<V, Wide::Type::float16>
                                                : wide_times_as<V, Wide::Type::bfloat16>;
    run(w, x, count, y, stride, first, last);
}

template <class V, Cache kCache>
inline V load_cached(const std::uint8_t* block, std::size_t index) {
    if constexpr (kCache == Cache::float16) return V::load_half(reinterpret_cast<const std::uint16_t*>(block) + index);
    else return V::load(reinterpret_cast<const float*>(block) + index);
}

// The scales of a lane's positions in a block of n codes each.
template <class V>
inline V load_scales(const std::uint8_t* block, int n, int lane) {
    return V::load_brain(reinterpret_cast<const std::uint16_t*>(block + Cached::kBlock * n) + lane * V::kWidth);
}

// What is not below this in size is worth integers; the rest is nothing, and has an inverse that is a number.
constexpr float kTiny = 1e-30f;

// x (n) as integers of up to `most` in size, and what to multiply them with: NaN if x is not finite.
template <class V>
float to_short(const float* x, int n, float most, std::int16_t* codes) {
    const V zero = V::broadcast(0);
    V largest_one = zero, trouble = zero;
    for (int i = 0; i < n; i += V::kWidth) {
        const V v = load_some<V>(x + i, n - i);
        largest_one = V::max(largest_one, V::max(v, V::sub(zero, v)));
        trouble = V::fma(v, zero, trouble);  // not finite: NaN
    }
    const float size = largest(largest_one);
    const V inverse = V::broadcast(size > kTiny ? most / size : 0);
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) V::mul(V::load(x + i), inverse).store_short(codes + i);
    if (i < n) {
        std::int16_t few[V::kWidth];
        V::mul(load_some<V>(x + i, n - i), inverse).store_short(few);
        std::memcpy(codes + i, few, sizeof(std::int16_t) * (n - i));
    }
    return size / most + trouble.sum();
}

// Memory comes while something else is computed: the values of a block are fetched as its keys are read, line by line, since
// later they are read in strides, which no hardware prefetcher follows.
inline void fetch_line(const std::uint8_t* from, int at) {
    if (at % 64 == 0) __builtin_prefetch(from + at, 0, 2);
}

// What a few queries times the keys of a block are, before the scale of scores. `values` are fetched by the way.
template <class V, Cache kCache, int kQueries>
struct KeyProducts {
    static constexpr int kLanes = Cached::kBlock / V::kWidth;  // vectors of a block of positions

    KeyProducts(const Cached& a, const float* const* query) : head_dim(a.head_dim), query(query) {}

    void of(const std::uint8_t* keys, const std::uint8_t* values, V (&dot)[kQueries][kLanes]) const {
        for (auto& q : dot)
            for (auto& lane : q) lane = V::broadcast(0);
        for (int d = 0; d < head_dim; d++) {
            fetch_line(values, d * Cached::kBlock * (kCache == Cache::float16 ? 2 : 4));
            for (int lane = 0; lane < kLanes; lane++) {
                const V key = load_cached<V, kCache>(keys, d * Cached::kBlock + lane * V::kWidth);
                for (int m = 0; m < kQueries; m++) dot[m][lane] = V::fma(key, V::broadcast(query[m][d]), dot[m][lane]);
            }
        }
    }

    const int head_dim;
    const float* const* const query;
};

// Of codes: integers of 16 bits for the query, and sums that are exact.
template <class V, int kQueries>
struct KeyProducts<V, Cache::int8, kQueries> {
    static constexpr int kLanes = Cached::kBlock / V::kWidth;

    KeyProducts(const Cached& a, const float* const* query) : head_dim(a.head_dim) {
        const float most = std::min(32767.0f, std::floor(float(1u << 31) / (128.0f * float(head_dim))));  // sums are below 2^31
        auto* room = reinterpret_cast<std::int16_t*>(a.scratch + kQueries * (Cached::kScores + Cached::kScores / 2));
        for (int m = 0; m < kQueries; m++) {
            codes[m] = room + m * (head_dim + head_dim % 2);
            scale[m] = to_short<V>(query[m], head_dim, most, codes[m]);
            if (head_dim % 2) codes[m][head_dim] = 0;
        }
    }

    void of(const std::uint8_t* keys, const std::uint8_t* values, V (&dot)[kQueries][kLanes]) const {
        typename V::Sums sums[kQueries][kLanes] = {};
        const auto* at = reinterpret_cast<const std::int8_t*>(keys);
        int d = 0;
        for (; d + 2 <= head_dim; d += 2) {
            fetch_line(values, d * Cached::kBlock);
            for (int lane = 0; lane < kLanes; lane++) {
                const auto key = V::load_pairs(at + d * Cached::kBlock + 2 * lane * V::kWidth);
                for (int m = 0; m < kQueries; m++) sums[m][lane] = V::dot(key, V::broadcast_pair(codes[m] + d), sums[m][lane]);
            }
        }
        for (int lane = 0; d < head_dim && lane < kLanes; lane++) {
            const auto key = V::load_alone(at + d * Cached::kBlock + lane * V::kWidth);
            for (int m = 0; m < kQueries; m++) sums[m][lane] = V::dot(key, V::broadcast_pair(codes[m] + d), sums[m][lane]);
        }
        for (int lane = 0; lane < kLanes; lane++) {
            const V scales = load_scales<V>(keys, head_dim, lane);
            for (int m = 0; m < kQueries; m++)
                dot[m][lane] = V::mul(V::floats_of(sums[m][lane]), V::mul(scales, V::broadcast(scale[m])));
        }
    }

    const int head_dim;
    std::int16_t* codes[kQueries];
    float scale[kQueries];
};

// softmax(q K^T scale) V for a few queries that share keys and values. Codes of 8 bits are multiplied as integers, by
// queries and weights of 16 bits: an error of 2^-15 of the largest, where the codes themselves have 2^-8.
template <class V, Cache kCache, int kQueries>
void attend_block(const Cached& a, const float* const* query, Share* share, float* const* out) {
    constexpr int kLanes = Cached::kBlock / V::kWidth;  // vectors of a block of positions
    constexpr bool kCodes = kCache == Cache::int8;
    const int first = a.first / Cached::kBlock, last = (a.last + Cached::kBlock - 1) / Cached::kBlock;
    const int stride = (last - first) * Cached::kBlock;
    // Positions of the first and the last block that are not seen get what does not count.
    const auto cut = [&](int b, float* block, float nothing) {
        for (int i = 0; i < Cached::kBlock; i++)
            if (const int p = b * Cached::kBlock + i; p < a.first || p >= a.last) block[i] = nothing;
    };
    V most[kQueries];
    for (auto& m : most) m = V::broadcast(-INFINITY);
    const int padded = Cached::padded(a.value_dim);
    const auto values_of = [&](int b) { return a.values + b % a.blocks * Cached::block_bytes(kCache, padded); };
    const KeyProducts<V, kCache, kQueries> products(a, query);
    for (int b = first; b < last; b++) {
        V dot[kQueries][kLanes];
        products.of(a.keys + b % a.blocks * Cached::block_bytes(kCache, a.head_dim), values_of(b), dot);
        for (int m = 0; m < kQueries; m++) {
            float* to = a.scratch + m * stride + (b - first) * Cached::kBlock;
            for (int lane = 0; lane < kLanes; lane++) V::mul(dot[m][lane], V::broadcast(a.scale)).store(to + lane * V::kWidth);
            if (b == first || b == last - 1) cut(b, to, -INFINITY);
            for (int lane = 0; lane < kLanes; lane++) most[m] = V::max(most[m], V::load(to + lane * V::kWidth));
        }
    }
    if (a.cap > 0)
        for (int m = 0; m < kQueries; m++) {
            cap<V>(a.scratch + m * stride, 1, a.cap, stride);
            most[m] = V::broadcast(-INFINITY);
            for (int b = first; b < last; b++) {
                float* at = a.scratch + m * stride + (b - first) * Cached::kBlock;
                if (b == first || b == last - 1) cut(b, at, -INFINITY);
                for (int lane = 0; lane < kLanes; lane++) most[m] = V::max(most[m], V::load(at + lane * V::kWidth));
            }
        }
    auto* weights = reinterpret_cast<std::int16_t*>(a.scratch + kQueries * Cached::kScores);  // of codes
    float factor[kQueries];  // of what weights and values add up to
    for (int m = 0; m < kQueries; m++) {
        const V top = V::broadcast(largest(most[m]));
        float* scores = a.scratch + m * stride;
        V sum = V::broadcast(0);
        for (int b = first; b < last; b++) {
            float* at = scores + (b - first) * Cached::kBlock;
            for (int lane = 0; lane < kLanes; lane++)
                exponential<V>(V::sub(V::load(at + lane * V::kWidth), top)).store(at + lane * V::kWidth);
            if (b == first || b == last - 1) cut(b, at, 0);  // the exponential of minus infinity is cut off above zero
            for (int lane = 0; lane < kLanes; lane++) {
                const V p = V::load(at + lane * V::kWidth);
                sum = V::add(sum, p);
                if constexpr (kCodes)  // what multiplies codes
                    V::mul(p, load_scales<V>(values_of(b), padded, lane)).store(at + lane * V::kWidth);
            }
            if (kCodes && (b == first || b == last - 1)) cut(b, at, 0);  // scales of what is not seen
        }
        const float total = sum.sum();
        share[m] = {largest(most[m]), total};
        factor[m] = 1 / total;
        if constexpr (kCodes) factor[m] *= to_short<V>(scores, stride, 32767, weights + m * stride);
    }
    static_assert(32767ll * 127 * Cached::kSegment < 1ll << 31);  // sums of weights times codes
    constexpr int kSpan = kQueries > (V::kWidth == 8 ? 2 : 6) ? 2 : 4;  // vectors of value_dim held at once: AVX2 has few
    // kVectors vectors of values from the d-th channel on: as many as are named, so that their sums stay in registers.
    const auto mix = [&]<int kVectors>(int d, std::integral_constant<int, kVectors>) {
        std::conditional_t<kCodes, typename V::Sums, V> mixed[kQueries][kVectors] = {};
        for (int b = first; b < last; b++) {
            const std::uint8_t* values = values_of(b);
            const int at = (b - first) * Cached::kBlock;
            const int from = std::max(0, a.first - b * Cached::kBlock), to = std::min(Cached::kBlock, a.last - b * Cached::kBlock);
            if constexpr (kCodes) {
                for (int p = from & ~1; p < to; p += 2) {
                    typename V::Pairs value[kVectors];
                    for (int v = 0; v < kVectors; v++)
                        value[v] = V::load_pairs(reinterpret_cast<const std::int8_t*>(values) + p * padded + 2 * (d + v * V::kWidth));
                    for (int m = 0; m < kQueries; m++) {
                        const auto weight = V::broadcast_pair(weights + m * stride + at + p);
                        for (int v = 0; v < kVectors; v++) mixed[m][v] = V::dot(value[v], weight, mixed[m][v]);
                    }
                }
            } else {
                for (int p = from; p < to; p++)
                    for (int v = 0; v < kVectors; v++) {
                        const V value = load_cached<V, kCache>(values, p * padded + d + v * V::kWidth);
                        for (int m = 0; m < kQueries; m++)
                            mixed[m][v] = V::fma(V::broadcast(a.scratch[m * stride + at + p]), value, mixed[m][v]);
                    }
            }
        }
        for (int m = 0; m < kQueries; m++)
            for (int v = 0; v < kVectors; v++) {
                V sum;
                if constexpr (kCodes) sum = V::floats_of(mixed[m][v]);
                else sum = mixed[m][v];
                store_some<V>(V::mul(sum, V::broadcast(factor[m])), out[m] + d + v * V::kWidth, a.value_dim - d - v * V::kWidth);
            }
    };
    int d = 0;
    for (; d + (kSpan - 1) * V::kWidth < a.value_dim; d += kSpan * V::kWidth) mix(d, std::integral_constant<int, kSpan>());
    for (; d < a.value_dim; d += V::kWidth) mix(d, std::integral_constant<int, 1>());
}

// As many queries at once as have their sums in registers.
template <class V, Cache kCache, int... kQueries>
void attend_by(const Cached& a, const float* const* query, int count, Share* share, float* const* out) {
    int m = 0;
    const auto take = [&](auto attend, int n) {
        for (; m + n <= count; m += n) attend(a, query + m, share + m, out + m);
    };
    (take(attend_block<V, kCache, kQueries>, kQueries), ...);
}

template <class V, Cache kCache>
void attend_in(const Cached& a, const float* const* query, int count, Share* share, float* const* out) {
    if constexpr (V::kWidth == 16) attend_by<V, kCache, 8, 6, 4, 3, 2, 1>(a, query, count, share, out);
    else if constexpr (V::kWidth == 4 || kCache == Cache::int8) attend_by<V, kCache, 6, 4, 3, 2, 1>(a, query, count, share, out);
    else attend_by<V, kCache, 4, 3, 2, 1>(a, query, count, share, out);
}

template <class V>
void attend(const Cached& a, const float* const* query, int count, Share* share, float* const* out) {
    auto* run = a.cache == Cache::float16 ? attend_in<V, Cache::float16>
                : a.cache == Cache::int8  ? attend_in<V, Cache::int8>
                                          : attend_in<V, Cache::float32>;
    run(a, query, count, share, out);
}

// The table of an instruction set: what it brings itself, and the rest in its lanes V.
template <class V>
constexpr Kernels with_lanes(Kernels table) {
    table.wide_times = wide_times<V>;
    table.rms_norm = rms_norm<V>;
    table.rotate = rotate<V>;
    table.gate[int(Activation::silu)] = gate<V, Activation::silu>;
    table.gate[int(Activation::gelu_tanh)] = gate<V, Activation::gelu_tanh>;
    table.gate[int(Activation::relu2)] = gate<V, Activation::relu2>;
    table.gate[int(Activation::clamped)] = gate<V, Activation::clamped>;
    table.add = add<V>;
    table.cap = cap<V>;
    table.to_half = to_half<V>;
    table.attend = attend<V>;
    return table;
}

}  // namespace pennyweight::ops
