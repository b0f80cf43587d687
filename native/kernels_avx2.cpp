// AVX2 with FMA and F16C: every x86 of the last ten years. Compiled with those instructions; entered only where they are.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "trellis_times.h"
#include "vector_ops.h"
#include "zigzag_step.h"

namespace pennyweight {
namespace {

struct Lanes {
    static constexpr int kWidth = 8;
    __m256 v;
    static Lanes load(const float* x) { return {_mm256_loadu_ps(x)}; }
    static Lanes load_half(const std::uint16_t* x) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
    }
    static Lanes load_brain(const std::uint16_t* x) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
    }
    static Lanes broadcast(float x) { return {_mm256_set1_ps(x)}; }
    void store(float* x) const { _mm256_storeu_ps(x, v); }
    void store_half(std::uint16_t* x) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    void store_short(std::int16_t* x) const {
        const __m256i whole = _mm256_cvtps_epi32(v);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                         _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
    }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.v, b.v)}; }
    static Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.v, b.v)}; }
    static Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Lanes nearest(Lanes a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static Lanes times_two_to(Lanes a, Lanes n) {  // by the exponent: |n| <= 127, results normal
        const __m256i shift = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
        return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(shift))};
    }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    struct Pairs {
        __m256i v;
    };
    struct Sums {
        __m256i v;
    };
    static Pairs load_pairs(const std::int8_t* x) {
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
    }
    static Pairs load_alone(const std::int8_t* x) {
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
        return {_mm256_and_si256(wide, _mm256_set1_epi32(0xffff))};
    }
    static Pairs broadcast_pair(const std::int16_t* x) {
        std::int32_t two;
        std::memcpy(&two, x, 4);
        return {_mm256_set1_epi32(two)};
    }
    static Sums dot(Pairs a, Pairs b, Sums to) { return {_mm256_add_epi32(to.v, _mm256_madd_epi16(a.v, b.v))}; }
    static Lanes floats_of(Sums sums) { return {_mm256_cvtepi32_ps(sums.v)}; }
};

inline __m256 halves(const void* at, Half kind) {
    const __m128i raw = _mm_loadu_si128(static_cast<const __m128i*>(at));
    return kind == Half::float16 ? _mm256_cvtph_ps(raw)
                                 : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline __m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline float largest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline std::int32_t total_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

void quantise(const float* x, int n, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum) {
    for (int b = 0; b < n / Rows::kBlock; b++) {
        __m256 part[4], most = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            part[i] = _mm256_loadu_ps(x + 32 * b + 8 * i);
            most = _mm256_max_ps(most, magnitude(part[i]));
        }
        const float top = largest(most);
        const __m256 inverse = _mm256_set1_ps(top > 0 ? 127.0f / top : 0.0f);
        __m256i code[4], added = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], inverse));
            added = _mm256_add_epi32(added, code[i]);
        }
        // Packing works within halves of 128 bits; one permutation of dwords puts the 32 codes in order.
        const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * b), _mm256_permutevar8x32_epi32(words, order));
        const std::int32_t total = total_of(added);
        scale[b] = top * (1.0f / 127.0f);
        minus8[b] = -8 * total;
        sum[b] = scale[b] * float(total);
    }
}

// Codes of columns 4q to 4q + 3 in half a tile's rows, of a block in two planes; `at` is where the half's bytes begin.
template <int kBits>
inline __m256i quad_codes(const std::uint8_t* at, int q) {
    constexpr int kLow = Rows::low_bits(kBits), kHigh = kBits - kLow, kHighPlane = Rows::kTile * Rows::kBlock * kLow / 8;
    const auto plane = [&](const std::uint8_t* from, int bits, int place) {
        const __m256i unit = load(from + 64 * (q / (8 / bits)));
        const int by = bits * (q % (8 / bits)) - place;  // what the code's bits are above where they shall be
        const __m256i moved = by >= 0 ? _mm256_srli_epi16(unit, by) : _mm256_slli_epi16(unit, -by);
        return _mm256_and_si256(moved, _mm256_set1_epi8(char(((1 << bits) - 1) << place)));
    };
    return _mm256_or_si256(plane(at, kLow, 0), plane(at + kHighPlane, kHigh, kLow));
}

