// Products with trellis codes: what is the same for every instruction set.
//
// `Ops` are an instruction set's: `kRows` rows are done at once, a divisor of 16;
//     Code<bits>     constants; `values(at)`: those of kRows rows and two columns, in rows' order column by column
//     Sums           of kRows rows in 32 bits; `add(sums, values, pair)`: values times a pair of codes of activations
//     widen          32 codes of activations in 16 bits
//     Floats         of kRows rows; `zero`, `fma(sums or bytes or floats, by, to)`, `store`
#pragma once

#include <cstring>

#include "trellis.h"

namespace pennyweight {

// kParts times Ops::kRows rows of a tile from `row` on, times kTokens tokens.
template <class Ops, int kBits, int kTokens, int kParts>
inline void trellis_rows(const Trellis& w, const std::uint8_t* at, int row, const Activations* x, float* y,
                         std::ptrdiff_t stride) {
    constexpr int kPairs = Rows::kBlock / 2;
    const typename Ops::template Code<kBits> code;
    const std::size_t pair_bytes = w.pair_bytes();
    const int blocks = w.group / Rows::kBlock, groups = w.groups(), first = row / Trellis::kUnit;
    typename Ops::Floats out[kTokens][kParts];
    for (auto& token : out)
        for (auto& o : token) o = Ops::zero();
    int b = 0;
    for (int g = 0; g < groups; g++) {
        typename Ops::Floats part[kTokens][kParts];
        for (auto& token : part)
            for (auto& p : token) p = Ops::zero();
        for (int end = b + blocks; b < end; b++) {
            alignas(64) std::int16_t wide[kTokens][Rows::kBlock];
            for (int t = 0; t < kTokens; t++) Ops::widen(x[t].codes + Rows::kBlock * b, wide[t]);
            typename Ops::Sums exact[kTokens][kParts] = {};
            for (int pair = 0; pair < kPairs; pair++, at += pair_bytes) {
                const std::uint8_t* from = at + 2 * kBits * first;
#pragma GCC unroll 8
                for (int i = 0; i < kParts; i++) {
                    const auto values = code.values(from + 2 * kBits * (Ops::kRows / Trellis::kUnit) * i);
#pragma GCC unroll 8
                    for (int t = 0; t < kTokens; t++) {
                        std::int32_t two;
                        std::memcpy(&two, wide[t] + 2 * pair, sizeof(two));
                        Ops::add(exact[t][i], values, two);
                    }
                }
            }
            for (int t = 0; t < kTokens; t++)
                for (int i = 0; i < kParts; i++) part[t][i] = Ops::fma(exact[t][i], x[t].scale[b], part[t][i]);
        }
        for (int t = 0; t < kTokens; t++)
            for (int i = 0; i < kParts; i++) out[t][i] = Ops::fma(part[t][i], at + row + Ops::kRows * i, out[t][i]);
        at += Trellis::kTile;
    }
    for (int t = 0; t < kTokens; t++)
        for (int i = 0; i < kParts; i++)
            Ops::store(out[t][i], at + sizeof(float) * (row + Ops::kRows * i), y + t * stride + Ops::kRows * i);
}

template <class Ops, int kBits>
void trellis_times_as(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                      int last) {
    constexpr int kSixteen = Rows::kTile / Ops::kRows, kWhole = Trellis::kTile / Ops::kRows;
    for (int row = Rows::kTile * first; row < Rows::kTile * last;) {
        const std::uint8_t* tile = w.data + row / Trellis::kTile * w.tile_bytes();
        const int within = row % Trellis::kTile;
        float* to = y + row - Rows::kTile * first;
        int t = 0;
        if (count < 4 && within == 0 && row + Trellis::kTile <= Rows::kTile * last) {
            for (; t < count; t++) trellis_rows<Ops, kBits, 1, kWhole>(w, tile, 0, x + t, to + t * stride, stride);
            row += Trellis::kTile;
            continue;
        }
        // The more tokens, the fewer times bits become values.
        for (; t + 8 <= count; t += 8)
            for (int i = 0; i < kSixteen; i++)
                trellis_rows<Ops, kBits, 8, 1>(w, tile, within + Ops::kRows * i, x + t,
                                               to + t * stride + Ops::kRows * i, stride);
        for (; t + 4 <= count; t += 4) trellis_rows<Ops, kBits, 4, kSixteen>(w, tile, within, x + t, to + t * stride, stride);
        for (; t < count; t++) trellis_rows<Ops, kBits, 1, kSixteen>(w, tile, within, x + t, to + t * stride, stride);
        row += Rows::kTile;
    }
}

template <class Ops>
void trellis_times_with(const Trellis& w, const Activations* x, int count, float* y, std::ptrdiff_t stride, int first,
                        int last) {
    static constexpr decltype(&trellis_times_as<Ops, 2>) kRun[] = {
        trellis_times_as<Ops, 2>, trellis_times_as<Ops, 3>, trellis_times_as<Ops, 4>, trellis_times_as<Ops, 5>,
        trellis_times_as<Ops, 6>};
    kRun[w.bits - kLeastTrellisBits](w, x, count, y, stride, first, last);
}

// For eight rows of two columns, in 16 bits each: the bytes that their states lie in, of those that `Code::values` reads;
// which bits of them; and the multiplier, shifted so that the product begins with the state's highest bit.
template <int kBits>
struct TrellisLanes {
    alignas(32) std::uint8_t byte[32];
    alignas(32) std::uint16_t mask[16], factor[16];
    static constexpr std::int16_t kHalf = 1 << (15 - trellis_code(kBits).window);
    static constexpr bool kThirteen = trellis_code(kBits).power == 13;

    constexpr TrellisLanes() : byte{}, mask{}, factor{} {
        constexpr TrellisCode code = trellis_code(kBits);
        for (int lane = 0; lane < 16; lane++) {
            const int first = 8 + kBits * (lane / 2 + 1) - code.window, at = first / 8, bit = first % 8;
            byte[2 * lane] = std::uint8_t(2 * at + lane % 2);
            byte[2 * lane + 1] = std::uint8_t(2 * (at + 1) + lane % 2);
            mask[lane] = std::uint16_t(((1 << code.window) - 1) << bit);
            factor[lane] = std::uint16_t(code.multiplier << (16 - code.window - bit));
        }
    }
};

}  // namespace pennyweight
