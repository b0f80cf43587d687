// AVX2 with FMA and F16C: every x86 of the last ten years. Compiled with those instructions; entered only where they are.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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
    static Lanes load_fp8(const std::uint8_t* x) {
        const __m128i raw = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
        const __m128i sign = _mm_slli_epi16(_mm_and_si128(raw, _mm_set1_epi16(0x80)), 8);
        const __m128i rest = _mm_slli_epi16(_mm_and_si128(raw, _mm_set1_epi16(0x7f)), 7);
        return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f))};
    }
    static Lanes broadcast(float x) { return {_mm256_set1_ps(x)}; }
    void store(float* x) const { _mm256_storeu_ps(x, v); }
    void store_half(std::uint16_t* x) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
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

// Rows 8 half to 8 half + 7 of a tile times `kTokens` tokens.
template <int kBits, bool kAffine, int kTokens>
inline void half_tile_times(const Rows& w, const std::uint8_t* at, int half, const Activations* x, float* y,
                            std::ptrdiff_t stride) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int blocks = w.group / Rows::kBlock, groups = w.groups();
    const std::size_t block_bytes = w.block_bytes();
    __m256 out[kTokens];
    for (auto& o : out) o = _mm256_setzero_ps();
    int b = 0;
    for (int g = 0; g < groups; g++) {
        __m256 part[kTokens];
        float sum[kTokens] = {};
        for (auto& p : part) p = _mm256_setzero_ps();
        for (int end = b + blocks; b < end; b++, at += block_bytes) {
            __m256i exact[kTokens];
            if constexpr (kBits == 4) {
                // Products of nibbles and bytes: eight times two of them stay below 2^15, so 16 bits hold a block.
                __m256i words[kTokens];
                for (auto& word : words) word = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) {
                    const __m256i unit = load(at + 64 * v + 32 * half);
                    const __m256i low = _mm256_and_si256(unit, nibble);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(unit, 4), nibble);
#pragma GCC unroll 4
                    for (int t = 0; t < kTokens; t++) {
                        const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                        const __m256i even = _mm256_maddubs_epi16(low, _mm256_set1_epi32(quad[2 * v]));
                        const __m256i odd = _mm256_maddubs_epi16(high, _mm256_set1_epi32(quad[2 * v + 1]));
                        words[t] = _mm256_add_epi16(words[t], _mm256_add_epi16(even, odd));
                    }
                }
                for (int t = 0; t < kTokens; t++)
                    exact[t] = _mm256_add_epi32(_mm256_madd_epi16(words[t], ones),
                                                _mm256_set1_epi32(kAffine ? 0 : x[t].minus8[b]));
            } else {
                // Products of whole bytes need 32 bits for two of them: words of 16 bits, four rows at a time.
                __m256i front[kTokens], back[kTokens];
                for (int t = 0; t < kTokens; t++) front[t] = back[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
                for (int v = 0; v < 8; v++) {
                    const __m256i unit = load(at + 64 * v + 32 * half);
                    const __m256i first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(unit));
                    const __m256i second = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(unit, 1));
                    for (int t = 0; t < kTokens; t++) {
                        const auto* quad = reinterpret_cast<const std::int32_t*>(x[t].codes + 32 * b);
                        const __m256i four = _mm256_cvtepi8_epi16(_mm_set1_epi32(quad[v]));
                        front[t] = _mm256_add_epi32(front[t], _mm256_madd_epi16(first, four));
                        back[t] = _mm256_add_epi32(back[t], _mm256_madd_epi16(second, four));
                    }
                }
                for (int t = 0; t < kTokens; t++)
                    exact[t] = _mm256_add_epi32(
                        _mm256_permute4x64_epi64(_mm256_hadd_epi32(front[t], back[t]), 0xd8),
                        _mm256_set1_epi32(kAffine ? 0 : 16 * x[t].minus8[b]));
            }
            for (int t = 0; t < kTokens; t++) {
                part[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[t]), _mm256_set1_ps(x[t].scale[b]), part[t]);
                if constexpr (kAffine) sum[t] += x[t].sum[b];
            }
        }
        const __m256 scale = halves(at + 16 * half, w.half);
        for (int t = 0; t < kTokens; t++) out[t] = _mm256_fmadd_ps(part[t], scale, out[t]);
        at += 2 * Rows::kTile;
        if constexpr (kAffine) {
            const __m256 minimum = halves(at + 16 * half, w.half);
            for (int t = 0; t < kTokens; t++) out[t] = _mm256_fmadd_ps(_mm256_set1_ps(sum[t]), minimum, out[t]);
            at += 2 * Rows::kTile;
        }
    }
    for (int t = 0; t < kTokens; t++) _mm256_storeu_ps(y + t * stride, out[t]);
}

