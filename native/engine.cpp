#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "half.h"

namespace pennyweight {
namespace {

constexpr int kPad = 128;  // widths of buffers; the largest group of columns

float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

// The share of `n` things that thread t of `threads` does: [first, last).
std::pair<int, int> share(int n, int t, int threads) {
    return {int(long(n) * t / threads), int(long(n) * (t + 1) / threads)};
}

}  // namespace

int Matrix::out() const { return layout == Layout::wide ? wide.rows : layout == Layout::rows ? rows.rows : zigzag.rows; }
int Matrix::in() const { return layout == Layout::wide ? wide.cols : layout == Layout::rows ? rows.cols : zigzag.cols; }

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
    if (matrix.layout != Matrix::Layout::rows) throw std::logic_error("a zigzag matrix has no rows to read");
    const Rows& w = matrix.rows;
    const int r = row % Rows::kTile, offset = w.affine ? 0 : w.bits == 4 ? 8 : 128;
    const std::uint8_t* tile = w.data + row / Rows::kTile * w.tile_bytes();
    for (int c = 0; c < w.cols; c++) {
        const std::uint8_t* group = tile + c / w.group * w.group_bytes();
        const std::uint8_t* block = group + c % w.group / Rows::kBlock * w.block_bytes();
        const std::uint8_t* halves = group + w.group / Rows::kBlock * w.block_bytes();
        const int k = c % Rows::kBlock;
        const std::uint8_t byte = block[64 * (w.bits == 4 ? k / 8 : k / 4) + 4 * r + k % 4];
        const int code = w.bits == 8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
        out[c] = float(code - offset) * load_half(halves + 2 * r, w.half);
        if (w.affine) out[c] += load_half(halves + 2 * (Rows::kTile + r), w.half);
    }
}

Engine::Engine(Model model, int threads, const Kernels& kernels)
    : model_(std::move(model)), kernels_(kernels), pool_(threads), own_(pool_.threads()) {
    int widest = round_up(model_.hidden_size, kPad), zigzag_rows = 0;
    const auto see = [&](const Linear& linear) {
        for (const auto& part : linear.parts) {
            widest = std::max(widest, round_up(part->in(), kPad));
            if (part->layout == Matrix::Layout::rows) widest = std::max(widest, part->rows.padded_cols());
            if (part->layout == Matrix::Layout::zigzag) zigzag_rows = std::max(zigzag_rows, part->zigzag.padded_rows());
        }
        // Tiles write whole, so every output has room for the last one.
        if (&linear != &model_.head) widest = std::max(widest, round_up(linear.out(), kPad) + kPad);
    };
    for (const Layer& layer : model_.layers)
        for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) see(*linear);
    see(model_.head);
    widest_ = widest;
    const std::size_t bytes = sizeof(float) * std::size_t(kMaxRows) * widest;
    for (Buffer* buffer : {&hidden_, &wide_, &mixed_, &out_, &normed_}) *buffer = Buffer(bytes, false);
    codes_ = Buffer(std::size_t(kMaxRows) * widest, false);
    for (Buffer* buffer : {&scale_, &sum_, &minus8_}) *buffer = Buffer(bytes / Rows::kBlock, false);
    partial_ = Buffer(sizeof(float) * std::size_t(pool_.threads()) * zigzag_rows, false);
    shared_.x.resize(kMaxRows);
    shared_.quantised.resize(kMaxRows);
    for (Thread& own : own_) {
        own.normed.resize(widest);
        own.codes.resize(widest);
        for (auto* part : {&own.scale, &own.sum}) part->resize(widest / Rows::kBlock);
        own.minus8.resize(widest / Rows::kBlock);
        own.index.resize(widest + 16);
        own.value.resize(widest + 16);
        own.input.x.resize(1);
        own.input.quantised.resize(1);
    }
}

