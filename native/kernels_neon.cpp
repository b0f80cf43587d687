// 64-bit Arm with the dot-product extension (Armv8.2 and later: Apple silicon, Graviton 2 and later, Cortex-A76 and later).
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "trellis_times.h"
#include "vector_ops.h"
#include "zigzag_step.h"

namespace pennyweight {
namespace {

struct Lanes {
    static constexpr int kWidth = 4;
    float32x4_t v;
    static Lanes load(const float* x) { return {vld1q_f32(x)}; }
    static Lanes load_half(const std::uint16_t* x) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)))}; }
    static Lanes load_brain(const std::uint16_t* x) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16))}; }
    static Lanes broadcast(float x) { return {vdupq_n_f32(x)}; }
    void store(float* x) const { vst1q_f32(x, v); }
    void store_half(std::uint16_t* x) const { vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    void store_short(std::int16_t* x) const { vst1_s16(x, vqmovn_s32(vcvtnq_s32_f32(v))); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
    static Lanes mul(Lanes a, Lanes b) { return {vmulq_f32(a.v, b.v)}; }
    static Lanes add(Lanes a, Lanes b) { return {vaddq_f32(a.v, b.v)}; }
    static Lanes sub(Lanes a, Lanes b) { return {vsubq_f32(a.v, b.v)}; }
    static Lanes div(Lanes a, Lanes b) { return {vdivq_f32(a.v, b.v)}; }
    static Lanes min(Lanes a, Lanes b) { return {vminq_f32(a.v, b.v)}; }
    static Lanes max(Lanes a, Lanes b) { return {vmaxq_f32(a.v, b.v)}; }
    static Lanes nearest(Lanes a) { return {vrndnq_f32(a.v)}; }
    static Lanes times_two_to(Lanes a, Lanes n) {  // by the exponent: |n| <= 127, results normal
        return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23)))};
    }
    float sum() const { return vaddvq_f32(v); }

    struct Pairs {
        int16x8_t v;
    };
    struct Sums {
        int32x4_t v;
    };
    static Pairs load_pairs(const std::int8_t* x) { return {vmovl_s8(vld1_s8(x))}; }
    static Pairs load_alone(const std::int8_t* x) {
        std::uint32_t four;
        std::memcpy(&four, x, 4);
        const int32x4_t wide = vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
        return {vreinterpretq_s16_s32(vandq_s32(wide, vdupq_n_s32(0xffff)))};
    }
    static Pairs broadcast_pair(const std::int16_t* x) {
        std::int32_t two;
        std::memcpy(&two, x, 4);
        return {vreinterpretq_s16_s32(vdupq_n_s32(two))};
    }
    static Sums dot(Pairs a, Pairs b, Sums to) {
        const int32x4_t low = vmull_s16(vget_low_s16(a.v), vget_low_s16(b.v)), high = vmull_high_s16(a.v, b.v);
        return {vaddq_s32(to.v, vpaddq_s32(low, high))};
    }
    static Lanes floats_of(Sums sums) { return {vcvtq_f32_s32(sums.v)}; }
};

inline float32x4_t halves(const std::uint8_t* at, Half kind) {
    const uint16x4_t raw = vld1_u16(reinterpret_cast<const std::uint16_t*>(at));
    return kind == Half::float16 ? vcvt_f32_f16(vreinterpret_f16_u16(raw))
                                 : vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
}