// kHalves times 8 rows, from the given half of a tile on, times kTokens tokens.
template <int kBits, bool kAffine, int kTokens, int kHalves>
[[gnu::noinline]] void halves_times(const Rows& w, const std::uint8_t* at, int half, const Activations* x, float* y,
                                    std::ptrdiff_t stride) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int blocks = w.group / Rows::kBlock, groups = w.groups();
    const std::size_t block_bytes = w.block_bytes(), tile_bytes = w.tile_bytes();
    // Eight halves are four tiles, read line by line in turn: four streams keep more of memory busy than one. Of one
    // tile, lines are asked for 4 KiB ahead, as the hardware's prefetcher stops at every page.
    const auto codes = [&](const std::uint8_t*& line, int h) {
        if (kHalves == 2 && h == 0) _mm_prefetch(reinterpret_cast<const char*>(line + 4096), _MM_HINT_T0);
        const __m256i unit = load(line + 32 * (half + h % 2));
        if (h % 2) line += tile_bytes;
        return unit;
    };
    __m256 out[kTokens][kHalves];
    for (auto& token : out)
        for (auto& o : token) o = _mm256_setzero_ps();
    int b = 0;
    for (int g = 0; g < groups; g++) {
        __m256 part[kTokens][kHalves];
        float sum[kTokens] = {};
        for (auto& token : part)
            for (auto& p : token) p = _mm256_setzero_ps();
        for (int end = b + blocks; b < end; b++, at += block_bytes) {
            __m256i exact[kTokens][kHalves];
            if constexpr (kBits == 4) {
                // Products of nibbles and bytes: eight times two of them stay below 2^15, so 16 bits hold a block.
                __m256i words[kTokens][kHalves];
                for (auto& token : words)
                    for (auto& word : token) word = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) {
                    const std::uint8_t* line = at + 64 * v;
#pragma GCC unroll 8
                    for (int h = 0; h < kHalves; h++) {
                        const __m256i unit = codes(line, h);
                        const __m256i low = _mm256_and_si256(unit, nibble);
                        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(unit, 4), nibble);
#pragma GCC unroll 4
                        for (int t = 0; t < kTokens; t++) {
                            const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                            const __m256i even = _mm256_maddubs_epi16(low, _mm256_set1_epi32(quad[2 * v]));
                            const __m256i odd = _mm256_maddubs_epi16(high, _mm256_set1_epi32(quad[2 * v + 1]));
                            words[t][h] = _mm256_add_epi16(words[t][h], _mm256_add_epi16(even, odd));
                        }
                    }
                }
                for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 8
                    for (int h = 0; h < kHalves; h++)
                        exact[t][h] = _mm256_add_epi32(_mm256_madd_epi16(words[t][h], ones),
                                                       _mm256_set1_epi32(kAffine ? 0 : x[t].minus8[b]));
            } else if constexpr (kBits != 8) {
                // Products of so many columns times four stay below 2^15: 8 of codes up to 7, 4 of 31, 2 of 63.
                constexpr int kTogether = kBits == 3 ? 8 : kBits == 5 ? 4 : 2;
#pragma GCC unroll 8
                for (int h = 0; h < kHalves; h++) {
                    const std::uint8_t* from = at + h / 2 * tile_bytes + 32 * (half + h % 2);
                    if (kHalves == 2) _mm_prefetch(reinterpret_cast<const char*>(from + 4096), _MM_HINT_T0);
                    for (int t = 0; t < kTokens; t++) {
                        const int minus8 = x[t].minus8[b];
                        exact[t][h] = _mm256_set1_epi32(kAffine ? 0 : kBits == 3 ? minus8 / 2 : minus8 << (kBits - 4));
                    }
#pragma GCC unroll 8
                    for (int start = 0; start < 8; start += kTogether) {
                        __m256i words[kTokens];
                        for (auto& word : words) word = _mm256_setzero_si256();
#pragma GCC unroll 8
                        for (int q = start; q < start + kTogether; q++) {
                            const __m256i unit = quad_codes<kBits>(from, q);
#pragma GCC unroll 4
                            for (int t = 0; t < kTokens; t++) {
                                const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                                words[t] = _mm256_add_epi16(words[t], _mm256_maddubs_epi16(unit, _mm256_set1_epi32(quad[q])));
                            }
                        }
                        for (int t = 0; t < kTokens; t++)
                            exact[t][h] = _mm256_add_epi32(exact[t][h], _mm256_madd_epi16(words[t], ones));
                    }
                }
            } else {
                // Codes less their offset, at most 128 in size: two products with at most 127 each stay below 2^15.
                for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 8
                    for (int h = 0; h < kHalves; h++) exact[t][h] = _mm256_set1_epi32(kAffine ? -16 * x[t].minus8[b] : 0);
#pragma GCC unroll 8
                for (int v = 0; v < 8; v++) {
                    const std::uint8_t* line = at + 64 * v;
#pragma GCC unroll 8
                    for (int h = 0; h < kHalves; h++) {
                        const __m256i unit = _mm256_xor_si256(codes(line, h), _mm256_set1_epi8(-128));
                        const __m256i size = _mm256_abs_epi8(unit);
#pragma GCC unroll 4
                        for (int t = 0; t < kTokens; t++) {
                            const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                            const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(quad[v]), unit));
                            exact[t][h] = _mm256_add_epi32(exact[t][h], _mm256_madd_epi16(two, ones));
                        }
                    }
                }
            }
            for (int t = 0; t < kTokens; t++) {
#pragma GCC unroll 8
                for (int h = 0; h < kHalves; h++)
                    part[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[t][h]), _mm256_set1_ps(x[t].scale[b]), part[t][h]);
                if constexpr (kAffine) sum[t] += x[t].sum[b];
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHalves; h++) {
            const std::uint8_t* scales = at + h / 2 * tile_bytes + 16 * (half + h % 2);
            const __m256 scale = halves(scales, w.half);
            for (int t = 0; t < kTokens; t++) out[t][h] = _mm256_fmadd_ps(part[t][h], scale, out[t][h]);
            if constexpr (kAffine) {
                const __m256 minimum = halves(scales + 2 * Rows::kTile, w.half);
                for (int t = 0; t < kTokens; t++) out[t][h] = _mm256_fmadd_ps(_mm256_set1_ps(sum[t]), minimum, out[t][h]);
            }
        }
        at += (kAffine ? 4 : 2) * Rows::kTile;
    }
    for (int t = 0; t < kTokens; t++)
        for (int h = 0; h < kHalves; h++) _mm256_storeu_ps(y + t * stride + 8 * h, out[t][h]);
}

