// The kernels in plain C++: what the others must compute. Slow, and meant to be read first.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "trellis.h"
#include "vector_ops.h"
#include "zigzag_step.h"

namespace pennyweight {
namespace {

struct Lanes {
    static constexpr int kWidth = 1;
    float v;
    static Lanes load(const float* x) { return {*x}; }
    static Lanes load_half(const std::uint16_t* x) { return {from_float16(*x)}; }
    static Lanes load_brain(const std::uint16_t* x) { return {from_bfloat16(*x)}; }
    static Lanes broadcast(float x) { return {x}; }
    void store(float* x) const { *x = v; }
    void store_half(std::uint16_t* x) const { *x = to_float16(v); }
    void store_short(std::int16_t* x) const { *x = std::isnan(v) ? 0 : std::int16_t(std::nearbyintf(v)); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return {std::fma(a.v, b.v, c.v)}; }
    static Lanes mul(Lanes a, Lanes b) { return {a.v * b.v}; }
    static Lanes add(Lanes a, Lanes b) { return {a.v + b.v}; }
    static Lanes sub(Lanes a, Lanes b) { return {a.v - b.v}; }
    static Lanes div(Lanes a, Lanes b) { return {a.v / b.v}; }
    static Lanes min(Lanes a, Lanes b) { return {std::min(b.v, a.v)}; }  // the second where one is NaN
    static Lanes max(Lanes a, Lanes b) { return {std::max(b.v, a.v)}; }
    static Lanes nearest(Lanes a) { return {std::nearbyintf(a.v)}; }
    static Lanes times_two_to(Lanes a, Lanes n) { return {std::isnan(n.v) ? n.v : std::ldexp(a.v, int(n.v))}; }
    float sum() const { return v; }