inline int8x16_t quad_of(const std::int8_t* codes, int quad) {
    std::int32_t four;
    std::memcpy(&four, codes + 4 * quad, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

void quantise(const float* x, int n, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum) {
    for (int b = 0; b < n / Rows::kBlock; b++) {
        float32x4_t part[8], most = vdupq_n_f32(0);
        for (int i = 0; i < 8; i++) {
            part[i] = vld1q_f32(x + 32 * b + 4 * i);
            most = vmaxq_f32(most, vabsq_f32(part[i]));
        }
        const float top = vmaxvq_f32(most), inverse = top > 0 ? 127.0f / top : 0.0f;
        int32x4_t code[8], added = vdupq_n_s32(0);
        for (int i = 0; i < 8; i++) {
            code[i] = vcvtnq_s32_f32(vmulq_n_f32(part[i], inverse));
            added = vaddq_s32(added, code[i]);
        }
        for (int i = 0; i < 4; i++)
            vst1_s8(codes + 32 * b + 8 * i, vmovn_s16(vcombine_s16(vmovn_s32(code[2 * i]), vmovn_s32(code[2 * i + 1]))));
        const std::int32_t total = vaddvq_s32(added);
        scale[b] = top * (1.0f / 127.0f);
        minus8[b] = -8 * total;
        sum[b] = scale[b] * float(total);
    }
}

// Codes of columns 4q to 4q + 3 in four rows, of a block in two planes; `at` is where the rows' bytes begin.
template <int kBits>
inline int8x16_t quad_codes(const std::uint8_t* at, int q) {
    constexpr int kLow = Rows::low_bits(kBits), kHigh = kBits - kLow, kHighPlane = Rows::kTile * Rows::kBlock * kLow / 8;
    const auto plane = [&](const std::uint8_t* from, int bits, int place) {
        const uint8x16_t unit = vld1q_u8(from + 64 * (q / (8 / bits)));
        const int by = place - bits * (q % (8 / bits));  // to the left, or if below zero to the right
        return vandq_u8(vshlq_u8(unit, vdupq_n_s8(std::int8_t(by))), vdupq_n_u8(std::uint8_t(((1 << bits) - 1) << place)));
    };
    return vreinterpretq_s8_u8(vorrq_u8(plane(at, kLow, 0), plane(at + kHighPlane, kHigh, kLow)));
}

// Rows of one tile, four to a register, times `kTokens` tokens.
template <int kBits, bool kAffine, int kTokens>
inline void tile_times(const Rows& w, const std::uint8_t* at, const Activations* x, float* y, std::ptrdiff_t stride) {
    const uint8x16_t nibble = vdupq_n_u8(15), offset = vdupq_n_u8(128);
    const int blocks = w.group / Rows::kBlock, groups = w.groups();
    const std::size_t block_bytes = w.block_bytes();
    float32x4_t out[kTokens][4];
    for (auto& token : out)
        for (auto& o : token) o = vdupq_n_f32(0);
    int b = 0;
    for (int g = 0; g < groups; g++) {
        float32x4_t part[kTokens][4];
        float sum[kTokens] = {};
        for (auto& token : part)
            for (auto& p : token) p = vdupq_n_f32(0);
        for (int end = b + blocks; b < end; b++, at += block_bytes) {
            int32x4_t exact[kTokens][4];
            for (int t = 0; t < kTokens; t++) {
                // Bytes become signed by taking 128 off, which for plain scales is the offset itself.
                const std::int32_t start = kBits == 8 ? (kAffine ? -16 * x[t].minus8[b] : 0)
                                           : kAffine  ? 0
                                                      : x[t].minus8[b] / 8 * (1 << (kBits - 1));
                for (auto& e : exact[t]) e = vdupq_n_s32(start);
            }
            if constexpr (kBits != 4 && kBits != 8) {
                for (int q = 0; q < 8; q++)
                    for (int i = 0; i < 4; i++) {
                        const int8x16_t unit = quad_codes<kBits>(at + 16 * i, q);
                        for (int t = 0; t < kTokens; t++)
                            exact[t][i] = vdotq_s32(exact[t][i], unit, quad_of(x[t].codes + 32 * b, q));
                    }
            } else {
                for (int v = 0; v < (kBits == 4 ? 4 : 8); v++)
                    for (int i = 0; i < 4; i++) {
                        const uint8x16_t unit = vld1q_u8(at + 64 * v + 16 * i);
                        if constexpr (kBits == 4) {
                            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(unit, nibble));
                            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(unit, 4));
                            for (int t = 0; t < kTokens; t++) {
                                exact[t][i] = vdotq_s32(exact[t][i], low, quad_of(x[t].codes + 32 * b, 2 * v));
                                exact[t][i] = vdotq_s32(exact[t][i], high, quad_of(x[t].codes + 32 * b, 2 * v + 1));
                            }
                        } else {
                            const int8x16_t code = vreinterpretq_s8_u8(veorq_u8(unit, offset));
                            for (int t = 0; t < kTokens; t++)
                                exact[t][i] = vdotq_s32(exact[t][i], code, quad_of(x[t].codes + 32 * b, v));
                        }
                    }
            }
            for (int t = 0; t < kTokens; t++) {
                for (int i = 0; i < 4; i++)
                    part[t][i] = vfmaq_n_f32(part[t][i], vcvtq_f32_s32(exact[t][i]), x[t].scale[b]);
                if constexpr (kAffine) sum[t] += x[t].sum[b];
            }
        }
        for (int i = 0; i < 4; i++) {
            const float32x4_t scale = halves(at + 8 * i, w.half);
            for (int t = 0; t < kTokens; t++) out[t][i] = vfmaq_f32(out[t][i], part[t][i], scale);
        }
        at += 2 * Rows::kTile;
        if constexpr (kAffine) {
            for (int i = 0; i < 4; i++) {
                const float32x4_t minimum = halves(at + 8 * i, w.half);
                for (int t = 0; t < kTokens; t++) out[t][i] = vfmaq_n_f32(out[t][i], minimum, sum[t]);
            }
            at += 2 * Rows::kTile;
        }
    }
    for (int t = 0; t < kTokens; t++)
        for (int i = 0; i < 4; i++) vst1q_f32(y + t * stride + 4 * i, out[t][i]);
}

