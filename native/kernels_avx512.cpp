// AVX-512 with BW, DQ, VL and VNNI. Compiled with those instructions; entered only on processors that have them.
#include "kernels.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "trellis_times.h"
#include "vector_ops.h"
#include "zigzag_step.h"

namespace pennyweight {
namespace {

struct Lanes {
    static constexpr int kWidth = 16;
    __m512 v;
    static Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
    static Lanes load_half(const std::uint16_t* x) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
    }
    static Lanes load_brain(const std::uint16_t* x) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
    }
    static Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
    void store(float* x) const { _mm512_storeu_ps(x, v); }
    void store_half(std::uint16_t* x) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    void store_short(std::int16_t* x) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
    }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
    static Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static Lanes times_two_to(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }

    struct Pairs {
        __m512i v;
    };
    struct Sums {
        __m512i v;
    };
    static Pairs load_pairs(const std::int8_t* x) {
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
    }
    static Pairs load_alone(const std::int8_t* x) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        return {_mm512_and_si512(wide, _mm512_set1_epi32(0xffff))};
    }
    static Pairs broadcast_pair(const std::int16_t* x) {
        std::int32_t two;
        std::memcpy(&two, x, 4);
        return {_mm512_set1_epi32(two)};
    }
    static Sums dot(Pairs a, Pairs b, Sums to) { return {_mm512_dpwssd_epi32(to.v, a.v, b.v)}; }
    static Lanes floats_of(Sums sums) { return {_mm512_cvtepi32_ps(sums.v)}; }
};

inline __m512 halves(const void* at, Half kind) {
    const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(at));
    return kind == Half::float16 ? _mm512_cvtph_ps(raw)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

void quantise(const float* x, int n, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum) {
    for (int b = 0; b < n / Rows::kBlock; b++) {
        const __m512 low = _mm512_loadu_ps(x + 32 * b), high = _mm512_loadu_ps(x + 32 * b + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
        const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
        const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 32 * b), _mm512_cvtepi32_epi8(a));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 32 * b + 16), _mm512_cvtepi32_epi8(c));
        const int total = _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
        scale[b] = most * (1.0f / 127.0f);
        minus8[b] = -8 * total;
        sum[b] = scale[b] * float(total);
    }
}

// Codes of columns 4q to 4q + 3 in a tile's rows, of a block in two planes.
template <int kBits>
inline __m512i quad_codes(const std::uint8_t* at, int q) {
    constexpr int kLow = Rows::low_bits(kBits), kHigh = kBits - kLow, kHighPlane = Rows::kTile * Rows::kBlock * kLow / 8;
    const auto plane = [&](const std::uint8_t* from, int bits, int place) {
        const __m512i unit = _mm512_loadu_si512(from + 64 * (q / (8 / bits)));
        const int by = bits * (q % (8 / bits)) - place;  // what the code's bits are above where they shall be
        const __m512i moved = by >= 0 ? _mm512_srli_epi16(unit, by) : _mm512_slli_epi16(unit, -by);
        return _mm512_and_si512(moved, _mm512_set1_epi8(char(((1 << bits) - 1) << place)));
    };
    return _mm512_or_si512(plane(at, kLow, 0), plane(at + kHighPlane, kHigh, kLow));
}