// Four tokens take half a tile at a time, for the registers' sake; one takes four tiles, as memory is read fastest.
template <int kBits, bool kAffine>
void rows_times_as(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    const int fours = count / 4 * 4;
    for (int tile = first; tile < last;) {
        const int tiles = count > fours && tile + 4 <= last ? 4 : 1;
        const std::uint8_t* at = w.data + tile * w.tile_bytes();
        float* to = y + (tile - first) * Rows::kTile;
        for (int half = 0; half < 2 * tiles; half++)
            for (int t = 0; t < fours; t += 4)
                halves_times<kBits, kAffine, 4, 1>(w, at + half / 2 * w.tile_bytes(), half % 2, x + t,
                                                   to + t * stride + 8 * half, stride);
        for (int t = fours; t < count; t++)
            (tiles == 4 ? halves_times<kBits, kAffine, 1, 8> : halves_times<kBits, kAffine, 1, 2>)(
                w, at, 0, x + t, to + t * stride, stride);
        tile += tiles;
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

// Trellis codes: eight rows of two columns to a register.
struct TrellisOps {
    static constexpr int kRows = 8;
    using Floats = __m256;
    struct Sums {
        __m256i v = _mm256_setzero_si256();
    };

    template <int kBits>
    struct Code {
        static constexpr TrellisLanes<kBits> kLanes{};
        const __m256i byte = load(kLanes.byte), mask = load(kLanes.mask), factor = load(kLanes.factor);

        __m256i values(const std::uint8_t* at) const {
            const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            const __m256i state = _mm256_and_si256(_mm256_shuffle_epi8(raw, byte), mask);
            const __m256i t = _mm256_add_epi16(_mm256_mullo_epi16(state, factor), _mm256_set1_epi16(kLanes.kHalf));
            const __m256i two = _mm256_mulhrs_epi16(t, t), four = _mm256_mulhrs_epi16(two, two);
            __m256i even = _mm256_mulhrs_epi16(four, four);
            if constexpr (kLanes.kThirteen) even = _mm256_mulhrs_epi16(even, four);
            return _mm256_mulhrs_epi16(t, _mm256_avg_epu16(even, _mm256_set1_epi16(32767)));
        }
    };

    static void add(Sums& sums, __m256i values, std::int32_t pair) {
        sums.v = _mm256_add_epi32(sums.v, _mm256_madd_epi16(values, _mm256_set1_epi32(pair)));
    }
    static void widen(const std::int8_t* codes, std::int16_t* to) {
        for (int i = 0; i < Rows::kBlock; i += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(bytes));
        }
    }
    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats fma(Sums sums, float by, Floats to) {
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.v), _mm256_set1_ps(by), to);
    }
    static Floats fma(Floats part, const std::uint8_t* scale, Floats to) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale));
        return _mm256_fmadd_ps(part, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), to);
    }
    static void store(Floats v, const std::uint8_t* factor, float* to) {
        _mm256_storeu_ps(to, _mm256_mul_ps(v, _mm256_castsi256_ps(load(factor))));
    }
};