template <int kBits, bool kAffine>
void rows_times_as(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    for (int tile = first; tile < last; tile++) {
        const std::uint8_t* at = w.data + tile * w.tile_bytes();
        float* to = y + (tile - first) * Rows::kTile;
        int t = 0;
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

// Trellis codes: eight rows of two columns to two registers.
struct TrellisOps {
    static constexpr int kRows = 8;
    struct Floats {
        float32x4_t v[2];
    };
    struct Sums {
        int32x4_t v[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    };

    template <int kBits>
    struct Code {
        static constexpr TrellisLanes<kBits> kLanes{};

        int16x8x2_t values(const std::uint8_t* at) const {
            const uint8x16_t raw = vld1q_u8(at);
            int16x8x2_t out;
            for (int h = 0; h < 2; h++) {
                const uint16x8_t bits = vreinterpretq_u16_u8(vqtbl1q_u8(raw, vld1q_u8(kLanes.byte + 16 * h)));
                const uint16x8_t state = vandq_u16(bits, vld1q_u16(kLanes.mask + 8 * h));
                const int16x8_t t = vreinterpretq_s16_u16(
                    vaddq_u16(vmulq_u16(state, vld1q_u16(kLanes.factor + 8 * h)), vdupq_n_u16(kLanes.kHalf)));
                const int16x8_t two = vqrdmulhq_s16(t, t), four = vqrdmulhq_s16(two, two);
                int16x8_t even = vqrdmulhq_s16(four, four);
                if constexpr (kLanes.kThirteen) even = vqrdmulhq_s16(even, four);
                const uint16x8_t bent = vrhaddq_u16(vreinterpretq_u16_s16(even), vdupq_n_u16(32767));
                out.val[h] = vqrdmulhq_s16(t, vreinterpretq_s16_u16(bent));
            }
            return out;
        }
    };

    static void add(Sums& sums, int16x8x2_t values, std::int32_t pair) {
        const int16x8_t by = vreinterpretq_s16_s32(vdupq_n_s32(pair));
        for (int h = 0; h < 2; h++) {
            const int32x4_t low = vmull_s16(vget_low_s16(values.val[h]), vget_low_s16(by));
            sums.v[h] = vaddq_s32(sums.v[h], vpaddq_s32(low, vmull_high_s16(values.val[h], by)));
        }
    }
    static void widen(const std::int8_t* codes, std::int16_t* to) {
        for (int i = 0; i < Rows::kBlock; i += 8) vst1q_s16(to + i, vmovl_s8(vld1_s8(codes + i)));
    }
    static Floats zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
    static Floats fma(Sums sums, float by, Floats to) {
        for (int h = 0; h < 2; h++) to.v[h] = vfmaq_n_f32(to.v[h], vcvtq_f32_s32(sums.v[h]), by);
        return to;
    }
    static Floats fma(Floats part, const std::uint8_t* scale, Floats to) {
        const uint16x8_t bytes = vmovl_u8(vld1_u8(scale));
        to.v[0] = vfmaq_f32(to.v[0], part.v[0], vcvtq_f32_u32(vmovl_u16(vget_low_u16(bytes))));
        to.v[1] = vfmaq_f32(to.v[1], part.v[1], vcvtq_f32_u32(vmovl_high_u16(bytes)));
        return to;
    }
    static void store(Floats v, const std::uint8_t* factor, float* to) {
        for (int h = 0; h < 2; h++)
            vst1q_f32(to + 4 * h, vmulq_f32(v.v[h], vreinterpretq_f32_u8(vld1q_u8(factor + 16 * h))));
    }
};

void trellis_times(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    trellis_times_with<TrellisOps>(w, x, count, y, stride, first, last);
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

// Scales of 4 groups and, unless symmetric, their minima, raised by 8 scales as codes count from 8.
struct Four {
    float32x4_t scale, minimum;
};

// Of groups g to g + 3 of a column, those beyond the tile's last zero.
template <Scales kScales>
inline Four four_of(const Zigzag& w, const std::uint8_t* chunk, int g) {
    const int inside = std::clamp(w.groups() - g, 0, 4);
    Four made{vdupq_n_f32(0), vdupq_n_f32(0)};
    if constexpr (kScales == Scales::super) {
        if (!inside) return made;
        const int within = g % Zigzag::kSuperGroups;  // 0 or 4
        const Super super(chunk + 2 * (g - within));
        const auto wide = [&](std::uint64_t bytes) {
            return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes >> 8 * within)))));
        };
        made.scale = vmulq_n_f32(wide(super.scales), from_float16(std::uint16_t(super.factors)));
        const float32x4_t m = vmulq_n_f32(wide(super.minima), from_float16(std::uint16_t(super.factors >> 16)));
        made.minimum = vfmaq_n_f32(vnegq_f32(m), made.scale, 8.0f);
    } else {
        const auto halves = [&](const std::uint8_t* at) {
            std::uint16_t few[4] = {};
            std::memcpy(few, at, 2 * inside);
            return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(few)));
        };
        made.scale = halves(chunk + 2 * g);
        if constexpr (kScales == Scales::affine)
            made.minimum = vfmaq_n_f32(halves(chunk + 2 * (w.groups() + g)), made.scale, 8.0f);
    }
    return made;
}

