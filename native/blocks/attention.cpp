#include "blocks/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace pennyweight {
namespace {

constexpr int kBlock = Cached::kBlock;

std::size_t key_bytes(const Attention::Parts& of) { return bytes_of(of.cache, of.head_dim); }
std::size_t value_bytes(const Attention::Parts& of) { return bytes_of(of.cache, Cached::padded(of.value_dim)); }

// Places of a ring: a window needs its own positions and those a step may add before they are looked at.
int blocks_for(const Attention::Parts& of, int capacity) {
    const std::int64_t places = of.window ? std::min<std::int64_t>(capacity, of.window + Products::kMaxRows) : capacity;
    return int((places + kBlock - 1) / kBlock);
}

// Keys and values of one sequence, of a block with a window in a ring.
class KeysValues : public State {
public:
    KeysValues(const Attention::Parts& of, int capacity) : of_(of), blocks_(blocks_for(of, capacity)) {
        const std::size_t positions = std::size_t(blocks_) * kBlock * of.kv_heads;
        keys_ = Buffer(positions * key_bytes(of), false);
        values_ = Buffer(positions * value_bytes(of), false);
    }

    std::string name() const override { return "a layer with a window of " + std::to_string(of_.window) + " positions"; }
    std::size_t bytes() const override { return keys_.size() + values_.size(); }

    // What float16 cannot hold it keeps as infinity.
    std::string trouble(int tokens) const override {
        if (of_.cache != Cache::float16) return {};
        const auto infinite = [](const Buffer& buffer, std::size_t first, std::size_t count) {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(buffer.data()) + first;
            return std::any_of(halves, halves + count, [](std::uint16_t h) { return (h & 0x7fff) == 0x7c00; });
        };
        const std::size_t used = std::min(blocks_, (tokens + kBlock - 1) / kBlock);
        const std::size_t key = std::size_t(kBlock) * of_.head_dim, value = std::size_t(kBlock) * Cached::padded(of_.value_dim);
        for (std::size_t head = 0; head < std::size_t(of_.kv_heads); head++)
            if (infinite(keys_, head * blocks_ * key, used * key) || infinite(values_, head * blocks_ * value, used * value))
                return "a key or value is beyond float16's range (65504), in which they are kept";
        return {};
    }

    int first_seen(int position) const { return of_.window ? int(std::max<std::int64_t>(0, position + 1 - of_.window)) : 0; }

    bool can_go_back(int tokens) const override {
        const int first = first_seen(tokens);
        return first >= tokens || first >= oldest_;
    }

    void copy(const State& other, int tokens) override {
        const auto& from = static_cast<const KeysValues&>(other);
        // Whole blocks, of positions that are there and as many as this one has places for.
        const int last = (tokens + kBlock - 1) / kBlock, first = std::max(from.oldest_ / kBlock, last - blocks_);
        for (int head = 0; head < of_.kv_heads; head++)
            for (int block = first; block < last; block++) {
                const std::size_t to_at = std::size_t(head) * blocks_ + block % blocks_;
                const std::size_t from_at = std::size_t(head) * from.blocks_ + block % from.blocks_;
                const std::size_t key = kBlock * key_bytes(of_), value = kBlock * value_bytes(of_);
                std::memcpy(keys_.data() + to_at * key, from.keys_.data() + from_at * key, key);
                std::memcpy(values_.data() + to_at * value, from.values_.data() + from_at * value, value);
            }
        oldest_ = std::min(tokens, std::max(from.oldest_, first * kBlock));
    }

    void fill(int tokens) override {
        constexpr int kSmall = 0x2c;  // a small positive number as any kind of float, and a code
        std::memset(keys_.data(), kSmall, keys_.size());
        std::memset(values_.data(), kSmall, values_.size());
        oldest_ = std::max(0, tokens - blocks_ * kBlock);
    }

    void went_on(int first, int last) override { oldest_ = std::max(std::min(oldest_, first), last - blocks_ * kBlock); }

    // `room`: as many floats as the wider of key and value.
    void store(int head, int position, const float* key, const float* value, const Kernels& kernels, float* room) {
        const std::size_t block = std::size_t(head) * blocks_ + position / kBlock % blocks_, place = position % kBlock;
        const int dim = of_.head_dim, value_dim = of_.value_dim, padded = Cached::padded(value_dim);
        std::uint8_t* keys = keys_.data() + block * Cached::block_bytes(of_.cache, dim);
        std::uint8_t* values = values_.data() + block * Cached::block_bytes(of_.cache, padded);
        if (of_.cache == Cache::int8) {
            const auto store = [&](const float* x, int n, std::uint8_t* block, int width, auto index) {
                const auto at = [&](int d) -> std::int8_t& { return reinterpret_cast<std::int8_t*>(block)[index(d, place, width)]; };
                reinterpret_cast<std::uint16_t*>(block + kBlock * width)[place] = encode(x, n, at);
            };
            store(key, dim, keys, dim, Cached::key_at);
            store(value, value_dim, values, padded, Cached::value_at);
        } else if (of_.cache == Cache::float32) {
            for (int d = 0; d < dim; d++) reinterpret_cast<float*>(keys)[place + d * kBlock] = key[d];
            std::memcpy(reinterpret_cast<float*>(values) + place * padded, value, sizeof(float) * value_dim);
        } else {
            auto* halves = reinterpret_cast<std::uint16_t*>(room);
            kernels.to_half(key, dim, halves);
            for (int d = 0; d < dim; d++) reinterpret_cast<std::uint16_t*>(keys)[place + d * kBlock] = halves[d];
            kernels.to_half(value, value_dim, reinterpret_cast<std::uint16_t*>(values) + place * padded);
        }
    }