void trellis_times(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    trellis_times_with<TrellisOps>(w, x, count, y, stride, first, last);
}

// What stands in for a compress instruction: for each set of lanes, their numbers from the lowest on.
struct Lowest {
    alignas(32) std::int32_t lane[256][8] = {};

    constexpr Lowest() {
        for (int set = 0; set < 256; set++)
            for (int i = 0, at = 0; i < 8; i++)
                if (set >> i & 1) lane[set][at++] = i;
    }
};

int collect(const float* x, const float* weight, float threshold, int n, std::int32_t* index, float* value) {
    static constexpr Lowest lowest;
    const __m256 bound = _mm256_set1_ps(threshold);
    __m256i here = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int found = 0, j = 0;
    for (; j + 8 <= n; j += 8) {
        const __m256 v = _mm256_loadu_ps(x + j);
        __m256 size = magnitude(v);
        if (weight) size = _mm256_mul_ps(size, _mm256_loadu_ps(weight + j));
        const int keep = _mm256_movemask_ps(_mm256_cmp_ps(size, bound, _CMP_GT_OQ));
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(lowest.lane[keep]));
        // Stored whole: hence the room for 16 more.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + found), _mm256_permutevar8x32_epi32(here, order));
        _mm256_storeu_ps(value + found, _mm256_permutevar8x32_ps(v, order));
        found += __builtin_popcount(keep);
        here = _mm256_add_epi32(here, _mm256_set1_epi32(8));
    }
    for (; j < n; j++) {
        const float size = weight ? std::fabs(x[j]) * weight[j] : std::fabs(x[j]);
        index[found] = j;
        value[found] = x[j];
        found += size > threshold;
    }
    return found;
}

// Scales of 8 groups and, unless symmetric, their minima, raised by 8 scales as codes count from 8.
struct Eight {
    __m256 scale, minimum;
};