// Codes of x[c] * scale[c][g] in 8 bits, with one float a group; four groups at a time.
template <Scales kScales>
inline void fold(const Zigzag& w, const Step& step, const Slice& slice, const float* const* value, int start, int tokens,
                 Folded& out) {
    float room[kStep];
    for (int i = 0; i < slice.groups; i += 4) {
        Four of[kStep];
        for (int c = 0; c < kStep; c++) of[c] = four_of<kScales>(w, step.chunk[c], slice.first_group + i);
        for (int t = 0; t < tokens; t++) {
            const float* x = step.of(value[t] + start, room);
            float32x4_t e[kStep], most = vdupq_n_f32(0), raised[4];
            for (auto& r : raised) r = vdupq_n_f32(0);
            for (int c = 0; c < kStep; c++) {
                e[c] = vmulq_n_f32(of[c].scale, x[c]);
                most = vmaxq_f32(most, vabsq_f32(e[c]));
                if constexpr (kScales != Scales::symmetric) raised[c % 4] = vfmaq_n_f32(raised[c % 4], of[c].minimum, x[c]);
            }
            if constexpr (kScales != Scales::symmetric) {
                const float32x4_t sum = vaddq_f32(vaddq_f32(raised[0], raised[1]), vaddq_f32(raised[2], raised[3]));
                vst1q_f32(out.bias(t) + i, vaddq_f32(vld1q_f32(out.bias(t) + i), sum));
            }
            const uint32x4_t some = vcgtq_f32(most, vdupq_n_f32(0));
            const float32x4_t inverse = vreinterpretq_f32_u32(
                vandq_u32(some, vreinterpretq_u32_f32(vdivq_f32(vdupq_n_f32(127.0f), most))));
            vst1q_f32(out.scale(t) + i, vmulq_n_f32(most, 1.0f / 127.0f));
            int32x4_t total = vdupq_n_s32(0);
            for (int q = 0; q < kStep / 4; q++) {
                int32x4_t four = vdupq_n_s32(0);
                for (int c = 3; c >= 0; c--) {
                    const int32x4_t code = vcvtnq_s32_f32(vmulq_f32(e[4 * q + c], inverse));
                    total = vaddq_s32(total, code);
                    four = vorrq_s32(vshlq_n_s32(four, 8), vandq_s32(code, vdupq_n_s32(255)));
                }
                vst1q_s32(out.quad(t, q) + i, four);
            }
            vst1q_s32(out.minus8(t) + i, vmulq_n_s32(total, -8));
        }
    }
}