    struct Pairs {
        std::int32_t low, high;
    };
    using Sums = std::int32_t;
    static Pairs load_pairs(const std::int8_t* x) { return {x[0], x[1]}; }
    static Pairs load_alone(const std::int8_t* x) { return {*x, 0}; }
    static Pairs broadcast_pair(const std::int16_t* x) { return {x[0], x[1]}; }
    static Sums dot(Pairs a, Pairs b, Sums to) { return to + a.low * b.low + a.high * b.high; }
    static Lanes floats_of(Sums sums) { return {float(sums)}; }
};

void quantise(const float* x, int n, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum) {
    for (int b = 0; b < n / Rows::kBlock; b++) {
        const float* block = x + b * Rows::kBlock;
        float most = 0;
        for (int i = 0; i < Rows::kBlock; i++) most = std::max(most, std::fabs(block[i]));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        std::int32_t total = 0;
        for (int i = 0; i < Rows::kBlock; i++) {
            const int code = int(std::nearbyintf(block[i] * inverse));
            codes[b * Rows::kBlock + i] = std::int8_t(code);
            total += code;
        }
        scale[b] = most * (1.0f / 127.0f);
        minus8[b] = -8 * total;
        sum[b] = scale[b] * float(total);
    }
}

// Sum over one block of 32 columns of row r of (code - offset) * x, exactly; without the offset if affine.
std::int32_t block_sum(const std::uint8_t* block, int r, int bits, bool affine, const std::int8_t* x,
                       std::int32_t minus8) {
    std::int32_t total = affine ? 0 : minus8 / 8 * (1 << (bits - 1));
    for (int c = 0; c < Rows::kBlock; c++) total += Rows::code(block, bits, r, c) * x[c];
    return total;
}

void rows_times(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first, int last) {
    const int blocks = w.group / Rows::kBlock;
    for (int tile = first; tile < last; tile++)
        for (int t = 0; t < count; t++)
            for (int r = 0; r < Rows::kTile; r++) {
                float out = 0;
                const std::uint8_t* at = w.data + tile * w.tile_bytes();
                for (int g = 0; g < w.groups(); g++, at += w.group_bytes()) {
                    float part = 0, sum = 0;
                    for (int b = g * blocks; b < (g + 1) * blocks; b++) {
                        const std::int32_t exact = block_sum(at + (b - g * blocks) * w.block_bytes(), r, w.bits, w.affine,
                                                             x[t].codes + b * Rows::kBlock, x[t].minus8[b]);
                        part = std::fma(float(exact), x[t].scale[b], part);
                        sum += x[t].sum[b];
                    }
                    const std::uint8_t* halves = at + blocks * w.block_bytes();
                    out = std::fma(part, load_half(halves + 2 * r, w.half), out);
                    if (w.affine) out = std::fma(sum, load_half(halves + 2 * (Rows::kTile + r), w.half), out);
                }
                y[t * stride + (tile - first) * Rows::kTile + r] = out;
            }
}

void trellis_times(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                   int last) {
    const TrellisCode& code = trellis_code(w.bits);
    const int blocks = w.group / Rows::kBlock;
    for (int row = Rows::kTile * first; row < Rows::kTile * last; row++) {
        const int r = row % Trellis::kTile;
        const std::uint8_t* tile = w.data + row / Trellis::kTile * w.tile_bytes();
        for (int t = 0; t < count; t++) {
            float out = 0;
            const std::uint8_t* at = tile;
            for (int g = 0; g < w.groups(); g++, at += w.group_bytes()) {
                float part = 0;
                for (int b = 0; b < blocks; b++) {
                    std::int32_t exact = 0;
                    for (int c = 0; c < Rows::kBlock; c++)
                        exact += trellis_value(code, trellis_state(w, at, r, b * Rows::kBlock + c)) *
                                 x[t].codes[g * w.group + b * Rows::kBlock + c];
                    part = std::fma(float(exact), x[t].scale[g * blocks + b], part);
                }
                out = std::fma(part, float(at[w.group_bytes() - Trellis::kTile + r]), out);
            }
            float factor;
            std::memcpy(&factor, at + sizeof(float) * r, sizeof(float));
            y[t * stride + row - Rows::kTile * first] = out * factor;
        }
    }
}

int collect(const float* x, const float* weight, float threshold, int n, std::int32_t* index, float* value) {
    int found = 0;
    for (int j = 0; j < n; j++)
        if ((weight ? std::fabs(x[j]) * weight[j] : std::fabs(x[j])) > threshold) {
            index[found] = j;
            value[found++] = x[j];
        }
    return found;
}

// Scale and minimum of a column's group.
std::pair<float, float> scales_of(const Zigzag& w, const std::uint8_t* chunk, int g) {
    if (w.scales == Scales::super) {
        const Super super(chunk + 2 * (g / Zigzag::kSuperGroups * Zigzag::kSuperGroups));
        const int shift = 8 * (g % Zigzag::kSuperGroups);
        return {from_float16(std::uint16_t(super.factors)) * float(super.scales >> shift & 63),
                -from_float16(std::uint16_t(super.factors >> 16)) * float(super.minima >> shift & 63)};
    }
    return {load_half(chunk + 2 * g, Half::float16),
            w.scales == Scales::affine ? load_half(chunk + 2 * (w.groups() + g), Half::float16) : 0.0f};
}

void zigzag_times(const Zigzag& w, int tile, int first, int last, const std::int32_t* index, const float* const* value,
                  int tokens, int count, float* y, std::ptrdiff_t stride) {
    const std::uint8_t* base = w.data + tile * w.tile_bytes();
    const int first_row = first * Zigzag::kUnitRows, last_row = last * Zigzag::kUnitRows;
    for (int t = 0; t < tokens; t++) {
        float* out = y + t * stride - first_row;
        std::fill(out + first_row, out + last_row, 0.0f);
        for (int g = first_row / w.group; g < last_row / w.group; g++) {
            float bias = 0;
            const bool minima = w.scales != Scales::symmetric;
            for (int start = 0; start < count; start += kStep) {
                const int columns = std::min(kStep, count - start);
                float folded[kStep], most = 0, raised[4] = {};
                for (int c = 0; c < columns; c++) {
                    const float x = value[t][start + c];
                    const auto [scale, minimum] = scales_of(w, base + index[start + c] * w.chunk_bytes(), g);
                    folded[c] = x * scale;
                    most = std::max(most, std::fabs(folded[c]));
                    // Codes count from 8 with minima too: what rounding leaves of a folded activation is multiplied by
                    // the code, and should not meet 15 where it could meet 7. The minimum is then 8 scales higher.
                    if (minima) raised[c % 4] = std::fma(x, std::fma(8.0f, scale, minimum), raised[c % 4]);
                }
                if (minima) bias += (raised[0] + raised[1]) + (raised[2] + raised[3]);
                const float inverse = most > 0 ? 127.0f / most : 0.0f, scale = most * (1.0f / 127.0f);
                std::int32_t codes[kStep] = {}, total = 0;
                for (int c = 0; c < columns; c++) {
                    codes[c] = int(std::nearbyintf(folded[c] * inverse));
                    total += codes[c];
                }
                for (int r = g * w.group; r < (g + 1) * w.group; r++) {
                    const int u = r % 128 / 32, high = r % 32 / 16, lane = r % 16 / 4, e = r % 4;
                    const std::size_t byte = w.scale_bytes() + r / 128 * 64 + 16 * lane + 4 * u + e;
                    std::int32_t exact = -8 * total;
                    for (int c = 0; c < columns; c++) {
                        const std::uint8_t pair = base[index[start + c] * w.chunk_bytes() + byte];
                        exact += codes[c] * (high ? pair >> 4 : pair & 15);
                    }
                    out[r] = std::fma(float(exact), scale, out[r]);
                }
            }
            if (minima)
                for (int r = g * w.group; r < (g + 1) * w.group; r++) out[r] += bias;
        }
    }
}

}  // namespace

const Kernels& kernels_scalar() {
    static const Kernels table = ops::with_lanes<Lanes>({.name = "scalar", .quantise = quantise,
                                                         .rows_times = rows_times, .trellis_times = trellis_times,
                                                         .collect = collect, .zigzag_times = zigzag_times});
    return table;
}

}  // namespace pennyweight
