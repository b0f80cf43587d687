#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "trellis.h"

namespace pennyweight {

namespace {

// Where a matrix finds `count` bytes from now on: in memory of its own, or where they are if somebody keeps them there.
const std::uint8_t* keep(Matrix& matrix, const std::uint8_t* from, std::size_t count, std::shared_ptr<void> lender) {
    if (lender) {
        matrix.lender = std::move(lender);
        return from;
    }
    matrix.bytes = Buffer(count);
    if (count) std::memcpy(matrix.bytes.data(), from, count);
    return matrix.bytes.data();
}

// One column of a packed row.
template <int kBits>
int code_of(const std::uint8_t* row, int column) {
    if constexpr (kBits == 8) return row[column];
    if constexpr (kBits == 4) return column % 2 ? row[column / 2] >> 4 : row[column / 2] & 15;
    int code = 0;
    for (int b = 0; b < kBits; b++) {
        const std::uint8_t* word = row + 4 * (std::size_t(column) / 32 * kBits + b);
        code |= (word[column % 32 / 8] >> column % 8 & 1) << b;
    }
    return code;
}

// From packed rows to tiles; `to` is zero.
template <int kBits>
void fill_rows(const Rows& w, std::uint8_t* to, const std::uint8_t* codes, std::size_t row_bytes,
               const std::uint16_t* scales, const std::uint16_t* minima) {
    const int groups = w.groups(), blocks = w.group / Rows::kBlock;
    for (int tile = 0; tile < w.tiles(); tile++) {
        std::uint8_t* at = to + tile * w.tile_bytes();
        for (int g = 0; g < groups; g++, at += w.group_bytes()) {
            for (int r = 0; r < Rows::kTile; r++) {
                const int row = tile * Rows::kTile + r;
                if (row >= w.rows) continue;  // scales stay zero
                for (int b = 0; b < blocks; b++) {
                    const int first = g * w.group + b * Rows::kBlock;
                    const std::uint8_t* from = codes + row * row_bytes;
                    std::uint8_t* block = at + b * w.block_bytes();
                    std::uint8_t code[Rows::kBlock];
                    for (int c = 0; c < Rows::kBlock; c++)
                        code[c] = std::uint8_t(first + c < w.cols ? code_of<kBits>(from, first + c) : w.offset());
                    // Opening a model is mostly this: four codes at a time where they lie side by side.
                    if constexpr (kBits == 8)
                        for (int v = 0; v < 8; v++) std::memcpy(block + 64 * v + 4 * r, code + 4 * v, 4);
                    else if constexpr (kBits == 4)
                        for (int v = 0; v < 4; v++)
                            for (int e = 0; e < 4; e++)
                                block[64 * v + 4 * r + e] = std::uint8_t(code[8 * v + e] | code[8 * v + 4 + e] << 4);
                    else
                        for (int c = 0; c < Rows::kBlock; c++) Rows::set_code(block, kBits, r, c, code[c]);
                }
                std::uint8_t* halves = at + blocks * w.block_bytes();
                std::memcpy(halves + 2 * r, scales + std::size_t(row) * groups + g, 2);
                if (minima) std::memcpy(halves + 2 * (Rows::kTile + r), minima + std::size_t(row) * groups + g, 2);
            }
        }
    }
}

}  // namespace

std::shared_ptr<Matrix> make_wide(const std::uint8_t* weights, int rows, int cols, Wide::Type type,
                                  std::shared_ptr<void> lender) {
    auto made = std::make_shared<Matrix>();
    made->layout = Matrix::Layout::wide;
    made->wide = {rows, cols, type, nullptr};
    made->wide.data = keep(*made, weights, rows * made->wide.row_bytes(), std::move(lender));
    return made;
}

std::shared_ptr<Matrix> make_rows(const std::uint8_t* codes, std::size_t row_bytes, const std::uint16_t* scales,
                                  const std::uint16_t* minima, int rows, int cols, int bits, int group, Half half) {
    if (bits < 3 || bits > 8 || bits == 7 || group < 1 || (group % Rows::kBlock && group != cols) ||
        (group != cols && cols % group))
        throw std::invalid_argument(std::to_string(bits) + " bits in groups of " + std::to_string(group) + " of " +
                                    std::to_string(cols) +
                                    " columns; 3, 4, 5, 6 or 8 bits and groups of whole 32 or a whole row");
    auto made = std::make_shared<Matrix>();
    made->layout = Matrix::Layout::rows;
    Rows& w = made->rows;
    w = {rows, cols, bits, round_up(group, Rows::kBlock), minima != nullptr, half, nullptr};
    made->bytes = Buffer(w.bytes());
    w.data = made->bytes.data();
    auto* fill = bits == 3   ? fill_rows<3>
                 : bits == 4 ? fill_rows<4>
                 : bits == 5 ? fill_rows<5>
                 : bits == 6 ? fill_rows<6>
                             : fill_rows<8>;
    fill(w, made->bytes.data(), codes, row_bytes, scales, minima);
    return made;
}

std::shared_ptr<Matrix> make_trellis(const std::uint8_t* columns, const std::uint8_t* scales, const float* factors,
                                     int rows, int cols, int bits, int group) {
    if (bits < kLeastTrellisBits || bits > kMostTrellisBits || group < 1 || (group % Rows::kBlock && group != cols) ||
        (group != cols && cols % group))
        throw std::invalid_argument("trellis codes of " + std::to_string(bits) + " bits in groups of " +
                                    std::to_string(group) + " of " + std::to_string(cols) +
                                    " columns; 2 to 6 bits and groups of whole 32 or a whole row");
    auto made = std::make_shared<Matrix>();
    made->layout = Matrix::Layout::trellis;
    Trellis& w = made->trellis;
    w = {rows, cols, bits, round_up(group, Rows::kBlock), nullptr};
    made->bytes = Buffer(w.bytes());
    w.data = made->bytes.data();
    const int groups = w.groups();
    const std::size_t column_bytes = (std::size_t(rows) * bits + 7) / 8, tile_column = Trellis::kTile / 8 * bits;
    for (int tile = 0; tile < w.tiles(); tile++) {
        const int row = tile * Trellis::kTile, filled = std::min(Trellis::kTile, rows - row);
        const std::size_t first = tile * tile_column, count = std::min(tile_column, column_bytes - first);
        std::uint8_t* at = made->bytes.data() + tile * w.tile_bytes();
        for (int g = 0; g < groups; g++, at += w.group_bytes()) {
            for (int c = 0; c < w.group && g * w.group + c < cols; c++) {
                const std::uint8_t* from = columns + (g * w.group + c) * column_bytes + first;
                std::uint8_t* to = at + c / 2 * w.pair_bytes() + c % 2;
                if (row % Trellis::kRestart) *to = from[-1];
                for (std::size_t i = 0; i < count; i++) to[2 * (i + 1)] = from[i];
            }
            std::uint8_t* of_rows = at + w.group_bytes() - Trellis::kTile;
            for (int r = 0; r < filled; r++) of_rows[r] = scales[std::size_t(row + r) * groups + g];
        }
        std::memcpy(at, factors + row, sizeof(float) * filled);
    }
    return made;
}

std::shared_ptr<Matrix> make_zigzag(const std::uint8_t* chunks, std::size_t bytes, int rows, int cols, int tile_rows,
                                    int group, Scales scales, std::shared_ptr<void> lender) {
    auto made = std::make_shared<Matrix>();
    made->layout = Matrix::Layout::zigzag;
    Zigzag& w = made->zigzag;
    w = {rows, cols, tile_rows, group, scales, nullptr};
    const bool super = scales == Scales::super;
    if ((group != 32 && (super || (group != 64 && group != 128))) || tile_rows < 1 ||
        tile_rows % (Zigzag::kUnitRows * w.whole_units()) || bytes != w.bytes())
        throw std::invalid_argument("a zigzag matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
                                    " in tiles of " + std::to_string(tile_rows) + " rows, groups of " +
                                    std::to_string(group) + ", does not have " + std::to_string(bytes) + " bytes");
    w.data = keep(*made, chunks, bytes, std::move(lender));
    return made;
}

}  // namespace pennyweight