// Rows of one tile times `kTokens` tokens. A unit of weights is loaded and split once for all of them.
template <int kBits, bool kAffine, int kTokens>
inline void tile_times(const Rows& w, const std::uint8_t* at, const Activations* x, float* y, std::ptrdiff_t stride) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int blocks = w.group / Rows::kBlock, groups = w.groups();
    const std::size_t block_bytes = w.block_bytes();
    __m512 out[kTokens];
    for (auto& o : out) o = _mm512_setzero_ps();
    int b = 0;
    for (int g = 0; g < groups; g++) {
        __m512 part[kTokens];
        float sum[kTokens] = {};
        for (auto& p : part) p = _mm512_setzero_ps();
        for (int end = b + blocks; b < end; b++, at += block_bytes) {
            __m512i exact[kTokens];
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; t++) {
                if constexpr (kAffine) exact[t] = _mm512_setzero_si512();
                else if constexpr (kBits == 3) exact[t] = _mm512_srai_epi32(_mm512_set1_epi32(x[t].minus8[b]), 1);
                else exact[t] = _mm512_slli_epi32(_mm512_set1_epi32(x[t].minus8[b]), kBits - 4);
            }
            if constexpr (kBits != 4 && kBits != 8) {
                for (std::size_t line = 0; line < block_bytes; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(at + line + 4096), _MM_HINT_T0);
#pragma GCC unroll 8
                for (int q = 0; q < 8; q++) {
                    const __m512i unit = quad_codes<kBits>(at, q);
#pragma GCC unroll 8
                    for (int t = 0; t < kTokens; t++) {
                        const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                        exact[t] = _mm512_dpbusd_epi32(exact[t], unit, _mm512_set1_epi32(quad[q]));
                    }
                }
            } else {
#pragma GCC unroll 8
                for (int v = 0; v < (kBits == 4 ? 4 : 8); v++) {
                    const __m512i unit = _mm512_loadu_si512(at + 64 * v);
                    // The same stream 4 KiB ahead: the hardware prefetcher stops at every page.
                    _mm_prefetch(reinterpret_cast<const char*>(at + 64 * v + 4096), _MM_HINT_T0);
                    if constexpr (kBits == 4) {
                        const __m512i low = _mm512_and_si512(unit, nibble);
                        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(unit, 4), nibble);
#pragma GCC unroll 8
                        for (int t = 0; t < kTokens; t++) {
                            const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                            exact[t] = _mm512_dpbusd_epi32(exact[t], low, _mm512_set1_epi32(quad[2 * v]));
                            exact[t] = _mm512_dpbusd_epi32(exact[t], high, _mm512_set1_epi32(quad[2 * v + 1]));
                        }
                    } else {
#pragma GCC unroll 8
                        for (int t = 0; t < kTokens; t++) {
                            const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                            exact[t] = _mm512_dpbusd_epi32(exact[t], unit, _mm512_set1_epi32(quad[v]));
                        }
                    }
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; t++) {
                part[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[t]), _mm512_set1_ps(x[t].scale[b]), part[t]);
                if constexpr (kAffine) sum[t] += x[t].sum[b];
            }
        }
        const __m512 scale = halves(at, w.half);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t++) out[t] = _mm512_fmadd_ps(part[t], scale, out[t]);
        at += 2 * Rows::kTile;
        if constexpr (kAffine) {
            const __m512 minimum = halves(at, w.half);
            for (int t = 0; t < kTokens; t++) out[t] = _mm512_fmadd_ps(_mm512_set1_ps(sum[t]), minimum, out[t]);
            at += 2 * Rows::kTile;
        }
    }
    for (int t = 0; t < kTokens; t++) _mm512_storeu_ps(y + t * stride, out[t]);
}

template <int kBits, bool kAffine>
void rows_times_as(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    for (int tile = first; tile < last; tile++) {
        const std::uint8_t* at = w.data + tile * w.tile_bytes();
        float* to = y + (tile - first) * Rows::kTile;
        int t = 0;
        for (; t + 8 <= count; t += 8) tile_times<kBits, kAffine, 8>(w, at, x + t, to + t * stride, stride);
        for (; t + 4 <= count; t += 4) tile_times<kBits, kAffine, 4>(w, at, x + t, to + t * stride, stride);
        for (; t + 2 <= count; t += 2) tile_times<kBits, kAffine, 2>(w, at, x + t, to + t * stride, stride);
        for (; t < count; t++) tile_times<kBits, kAffine, 1>(w, at, x + t, to + t * stride, stride);
    }
}

void rows_times(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first, int last) {
    auto* run = w.bits == 3   ? (w.affine ? rows_times_as<3, true> : rows_times_as<3, false>)
                : w.bits == 4 ? (w.affine ? rows_times_as<4, true> : rows_times_as<4, false>)
                : w.bits == 5 ? (w.affine ? rows_times_as<5, true> : rows_times_as<5, false>)
                : w.bits == 6 ? (w.affine ? rows_times_as<6, true> : rows_times_as<6, false>)
                              : (w.affine ? rows_times_as<8, true> : rows_times_as<8, false>);
    run(w, x, count, y, stride, first, last);
}