// Of groups g to g + 7 of a column the first `inside`, the others zero.
template <Scales kScales>
inline Eight eight(const Zigzag& w, const std::uint8_t* chunk, int g, int inside) {
    Eight made{_mm256_setzero_ps(), _mm256_setzero_ps()};
    if constexpr (kScales == Scales::super) {
        if (!inside) return made;
        // The words of Super's constructor, all at once.
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk + 2 * g));
        const __m128i pairs = _mm_shuffle_epi32(words, 0b10100101), last = _mm_shuffle_epi32(words, 0b11111111);
        const __m128i low = _mm_and_si128(pairs, _mm_set1_epi64x(0x3f3f3f3f));
        const __m128i two = _mm_and_si128(_mm_srli_epi32(pairs, 2), _mm_set1_epi64x(0x30303030ll << 32));
        const __m128i four =
            _mm_and_si128(_mm_srlv_epi32(last, _mm_setr_epi32(0, 0, 0, 4)), _mm_set1_epi64x(0x0f0f0f0fll << 32));
        const __m128i sixes = _mm_or_si128(low, _mm_or_si128(two, four));
        const __m128 factors = _mm_cvtph_ps(words);
        made.scale = _mm256_mul_ps(_mm256_broadcastss_ps(factors), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(sixes)));
        const __m256 m = _mm256_mul_ps(_mm256_broadcastss_ps(_mm_movehdup_ps(factors)),
                                       _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(sixes, 8))));
        made.minimum = _mm256_fmsub_ps(_mm256_set1_ps(8.0f), made.scale, m);
    } else {
        const auto halves = [&](const std::uint8_t* at) {
            if (inside == 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            alignas(16) std::uint16_t few[8] = {};
            std::memcpy(few, at, 2 * inside);
            return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(few)));
        };
        made.scale = halves(chunk + 2 * g);
        if constexpr (kScales == Scales::affine)
            made.minimum = _mm256_fmadd_ps(_mm256_set1_ps(8.0f), made.scale, halves(chunk + 2 * (w.groups() + g)));
    }
    return made;
}

// What activations times scales become, as PMADDUBSW wants it: it multiplies two columns at a time, so codes come in pairs
// of columns, and sums of a step's sixteen fit 16 bits: 16 products of at most 15 * 127 while offsets are in, and of at
// most 8 * 127 without.
struct Pairs {
    static constexpr int kPairs = kStep / 2;
    int groups = 0;  // of each token
    // Of a group: every token's codes, each pair of columns twice. So one address does for all that a product needs.
    alignas(64) std::int32_t codes[kPairs * kMaxGroups];
    // Of a token: for every group the scale divided by 2^16, -8 times the sum of the codes in 16 bits, twice, and what
    // minima add.
    alignas(64) std::int32_t rest[3 * kMaxGroups];

    float* scale(int t) { return reinterpret_cast<float*>(rest + 3 * t * groups); }
    std::int32_t* minus8(int t) { return rest + (3 * t + 1) * groups; }
    float* bias(int t) { return reinterpret_cast<float*>(rest + (3 * t + 2) * groups); }
};