std::size_t Engine::weight_bytes() const {
    std::size_t total = model_.embedding->nbytes();
    const auto add = [&](const Linear& linear) {
        for (const auto& part : linear.parts)
            if (part != model_.embedding) total += part->nbytes();
    };
    for (const Layer& layer : model_.layers)
        for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) add(*linear);
    add(model_.head);
    return total;
}

std::size_t Engine::bytes_read_per_token() const {
    const auto& head = model_.head.parts;
    const bool tied = std::find(head.begin(), head.end(), model_.embedding) != head.end();
    return weight_bytes() - (tied ? 0 : model_.embedding->nbytes());
}

std::size_t Engine::cache_bytes_of(int tokens) const {
    std::size_t total = 0;
    for (const Layer& layer : model_.layers)
        if (!layer.qkv.empty())
            total += std::size_t(layer.window ? std::min(tokens, layer.window) : tokens) * layer.kv_heads *
                     (layer.head_dim + Attention::padded(layer.head_dim)) * bytes_of(model_.cache);
    return total;
}

std::size_t Engine::cache_bytes() const {
    std::size_t total = 0;
    for (const Sequence& sequence : sequences_)
        for (const Kept& cache : sequence.layers) total += cache.keys.size() + cache.values.size();
    return total;
}

int Engine::open(int capacity) {
    if (capacity < 1 || capacity > model_.max_positions)
        throw std::invalid_argument("a sequence of " + std::to_string(capacity) + " tokens; this model takes 1 to " +
                                    std::to_string(model_.max_positions));
    Sequence sequence;
    sequence.used = true;
    sequence.capacity = capacity;
    const std::size_t each = bytes_of(model_.cache);
    for (const Layer& layer : model_.layers) {
        Kept cache;
        if (!layer.qkv.empty()) {
            // A window needs its own positions and those a step may add before they are looked at.
            const int places = layer.window ? std::min(capacity, layer.window + kMaxRows) : capacity;
            cache.blocks = round_up(places, Attention::kBlock) / Attention::kBlock;
            const std::size_t positions = std::size_t(cache.blocks) * Attention::kBlock * layer.kv_heads;
            cache.keys = Buffer(positions * layer.head_dim * each, false);
            cache.values = Buffer(positions * Attention::padded(layer.head_dim) * each, false);
        }
        sequence.layers.push_back(std::move(cache));
    }
    for (std::size_t i = 0; i < sequences_.size(); i++)
        if (!sequences_[i].used) {
            sequences_[i] = std::move(sequence);
            return int(i);
        }
    sequences_.push_back(std::move(sequence));
    return int(sequences_.size()) - 1;
}

void Engine::close(int sequence) { sequences_.at(sequence) = Sequence(); }

void Engine::copy(int from, int to, int tokens) {
    Sequence &source = sequences_.at(from), &target = sequences_.at(to);
    if (!source.used || !target.used || tokens > source.length || tokens > target.capacity)
        throw std::invalid_argument("sequence " + std::to_string(from) + " has no " + std::to_string(tokens) +
                                    " tokens to give, or sequence " + std::to_string(to) + " no room for them");
    for (std::size_t l = 0; l < model_.layers.size(); l++) {
        const Layer& layer = model_.layers[l];
        if (layer.qkv.empty()) continue;
        const Kept &a = source.layers[l], &b = target.layers[l];
        const std::size_t each = bytes_of(model_.cache);
        const std::size_t key = Attention::kBlock * layer.head_dim * each;
        const std::size_t value = Attention::kBlock * Attention::padded(layer.head_dim) * each;
        // Blocks of positions that are still there; a ring has lost the oldest.
        const int last = (tokens + Attention::kBlock - 1) / Attention::kBlock;
        const int first = std::max(0, (source.length + Attention::kBlock - 1) / Attention::kBlock - a.blocks);
        for (int head = 0; head < layer.kv_heads; head++)
            for (int block = std::max(first, last - b.blocks); block < last; block++) {
                std::memcpy(b.keys.data() + (std::size_t(head) * b.blocks + block % b.blocks) * key,
                            a.keys.data() + (std::size_t(head) * a.blocks + block % a.blocks) * key, key);
                std::memcpy(b.values.data() + (std::size_t(head) * b.blocks + block % b.blocks) * value,
                            a.values.data() + (std::size_t(head) * a.blocks + block % a.blocks) * value, value);
            }
    }
    target.length = tokens;
}

