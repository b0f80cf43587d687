// Weight matrices as they lie in memory: the layouts every kernel file knows. The bytes are told in docs/formats.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pennyweight {

enum class Half : int { float16 = 0, bfloat16 = 1 };  // what a 16-bit scale or weight is

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows: scales run along the input (compressed-tensors, Q4_0, Q8_0). For a product with every column.
//
// Tiles of 16 rows; in a tile one group of columns after the other: its codes, then 16 scales, then, if affine, 16
// minima. Codes come in units of 64 bytes whose byte 4r + e belongs to row r, so that a unit is 16 dwords of four
// neighbouring columns: what one instruction of VNNI, SDOT or PMADDUBSW + PMADDWD multiplies by one broadcast dword
// of activations. 4 bits: unit v of 32 columns holds column 8v + e in low and 8v + 4 + e in high nibbles. 8 bits:
// unit v holds column 4v + e. Other codes are in two planes, the low bits' units first: 6 bits are a plane of 4 and one
// of 2, 5 bits of 4 and 1, 3 bits of 2 and 1. In a plane of 2 bits, unit v holds column 16v + 4k + e in bits 2k and
// 2k + 1 of its byte, in one of 1 bit column 4k + e in bit k. Codes are unsigned with an offset of half their range:
// w = scale (code - offset), affine w = scale code + minimum.
struct Rows {
    static constexpr int kTile = 16;
    static constexpr int kBlock = 32;  // columns that share one activation scale

    int rows = 0, cols = 0;  // as the model has them
    int bits = 4;            // 3, 4, 5, 6 or 8
    int group = 32;          // columns that share a scale; a multiple of 32
    bool affine = false;
    Half half = Half::float16;
    const std::uint8_t* data = nullptr;

    int tiles() const { return (rows + kTile - 1) / kTile; }
    int padded_cols() const { return round_up(cols, group); }
    int groups() const { return padded_cols() / group; }
    std::size_t block_bytes() const { return kTile * kBlock * std::size_t(bits) / 8; }
    std::size_t group_bytes() const { return group / kBlock * block_bytes() + (affine ? 2 : 1) * kTile * 2; }
    std::size_t tile_bytes() const { return groups() * group_bytes(); }
    std::size_t bytes() const { return tiles() * tile_bytes(); }
    int offset() const { return 1 << (bits - 1); }

    static constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits == 3 ? 2 : 4; }  // of the first plane
    // Column k of a block in its row r.
    static int code(const std::uint8_t* block, int bits, int r, int k) {
        const int low = low_bits(bits), high = bits - low;
        const int code = plane(block, low, r, k);
        return high ? code | plane(block + kTile * kBlock * low / 8, high, r, k) << low : code;
    }
    static void set_code(std::uint8_t* block, int bits, int r, int k, int code) {
        const int low = low_bits(bits), high = bits - low;
        byte(block, low, r, k) |= std::uint8_t((code & ((1 << low) - 1)) << shift(low, k));
        if (high) byte(block + kTile * kBlock * low / 8, high, r, k) |= std::uint8_t(code >> low << shift(high, k));
    }

private:
    // A plane of some bits has 8 / bits columns' codes to a byte, four columns apart.
    static int shift(int bits, int k) { return bits * (k / 4 % (8 / bits)); }
    template <class Byte>
    static Byte& byte(Byte* plane, int bits, int r, int k) { return plane[64 * (k / (32 / bits)) + 4 * r + k % 4]; }
    static int plane(const std::uint8_t* at, int bits, int r, int k) {
        return byte(at, bits, r, k) >> shift(bits, k) & ((1 << bits) - 1);
    }
};

// Zigzag (ZG4): scales run down the output within one input column, so that a column that is not needed is not read.
//
// Tiles of `tile_rows` rows; in a tile one chunk per column: scales of its groups of rows, then nibbles in units of 64
// bytes for 128 rows: byte 16L + 4u + e holds row 32u + 4L + e in its low and row 32u + 16 + 4L + e in its high nibble.
// Chunks are padded to 64 bytes. Scales are
//   symmetric  float16: w = scale (code - 8)
//   affine     float16, and behind them float16 minima: w = scale code + minimum
//   super      16 bytes for 8 groups of 32 rows, as in Q4_K: float16 d and dmin, then scales s and minima m in 6 bits:
//              bytes 0-3 hold s of groups 0-3 in their low 6 bits, bytes 4-7 m; bytes 8-11 the low 4 bits of s and m of
//              groups 4-7, whose high 2 bits are the high bits of bytes 0-3 and 4-7. w = d s code - dmin m
enum class Scales : int { symmetric = 0, affine = 1, super = 2 };