// Trellis codes: sixteen rows of two columns to a register.
struct TrellisOps {
    static constexpr int kRows = 16;
    using Floats = __m512;
    struct Sums {
        __m512i v = _mm512_setzero_si512();
    };

    template <int kBits>
    struct Code {
        static constexpr TrellisLanes<kBits> kLanes{};
        const __m512i byte = twice(kLanes.byte), mask = twice(kLanes.mask), factor = twice(kLanes.factor);

        static __m512i twice(const void* at) { return _mm512_broadcast_i64x4(_mm256_load_si256(static_cast<const __m256i*>(at))); }

        __m512i values(const std::uint8_t* at) const {
            const __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            const __m512i raw = _mm512_mask_broadcast_i32x4(
                low, 0xff00, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 2 * kBits)));
            const __m512i state = _mm512_and_si512(_mm512_shuffle_epi8(raw, byte), mask);
            const __m512i t = _mm512_add_epi16(_mm512_mullo_epi16(state, factor), _mm512_set1_epi16(kLanes.kHalf));
            const __m512i two = _mm512_mulhrs_epi16(t, t), four = _mm512_mulhrs_epi16(two, two);
            __m512i even = _mm512_mulhrs_epi16(four, four);
            if constexpr (kLanes.kThirteen) even = _mm512_mulhrs_epi16(even, four);
            return _mm512_mulhrs_epi16(t, _mm512_avg_epu16(even, _mm512_set1_epi16(32767)));
        }
    };

    static void add(Sums& sums, __m512i values, std::int32_t pair) {
        sums.v = _mm512_dpwssd_epi32(sums.v, values, _mm512_set1_epi32(pair));
    }
    static void widen(const std::int8_t* codes, std::int16_t* to) {
        _mm512_store_si512(to, _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
    }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats fma(Sums sums, float by, Floats to) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.v), _mm512_set1_ps(by), to);
    }
    static Floats fma(Floats part, const std::uint8_t* scale, Floats to) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale));
        return _mm512_fmadd_ps(part, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), to);
    }
    static void store(Floats v, const std::uint8_t* factor, float* to) {
        _mm512_storeu_ps(to, _mm512_mul_ps(v, _mm512_loadu_ps(factor)));
    }
};

void trellis_times(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    trellis_times_with<TrellisOps>(w, x, count, y, stride, first, last);
}

int collect(const float* x, const float* weight, float threshold, int n, std::int32_t* index, float* value) {
    const __m512 bound = _mm512_set1_ps(threshold);
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int found = 0;
    for (int j = 0; j < n; j += 16) {
        const __mmask16 inside = n - j >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - j)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(inside, x + j);
        __m512 size = _mm512_abs_ps(v);
        if (weight) size = _mm512_mul_ps(size, _mm512_maskz_loadu_ps(inside, weight + j));
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(inside, size, bound, _CMP_GT_OQ);
        // Compress in registers and store whole: the memory form is microcoded on Zen 4. Hence the room for 16 more.
        _mm512_storeu_si512(index + found, _mm512_maskz_compress_epi32(keep, here));
        _mm512_storeu_ps(value + found, _mm512_maskz_compress_ps(keep, v));
        found += __builtin_popcount(keep);
        here = _mm512_add_epi32(here, _mm512_set1_epi32(16));
    }
    return found;
}

// 16 groups of a step: what activations times scales `e` become, in the table of token t.
inline void fold_sixteen(const __m512 (&e)[kStep], Folded& out, int t, int i, Ahead& ahead, int fetched) {
    __m512 most = _mm512_abs_ps(e[0]);
#pragma GCC unroll 16
    for (int c = 1; c < kStep; c++) most = _mm512_range_ps(most, e[c], 0b1011);  // the larger magnitude, positive
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127.0f), most);
    _mm512_store_ps(out.scale(t) + i, _mm512_mul_ps(most, _mm512_set1_ps(1.0f / 127.0f)));
    __m512i total = _mm512_setzero_si512();
    const __m512i transpose = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
