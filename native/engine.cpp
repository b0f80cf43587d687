#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace pennyweight {
namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

}  // namespace

Engine::Engine(Model model, int threads, const Kernels& kernels)
    : model_(std::move(model)), kernels_(kernels), pool_(threads), products_(pool_, kernels), own_(pool_.threads()) {
    check();
    for (const Layer& layer : model_.layers)
        for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) products_.expect(*linear);
    products_.expect(model_.head, false);  // logits go to the caller's memory
    products_.reserve();
    stride_ = std::max(products_.stride(), round_up(model_.hidden_size, 16));
    for (Buffer* buffer : {&hidden_, &wide_, &mixed_, &out_})
        *buffer = Buffer(sizeof(float) * std::size_t(kMaxRows) * stride_, false);
}

void Engine::check() const {
    const int hidden = model_.hidden_size;
    const auto fail = [](const std::string& what) { throw std::invalid_argument("the model's parts do not fit: " + what); };
    const auto sized = [&](const std::string& name, const Linear& linear, int out, int in) {
        if (linear.empty()) fail(name + " is missing");
        if (linear.out() != out || linear.in() != in)
            fail(name + " is " + std::to_string(linear.out()) + " x " + std::to_string(linear.in()) + ", expected " +
                 std::to_string(out) + " x " + std::to_string(in));
    };
    const auto long_as = [&](const std::string& name, const std::vector<float>& values, int n, bool optional) {
        if (int(values.size()) != n && !(optional && values.empty()))
            fail(name + " has " + std::to_string(values.size()) + " values, expected " + std::to_string(n));
    };
    if (hidden < 1 || model_.vocab_size < 1) fail("hidden_size and vocab_size have to be positive");
    if (!model_.embedding) fail("the embedding is missing");
    if (model_.embedding->layout == Matrix::Layout::zigzag) fail("the embedding is zigzag, which has no rows to read");
    Linear embedding;
    embedding.parts.push_back(model_.embedding);
    sized("the embedding", embedding, model_.vocab_size, hidden);
    sized("the head", model_.head, model_.vocab_size, hidden);
    long_as("the last norm", model_.final_norm, hidden, false);
    for (std::size_t i = 0; i < model_.layers.size(); i++) {
        const Layer& layer = model_.layers[i];
        const std::string of = " of layer " + std::to_string(i);
        if (!layer.o.empty()) long_as("the mixer's norm" + of, layer.mixer_norm, hidden, false);
        if (!layer.down.empty()) long_as("the FFN's norm" + of, layer.ffn_norm, hidden, false);
        if (!layer.qkv.empty()) {
            if (layer.kv_heads < 1 || layer.heads % layer.kv_heads || layer.heads / layer.kv_heads > kMaxQueries)
                fail(std::to_string(layer.heads) + " heads on " + std::to_string(layer.kv_heads) + " key-value heads" + of +
                     "; a whole number of them, up to " + std::to_string(kMaxQueries) + ", share one");
            if (layer.head_dim < 2 || 2 * model_.rotary_half > layer.head_dim || model_.max_positions < 1)
                fail("rotary tables of " + std::to_string(model_.max_positions) + " x " + std::to_string(model_.rotary_half) +
                     " for heads of " + std::to_string(layer.head_dim) + of);
            if (layer.window < 0) fail("a window of " + std::to_string(layer.window) + of);
            sized("q, k and v" + of, layer.qkv, (layer.heads + 2 * layer.kv_heads) * layer.head_dim, hidden);
            sized("o" + of, layer.o, hidden, layer.heads * layer.head_dim);
            long_as("the norm of queries" + of, layer.q_norm, layer.head_dim, true);
            long_as("the norm of keys" + of, layer.k_norm, layer.head_dim, true);
            long_as("the sinks" + of, layer.sinks, layer.heads, true);
        } else if (!layer.o.empty()) {
            sized("the mixer's matrix" + of, layer.o, hidden, hidden);
        }
        if (!layer.gate_up.empty()) {
            sized("gate and up" + of, layer.gate_up, layer.gate_up.out() / 2 * 2, hidden);
            sized("down" + of, layer.down, hidden, layer.gate_up.out() / 2);
        } else if (!layer.down.empty()) {
            sized("the FFN's matrix" + of, layer.down, hidden, hidden);
        }
    }
}