    Cached look(int head, int first, int last, float* scratch) const {
        const std::size_t positions = std::size_t(head) * blocks_ * kBlock;
        return {keys_.data() + positions * key_bytes(of_), values_.data() + positions * value_bytes(of_), of_.cache,
                of_.head_dim, of_.value_dim, blocks_, first, last, of_.scale, of_.cap, scratch};
    }

private:
    const Attention::Parts& of_;
    const int blocks_;  // of a head
    Buffer keys_, values_;
    int oldest_ = 0;  // positions from here to the sequence's length are there
};

// Rotary embedding of one head: pairs (2 i, 2 i + 1), in place.
void rotate_neighbours(float* head, const float* cosine, const float* sine, int half) {
    for (int i = 0; i < half; i++) {
        const float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cosine[i] - b * sine[i];
        head[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
}

int segments(const Step& step) { return (step.longest - 1) / Cached::kSegment + 1; }

}  // namespace

Attention::Attention(Norms given, Parts parts) : Block(std::move(given), parts.o), parts_(std::move(parts)) {
    const auto& [qkv, o, heads, kv_heads, head_dim, value_dim, window, scale, cap, cache, rotary, neighbours, q_norm, k_norm,
                 sinks] = parts_;
    if (kv_heads < 1 || heads < 1 || heads % kv_heads || heads / kv_heads > kMaxQueries)
        misfit(std::to_string(heads) + " heads on " + std::to_string(kv_heads) + " key-value heads; a whole number of them, up to " +
               std::to_string(kMaxQueries) + ", share one");
    if (head_dim < 1 || value_dim < 1)
        misfit("heads of " + std::to_string(head_dim) + " and values of " + std::to_string(value_dim));
    if (rotary && std::int64_t(2) * rotary->half > head_dim)
        misfit("rotary tables of " + std::to_string(rotary->positions) + " x " + std::to_string(rotary->half) + " for heads of " +
               std::to_string(head_dim));
    if (window < 0) misfit("a window of " + std::to_string(window));
    if (!(cap >= 0)) misfit("scores of at most " + std::to_string(cap));
    const std::int64_t many = heads, few = kv_heads;
    expect_shape("q, k and v", qkv, (many + few) * head_dim + few * value_dim, hidden);
    expect_shape("o", o, hidden, many * value_dim);
    const auto each_or_all = [&, dim = head_dim](const std::string& name, const Norm& norm, int count) {
        if (!norm.empty() && int(norm.weight.size()) != dim) expect_values(name, norm.weight, count * dim);
    };
    each_or_all("the norm of queries", q_norm, heads);
    each_or_all("the norm of keys", k_norm, kv_heads);
    if (!sinks.empty()) expect_values("the list of sinks", sinks, heads);
    parts_.window = std::min<std::int64_t>(window, INT_MAX);  // no text is longer
}

std::unique_ptr<State> Attention::open(int capacity) const { return std::make_unique<KeysValues>(parts_, capacity); }

std::size_t Attention::reserved_bytes(int capacity) const {
    return std::size_t(blocks_for(parts_, capacity)) * kBlock * parts_.kv_heads * (key_bytes(parts_) + value_bytes(parts_));
}

std::size_t Attention::state_bytes(int tokens) const {
    const std::size_t seen = parts_.window ? std::min<std::int64_t>(tokens, parts_.window) : tokens;
    return seen * parts_.kv_heads * (key_bytes(parts_) + value_bytes(parts_));
}

// Few heads and a long text: several threads share a head's segments. Otherwise a thread does all of a head's.
bool Attention::threads_share_heads(const Step& step) const {
    const int threads = step.pool.threads();
    return segments(step) > 1 && step.count * parts_.kv_heads < 4 * threads && threads > 1;
}

std::size_t Attention::shared_floats(const Step& step) const {
    return threads_share_heads(step) ? std::size_t(step.count) * segments(step) * parts_.heads * (parts_.value_dim + 2) : 0;
}

void Attention::run(Step& step, int t, int number) const {
    step.times(t, parts_.qkv, step.hidden, step.wide, norms.before);
    step.meet(t, step.spent.products);
    Step::timed(t, step.spent.attention, [&] {
        norm_whole_rows(step, t);
        mix(step, t, number);
        step.pool.barrier();
    });
    step.times(t, parts_.o, step.mixed, step.out);
}

void Attention::norm_whole_rows(Step& step, int t) const {
    const auto whole = [&](const Norm& norm) { return int(norm.weight.size()) > parts_.head_dim; };
    if (!whole(parts_.q_norm) && !whole(parts_.k_norm)) return;
    for (int i = t; i < 2 * step.count; i += step.pool.threads()) {
        const Norm& norm = i % 2 ? parts_.k_norm : parts_.q_norm;
        float* at = step.wide.at(i / 2) + (i % 2 ? parts_.heads * parts_.head_dim : 0);
        if (whole(norm)) step.kernels.rms_norm(at, norm.weight.data(), norm.epsilon, int(norm.weight.size()), at);
    }
    step.pool.barrier();
}

void Attention::mix(Step& step, int t, int number) const {
    const int dim = parts_.head_dim, value_dim = parts_.value_dim, kv_heads = parts_.kv_heads;
    const int per_group = parts_.heads / kv_heads, threads = step.pool.threads(), tasks = step.count * kv_heads;
    const bool shared = threads_share_heads(step);
    // Segment s of a task, counted from the first it sees: its shares (per_group) and what it adds (per_group, value_dim).
    const std::size_t part = std::size_t(per_group) * (value_dim + 2);
    float* scores = step.own(t, Cached::scratch_floats(dim) + std::max(dim, value_dim) + (shared ? 0 : part * segments(step)));
    float *room = scores + Cached::scratch_floats(dim), *own_parts = room + std::max(dim, value_dim);
    const auto share_of = [&](float* parts, int s) { return reinterpret_cast<Share*>(parts + s * part); };
    const auto part_of = [&](float* parts, int s) { return parts + s * part + 2 * per_group; };

    // A task is a row and a key-value head.
    const auto row = [&](int task) -> const Row& { return step.rows[task / kv_heads]; };
    const auto kept = [&](int task) -> KeysValues& { return step.state<KeysValues>(number, task / kv_heads); };
    const auto query = [&](int task) { return step.wide.at(task / kv_heads) + task % kv_heads * per_group * dim; };
    const auto turn_pairs = parts_.neighbours ? rotate_neighbours : step.kernels.rotate;
    const auto rotate = [&](float* head, const Norm& norm, int position) {
        if (int(norm.weight.size()) == dim) step.kernels.rms_norm(head, norm.weight.data(), norm.epsilon, dim, head);
        if (const Rotary* tables = parts_.rotary.get()) {
            const std::size_t at = std::size_t(position) * tables->half;
            turn_pairs(head, tables->cosine.data() + at, tables->sine.data() + at, tables->half);
        }
        if (parts_.cache == Cache::int8) spread(head, dim);
    };
    for (int task = t; task < tasks; task += threads) {
        const int head = task % kv_heads, position = row(task).position;
        float* keys = step.wide.at(task / kv_heads) + parts_.heads * dim;
        for (int m = 0; m < per_group; m++) rotate(query(task) + m * dim, parts_.q_norm, position);
        rotate(keys + head * dim, parts_.k_norm, position);
        kept(task).store(head, position, keys + head * dim, keys + kv_heads * dim + head * value_dim, step.kernels, room);
    }
    if (step.count > 1 || shared) step.pool.barrier();  // a row alone, not shared, sees keys of its own thread only

    const auto attend = [&](int task, int first, int last, float* parts, int s) {
        const float* queries[kMaxQueries];
        float* outs[kMaxQueries];
        for (int m = 0; m < per_group; m++) {
            queries[m] = query(task) + m * dim;
            outs[m] = part_of(parts, s) + m * value_dim;
        }
        step.kernels.attend(kept(task).look(task % kv_heads, first, last, scores), queries, per_group, share_of(parts, s), outs);
    };
    const auto each_segment = [&](int task, auto&& body) {  // body(s, first, last); how many there are
        const int end = row(task).position + 1;
        int s = 0;
        for (int first = kept(task).first_seen(end - 1); first < end; s++) {
            const int last = std::min(end, (first / Cached::kSegment + 1) * Cached::kSegment);
            body(s, first, last);
            first = last;
        }
        return s;
    };
    const auto finish = [&](int task, float* parts, int count) {
        const int head = task % kv_heads;
        float* out = step.mixed.at(task / kv_heads) + head * per_group * value_dim;
        for (int m = 0; m < per_group; m++)
            merge(share_of(parts, 0) + m, part / 2, part_of(parts, 0) + m * value_dim, part, count,
                  parts_.sinks.empty() ? nullptr : &parts_.sinks[head * per_group + m], value_dim, out + m * value_dim);
    };
    if (!shared) {
        for (int task = t; task < tasks; task += threads)
            finish(task, own_parts, each_segment(task, [&](int s, int first, int last) { attend(task, first, last, own_parts, s); }));
        return;
    }
    const auto parts_of = [&](int task) { return step.shared.floats() + task * segments(step) * part; };
    int turn = 0;
    for (int task = 0; task < tasks; task++)
        each_segment(task, [&](int s, int first, int last) {
            if (turn++ % threads == t) attend(task, first, last, parts_of(task), s);
        });
    step.pool.barrier();
    for (int task = t; task < tasks; task += threads) finish(task, parts_of(task), each_segment(task, [](int, int, int) {}));
}

}  // namespace pennyweight