struct Zigzag {
    static constexpr int kUnitRows = 128;
    static constexpr int kStep = 16;  // columns that a product takes at a time, and that share a scale of activations
    static constexpr int kSuperGroups = 8;  // that share d and dmin

    int rows = 0, cols = 0;
    int tile_rows = 128;  // a multiple of 128
    int group = 64;       // rows that share a scale: 32, 64 or 128
    Scales scales = Scales::symmetric;
    const std::uint8_t* data = nullptr;

    int tiles() const { return (rows + tile_rows - 1) / tile_rows; }
    int groups() const { return tile_rows / group; }  // of a tile
    // Of one column in one tile; those of group g begin at byte 2 g.
    std::size_t scale_bytes() const { return std::size_t(scales == Scales::affine ? 4 : 2) * groups(); }
    // Units that are not parted: those of groups that share a scale of scales.
    int whole_units() const { return scales == Scales::super ? kSuperGroups * group / kUnitRows : 1; }
    std::size_t chunk_bytes() const { return (scale_bytes() + tile_rows / 2 + 63) / 64 * 64; }
    std::size_t tile_bytes() const { return cols * chunk_bytes(); }
    std::size_t bytes() const { return tiles() * tile_bytes(); }
    int padded_rows() const { return tiles() * tile_rows; }
};

// Trellis codes (trellis.h): sequences run down the output within one input column, kRestart rows at a time. For a product
// with every column.
//
// Tiles of 64 rows; in a tile one group of columns after the other: their bits, two columns at a time, then 64 scales of 8
// bits; behind the last group 64 factors in float32. The bits of two columns lie byte by byte in turns: first the byte
// before the tile's own, 0 where a sequence begins, then those of its rows, lowest first. A pair of columns so is 2 + 16 k
// bytes of 64 rows in k bits, and what eight rows need of it lies within 16.
// w = value * scale * factor of the row.
struct Trellis {
    static constexpr int kTile = 64;
    static constexpr int kUnit = 8;  // rows that are read at once
    static constexpr int kRestart = 1024;
    static constexpr int kBeyond = 16;  // bytes behind the last one that are read, and left alone

    int rows = 0, cols = 0;
    int bits = 2;    // 2 to 6
    int group = 64;  // columns that share a scale; a multiple of 32
    const std::uint8_t* data = nullptr;

    int tiles() const { return (rows + kTile - 1) / kTile; }
    int padded_cols() const { return round_up(cols, group); }
    int groups() const { return padded_cols() / group; }
    std::size_t pair_bytes() const { return 2 + 2 * kTile / 8 * std::size_t(bits); }
    std::size_t group_bytes() const { return group / 2 * pair_bytes() + kTile; }
    std::size_t tile_bytes() const { return groups() * group_bytes() + kTile * sizeof(float); }
    std::size_t bytes() const { return tiles() * tile_bytes() + kBeyond; }
};

// Plain rows of floats, as a checkpoint has them.
struct Wide {
    enum class Type : int { float16 = 0, bfloat16 = 1, float32 = 2 };

    int rows = 0, cols = 0;
    Type type = Type::bfloat16;
    const std::uint8_t* data = nullptr;

    std::size_t row_bytes() const { return std::size_t(cols) * (type == Type::float32 ? 4 : 2); }
};

// Activations of one token in 8 bits, 32 to a block: value = scale[b] * code.
struct Activations {
    const std::int8_t* codes = nullptr;
    const float* scale = nullptr;
    const std::int32_t* minus8 = nullptr;  // -8 times the sum of the block's codes: where sums of offset codes start
    const float* sum = nullptr;            // scale[b] times the sum of the block's codes, for minima
};

}  // namespace pennyweight