template <int kBits, bool kAffine>
void rows_times_as(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    for (int tile = first; tile < last; tile++) {
        const std::uint8_t* at = w.data + tile * w.tile_bytes();
        for (int half = 0; half < 2; half++) {
            float* to = y + (tile - first) * Rows::kTile + 8 * half;
            int t = 0;
            for (; t + 4 <= count; t += 4) half_tile_times<kBits, kAffine, 4>(w, at, half, x + t, to + t * stride, stride);
            for (; t < count; t++) half_tile_times<kBits, kAffine, 1>(w, at, half, x + t, to + t * stride, stride);
        }
    }
}

void rows_times(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first, int last) {
    auto* run = w.bits == 4 ? (w.affine ? rows_times_as<4, true> : rows_times_as<4, false>)
                            : (w.affine ? rows_times_as<8, true> : rows_times_as<8, false>);
    run(w, x, count, y, stride, first, last);
}

// Without a compress instruction: written always, the place moves on only if the column is kept.
int collect(const float* x, const float* weight, float threshold, int n, std::int32_t* index, float* value) {
    int found = 0;
    for (int j = 0; j < n; j++) {
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

// Of groups g to g + 7 of a column, those beyond the tile's last zero.
template <Scales kScales>
inline Eight eight(const Zigzag& w, const std::uint8_t* chunk, int g) {
    const int inside = std::clamp(w.groups() - g, 0, 8);
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

// Codes of x[c] * scale[c][g] in 8 bits, with one float a group; eight groups at a time.
template <Scales kScales>
inline void fold(const Zigzag& w, const Step& step, const Slice& slice, const float* const* value, int start, int tokens,
                 Folded& out) {
    float room[kStep];
    for (int i = 0; i < slice.groups; i += 8) {
        constexpr bool kMinima = kScales != Scales::symmetric;
        __m256 scales[kStep], minima[kMinima ? kStep : 1];
        for (int c = 0; c < kStep; c++) {
            const Eight of = eight<kScales>(w, step.chunk[c], slice.first_group + i);
            scales[c] = of.scale;
            if constexpr (kMinima) minima[c] = of.minimum;
        }
        for (int t = 0; t < tokens; t++) {
            const float* x = step.of(value[t] + start, room);
            __m256 e[kStep], most = _mm256_setzero_ps();
            for (int c = 0; c < kStep; c++) {
                e[c] = _mm256_mul_ps(scales[c], _mm256_set1_ps(x[c]));
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
            _mm256_store_ps(out.scale(t) + i, _mm256_mul_ps(most, _mm256_set1_ps(1.0f / 127.0f)));
            __m256i total = _mm256_setzero_si256();
            const __m256i byte = _mm256_set1_epi32(255);
            for (int q = 0; q < kStep / 4; q++) {
                __m256i four = _mm256_setzero_si256();
                for (int c = 3; c >= 0; c--) {
                    const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(e[4 * q + c], inverse));
                    total = _mm256_add_epi32(total, code);
                    four = _mm256_or_si256(_mm256_slli_epi32(four, 8), _mm256_and_si256(code, byte));
                }
                _mm256_store_si256(reinterpret_cast<__m256i*>(out.quad(t, q) + i), four);
            }
            _mm256_store_si256(reinterpret_cast<__m256i*>(out.minus8(t) + i),
                               _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(total, 3)));
        }
    }
}

// One step's columns of a slice, for all tokens. Sums of nibbles times codes stay in 16 bits: four quads of two products
// of at most 15 * 127.
template <bool kOne>
inline void slice_times(const Step& step, const Slice& slice, int group, std::size_t scale_bytes, Folded& folded,
                        int tokens, float* y, std::ptrdiff_t stride) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int unit = slice.first; unit < slice.last; unit++)
        for (int half = 0; half < 2; half++) {  // lanes 2 half and 2 half + 1: rows 8 half .. 8 half + 7 of 16
            const std::size_t at = scale_bytes + 64 * unit + 32 * half;
            __m256i rows[kStep / 4][4];
            for (int q = 0; q < kStep / 4; q++) {
                __m256i column[4];
                for (int c = 0; c < 4; c++) {
                    if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(step.next[4 * q + c] + at), _MM_HINT_T1);
                    column[c] = load(step.chunk[4 * q + c] + at);
                }
                const __m256i a = _mm256_unpacklo_epi8(column[0], column[1]);
                const __m256i b = _mm256_unpackhi_epi8(column[0], column[1]);
                const __m256i c = _mm256_unpacklo_epi8(column[2], column[3]);
                const __m256i d = _mm256_unpackhi_epi8(column[2], column[3]);
                rows[q][0] = _mm256_unpacklo_epi16(a, c);
                rows[q][1] = _mm256_unpackhi_epi16(a, c);
                rows[q][2] = _mm256_unpacklo_epi16(b, d);
                rows[q][3] = _mm256_unpackhi_epi16(b, d);
            }
            for (int u = 0; u < 4; u++) {
                const int g = (128 * (unit - slice.first) + 32 * u) / group;
                __m256i lower[kStep / 4], upper[kStep / 4];
                for (int q = 0; q < kStep / 4; q++) {
                    lower[q] = _mm256_and_si256(rows[q][u], nibble);
                    upper[q] = _mm256_and_si256(_mm256_srli_epi16(rows[q][u], 4), nibble);
                }
                float* row = y + 128 * (unit - slice.first) + 32 * u + 8 * half;
                for (int t = 0; t < (kOne ? 1 : tokens); t++, row += stride) {
                    __m256i low = _mm256_setzero_si256(), high = low;
                    for (int q = 0; q < kStep / 4; q++) {
                        const __m256i codes = _mm256_set1_epi32(folded.quad(t, q)[g]);
                        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(lower[q], codes));
                        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper[q], codes));
                    }
                    const __m256i minus8 = _mm256_set1_epi32(folded.minus8(t)[g]);
                    const __m256 scale = _mm256_set1_ps(folded.scale(t)[g]);
                    for (int up = 0; up < 2; up++) {
                        const __m256i sum = _mm256_madd_epi16(up ? high : low, ones);
                        const __m256 exact = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, minus8));
                        float* to = row + 16 * up;
                        _mm256_storeu_ps(to, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(to)));
                    }
                }
            }
        }
}

