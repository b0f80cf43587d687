// 16-bit floats to float, without instructions that not every processor has. Exact for every input.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "matrices.h"

namespace pennyweight {

inline float from_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }

inline float from_float16(std::uint16_t bits) {
    // Exponent and mantissa moved into place are the value times 2^-112, subnormals too; infinities need the rest.
    const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, rest = std::uint32_t(bits & 0x7fff) << 13;
    float value = std::bit_cast<float>(rest) * std::bit_cast<float>(0x77800000u);  // 2^112
    if ((bits & 0x7c00) == 0x7c00) value = std::bit_cast<float>(rest | 0x7f800000u);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

inline std::uint16_t to_float16(float value) {  // nearest even; too large becomes infinity
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), size = bits & 0x7fffffffu;
    const std::uint16_t sign = std::uint16_t(bits >> 16 & 0x8000);
    if (size > 0x7f800000u) return sign | 0x7e00;
    if (size >= 0x477ff000u) return sign | 0x7c00;
    if (size < 0x38800000u)  // subnormal: adding one half puts the rounded mantissa in the lowest bits
        return sign | std::uint16_t(std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u);
    return sign | std::uint16_t((size + 0xc8000fffu + (size >> 13 & 1)) >> 13);
}

inline float load_half(const std::uint8_t* at, Half kind) {
    std::uint16_t bits;
    std::memcpy(&bits, at, 2);
    return kind == Half::float16 ? from_float16(bits) : from_bfloat16(bits);
}

}  // namespace pennyweight