bool Engine::is_sparse() const {
    const auto sparse = [](const Linear& linear) {
        return std::any_of(linear.parts.begin(), linear.parts.end(), [](const auto& part) { return part->threshold >= 0; });
    };
    return sparse(model_.head) || std::any_of(model_.layers.begin(), model_.layers.end(), [&](const Layer& layer) {
               return sparse(layer.qkv) || sparse(layer.o) || sparse(layer.gate_up) || sparse(layer.down);
           });
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

void Engine::close(int sequence) {
    used(sequence);
    sequences_[sequence] = Sequence();
}

const Engine::Sequence& Engine::used(int sequence) const {
    if (sequence < 0 || sequence >= int(sequences_.size()) || !sequences_[sequence].used)
        throw std::invalid_argument("sequence " + std::to_string(sequence) + " is not open");
    return sequences_[sequence];
}

const Layer* Engine::forgetful(const Sequence& sequence, int tokens) const {
    for (std::size_t l = 0; l < model_.layers.size(); l++) {
        const Layer& layer = model_.layers[l];
        const int first = layer.window ? std::max(0, tokens + 1 - layer.window) : 0;
        if (!layer.qkv.empty() && first < tokens && first < sequence.layers[l].oldest) return &layer;
    }
    return nullptr;
}

bool Engine::can_go_back(int number, int tokens) const {
    const Sequence& sequence = used(number);
    return tokens >= 0 && tokens <= sequence.length && !forgetful(sequence, tokens);
}

void Engine::copy(int from, int to, int tokens) {
    if (!can_go_back(from, tokens) || tokens > used(to).capacity)
        throw std::invalid_argument("sequence " + std::to_string(from) + " does not hold its first " + std::to_string(tokens) +
                                    " tokens, or sequence " + std::to_string(to) + " has no room for them");
    if (from == to) return;
    Sequence &source = sequences_[from], &target = sequences_[to];
    for (std::size_t l = 0; l < model_.layers.size(); l++) {
        const Layer& layer = model_.layers[l];
        if (layer.qkv.empty()) continue;
        const Kept& a = source.layers[l];
        Kept& b = target.layers[l];
        const std::size_t each = bytes_of(model_.cache);
        const std::size_t key = Attention::kBlock * layer.head_dim * each;
        const std::size_t value = Attention::kBlock * Attention::padded(layer.head_dim) * each;
        // Whole blocks, of positions that are there and as many as the target has places for.
        const int last = (tokens + Attention::kBlock - 1) / Attention::kBlock;
        const int first = std::max(a.oldest / Attention::kBlock, last - b.blocks);
        for (int head = 0; head < layer.kv_heads; head++)
            for (int block = first; block < last; block++) {
                std::memcpy(b.keys.data() + (std::size_t(head) * b.blocks + block % b.blocks) * key,
                            a.keys.data() + (std::size_t(head) * a.blocks + block % a.blocks) * key, key);
                std::memcpy(b.values.data() + (std::size_t(head) * b.blocks + block % b.blocks) * value,
                            a.values.data() + (std::size_t(head) * a.blocks + block % a.blocks) * value, value);
            }
        b.oldest = std::min(tokens, std::max(a.oldest, first * Attention::kBlock));
    }
    target.length = tokens;
}

void Engine::fill(int number, int tokens) {
    Sequence& sequence = sequences_.at(number);
    if (!sequence.used || tokens < 0 || tokens > sequence.capacity)
        throw std::invalid_argument("sequence " + std::to_string(number) + " has no room for " + std::to_string(tokens) +
                                    " tokens");
    constexpr int kSmall = 0x2c;  // a small positive number as float16, E4M3 and float32 alike, whatever byte it starts at
    for (Kept& cache : sequence.layers) {
        std::memset(cache.keys.data(), kSmall, cache.keys.size());
        std::memset(cache.values.data(), kSmall, cache.values.size());
        cache.oldest = std::max(0, tokens - cache.blocks * Attention::kBlock);
    }
    sequence.length = tokens;
}

void Engine::step(const std::vector<Row>& rows, float* logits) {
    if (rows.empty() || rows.size() > kMaxRows)
        throw std::invalid_argument(std::to_string(rows.size()) + " rows; a step takes 1 to " + std::to_string(kMaxRows));
    std::vector<int> length;
    for (const Sequence& sequence : sequences_) length.push_back(sequence.length);
    std::vector<int> begin(sequences_.size(), -1);  // where a sequence goes on
    for (const Row& row : rows) {
        used(row.sequence);
        if (row.token < 0 || row.token >= model_.vocab_size)
            throw std::invalid_argument("token " + std::to_string(row.token) + " is outside the vocabulary of " +
                                        std::to_string(model_.vocab_size));
        // A sequence may go back: tokens that were guessed wrong are written over.
        int& next = length[row.sequence];
        if (begin[row.sequence] < 0) {
            if (row.position >= 0 && row.position < next) next = row.position;
            begin[row.sequence] = next;
            if (const Layer* layer = forgetful(sequences_[row.sequence], next))
                throw std::invalid_argument("sequence " + std::to_string(row.sequence) + " cannot go back to position " +
                                            std::to_string(next) + ": a layer with a window of " +
                                            std::to_string(layer->window) + " positions has forgotten what came before");
        }
        if (row.position != next || row.position >= sequences_[row.sequence].capacity)
            throw std::invalid_argument("position " + std::to_string(row.position) + " of sequence " +
                                        std::to_string(row.sequence) + "; the next is " + std::to_string(next) + " of " +
                                        std::to_string(sequences_[row.sequence].capacity));
        next++;
    }
    rows_ = &rows;
    count_ = int(rows.size());
    logits_ = logits;
    wanted_.clear();
    std::vector<char> sparse(count_);
    for (int r = 0; r < count_; r++) {
        if (rows[r].wants_logits) wanted_.push_back(r);
        sparse[r] = rows[r].sparse;
    }
    products_.begin(std::move(sparse));
    segments_ = 1;
    for (const Row& row : rows) segments_ = std::max(segments_, row.position / Attention::kSegment + 1);
    std::size_t parts = 0;
    for (const Layer& layer : model_.layers)
        if (!layer.qkv.empty() && segments_ > 1 && count_ * layer.kv_heads < 4 * threads())
            parts = std::max(parts, std::size_t(count_) * segments_ * layer.heads * (layer.head_dim + 2));
    if (parts_.size() < sizeof(float) * parts) parts_ = Buffer(sizeof(float) * parts, false);
    const double started = now();
    pool_.run([this](int t) { run(t); });
    spent_.all += now() - started;
    for (std::size_t i = 0; i < sequences_.size(); i++) {
        if (begin[i] < 0) continue;
        sequences_[i].length = length[i];
        for (Kept& cache : sequences_[i].layers)
            cache.oldest = std::max(std::min(cache.oldest, begin[i]), length[i] - cache.blocks * Attention::kBlock);
    }
}

void Engine::run(int t) {
    const int threads = pool_.threads(), hidden = model_.hidden_size;
    float *x = floats(hidden_), *wide = floats(wide_), *mixed = floats(mixed_), *out = floats(out_);
    for (int r = t; r < count_; r += threads)
        dequantise_row(*model_.embedding, (*rows_)[r].token, x + std::size_t(r) * stride_);
    pool_.barrier();
    // Adds this thread's rows of a product to the residual stream. The same rows as `multiply` gave it, so that no
    // barrier is needed in between.
    const auto add = [&](const Linear& linear) {
        int row = 0;
        for (const auto& part : linear.parts) {
            const auto [first, last] = share_of_rows(part->out(), t, threads);
            for (int r = 0; r < count_ && first < last; r++)
                kernels_.add(x + std::size_t(r) * stride_ + row + first, out + std::size_t(r) * stride_ + row + first,
                             last - first);
            row += part->out();
        }
    };
    const auto times = [&](const Linear& linear, const float* from, int width, const std::vector<float>* norm, float* to) {
        const Products::Input& input =
            products_.prepare(t, from, count_, width, stride_, norm, model_.epsilon, linear);
        const double started = t ? 0 : now();
        products_.multiply(t, linear, input, count_, to, stride_);
        if (t == 0) spent_.products += now() - started;
    };
    const auto meet = [&](double& category) {  // a barrier whose wait belongs to what was done before it
        const double started = t ? 0 : now();
        pool_.barrier();
        if (t == 0) category += now() - started;
    };
    for (int index = 0; index < int(model_.layers.size()); index++) {
        const Layer& layer = model_.layers[index];
        if (!layer.o.empty()) {
            if (layer.qkv.empty()) {
                times(layer.o, x, hidden, &layer.mixer_norm, out);
                pool_.barrier();  // every thread has read x before any adds to it
            } else {
                times(layer.qkv, x, hidden, &layer.mixer_norm, wide);
                meet(spent_.products);
                const double started = t ? 0 : now();
                attention(t, index);
                pool_.barrier();
                if (t == 0) spent_.attention += now() - started;
                times(layer.o, mixed, layer.heads * layer.head_dim, nullptr, out);
            }
            add(layer.o);
            meet(spent_.products);
        }
        if (!layer.down.empty()) {
            if (layer.gate_up.empty()) {
                times(layer.down, x, hidden, &layer.ffn_norm, out);
                pool_.barrier();
            } else {
                times(layer.gate_up, x, hidden, &layer.ffn_norm, wide);
                meet(spent_.products);
                const int width = layer.gate_up.out() / 2;
                const auto [first, last] = share_of_rows(width, t, threads);
                for (int r = 0; r < count_ && first < last; r++) {
                    const float* gate = wide + std::size_t(r) * stride_;
                    kernels_.swiglu(gate + first, gate + width + first, last - first,
                                    mixed + std::size_t(r) * stride_ + first);
                }
                pool_.barrier();
                times(layer.down, mixed, width, nullptr, out);
            }
            add(layer.down);
            meet(spent_.products);
        }
    }
    if (wanted_.empty()) return;
    const int wanted = int(wanted_.size());
    const Products::Input& input =
        products_.prepare(t, x, wanted, hidden, stride_, &model_.final_norm, model_.epsilon, model_.head, &wanted_);
    const double started = t ? 0 : now();
    products_.multiply(t, model_.head, input, wanted, logits_, model_.vocab_size, &wanted_);
    pool_.barrier();
    if (t == 0) spent_.products += now() - started;
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
        float* qkv = floats(wide_) + std::size_t(r) * stride_;
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
    // Few heads and a long text: several threads share a head's segments. Otherwise a thread does all of a head's.
    const bool shared = segments_ > 1 && tasks < 4 * threads && threads > 1;
    if (count_ > 1 || shared) pool_.barrier();  // a row alone, not shared, sees keys of its own thread only
    const auto first_of = [&](const Row& row) { return layer.window ? std::max(0, row.position + 1 - layer.window) : 0; };
    const auto attend = [&](int task, int first, int last, Share* share, float* out) {
        of(task, [&](int, int head, const Row&, float* query, float*, float*, Kept& cache) {
            Attention a;
            const std::size_t each = bytes_of(model_.cache);
            const std::size_t blocks = std::size_t(head) * cache.blocks;
            a.keys = cache.keys.data() + blocks * Attention::kBlock * dim * each;
            a.values = cache.values.data() + blocks * Attention::kBlock * Attention::padded(dim) * each;
            a.cache = model_.cache;
            a.head_dim = dim;
            a.blocks = cache.blocks;
            a.first = first;
            a.last = last;
            a.scale = attention_scale;
            a.scratch = own.scores.data();
            const float* queries[kMaxQueries];
            float* outs[kMaxQueries];
            for (int m = 0; m < per_group; m++) {
                queries[m] = query + m * dim;
                outs[m] = out + m * dim;
            }
            kernels_.attend(a, queries, per_group, share, outs);
        });
    };
    // Segment s of a task, counted from the first it sees: its shares (per_group) and what it adds (per_group, dim).
    const std::size_t part = std::size_t(per_group) * (dim + 2);
    const auto part_of = [&](float* parts, int s) { return parts + s * part + 2 * per_group; };
    const auto share_of = [&](float* parts, int s) { return reinterpret_cast<Share*>(parts + s * part); };
    const auto each_segment = [&](int task, auto&& body) {  // body(s, first, last)
        const Row& row = (*rows_)[task / layer.kv_heads];
        int s = 0;
        for (int first = first_of(row); first <= row.position; s++) {
            const int last = std::min(row.position + 1, (first / Attention::kSegment + 1) * Attention::kSegment);
            body(s, first, last);
            first = last;
        }
        return s;
    };
    const auto finish = [&](int task, float* parts, int count) {
        const int head = task % layer.kv_heads;
        float* out = floats(mixed_) + std::size_t(task / layer.kv_heads) * stride_ + head * per_group * dim;
        for (int m = 0; m < per_group; m++)
            merge(share_of(parts, 0) + m, part / 2, part_of(parts, 0) + m * dim, part, count,
                  layer.sinks.empty() ? nullptr : &layer.sinks[head * per_group + m], dim, out + m * dim);
    };
    if (!shared) {
        own.parts.resize(part * segments_);
        for (int task = t; task < tasks; task += threads)
            finish(task, own.parts.data(), each_segment(task, [&](int s, int first, int last) {
                       attend(task, first, last, share_of(own.parts.data(), s), part_of(own.parts.data(), s));
                   }));
        return;
    }
    int number = 0;
    for (int task = 0; task < tasks; task++)
        each_segment(task, [&](int s, int first, int last) {
            float* parts = floats(parts_) + task * segments_ * part;
            if (number++ % threads == t) attend(task, first, last, share_of(parts, s), part_of(parts, s));
        });
    pool_.barrier();
    for (int task = t; task < tasks; task += threads)
        finish(task, floats(parts_) + task * segments_ * part, each_segment(task, [](int, int, int) {}));
}

}  // namespace pennyweight