#pragma GCC unroll 4
    for (int q = 0; q < kStep / 4; q++) {
        __m512i code[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) code[c] = _mm512_cvtps_epi32(_mm512_mul_ps(e[4 * q + c], inverse));
        const __m512i packed =
            _mm512_packs_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
        const __m512i four = _mm512_shuffle_epi8(packed, transpose);
        ahead.fetch(fetched);
        _mm512_store_si512(out.quad(t, q) + i, four);
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(8), four);  // 8 times the sum of the codes
    }
    const __m512i minus8 = _mm512_sub_epi32(_mm512_setzero_si512(), total);
    _mm512_store_si512(out.minus8(t) + i, minus8);
    _mm512_store_si512(out.minus136(t) + i, _mm512_add_epi32(minus8, _mm512_slli_epi32(minus8, 4)));
}

// Scales of 16 groups and, unless symmetric, their minima, raised by 8 scales as codes count from 8.
struct Sixteen {
    __m512 scale, minimum;
};

// Of groups g to g + 15 of a column, those beyond the tile's last zero.
template <Scales kScales>
inline Sixteen sixteen(const Zigzag& w, const std::uint8_t* chunk, int g) {
    const int left = w.groups() - g;
    Sixteen made;
    if constexpr (kScales == Scales::super) {
        // Two blocks, one in each half: the words of Super's constructor, all at once.
        const __mmask8 inside = left >= 16 ? __mmask8(0xff) : __mmask8(0x0f);
        const __m256i words = _mm256_maskz_loadu_epi32(inside, chunk + 2 * g);
        const __m256i pairs = _mm256_shuffle_epi32(words, 0b10100101), last = _mm256_shuffle_epi32(words, 0b11111111);
        const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi64x(0x3f3f3f3f));
        const __m256i two = _mm256_and_si256(_mm256_srli_epi32(pairs, 2), _mm256_set1_epi64x(0x30303030ll << 32));
        const __m256i four = _mm256_and_si256(_mm256_srlv_epi32(last, _mm256_setr_epi32(0, 0, 0, 4, 0, 0, 0, 4)),
                                              _mm256_set1_epi64x(0x0f0f0f0fll << 32));
        const __m256i sixes = _mm256_permute4x64_epi64(_mm256_or_si256(low, _mm256_or_si256(two, four)), 0b11011000);
        const __m128i halves = _mm256_castsi256_si128(
            _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4)));
        const __m512 factors = _mm512_castps128_ps512(_mm_cvtph_ps(halves));  // d, dmin of one block, then of the other
        const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
        const __m512 d = _mm512_permutexvar_ps(block, factors);
        const __m512 dmin = _mm512_permutexvar_ps(_mm512_add_epi32(block, _mm512_set1_epi32(1)), factors);
        made.scale = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(sixes))));
        const __m512 m = _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(sixes, 1))));
        made.minimum = _mm512_fmsub_ps(_mm512_set1_ps(8.0f), made.scale, m);
    } else {
        const __mmask16 inside = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
        made.scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, chunk + 2 * g));
        if constexpr (kScales == Scales::affine)
            made.minimum = _mm512_fmadd_ps(_mm512_set1_ps(8.0f), made.scale,
                                           _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, chunk + 2 * (w.groups() + g))));
    }
    return made;
}

