// Products of weights with the activations of a step, done by all threads of a pool together.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace pennyweight {

// A matrix of one of the layouts, and its bytes.
struct Matrix {
    enum class Layout { wide, rows, trellis, zigzag };
    Layout layout = Layout::wide;
    Wide wide;
    Rows rows;
    Trellis trellis;
    Zigzag zigzag;
    // Of zigzag alone:
    std::vector<float> row_scale;     // multiplies each row at the end; empty: 1
    std::vector<std::int32_t> order;  // the input that each column, as they lie, multiplies; empty: 0, 1, ...
    float threshold = -1;             // columns with |x| at most this are left out; below 0 keeps all
    std::vector<float> importance;    // in that order; multiplies |x| before it is compared; empty: 1
    Buffer bytes;
    std::shared_ptr<void> lender;  // who keeps the bytes, if they are somebody else's

    int out() const;
    int in() const;
    // Of activations in 8 bits, which rows and trellis codes are multiplied with; 0 of others.
    int coded_in() const;
    std::size_t nbytes() const;
    // The inputs as the columns lie: x itself, or `room` filled with them.
    const float* ordered(const float* x, float* room) const;
};

// One row of a matrix in float32. Throws std::logic_error for zigzag, which has no rows to read.
void dequantise_row(const Matrix& matrix, int row, float* out);

// Matrices stacked on one input: y = [A x; B x; ...] + bias.
struct Linear {
    std::vector<std::shared_ptr<Matrix>> parts;
    std::vector<float> bias;  // empty, or one value per row

    int out() const;
    int in() const { return parts.front()->in(); }
    bool empty() const { return parts.empty(); }
};

// Root mean square norm. No weights: none.
struct Norm {
    std::vector<float> weight;
    float epsilon = 1e-5f;

    bool empty() const { return weight.empty(); }
};

// The share of `n` things that thread t of `threads` does: [first, last).
inline std::pair<int, int> share(int n, int t, int threads) {
    return {int(long(n) * t / threads), int(long(n) * (t + 1) / threads)};
}

// The share of `rows` rows, in whole groups of 16: the rows of a product that thread t has written when it returns.
inline std::pair<int, int> share_of_rows(int rows, int t, int threads) {
    const auto [first, last] = share((rows + Rows::kTile - 1) / Rows::kTile, t, threads);
    return {std::min(first * Rows::kTile, rows), std::min(last * Rows::kTile, rows)};
}

class Products {
public:
    // What a linear reads, for all rows.
    struct Input {
        std::vector<const float*> x;
        std::vector<Activations> quantised;
    };

    static constexpr int kMaxRows = 512;

    Products(ThreadPool& pool, const Kernels& kernels) : pool_(pool), kernels_(kernels), own_(pool.threads()) {}

    // Linears that will be multiplied; call for each, then `reserve` once. `output`: into buffers of `stride`.
    void expect(const Linear& linear, bool normed, bool output = true);
    void reserve();

    // Floats between rows of inputs, and of outputs: the widest of either, and room for tiles that are written whole.
    int in_stride() const { return in_stride_; }
    int out_stride() const { return out_stride_; }
    static int out_stride(int width);
    std::size_t work_bytes(int rows) const;  // that products of so many rows write beside their outputs, at most

    // Before a step: which of its rows leave columns out where a matrix has a threshold.
    void begin(std::vector<char> sparse);

    // Called by all threads. x (count, next.in()) with `stride` floats between rows, or the given `rows` of it; normed if
    // asked for, and in 8 bits if the next matrices want that. One row is done by every thread for itself, which saves
    // a barrier; more are shared out and met by one.
    const Input& prepare(int t, const float* x, int count, int stride, const Norm& norm, const Linear& next,
                         const std::vector<int>* rows = nullptr);

    // Called by all threads. y[r * stride + i] for `count` rows r; returns when this thread's share_of_rows of every
    // part is written. `which`: numbers of the rows within the step, if not 0, 1, ...
    void multiply(int t, const Linear& linear, const Input& input, int count, float* y, int stride,
                  const std::vector<int>* which = nullptr);

    // Since `begin`, of all products of sparse rows: columns read and all there were, and the same in bytes.
    struct Sparse {
        long kept = 0, columns = 0;
        std::size_t read = 0, bytes = 0;
    };
    const Sparse& sparse() const { return own_[0].sparse; }

private:
    struct Thread {  // scratch that no other thread touches
        std::vector<float> normed, value, stretch_value, ordered, part;
        std::vector<std::int8_t> codes;
        std::vector<float> scale, sum;
        std::vector<std::int32_t> minus8, index, stretch_index;
        std::vector<const float*> dense;
        std::vector<int> dense_row;
        Input input;
        unsigned zigzags = 0;  // done so far; may wrap around
        Sparse sparse;  // counted by the first thread alone
    };

    void zigzag(int t, const Matrix& matrix, const Input& input, int count, float* y, int stride,
                const std::vector<int>* which);
    void zigzag_one(int t, const Matrix& matrix, const float* x, float threshold, float* y);
    void zigzag_many(int t, const Matrix& matrix, int stride, float* y);
    int column_parts(const Zigzag& w) const;

    ThreadPool& pool_;
    const Kernels& kernels_;
    std::vector<Thread> own_;
    std::vector<char> sparse_;
    int in_stride_ = 0, out_stride_ = 0, zigzag_rows_ = 0;
    int coded_ = 0;   // the widest input that is put in 8 bits
    int normed_width_ = 0;  // and that is copied first, to be normed or padded
    bool any_order_ = false;
    Buffer partial_;  // (2, threads, zigzag_rows_)
    Panel ordered_;
    // Of the rows of one input, one behind the other: as far apart as that input is wide.
    Buffer normed_, codes_, scale_, sum_, minus8_;
    std::vector<std::int32_t> every_;  // 0, 1, 2, ...
    Input shared_;
};

}  // namespace pennyweight
