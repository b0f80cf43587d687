// From the bytes of checkpoints to the layouts of matrices.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "products.h"

namespace pennyweight {

// Floats as they are, row by row. With a lender they stay where they lie, else they are copied.
std::shared_ptr<Matrix> make_wide(const std::uint8_t* weights, int rows, int cols, Wide::Type type,
                                  std::shared_ptr<void> lender = nullptr);

// Codes packed row by row, `row_bytes` bytes each: two to a byte, the even column low (4 bits), or one (8 bits); of other
// bits, 32-bit words for 32 columns, one for each bit of their codes, the lowest first, whose bit j is column j's.
// Unsigned, with an offset of half their range. One 16-bit scale (and minimum, unless null) per row and group of columns.
// A group that is no multiple of 32 must be the whole row.
std::shared_ptr<Matrix> make_rows(const std::uint8_t* codes, std::size_t row_bytes, const std::uint16_t* scales,
                                  const std::uint16_t* minima, int rows, int cols, int bits, int group, Half half);

// Bits of each column (ceil(rows bits / 8) bytes, the first row lowest), scales (rows, groups) and factors (rows) as
// docs/formats.md tells. A group that is no multiple of 32 must be the whole row.
std::shared_ptr<Matrix> make_trellis(const std::uint8_t* columns, const std::uint8_t* scales, const float* factors,
                                     int rows, int cols, int bits, int group);

// Chunks as matrices.h tells, already in order. With a lender they stay where they lie, else they are copied.
std::shared_ptr<Matrix> make_zigzag(const std::uint8_t* chunks, std::size_t bytes, int rows, int cols, int tile_rows,
                                    int group, Scales scales, std::shared_ptr<void> lender = nullptr);

}  // namespace pennyweight