// Codes of x[c] * scale[c][g] in 8 bits, with one float a group, for groups i to i + 7 of a slice, `inside` of which are
// the tile's.
template <Scales kScales>
[[gnu::always_inline]] inline void fold_eight(const Zigzag& w, const Step& step, const Slice& slice,
                                              const float* const* value, int start, int tokens, int i, int inside,
                                              Pairs& out) {
    float room[kStep];
    constexpr bool kMinima = kScales != Scales::symmetric;
    __m256 scales[kStep], minima[kMinima ? kStep : 1];
    if (tokens > 1)  // widened once for all
        for (int c = 0; c < kStep; c++) {
            const Eight of = eight<kScales>(w, step.chunk[c], slice.first_group + i, inside);
            scales[c] = of.scale;
            if constexpr (kMinima) minima[c] = of.minimum;
        }
    for (int t = 0; t < tokens; t++) {
        const float* x = step.of(value[t] + start, room);
        __m256 e[kStep], most = _mm256_setzero_ps();
        for (int c = 0; c < kStep; c++) {
            if (tokens > 1) {
                e[c] = _mm256_mul_ps(scales[c], _mm256_set1_ps(x[c]));
            } else {
                const Eight of = eight<kScales>(w, step.chunk[c], slice.first_group + i, inside);
                e[c] = _mm256_mul_ps(of.scale, _mm256_set1_ps(x[c]));
                if constexpr (kMinima) minima[c] = of.minimum;
            }
            most = _mm256_max_ps(most, magnitude(e[c]));
        }
        if constexpr (kMinima) {
            __m256 raised[4];
            for (int c = 0; c < kStep; c++)
                raised[c % 4] = _mm256_fmadd_ps(_mm256_set1_ps(x[c]), minima[c], c < 4 ? _mm256_setzero_ps() : raised[c % 4]);
            const __m256 sum = _mm256_add_ps(_mm256_add_ps(raised[0], raised[1]), _mm256_add_ps(raised[2], raised[3]));
            _mm256_store_ps(out.bias(t) + i, _mm256_add_ps(_mm256_load_ps(out.bias(t) + i), sum));
        }
        const __m256 some = _mm256_cmp_ps(most, _mm256_setzero_ps(), _CMP_GT_OQ);
        const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(127.0f), most));
        const __m256 scale = _mm256_mul_ps(most, _mm256_set1_ps(1.0f / 127.0f));
        _mm256_store_ps(out.scale(t) + i, _mm256_mul_ps(scale, _mm256_set1_ps(1.0f / 65536)));
        // Each lane of 128 bits has four of the groups: their codes of four columns, dword by dword.
        const __m256i transpose = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        __m256i quad[kStep / 4], sums = _mm256_setzero_si256();
        for (int q = 0; q < kStep / 4; q++) {
            __m256i code[4];
            for (int c = 0; c < 4; c++) code[c] = _mm256_cvtps_epi32(_mm256_mul_ps(e[4 * q + c], inverse));
            const __m256i packed =
                _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
            quad[q] = _mm256_shuffle_epi8(packed, transpose);
            sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(8), quad[q]));
        }
        const __m256i minus8 = _mm256_madd_epi16(sums, _mm256_set1_epi16(-1));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.minus8(t) + i),
                           _mm256_blend_epi16(minus8, _mm256_slli_epi32(minus8, 16), 0b10101010));
        // All sixteen columns of a group side by side, then every pair twice.
        const __m256i a = _mm256_unpacklo_epi32(quad[0], quad[1]), b = _mm256_unpackhi_epi32(quad[0], quad[1]);
        const __m256i c = _mm256_unpacklo_epi32(quad[2], quad[3]), d = _mm256_unpackhi_epi32(quad[2], quad[3]);
        const __m256i sixteen[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                    _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
        for (int g = 0; g < 4; g++) {
            const __m256i low = _mm256_unpacklo_epi16(sixteen[g], sixteen[g]);
            const __m256i high = _mm256_unpackhi_epi16(sixteen[g], sixteen[g]);
            auto* to = reinterpret_cast<__m128i*>(out.codes + Pairs::kPairs * ((i + g) * tokens + t));
            _mm_store_si128(to, _mm256_castsi256_si128(low));
            _mm_store_si128(to + 1, _mm256_castsi256_si128(high));
            to += Pairs::kPairs * tokens;  // four groups further: 4 * 8 dwords of 4 to a register
            _mm_store_si128(to, _mm256_extracti128_si256(low, 1));
            _mm_store_si128(to + 1, _mm256_extracti128_si256(high, 1));
        }
    }
}

// Where the compiler is told that eight groups are inside and that there is one token, it does not ask column by column.
template <Scales kScales>
[[gnu::noinline]] void fold(const Zigzag& w, const Step& step, const Slice& slice, const float* const* value, int start,
                            int tokens, Pairs& out) {
    const int groups = w.groups() - slice.first_group;
    for (int i = 0; i < out.groups; i += 8) {
        if (i + 8 <= groups && tokens == 1) fold_eight<kScales>(w, step, slice, value, start, 1, i, 8, out);
        else fold_eight<kScales>(w, step, slice, value, start, tokens, i, std::clamp(groups - i, 0, 8), out);
    }
}

// What each of the 16 rows of 16 bits in half a register of bytes takes of a table with `stride` dwords from group to
// group: of a unit, rows r to r + 31 and the 32 that follow lie side by side in every quarter.
template <int kGroup>
inline __m256i entry(const std::int32_t* at, int stride) {
    const __m256i one = _mm256_set1_epi32(*at);
    return kGroup > 32 ? one : _mm256_blend_epi32(one, _mm256_set1_epi32(at[stride]), 0b11001100);
}