void Engine::step(const std::vector<Row>& rows, bool sparse, float* logits) {
    if (rows.empty() || rows.size() > kMaxRows)
        throw std::invalid_argument(std::to_string(rows.size()) + " rows; a step takes 1 to " + std::to_string(kMaxRows));
    std::vector<int> length;
    for (const Sequence& sequence : sequences_) length.push_back(sequence.length);
    std::vector<bool> seen(sequences_.size());
    for (const Row& row : rows) {
        if (row.sequence < 0 || row.sequence >= int(sequences_.size()) || !sequences_[row.sequence].used)
            throw std::invalid_argument("sequence " + std::to_string(row.sequence) + " is not open");
        if (row.token < 0 || row.token >= model_.vocab_size)
            throw std::invalid_argument("token " + std::to_string(row.token) + " is outside the vocabulary of " +
                                        std::to_string(model_.vocab_size));
        // A sequence may go back: tokens that were guessed wrong are written over.
        int& next = length[row.sequence];
        if (!seen[row.sequence] && row.position < next) next = row.position;
        seen[row.sequence] = true;
        if (row.position != next || row.position >= sequences_[row.sequence].capacity)
            throw std::invalid_argument("position " + std::to_string(row.position) + " of sequence " +
                                        std::to_string(row.sequence) + "; the next is " + std::to_string(next) + " of " +
                                        std::to_string(sequences_[row.sequence].capacity));
        next++;
    }
    rows_ = &rows;
    count_ = int(rows.size());
    sparse_ = sparse;
    logits_ = logits;
    wanted_.clear();
    for (int r = 0; r < count_; r++)
        if (rows[r].wants_logits) wanted_.push_back(r);
    for (Thread& own : own_) own.kept = own.kept_of = 0;
    pool_.run([this](int t) { run(t); });
    for (std::size_t i = 0; i < sequences_.size(); i++) sequences_[i].length = length[i];
    kept_ = kept_of_ = 0;
    for (Thread& own : own_) {
        kept_ += own.kept;
        kept_of_ += own.kept_of;
    }
}

void Engine::embed(int token, float* out) const { dequantise_row(*model_.embedding, token, out); }

