#include "products.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "half.h"
#include "trellis.h"

namespace pennyweight {
namespace {

constexpr int kPad = 128;           // widths of buffers; the largest group of columns
constexpr int kTallEnough = 4096;   // rows of a thread's piece of a column
constexpr int kRowsTogether = 1024, kTokensTogether = 6;  // of many tokens: their sums stay in L1

std::pair<int, int> share_of_units(const Zigzag& w, int t, int threads) {
    const int whole = w.whole_units();
    const auto [first, last] = share(w.padded_rows() / Zigzag::kUnitRows / whole, t, threads);
    return {first * whole, last * whole};
}

// Floats of one row of an input, its padding included.
int padded_in(const Linear& linear) {
    int width = round_up(linear.in(), kPad);
    for (const auto& part : linear.parts) width = std::max(width, round_up(part->coded_in(), kPad));
    return width;
}

constexpr int kStep = Zigzag::kStep;

// Columns are worked on kStep at a time. Each place of a step gets a stretch of the list, one column a step, so that it
// comes upon neighbours: hardware prefetchers follow it from column to column, and page walks are shared. Writes the
// given steps, of all that `count` columns take, one behind the other.
void by_stretches(const std::int32_t* index, const float* value, int count, int first_step, int last_step,
                  std::int32_t* to_index, float* to_value) {
    const int steps = (count + kStep - 1) / kStep, in_last = count - kStep * (steps - 1);
    int start[kStep];
    for (int place = 0; place < kStep; place++) start[place] = place * (steps - 1) + std::min(place, in_last);
    for (int step = first_step; step < last_step; step++)
        for (int place = 0; place < (step + 1 < steps ? kStep : in_last); place++) {
            *to_index++ = index[start[place] + step];
            *to_value++ = value[start[place] + step];
        }
}

}  // namespace

int Matrix::out() const {
    return layout == Layout::wide      ? wide.rows
           : layout == Layout::rows    ? rows.rows
           : layout == Layout::trellis ? trellis.rows
                                       : zigzag.rows;
}

int Matrix::in() const {
    return layout == Layout::wide      ? wide.cols
           : layout == Layout::rows    ? rows.cols
           : layout == Layout::trellis ? trellis.cols
                                       : zigzag.cols;
}

int Matrix::coded_in() const {
    return layout == Layout::rows ? rows.padded_cols() : layout == Layout::trellis ? trellis.padded_cols() : 0;
}

std::size_t Matrix::nbytes() const {
    const std::size_t weights = layout == Layout::wide      ? wide.rows * wide.row_bytes()
                                : layout == Layout::rows    ? rows.bytes()
                                : layout == Layout::trellis ? trellis.bytes()
                                                            : zigzag.bytes();
    return weights + sizeof(float) * row_scale.size() + sizeof(std::int32_t) * order.size();
}

const float* Matrix::ordered(const float* x, float* room) const {
    if (order.empty()) return x;
    for (std::size_t i = 0; i < order.size(); i++) room[i] = x[order[i]];
    return room;
}

int Linear::out() const {
    int total = 0;
    for (const auto& part : parts) total += part->out();
    return total;
}

void dequantise_row(const Matrix& matrix, int row, float* out) {
    if (matrix.layout == Matrix::Layout::wide) {
        const Wide& w = matrix.wide;
        const std::uint8_t* at = w.data + row * w.row_bytes();
        if (w.type == Wide::Type::float32) std::memcpy(out, at, w.row_bytes());
        else
            for (int c = 0; c < w.cols; c++)
                out[c] = load_half(at + 2 * c, w.type == Wide::Type::float16 ? Half::float16 : Half::bfloat16);
        return;
    }
    if (matrix.layout == Matrix::Layout::trellis) {
        const Trellis& w = matrix.trellis;
        const TrellisCode& code = trellis_code(w.bits);
        const int r = row % Trellis::kTile;
        const std::uint8_t* tile = w.data + row / Trellis::kTile * w.tile_bytes();
        float factor;
        std::memcpy(&factor, tile + w.groups() * w.group_bytes() + sizeof(float) * r, sizeof(float));
        for (int c = 0; c < w.cols; c++) {
            const std::uint8_t* group = tile + c / w.group * w.group_bytes();
            const float scale = group[w.group_bytes() - Trellis::kTile + r];
            out[c] = float(trellis_value(code, trellis_state(w, group, r, c % w.group))) * (scale * factor);
        }
        return;
    }
    if (matrix.layout != Matrix::Layout::rows) throw std::logic_error("a zigzag matrix has no rows to read");
    const Rows& w = matrix.rows;
    const int r = row % Rows::kTile, offset = w.affine ? 0 : w.offset();
    const std::uint8_t* tile = w.data + row / Rows::kTile * w.tile_bytes();
    for (int c = 0; c < w.cols; c++) {
        const std::uint8_t* group = tile + c / w.group * w.group_bytes();
        const std::uint8_t* block = group + c % w.group / Rows::kBlock * w.block_bytes();
        const std::uint8_t* halves = group + w.group / Rows::kBlock * w.block_bytes();
        const int code = Rows::code(block, w.bits, r, c % Rows::kBlock);
        out[c] = float(code - offset) * load_half(halves + 2 * r, w.half);
        if (w.affine) out[c] += load_half(halves + 2 * (Rows::kTile + r), w.half);
    }
}

void Products::expect(const Linear& linear, bool normed, bool output) {
    const int in = padded_in(linear);
    in_stride_ = std::max(in_stride_, in);
    for (const auto& part : linear.parts) {
        if (part->coded_in()) {
            coded_ = std::max(coded_, in);
            normed = normed || part->coded_in() > part->in();
        }
        if (part->layout != Matrix::Layout::zigzag) continue;
        zigzag_rows_ = std::max(zigzag_rows_, part->zigzag.padded_rows());
        any_order_ = any_order_ || !part->order.empty();
    }
    if (normed) normed_width_ = std::max(normed_width_, in);
    if (output) out_stride_ = std::max(out_stride_, out_stride(linear.out()));
}

// Tiles write whole, so every output has room for the last one.
int Products::out_stride(int width) { return round_up(width, kPad) + kPad; }

std::size_t Products::work_bytes(int rows) const {
    const std::size_t codes = coded_ + 3 * sizeof(float) * (coded_ / Rows::kBlock);
    return rows * (codes + sizeof(float) * (normed_width_ + ordered_.stride));
}

void Products::reserve() {
    normed_ = Buffer(sizeof(float) * std::size_t(kMaxRows) * normed_width_, false);
    codes_ = Buffer(std::size_t(kMaxRows) * coded_, false);
    for (Buffer* buffer : {&scale_, &sum_, &minus8_})
        *buffer = Buffer(sizeof(float) * std::size_t(kMaxRows) * (coded_ / Rows::kBlock), false);
    if (any_order_) ordered_ = Panel(kMaxRows, in_stride_);
    partial_ = Buffer(2 * sizeof(float) * std::size_t(pool_.threads()) * zigzag_rows_, false);
    shared_.x.resize(kMaxRows);
    shared_.quantised.resize(kMaxRows);
    every_.resize(in_stride_ + 16);
    std::iota(every_.begin(), every_.end(), 0);
    for (Thread& own : own_) {
        own.normed.resize(in_stride_);
        own.codes.resize(in_stride_);
        for (auto* part : {&own.scale, &own.sum}) part->resize(in_stride_ / Rows::kBlock);
        own.minus8.resize(in_stride_ / Rows::kBlock);
        own.index.resize(in_stride_ + 16);
        own.value.resize(in_stride_ + 16);
        own.stretch_index.resize(in_stride_ + 16);
        own.stretch_value.resize(in_stride_ + 16);
        own.ordered.resize(in_stride_);
        if (zigzag_rows_) own.part.resize(std::size_t(2) * kRowsTogether * kTokensTogether);
        own.input.x.resize(1);
        own.input.quantised.resize(1);
    }
}

void Products::begin(std::vector<char> sparse) {
    sparse_ = std::move(sparse);
    own_[0].sparse = {};
}

const Products::Input& Products::prepare(int t, const float* x, int count, int stride, const Norm& norm,
                                         const Linear& next, const std::vector<int>* rows) {
    const int width = next.in();
    int padded = 0;
    for (const auto& part : next.parts) padded = std::max(padded, part->coded_in());
    const auto one = [&](int i, float* normed, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum,
                         Input& input) {
        const float* from = x + std::size_t(rows ? (*rows)[i] : i) * stride;
        const int slot = count == 1 ? 0 : i;
        if (!norm.empty()) {
            kernels_.rms_norm(from, norm.weight.data(), norm.epsilon, width, normed);
            from = normed;
        } else if (padded > width) {
            std::memcpy(normed, from, sizeof(float) * width);
            from = normed;
        }
        input.x[slot] = from;
        if (padded) {
            if (padded > width) std::fill(normed + width, normed + padded, 0.0f);
            kernels_.quantise(from, padded, codes, scale, minus8, sum);
            input.quantised[slot] = {codes, scale, minus8, sum};
        }
    };
    if (count == 1) {
        Thread& own = own_[t];
        one(0, own.normed.data(), own.codes.data(), own.scale.data(), own.minus8.data(), own.sum.data(), own.input);
        return own.input;
    }
    const int wide = padded_in(next), blocks = wide / Rows::kBlock;
    for (int i = t; i < count; i += pool_.threads())
        one(i, normed_.floats() + std::size_t(i) * wide, reinterpret_cast<std::int8_t*>(codes_.data()) + std::size_t(i) * wide,
            scale_.floats() + std::size_t(i) * blocks, reinterpret_cast<std::int32_t*>(minus8_.data()) + std::size_t(i) * blocks,
            sum_.floats() + std::size_t(i) * blocks, shared_);
    pool_.barrier();
    return shared_;
}

void Products::multiply(int t, const Linear& linear, const Input& input, int count, float* y, int stride,
                        const std::vector<int>* which) {
    const int threads = pool_.threads();
    int row = 0;
    for (const auto& part : linear.parts) {
        const auto [first, last] = share_of_rows(part->out(), t, threads);
        if (part->layout == Matrix::Layout::zigzag) {
            zigzag(t, *part, input, count, y + row, stride, which);
        } else if (part->coded_in()) {
            const auto times = [&](const Activations* of, int tokens, float* to, std::ptrdiff_t apart, int from, int end) {
                if (part->layout == Matrix::Layout::rows) kernels_.rows_times(part->rows, of, tokens, to, apart, from, end);
                else kernels_.trellis_times(part->trellis, of, tokens, to, apart, from, end);
            };
            // The last tile may not be full: beside it lie rows of the next part, which it must not touch.
            const int from = first / Rows::kTile, full = last / Rows::kTile;
            if (from < full) times(input.quantised.data(), count, y + row + first, stride, from, full);
            for (int r = 0; r < count && full * Rows::kTile < last; r++) {
                alignas(64) float tile[Rows::kTile];
                const int at = full * Rows::kTile;
                times(input.quantised.data() + r, 1, tile, 0, full, full + 1);
                std::memcpy(y + row + std::ptrdiff_t(r) * stride + at, tile, sizeof(float) * (last - at));
            }
        } else if (first < last) {
            kernels_.wide_times(part->wide, input.x.data(), count, y + row, stride, first, last);
        }
        if (!linear.bias.empty() && first < last)
            for (int r = 0; r < count; r++)
                kernels_.add(y + std::ptrdiff_t(r) * stride + row + first, linear.bias.data() + row + first, last - first);
        row += part->out();
    }
}

// A column's pieces should be long: no prefetcher helps to find the next one. Where every thread's share of the rows is
// not, columns are split instead, each thread sums down all rows, and the parts are added in a fixed order. A product
// with many tokens splits rows but adds in the same order, so that a token gets the same bits alone and among others.
int Products::column_parts(const Zigzag& w) const {
    return w.padded_rows() / pool_.threads() >= kTallEnough ? 1 : pool_.threads();
}

void Products::zigzag(int t, const Matrix& matrix, const Input& input, int count, float* y, int stride,
                      const std::vector<int>* which) {
    Thread& own = own_[t];
    own.dense.clear();
    own.dense_row.clear();
    for (int r = 0; r < count; r++) {
        const int in_step = which ? (*which)[r] : r;
        const bool sparse = matrix.threshold >= 0 && in_step < int(sparse_.size()) && sparse_[in_step];
        if (sparse || count == 1) {
            zigzag_one(t, matrix, input.x[r], sparse ? matrix.threshold : -1, y + std::ptrdiff_t(r) * stride);
        } else {
            own.dense.push_back(input.x[r]);
            own.dense_row.push_back(r);
        }
    }
    if (!own.dense.empty()) zigzag_many(t, matrix, stride, y);
}

void Products::zigzag_one(int t, const Matrix& matrix, const float* x, float threshold, float* y) {
    const Zigzag& w = matrix.zigzag;
    const int threads = pool_.threads(), parts = column_parts(w), units = w.tile_rows / Zigzag::kUnitRows;
    Thread& own = own_[t];
    const std::int32_t* index = every_.data();
    x = matrix.ordered(x, own.ordered.data());
    int kept = w.cols;
    if (threshold >= 0) {
        const float* importance = matrix.importance.empty() ? nullptr : matrix.importance.data();
        kept = kernels_.collect(x, importance, threshold, w.cols, own.index.data(), own.value.data());
        index = own.index.data();
        x = own.value.data();
        if (t == 0) {
            own.sparse.kept += kept;
            own.sparse.columns += w.cols;
            own.sparse.read += std::size_t(w.tiles()) * kept * w.chunk_bytes();
            own.sparse.bytes += w.bytes();
        }
    }
    // Buffers take turns: whoever comes to the barrier of the next product has read this one's.
    float* partial = partial_.floats() + std::size_t(own.zigzags++ % 2) * threads * zigzag_rows_;
    const int steps = (kept + kStep - 1) / kStep;  // parts are whole steps
    const auto run = [&](int part, int first_unit, int last_unit, float* to) {
        const auto [first_step, last_step] = share(steps, part, parts);
        const int columns = std::min(kStep * last_step, kept) - kStep * first_step;
        const std::int32_t* listed = index + kStep * first_step;
        const float* values = x + kStep * first_step;
        if (kept < w.cols) {  // if all are kept, stretches are equally long and may share their places in a cache
            by_stretches(index, x, kept, first_step, last_step, own.stretch_index.data(), own.stretch_value.data());
            listed = own.stretch_index.data();
            values = own.stretch_value.data();
        }
        for (int unit = first_unit; unit < last_unit;) {
            const int tile = unit / units, from = unit % units, end = std::min(units, from + last_unit - unit);
            kernels_.zigzag_times(w, tile, from, end, listed, &values, 1, columns,
                                  to + std::size_t(unit) * Zigzag::kUnitRows, 0);
            unit += end - from;
        }
    };
    if (parts == 1) {
        const auto [first, last] = share_of_units(w, t, threads);
        run(0, first, last, partial);
    } else {
        run(t, 0, w.tiles() * units, partial + std::size_t(t) * zigzag_rows_);
    }
    pool_.barrier();
    const auto [from, to] = share_of_rows(w.rows, t, threads);
    if (from == to) return;
    std::memcpy(y + from, partial + from, sizeof(float) * (to - from));
    for (int part = 1; part < parts; part++)
        kernels_.add(y + from, partial + std::size_t(part) * zigzag_rows_ + from, to - from);
    if (!matrix.row_scale.empty())
        for (int i = from; i < to; i++) y[i] *= matrix.row_scale[i];
}

void Products::zigzag_many(int t, const Matrix& matrix, int stride, float* y) {
    const Zigzag& w = matrix.zigzag;
    const int threads = pool_.threads(), parts = column_parts(w), units = w.tile_rows / Zigzag::kUnitRows;
    const int count = int(own_[t].dense.size());
    Thread& own = own_[t];
    if (!matrix.order.empty()) {
        for (int i = 0; i < count; i++) {
            float* room = ordered_.at(i);
            if (i % threads == t) matrix.ordered(own.dense[i], room);
            own.dense[i] = room;
        }
        pool_.barrier();
    }
    const auto [first_unit, last_unit] = share_of_units(w, t, threads);
    const int steps = (w.cols + kStep - 1) / kStep;
    const float* values[kTokensTogether];
    for (int unit = first_unit; unit < last_unit;) {
        const int tile = unit / units, from = unit % units;
        const int end = std::min({units, from + last_unit - unit, from + kRowsTogether / Zigzag::kUnitRows});
        const int rows = (end - from) * Zigzag::kUnitRows, row = unit * Zigzag::kUnitRows;
        const int real = std::min(rows, w.rows - row);  // of the last tile, not all
        for (int token = 0; token < count && real > 0; token += kTokensTogether) {
            const int n = std::min(kTokensTogether, count - token);
            float *sum = own.part.data(), *more = sum + std::size_t(kRowsTogether) * kTokensTogether;
            for (int part = 0; part < parts; part++) {
                const int first = kStep * share(steps, part, parts).first;
                const int last = std::min(kStep * share(steps, part, parts).second, w.cols);
                for (int i = 0; i < n; i++) values[i] = own.dense[token + i] + first;
                kernels_.zigzag_times(w, tile, from, end, every_.data() + first, values, n, last - first,
                                      part ? more : sum, rows);
                if (part) kernels_.add(sum, more, n * rows);
            }
            for (int i = 0; i < n; i++) {
                float* to = y + std::ptrdiff_t(own.dense_row[token + i]) * stride + row;
                std::memcpy(to, sum + std::size_t(i) * rows, sizeof(float) * real);
                if (!matrix.row_scale.empty())
                    for (int r = 0; r < real; r++) to[r] *= matrix.row_scale[row + r];
            }
        }
        unit += end - from;
    }
    pool_.barrier();  // units are not shares of 16 rows
}

}  // namespace pennyweight