// Adds the sums of 16 rows to those of y: rows r to r + 7, and 32 further down.
template <int kGroup>
inline void add_sums(__m256i sums, const float* scale, float* y) {
    // Into the upper halves of 32 bits, which the scale makes up for: exact, and cheaper than widening them.
    const __m256 first = _mm256_cvtepi32_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), sums));
    const __m256 second = _mm256_cvtepi32_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), sums));
    _mm256_storeu_ps(y, _mm256_fmadd_ps(first, _mm256_set1_ps(scale[0]), _mm256_loadu_ps(y)));
    _mm256_storeu_ps(y + 32, _mm256_fmadd_ps(second, _mm256_set1_ps(scale[kGroup > 32 ? 0 : 1]), _mm256_loadu_ps(y + 32)));
}

// From so many units on, 3 KiB, hardware prefetchers are worth having: they follow columns once they have seen a few lines.
constexpr int kLongSlice = 48;

// One step's columns of a slice for one token. Lines of short slices are asked for a step ahead, as no prefetcher gets
// going in them. In long slices that would be twice the streams it can follow: there four units ahead.
template <int kGroup, bool kLong>
[[gnu::noinline]] void slice_times_one(const Step& step, std::size_t at, int units, Pairs& folded, float* y) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const std::size_t start = at;
    for (int i = 0; i < units; i++, at += 64, y += Zigzag::kUnitRows) {
        // Where the next columns begin once more, one of them at a time.
        if (const int c = i - (units - kStep - 4); c >= 0 && c < kStep)
            for (int line = -2; line <= 0; line++)
                _mm_prefetch(reinterpret_cast<const char*>(step.next[c] + start) + 64 * line, _MM_HINT_T1);
        constexpr int kAhead = 4;
        const bool inside = kLong && i + kAhead < units;
        const std::uint8_t* const* from = inside ? step.chunk : step.next;
        const std::size_t ahead = kLong ? at + 64 * kAhead - (inside ? 0 : 64 * std::size_t(units)) : at;
        const int g = Zigzag::kUnitRows * i / kGroup, next = kGroup < 128 ? 64 / kGroup : 0;  // of the last 64 rows
        const std::int32_t *codes = folded.codes + Pairs::kPairs * g, *minus8 = folded.minus8(0) + g;
        // Sums of low nibbles and of high ones, 16 rows further down, of the first 64 rows and of the last.
        __m256i low[2][2], high[2][2];
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++)
            low[0][side] = high[0][side] = low[1][side] = high[1][side] = entry<kGroup>(minus8 + side * next, 1);
#pragma GCC unroll 8
        for (int p = 0; p < Pairs::kPairs; p++) {
            for (int c = 0; c < 2; c++)
                _mm_prefetch(reinterpret_cast<const char*>(from[2 * p + c] + ahead), kLong ? _MM_HINT_T0 : _MM_HINT_T1);
            const std::uint8_t *one = step.chunk[2 * p] + at, *two = step.chunk[2 * p + 1] + at;
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++) {
                const __m256i pair = entry<kGroup>(codes + Pairs::kPairs * side * next + p, Pairs::kPairs);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m256i first = load(one + 32 * half), second = load(two + 32 * half);
                    const __m256i rows = side ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
                    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(rows, 4), nibble);
                    low[half][side] = _mm256_add_epi16(low[half][side], _mm256_maddubs_epi16(_mm256_and_si256(rows, nibble), pair));
                    high[half][side] = _mm256_add_epi16(high[half][side], _mm256_maddubs_epi16(upper, pair));
                }
            }
        }
        const float* scale = folded.scale(0) + g;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++) {
                add_sums<kGroup>(low[half][side], scale + side * next, y + 64 * side + 8 * half);
                add_sums<kGroup>(high[half][side], scale + side * next, y + 64 * side + 8 * half + 16);
            }
    }
}