void Engine::run(int t) {
    const int threads = pool_.threads(), hidden = model_.hidden_size;
    float *x = floats(hidden_), *wide = floats(wide_), *mixed = floats(mixed_), *out = floats(out_);
    for (int r = t; r < count_; r += threads) embed((*rows_)[r].token, x + std::size_t(r) * widest_);
    pool_.barrier();
    // Adds this thread's rows of a product to the residual stream. The same rows as `multiply` gave it, so that no
    // barrier is needed in between.
    const auto add = [&](const Linear& linear) {
        int row = 0;
        for (const auto& part : linear.parts) {
            auto [first, last] = share((part->out() + 15) / 16, t, threads);
            first *= 16;
            last = std::min(16 * last, part->out());
            for (int r = 0; r < count_ && first < last; r++)
                kernels_.add(x + std::size_t(r) * widest_ + row + first, out + std::size_t(r) * widest_ + row + first,
                             last - first);
            row += part->out();
        }
    };
    for (int index = 0; index < int(model_.layers.size()); index++) {
        const Layer& layer = model_.layers[index];
        if (!layer.o.empty()) {
            if (layer.qkv.empty()) {
                multiply(t, layer.o, prepare(t, x, hidden, widest_, &layer.mixer_norm, layer.o), count_, out, widest_);
                pool_.barrier();  // every thread has read x before any adds to it
            } else {
                const Input& input = prepare(t, x, hidden, widest_, &layer.mixer_norm, layer.qkv);
                multiply(t, layer.qkv, input, count_, wide, widest_);
                pool_.barrier();
                attention(t, index);
                pool_.barrier();
                multiply(t, layer.o, prepare(t, mixed, layer.heads * layer.head_dim, widest_, nullptr, layer.o), count_,
                         out, widest_);
            }
            add(layer.o);
            pool_.barrier();
        }
        if (!layer.down.empty()) {
            if (layer.gate_up.empty()) {
                multiply(t, layer.down, prepare(t, x, hidden, widest_, &layer.ffn_norm, layer.down), count_, out, widest_);
                pool_.barrier();
            } else {
                multiply(t, layer.gate_up, prepare(t, x, hidden, widest_, &layer.ffn_norm, layer.gate_up), count_, wide,
                         widest_);
                pool_.barrier();
                const int width = layer.gate_up.out() / 2;
                auto [first, last] = share(round_up(width, 16) / 16, t, threads);
                first *= 16;
                last = std::min(16 * last, width);
                for (int r = 0; r < count_ && first < last; r++) {
                    const float* gate = wide + std::size_t(r) * widest_;
                    kernels_.swiglu(gate + first, gate + width + first, last - first,
                                    mixed + std::size_t(r) * widest_ + first);
                }
                pool_.barrier();
                multiply(t, layer.down, prepare(t, mixed, width, widest_, nullptr, layer.down), count_, out, widest_);
            }
            add(layer.down);
            pool_.barrier();
        }
    }
    if (wanted_.empty()) return;
    const Input& input = prepare(t, x, hidden, widest_, &model_.final_norm, model_.head, &wanted_);
    multiply(t, model_.head, input, int(wanted_.size()), logits_, model_.vocab_size);
}

