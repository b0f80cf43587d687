// Trellis codes: what the bits of a stream mean. Trellis-coded quantisation in the form of QTIP (arXiv:2406.11235, a window
// that slides over the bits of a sequence is the state), with a code of our own that a few 16-bit instructions compute.
//
// Every weight of a sequence adds k bits. Its state are the last L bits, the newest highest, and zeros before the first; its
// value is
//     t = (state << (16 - L)) * multiplier + half a step      modulo 2^16, signed
//     value = t (1 + t^(p-1)) / 2                              as fractions of 2^15, each product rounded
// The multiplier is odd: however old bits are set, the 2^k values that new ones choose from lie evenly spread over the range,
// so that no state has bad choices, as random codes do. The power bends the range towards a normal distribution.
#pragma once

#include <cstdint>

#include "matrices.h"

namespace pennyweight {

struct TrellisCode {
    int bits;                  // k, per weight
    int window;                // L; so that with any bit as its first it fits 16 bits that begin at a byte
    std::uint16_t multiplier;  // found by trying: benchmarks/trellis_codes.py
    int power;                 // p: 9 or 13
};

constexpr int kLeastTrellisBits = 2, kMostTrellisBits = 6;
constexpr TrellisCode kTrellisCodes[] = {
    {2, 10, 2827, 9}, {3, 9, 45627, 9}, {4, 10, 2827, 13}, {5, 9, 27533, 13}, {6, 10, 6171, 13}};

constexpr const TrellisCode& trellis_code(int bits) { return kTrellisCodes[bits - kLeastTrellisBits]; }

// a b / 2^15, nearest: what PMULHRSW and SQRDMULH compute.
constexpr std::int16_t times_rounded(int a, int b) { return std::int16_t((a * b + 0x4000) >> 15); }

constexpr std::int16_t trellis_value(const TrellisCode& code, unsigned state) {
    const int shift = 16 - code.window;
    const auto t = std::int16_t(std::uint16_t((state << shift) * code.multiplier + (1u << (shift - 1))));
    const int two = times_rounded(t, t), four = times_rounded(two, two);
    int even = times_rounded(four, four);
    if (code.power == 13) even = times_rounded(even, four);
    return times_rounded(t, (even + 32768) >> 1);
}

// The state of row r of a tile and column c of the group that begins at `group`.
inline unsigned trellis_state(const Trellis& w, const std::uint8_t* group, int r, int c) {
    const TrellisCode& code = trellis_code(w.bits);
    const int first = 8 + code.bits * (r + 1) - code.window;
    const std::uint8_t* at = group + c / 2 * w.pair_bytes() + 2 * (first / 8) + c % 2;
    return (at[0] | at[2] << 8) >> first % 8 & ((1 << code.window) - 1);
}

}  // namespace pennyweight