// Half of 64 rows times kTokens tokens, whose tables begin at token t.
template <int kGroup, int kTokens>
[[gnu::noinline]] void rows_times_tokens(const __m256i (&rows)[Pairs::kPairs][2], Pairs& folded, int tokens, int t, int g, float* y,
                              std::ptrdiff_t stride) {
    const std::int32_t* codes = folded.codes + Pairs::kPairs * (g * tokens + t);
    __m256i low[kTokens], high[kTokens];
#pragma GCC unroll 6
    for (int i = 0; i < kTokens; i++) low[i] = high[i] = entry<kGroup>(folded.minus8(t + i) + g, 1);
#pragma GCC unroll 8
    for (int p = 0; p < Pairs::kPairs; p++) {
        const __m256i lower = rows[p][0], upper = rows[p][1];
#pragma GCC unroll 6
        for (int i = 0; i < kTokens; i++) {
            const __m256i pair = entry<kGroup>(codes + Pairs::kPairs * i + p, Pairs::kPairs * tokens);
            low[i] = _mm256_add_epi16(low[i], _mm256_maddubs_epi16(lower, pair));
            high[i] = _mm256_add_epi16(high[i], _mm256_maddubs_epi16(upper, pair));
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTokens; i++) {
        add_sums<kGroup>(low[i], folded.scale(t + i) + g, y + i * stride);
        add_sums<kGroup>(high[i], folded.scale(t + i) + g, y + i * stride + 16);
    }
}

// One step's columns of a slice for a few tokens, which all use half a unit's rows before the next are looked at.
template <int kGroup>
[[gnu::noinline]] void slice_times(const Step& step, std::size_t at, int units, Pairs& folded, int tokens, float* y,
                                   std::ptrdiff_t stride) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int i = 0; i < units; i++, at += 64, y += Zigzag::kUnitRows)
        for (int half = 0; half < 2; half++) {
            __m256i rows[2][Pairs::kPairs][2];
            for (int p = 0; p < Pairs::kPairs; p++) {
                if (half == 0)
                    for (int c = 0; c < 2; c++)
                        _mm_prefetch(reinterpret_cast<const char*>(step.next[2 * p + c] + at), _MM_HINT_T1);
                const __m256i first = load(step.chunk[2 * p] + at + 32 * half);
                const __m256i second = load(step.chunk[2 * p + 1] + at + 32 * half);
                for (int side = 0; side < 2; side++) {
                    const __m256i both = side ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
                    rows[side][p][0] = _mm256_and_si256(both, nibble);
                    rows[side][p][1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                }
            }
            for (int side = 0; side < 2; side++) {
                const int g = (Zigzag::kUnitRows * i + 64 * side) / kGroup;
                float* to = y + 64 * side + 8 * half;
                int t = 0;
                for (; t + 6 <= tokens; t += 6)
                    rows_times_tokens<kGroup, 6>(rows[side], folded, tokens, t, g, to + t * stride, stride);
                for (; t + 3 <= tokens; t += 3)
                    rows_times_tokens<kGroup, 3>(rows[side], folded, tokens, t, g, to + t * stride, stride);
                for (; t < tokens; t++)
                    rows_times_tokens<kGroup, 1>(rows[side], folded, tokens, t, g, to + t * stride, stride);
            }
        }
}

template <Scales kScales, int kGroup>
void zigzag_times_as(const Zigzag& w, int tile, int first, int last, const std::int32_t* index,
                     const float* const* value, int tokens, int count, float* y, std::ptrdiff_t stride) {
    each_step<kScales, Pairs>(
        w, tile, first, last, index, value, tokens, count, y, stride,
        [&](const Step& step, const Slice& slice, const float* const* x, int start, int n, Pairs& folded, Ahead&) {
            fold<kScales>(w, step, slice, x, start, n, folded);
        },
        [&](const Step& step, const Slice& slice, Pairs& folded, int n, float* out, const Ahead&) {
            const std::size_t at = w.scale_bytes() + 64 * slice.first;
            const int units = slice.last - slice.first;
            if (n == 1) (units < kLongSlice ? slice_times_one<kGroup, false> : slice_times_one<kGroup, true>)(step, at, units, folded, out);
            else slice_times<kGroup>(step, at, units, folded, n, out, stride);
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

const Kernels* kernels_avx2() {
    static const bool have =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    static const Kernels table = ops::with_lanes<Lanes>({.name = "avx2", .quantise = quantise,
                                                         .rows_times = rows_times, .trellis_times = trellis_times,
                                                         .collect = collect, .zigzag_times = zigzag_times});
    return have ? &table : nullptr;
}

}  // namespace pennyweight

#else

namespace pennyweight {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace pennyweight

#endif