// Codes of x[c] * scale[c][g] in 8 bits, with one float a group; for 16 groups at a time. With many tokens a group's
// scales are widened once for all.
template <Scales kScales>
[[gnu::noinline]] void fold(const Zigzag& w, const Step& step, const Slice& slice, const float* const* value, int start,
                            int tokens, Folded& out, Ahead& pass) {
    float room[kStep];
    Ahead ahead = pass;  // a copy of its own stays in registers: stores into the tables might change the caller's
    for (int i = 0; i < slice.groups; i += 16) {
        const int g = slice.first_group + i;
        constexpr bool kMinima = kScales != Scales::symmetric;
        alignas(64) float scales[kStep][16], minima[kMinima ? kStep : 1][16];
        if (tokens > 1)
            for (int c = 0; c < kStep; c++) {
                const Sixteen of = sixteen<kScales>(w, step.chunk[c], g);
                _mm512_store_ps(scales[c], of.scale);
                if constexpr (kMinima) _mm512_store_ps(minima[c], of.minimum);
            }
        for (int t = 0; t < tokens; t++) {
            const float* x = step.of(value[t] + start, room);
            __m512 e[kStep];
            if (tokens > 1) {
#pragma GCC unroll 16
                for (int c = 0; c < kStep; c++) e[c] = _mm512_mul_ps(_mm512_load_ps(scales[c]), _mm512_set1_ps(x[c]));
            } else {
#pragma GCC unroll 16
                for (int c = 0; c < kStep; c++) {
                    const Sixteen of = sixteen<kScales>(w, step.chunk[c], g);
                    e[c] = _mm512_mul_ps(of.scale, _mm512_set1_ps(x[c]));
                    if constexpr (kMinima) _mm512_store_ps(minima[c], of.minimum);
                }
            }
            if constexpr (kMinima) {
                __m512 raised[4];
#pragma GCC unroll 16
                for (int c = 0; c < kStep; c++)
                    raised[c % 4] = _mm512_fmadd_ps(_mm512_set1_ps(x[c]), _mm512_load_ps(minima[c]),
                                                    c < 4 ? _mm512_setzero_ps() : raised[c % 4]);
                const __m512 sum = _mm512_add_ps(_mm512_add_ps(raised[0], raised[1]), _mm512_add_ps(raised[2], raised[3]));
                _mm512_store_ps(out.bias(t) + i, _mm512_add_ps(_mm512_load_ps(out.bias(t) + i), sum));
            }
            // A quarter of a step's lines: what the tables take of its time.
            fold_sixteen(e, out, t, i, ahead, t == 0 ? w.group / 32 : 0);
        }
    }
    pass = ahead;
}

// Four columns of 128 rows, interleaved: dword i of rows[u] holds one row's bytes of all four.
inline void interleave(const std::uint8_t* const* chunk, std::size_t at, __m512i (&rows)[4]) {
    const __m512i first = _mm512_loadu_si512(chunk[0] + at), second = _mm512_loadu_si512(chunk[1] + at);
    const __m512i third = _mm512_loadu_si512(chunk[2] + at), fourth = _mm512_loadu_si512(chunk[3] + at);
    const __m512i a = _mm512_unpacklo_epi8(first, second), b = _mm512_unpackhi_epi8(first, second);
    const __m512i c = _mm512_unpacklo_epi8(third, fourth), d = _mm512_unpackhi_epi8(third, fourth);
    rows[0] = _mm512_unpacklo_epi16(a, c);
    rows[1] = _mm512_unpackhi_epi16(a, c);
    rows[2] = _mm512_unpacklo_epi16(b, d);
    rows[3] = _mm512_unpackhi_epi16(b, d);
}

// Add sums of low nibbles and of whole bytes (low + 16 high) to 32 rows.
inline void add_sums(__m512i low, __m512i both, float scale, float* row) {
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(both, low), 4);
    const __m512 factor = _mm512_set1_ps(scale);
    _mm512_storeu_ps(row, _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), factor, _mm512_loadu_ps(row)));
    _mm512_storeu_ps(row + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), factor, _mm512_loadu_ps(row + 16)));
}

// One step's columns of a slice for one token: a quad's rows are used as soon as they are there. Not inlined: among the
// loops around it the compiler runs out of registers, and spilled columns cost half the speed.
template <int kGroup>
[[gnu::noinline]] void slice_times_one(const std::uint8_t* const* chunk, Ahead ahead, std::size_t at, int units,
                                       const std::int32_t* quad, int groups, float* y) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const auto* scale = reinterpret_cast<const float*>(quad + 4 * groups);
    const std::int32_t *minus8 = quad + 5 * groups, *minus136 = quad + 6 * groups;
    for (int i = 0; i < units; i++, at += 64, y += Zigzag::kUnitRows) {
        __m512i low[4], both[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            low[u] = _mm512_set1_epi32(minus8[(128 * i + 32 * u) / kGroup]);
            both[u] = _mm512_set1_epi32(minus136[(128 * i + 32 * u) / kGroup]);
        }
#pragma GCC unroll 4
        for (int q = 0; q < kStep / 4; q++) {
            if (q < 3) ahead.fetch(1);
            __m512i rows[4];
            interleave(chunk + 4 * q, at, rows);
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
                const __m512i codes = _mm512_set1_epi32(quad[q * groups + (128 * i + 32 * u) / kGroup]);
                both[u] = _mm512_dpbusd_epi32(both[u], rows[u], codes);
                low[u] = _mm512_dpbusd_epi32(low[u], _mm512_and_si512(rows[u], nibble), codes);
            }
        }
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) add_sums(low[u], both[u], scale[(128 * i + 32 * u) / kGroup], y + 32 * u);
    }
}

