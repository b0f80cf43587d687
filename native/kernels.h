// The arithmetic that has to be fast, as one table of functions per instruction set.
//
// kernels_scalar.cpp is the definition. The others give the same integer sums bit for bit, and the same floats too
// where rows do not mix (products with Rows, Trellis and Zigzag): every row adds its terms in the same order with fused
// multiply-adds. Sums across lanes (norms, dot products of attention) agree within 1e-6 relative.
#pragma once

#include <string>
#include <vector>

#include "cache.h"
#include "matrices.h"

namespace pennyweight {

// What a gated MLP does to gate and up. `clamped` is gpt-oss's: gate at most 7, up within 7, gate / (1 + e^-1.702 gate)
// * (up + 1). relu2 is max(gate, 0)^2 * up.
enum class Activation : int { silu = 0, gelu_tanh = 1, relu2 = 2, clamped = 3 };
constexpr int kActivations = 4;

struct Kernels {
    const char* name = nullptr;

    // x (n), n a multiple of 32, into 8 bits a block of 32: scale = max |x| / 127, nearest even. See Activations.
    void (*quantise)(const float* x, int n, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum) = nullptr;

    // y[t * stride + r] = row 16 first + r of w times token t, for the rows of tiles [first, last); `count` tokens.
    // y must have room for the padded rows of the last tile.
    void (*rows_times)(const Rows& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                       int last) = nullptr;

    // The same of trellis codes; `first` and `last` count 16 rows too.
    void (*trellis_times)(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                          int last) = nullptr;

    // Columns with |x| * weight > threshold (weight may be null: all 1), ascending, and their x; returns how many.
    // `index` and `value` must have room for n + 16.
    int (*collect)(const float* x, const float* weight, float threshold, int n, std::int32_t* index, float* value) = nullptr;

    // y[t * stride + r] = row r of the units [first, last) of one tile, counted from the first of them: the listed columns
    // of w times value[t]; overwritten. `count` columns, the same for all tokens. A unit is 128 rows.
    void (*zigzag_times)(const Zigzag& w, int tile, int first, int last, const std::int32_t* index,
                         const float* const* value, int tokens, int count, float* y, std::ptrdiff_t stride) = nullptr;

    // y[t * stride + r] = row r of w times x[t] in float32, for rows [first, last).
    void (*wide_times)(const Wide& w, const float* const* x, int count, float* y, std::ptrdiff_t stride, int first,
                       int last) = nullptr;

    // out[i] = x[i] weight[i] / sqrt(mean of squares + epsilon); out may be x.
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out) = nullptr;

    // Rotary embedding of one head, half-split: pairs (i, half + i), in place.
    void (*rotate)(float* head, const float* cosine, const float* sine, int half) = nullptr;

    // out = activation(gate) * up, by Activation; out may be gate.
    void (*gate[kActivations])(const float* gate, const float* up, int n, float* out) = {};

    // x += y
    void (*add)(float* x, const float* y, int n) = nullptr;

    // x = x scale; then, with a bound above 0, bound tanh(x / bound).
    void (*cap)(float* x, float scale, float bound, int n) = nullptr;

    // x as float16, nearest even.
    void (*to_half)(const float* x, int n, std::uint16_t* out) = nullptr;

    // out[m] (value_dim) = softmax over positions of (query[m] . key * scale) times values, for `count` queries, and what
    // it takes to merge it with others.
    void (*attend)(const Cached& a, const float* const* query, int count, Share* share, float* const* out) = nullptr;
};

const Kernels& kernels_scalar();
const Kernels* kernels_avx2();    // null where this build or this processor has no such instructions
const Kernels* kernels_avx512();  // needs BW, DQ, VL and VNNI
const Kernels* kernels_neon();    // needs dotprod

// Those that run here, the fastest first.
std::vector<const Kernels*> runnable_kernels();

// By name, `best` being the fastest. Throws std::invalid_argument.
const Kernels& kernels_named(const std::string& name);

}  // namespace pennyweight