// One step's columns of a slice, for all tokens.
inline void slice_times(const Step& step, const Slice& slice, int group, std::size_t scale_bytes, Folded& folded,
                        int tokens, float* y, std::ptrdiff_t stride) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    for (int unit = slice.first; unit < slice.last; unit++)
        for (int lane = 0; lane < 4; lane++) {
            const std::size_t at = scale_bytes + 64 * unit + 16 * lane;
            uint8x16_t rows[kStep / 4][4];
            for (int q = 0; q < kStep / 4; q++) {
                uint8x16_t column[4];
                for (int c = 0; c < 4; c++) {
                    if (lane == 0) __builtin_prefetch(step.next[4 * q + c] + at, 0, 2);
                    column[c] = vld1q_u8(step.chunk[4 * q + c] + at);
                }
                const uint8x16x2_t ab = vzipq_u8(column[0], column[1]), cd = vzipq_u8(column[2], column[3]);
                for (int i = 0; i < 2; i++) {
                    const uint16x8x2_t both =
                        vzipq_u16(vreinterpretq_u16_u8(ab.val[i]), vreinterpretq_u16_u8(cd.val[i]));
                    rows[q][2 * i] = vreinterpretq_u8_u16(both.val[0]);
                    rows[q][2 * i + 1] = vreinterpretq_u8_u16(both.val[1]);
                }
            }
            for (int u = 0; u < 4; u++) {
                const int g = (128 * (unit - slice.first) + 32 * u) / group;
                int8x16_t lower[kStep / 4], upper[kStep / 4];
                for (int q = 0; q < kStep / 4; q++) {
                    lower[q] = vreinterpretq_s8_u8(vandq_u8(rows[q][u], nibble));
                    upper[q] = vreinterpretq_s8_u8(vshrq_n_u8(rows[q][u], 4));
                }
                float* row = y + 128 * (unit - slice.first) + 32 * u + 4 * lane;
                for (int t = 0; t < tokens; t++, row += stride) {
                    int32x4_t low = vdupq_n_s32(folded.minus8(t)[g]), high = low;
                    for (int q = 0; q < kStep / 4; q++) {
                        const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(folded.quad(t, q)[g]));
                        low = vdotq_s32(low, lower[q], codes);
                        high = vdotq_s32(high, upper[q], codes);
                    }
                    const float scale = folded.scale(t)[g];
                    vst1q_f32(row, vfmaq_n_f32(vld1q_f32(row), vcvtq_f32_s32(low), scale));
                    vst1q_f32(row + 16, vfmaq_n_f32(vld1q_f32(row + 16), vcvtq_f32_s32(high), scale));
                }
            }
        }
}

template <Scales kScales>
void zigzag_times_as(const Zigzag& w, int tile, int first, int last, const std::int32_t* index,
                     const float* const* value, int tokens, int count, float* y, std::ptrdiff_t stride) {
    each_step<kScales, Folded>(
        w, tile, first, last, index, value, tokens, count, y, stride,
        [&](const Step& step, const Slice& slice, const float* const* x, int start, int n, Folded& folded, Ahead&) {
            fold<kScales>(w, step, slice, x, start, n, folded);
        },
        [&](const Step& step, const Slice& slice, Folded& folded, int n, float* out, const Ahead&) {
            slice_times(step, slice, w.group, w.scale_bytes(), folded, n, out, stride);
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

const Kernels* kernels_neon() {
#if defined(__linux__)
    static const bool have = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    static const bool have = true;  // every Apple processor of 64 bits since the A13 and M1
#endif
    static const Kernels table = ops::with_lanes<Lanes>({.name = "neon", .quantise = quantise,
                                                         .rows_times = rows_times, .trellis_times = trellis_times,
                                                         .collect = collect, .zigzag_times = zigzag_times});
    return have ? &table : nullptr;
}

}  // namespace pennyweight

#else

namespace pennyweight {
const Kernels* kernels_neon() { return nullptr; }
}  // namespace pennyweight

#endif