// The same for many tokens, which all use a unit's rows before the next unit is looked at.
template <int kGroup>
[[gnu::noinline]] void slice_times(const std::uint8_t* const* chunk, Ahead ahead, std::size_t at, int units,
                                   const std::int32_t* table, int groups, int tokens, float* y, std::ptrdiff_t stride) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int i = 0; i < units; i++, at += 64, y += Zigzag::kUnitRows) {
        ahead.fetch(3);
        __m512i rows[kStep / 4][4];
#pragma GCC unroll 4
        for (int q = 0; q < kStep / 4; q++) interleave(chunk + 4 * q, at, rows[q]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            __m512i lower[kStep / 4];
#pragma GCC unroll 4
            for (int q = 0; q < kStep / 4; q++) lower[q] = _mm512_and_si512(rows[q][u], nibble);
            const std::int32_t* quad = table + (128 * i + 32 * u) / kGroup;
            float* row = y + 32 * u;
            for (int t = 0; t < tokens; t++, row += stride, quad += 8 * groups) {
                __m512i low = _mm512_set1_epi32(quad[5 * groups]), both = _mm512_set1_epi32(quad[6 * groups]);
#pragma GCC unroll 4
                for (int q = 0; q < kStep / 4; q++) {
                    const __m512i codes = _mm512_set1_epi32(quad[q * groups]);
                    both = _mm512_dpbusd_epi32(both, rows[q][u], codes);
                    low = _mm512_dpbusd_epi32(low, lower[q], codes);
                }
                add_sums(low, both, reinterpret_cast<const float*>(quad)[4 * groups], row);
            }
        }
    }
}

template <Scales kScales, int kGroup>
void zigzag_times_as(const Zigzag& w, int tile, int first, int last, const std::int32_t* index,
                     const float* const* value, int tokens, int count, float* y, std::ptrdiff_t stride) {
    each_step<kScales, Folded>(
        w, tile, first, last, index, value, tokens, count, y, stride,
        [&](const Step& step, const Slice& slice, const float* const* x, int start, int n, Folded& folded, Ahead& ahead) {
            fold<kScales>(w, step, slice, x, start, n, folded, ahead);
        },
        [&](const Step& step, const Slice& slice, Folded& folded, int n, float* out, const Ahead& ahead) {
            const std::size_t at = w.scale_bytes() + 64 * slice.first;
            const int units = slice.last - slice.first;
            if (n == 1) slice_times_one<kGroup>(step.chunk, ahead, at, units, folded.table, slice.groups, out);
            else slice_times<kGroup>(step.chunk, ahead, at, units, folded.table, slice.groups, n, out, stride);
        });
}

void zigzag_times(const Zigzag& w, int tile, int first, int last, const std::int32_t* index, const float* const* value,
                  int tokens, int count, float* y, std::ptrdiff_t stride) {
    constexpr auto symmetric = Scales::symmetric, affine = Scales::affine;
    const bool plain = w.scales == symmetric;
    auto* run = w.scales == Scales::super ? zigzag_times_as<Scales::super, 32>
                : w.group == 32           ? (plain ? zigzag_times_as<symmetric, 32> : zigzag_times_as<affine, 32>)
                : w.group == 64           ? (plain ? zigzag_times_as<symmetric, 64> : zigzag_times_as<affine, 64>)
                                          : (plain ? zigzag_times_as<symmetric, 128> : zigzag_times_as<affine, 128>);
    run(w, tile, first, last, index, value, tokens, count, y, stride);
}

}  // namespace

const Kernels* kernels_avx512() {
    static const bool have = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    static const Kernels table = ops::with_lanes<Lanes>({.name = "avx512", .quantise = quantise,
                                                         .rows_times = rows_times, .trellis_times = trellis_times,
                                                         .collect = collect, .zigzag_times = zigzag_times});
    return have ? &table : nullptr;
}

}  // namespace pennyweight

#else

namespace pennyweight {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace pennyweight

#endif