template <Scales kScales>
void zigzag_times_as(const Zigzag& w, int tile, int first, int last, const std::int32_t* index,
                     const float* const* value, int tokens, int count, float* y, std::ptrdiff_t stride) {
    each_step<kScales>(
        w, tile, first, last, index, value, tokens, count, y, stride,
        [&](const Step& step, const Slice& slice, const float* const* x, int start, int n, Folded& folded, Ahead&) {
            fold<kScales>(w, step, slice, x, start, n, folded);
        },
        [&](const Step& step, const Slice& slice, Folded& folded, int n, float* out, const Ahead&) {
            auto* run = n == 1 ? slice_times<true> : slice_times<false>;
            run(step, slice, w.group, w.scale_bytes(), folded, n, out, stride);
        });
}

void zigzag_times(const Zigzag& w, int tile, int first, int last, const std::int32_t* index, const float* const* value,
                  int tokens, int count, float* y, std::ptrdiff_t stride) {
    auto* run = w.scales == Scales::super    ? zigzag_times_as<Scales::super>
                : w.scales == Scales::affine ? zigzag_times_as<Scales::affine>
                                             : zigzag_times_as<Scales::symmetric>;
    run(w, tile, first, last, index, value, tokens, count, y, stride);
}

}  // namespace

const Kernels* kernels_avx2() {
    static const bool have =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    static const Kernels table = [] {
        Kernels made{.name = "avx2", .quantise = quantise, .rows_times = rows_times, .collect = collect,
                     .zigzag_times = zigzag_times};
        ops::fill<Lanes>(made);
        return made;
    }();
    return have ? &table : nullptr;
}

}  // namespace pennyweight

#else

namespace pennyweight {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace pennyweight

#endif