// Normed if asked for, and in 8 bits if the next matrices want that. One row is done by every thread for itself,
// which saves a barrier. `rows` picks rows of x.
const Engine::Input& Engine::prepare(int t, const float* x, int width, int stride, const std::vector<float>* norm,
                                     const Linear& next, const std::vector<int>* rows) {
    const int count = rows ? int(rows->size()) : count_, threads = pool_.threads();
    int padded = 0;
    for (const auto& part : next.parts)
        if (part->layout == Matrix::Layout::rows) padded = std::max(padded, part->rows.padded_cols());
    const auto one = [&](int i, float* normed, std::int8_t* codes, float* scale, std::int32_t* minus8, float* sum,
                         Input& input) {
        const float* from = x + std::size_t(rows ? (*rows)[i] : i) * stride;
        const int slot = count == 1 ? 0 : i;
        if (norm) {
            kernels_.rms_norm(from, norm->data(), model_.epsilon, width, normed);
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
    const int blocks = widest_ / Rows::kBlock;
    for (int i = t; i < count; i += threads)
        one(i, floats(normed_) + std::size_t(i) * widest_,
            reinterpret_cast<std::int8_t*>(codes_.data()) + std::size_t(i) * widest_,
            floats(scale_) + std::size_t(i) * blocks, reinterpret_cast<std::int32_t*>(minus8_.data()) + std::size_t(i) * blocks,
            floats(sum_) + std::size_t(i) * blocks, shared_);
    pool_.barrier();
    return shared_;
}

void Engine::multiply(int t, const Linear& linear, const Input& input, int count, float* y, int stride) {
    const int threads = pool_.threads();
    int row = 0;
    for (const auto& part : linear.parts) {
        int first = 0, last = 0;  // rows of this part that this thread made
        if (part->layout == Matrix::Layout::zigzag) {
            multiply_zigzag(t, *part, input, count, y + row, stride);
            std::tie(first, last) = share((part->out() + 15) / 16, t, threads);
        } else if (part->layout == Matrix::Layout::rows) {
            std::tie(first, last) = share(part->rows.tiles(), t, threads);
            // The last tile may not be full: beside it lie rows of the next part, which it must not touch.
            const int full = std::min(last, part->out() / Rows::kTile);
            float* to = y + row + first * Rows::kTile;
            kernels_.rows_times(part->rows, input.quantised.data(), count, to, stride, first, full);
            for (int r = 0; r < count && full < last; r++) {
                alignas(64) float tile[Rows::kTile];
                const int at = full * Rows::kTile;
                kernels_.rows_times(part->rows, input.quantised.data() + r, 1, tile, 0, full, last);
                std::memcpy(y + row + std::ptrdiff_t(r) * stride + at, tile, sizeof(float) * (part->out() - at));
            }
        } else {
            std::tie(first, last) = share((part->out() + Rows::kTile - 1) / Rows::kTile, t, threads);
            kernels_.wide_times(part->wide, input.x.data(), count, y + row, stride, first * Rows::kTile,
                                std::min(last * Rows::kTile, part->out()));
        }
        if (!linear.bias.empty())
            for (int r = 0; r < count; r++)
                for (int i = row + first * 16; i < row + std::min(last * 16, part->out()); i++)
                    y[std::ptrdiff_t(r) * stride + i] += linear.bias[i];
        row += part->out();
    }
}

// Columns are split among threads, which sum down whole tiles: the longer the pieces of memory, the better. Each leaves
// its part of the sum; after a barrier every thread adds up its share of the rows.
void Engine::multiply_zigzag(int t, const Matrix& matrix, const Input& input, int count, float* y, int stride) {
    const Zigzag& w = matrix.zigzag;
    const int threads = pool_.threads(), padded = w.padded_rows();
    Thread& own = own_[t];
    for (int r = 0; r < count; r++) {
        const float threshold = sparse_ ? matrix.threshold : -1;
        const float* importance = threshold < 0 || matrix.importance.empty() ? nullptr : matrix.importance.data();
        const int kept = kernels_.collect(input.x[r], importance, threshold, w.cols, own.index.data(), own.value.data());
        if (t == 0 && sparse_) {
            own.kept += kept;
            own.kept_of += w.cols;
        }
        // Whole steps of 16 columns, so that the sum depends on the number of threads only in its last bits.
        const int steps = (kept + 15) / 16;
        auto [first, last] = share(steps, t, threads);
        first *= 16;
        last = std::min(16 * last, kept);
        kernels_.zigzag_times(w, own.index.data() + first, own.value.data() + first, std::max(0, last - first),
                              floats(partial_) + std::size_t(t) * padded, 0, w.tiles());
        pool_.barrier();
        auto [from, to] = share((w.rows + 15) / 16, t, threads);
        from *= 16;
        to = std::min(16 * to, w.rows);
        if (from < to) {
            float* out = y + std::ptrdiff_t(r) * stride + from;
            std::memcpy(out, floats(partial_) + from, sizeof(float) * (to - from));
            for (int other = 1; other < threads; other++)
                kernels_.add(out, floats(partial_) + std::size_t(other) * padded + from, to - from);
        }
        pool_.barrier();
    }
}

void Engine::store(Kept& cache, const Layer& layer, int head, int position, const float* key, const float* value,
                   Thread& own) {
    const int dim = layer.head_dim, padded = Attention::padded(dim);
    const std::size_t place = std::size_t(position) % (std::size_t(cache.blocks) * Attention::kBlock);
    const std::size_t block = std::size_t(head) * cache.blocks + place / Attention::kBlock;
    const std::size_t key_at = block * dim * Attention::kBlock + place % Attention::kBlock;
    const std::size_t value_at = (block * Attention::kBlock + place % Attention::kBlock) * padded;
    if (model_.cache == Cache::fp8) {
        for (int d = 0; d < dim; d++) cache.keys.data()[key_at + d * Attention::kBlock] = to_fp8(key[d]);
        for (int d = 0; d < dim; d++) cache.values.data()[value_at + d] = to_fp8(value[d]);
        return;
    }
    if (model_.cache == Cache::float32) {
        for (int d = 0; d < dim; d++) reinterpret_cast<float*>(cache.keys.data())[key_at + d * Attention::kBlock] = key[d];
        std::memcpy(cache.values.data() + sizeof(float) * value_at, value, sizeof(float) * dim);
        return;
    }
    own.head.resize(dim);
    auto* halves = reinterpret_cast<std::uint16_t*>(own.head.data());
    auto* keys = reinterpret_cast<std::uint16_t*>(cache.keys.data());
    kernels_.to_half(key, dim, halves);
    for (int d = 0; d < dim; d++) keys[key_at + d * Attention::kBlock] = halves[d];
    kernels_.to_half(value, dim, reinterpret_cast<std::uint16_t*>(cache.values.data()) + value_at);
}

void Engine::attention(int t, int index) {
    const Layer& layer = model_.layers[index];
    const int dim = layer.head_dim, per_group = layer.heads / layer.kv_heads, threads = pool_.threads();
    const int half = model_.rotary_half, tasks = count_ * layer.kv_heads;
    const float attention_scale = model_.attention_scale ? model_.attention_scale : 1.0f / std::sqrt(float(dim));
    Thread& own = own_[t];
    const auto of = [&](int task, auto&& body) {
        const int r = task / layer.kv_heads, head = task % layer.kv_heads;
        const Row& row = (*rows_)[r];
        float* qkv = floats(wide_) + std::size_t(r) * widest_;
        body(r, head, row, qkv + head * per_group * dim, qkv + (layer.heads + head) * dim,
             qkv + (layer.heads + layer.kv_heads + head) * dim, sequences_[row.sequence].layers[index]);
    };
    const auto rotate = [&](float* head, const std::vector<float>& norm, int position) {
        if (!norm.empty()) kernels_.rms_norm(head, norm.data(), model_.epsilon, dim, head);
        kernels_.rotate(head, model_.cosine.data() + std::size_t(position) * half,
                        model_.sine.data() + std::size_t(position) * half, half);
    };
    for (int task = t; task < tasks; task += threads)
        of(task, [&](int, int head, const Row& row, float* query, float* key, float* value, Kept& cache) {
            for (int m = 0; m < per_group; m++) rotate(query + m * dim, layer.q_norm, row.position);
            rotate(key, layer.k_norm, row.position);
            store(cache, layer, head, row.position, key, value, own);
        });
    if (count_ > 1) pool_.barrier();  // a row sees keys of earlier rows; one row alone sees its own thread's
    for (int task = t; task < tasks; task += threads)
        of(task, [&](int r, int head, const Row& row, float* query, float*, float*, Kept& cache) {
            Attention a;
            const std::size_t each = bytes_of(model_.cache);
            const std::size_t blocks = std::size_t(head) * cache.blocks;
            a.keys = cache.keys.data() + blocks * Attention::kBlock * dim * each;
            a.values = cache.values.data() + blocks * Attention::kBlock * Attention::padded(dim) * each;
            a.cache = model_.cache;
            a.head_dim = dim;
            a.blocks = cache.blocks;
            a.first = layer.window ? std::max(0, row.position + 1 - layer.window) : 0;
            a.last = row.position + 1;
            a.scale = attention_scale;
            own.scores.resize(4 * std::size_t(a.last - a.first + 2 * Attention::kBlock));
            a.scratch = own.scores.data();
            float* out = floats(mixed_) + std::size_t(r) * widest_ + head * per_group * dim;
            const float* queries[64];
            float* outs[64];
            for (int m = 0; m < per_group; m++) {
                queries[m] = query + m * dim;
                outs[m] = out + m * dim;
            }
            kernels_.attend(a, queries, per_group, layer.sinks.empty() ? nullptr : layer.sinks.data() + head * per_group,
                            outs);
        });
}

}  // namespace pennyweight
