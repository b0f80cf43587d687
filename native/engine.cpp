#include "engine.h"

#include <algorithm>
#include <stdexcept>

namespace pennyweight {

Engine::Engine(Model model, std::shared_ptr<ThreadPool> pool, const Kernels& kernels)
    : model_(std::move(model)), pool_(std::move(pool)), step_(*pool_, kernels) {
    for (const auto& block : model_.blocks()) {
        bool first = true;  // of a block's matrices, which read its normed input
        for (const Linear* linear : block->linears()) {
            step_.products.expect(*linear, first && !block->norms.before.empty());
            first = false;
        }
    }
    step_.products.expect(model_.head, !model_.norm.empty(), false);
    step_.products.reserve();
    const int hidden = model_.embedding->hidden();
    step_.hidden = Panel(kMaxRows, round_up(hidden, 16));
    step_.wide = Panel(kMaxRows, step_.products.out_stride());
    step_.mixed = Panel(kMaxRows, step_.products.in_stride());
    step_.out = Panel(kMaxRows, Products::out_stride(hidden));
}

std::size_t Engine::work_bytes(int rows) const {
    std::size_t total = step_.products.work_bytes(rows);
    for (const Panel* panel : {&step_.hidden, &step_.wide, &step_.mixed, &step_.out})
        total += sizeof(float) * std::size_t(rows) * panel->stride;
    return total;
}

std::size_t Engine::state_bytes() const {
    std::size_t total = 0;
    for (const Sequence& sequence : sequences_)
        for (const auto& state : sequence.states) total += state ? state->bytes() : 0;
    return total;
}

std::size_t Engine::unused_bytes() const {
    std::size_t total = 0;
    for (const Sequence& sequence : sequences_)
        if (sequence.used()) total += model_.reserved_bytes(sequence.capacity) - model_.reserved_bytes(int(sequence.ids.size()));
    return total;
}

std::string Engine::trouble(int number) const {
    const Sequence& sequence = used(number);
    for (const auto& state : sequence.states)
        if (const std::string found = state ? state->trouble(int(sequence.ids.size())) : ""; !found.empty()) return found;
    return {};
}

int Engine::open(int capacity) {
    if (capacity < 1 || capacity > model_.context)
        throw std::invalid_argument("a sequence of " + std::to_string(capacity) + " tokens; this model takes 1 to " +
                                    std::to_string(model_.context));
    if (capacity > model_.positions())
        throw std::invalid_argument("rotary tables of " + std::to_string(model_.positions()) + " positions for a sequence of " +
                                    std::to_string(capacity) + " tokens");
    Sequence sequence{.capacity = capacity};
    for (const auto& block : model_.blocks()) sequence.states.push_back(block->open(capacity));
    const auto place = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& one) { return !one.used(); });
    if (place != sequences_.end()) return *place = std::move(sequence), int(place - sequences_.begin());
    sequences_.push_back(std::move(sequence));
    return int(sequences_.size()) - 1;
}

void Engine::close(int sequence) { used(sequence) = Sequence(); }

const Sequence& Engine::used(int sequence) const {
    if (sequence < 0 || sequence >= int(sequences_.size()) || !sequences_[sequence].used())
        throw std::invalid_argument("sequence " + std::to_string(sequence) + " is not open");
    return sequences_[sequence];
}

bool Engine::can_go_back(int number, int tokens) const {
    const Sequence& sequence = used(number);
    return tokens >= 0 && tokens <= sequence.length && !sequence.forgetful(tokens);
}

void Engine::copy(int from, int to, int tokens) {
    if (!can_go_back(from, tokens) || tokens > used(to).capacity)
        throw std::invalid_argument("sequence " + std::to_string(from) + " does not hold its first " + std::to_string(tokens) +
                                    " tokens, or sequence " + std::to_string(to) + " has no room for them");
    if (from == to) return;
    const Sequence& source = sequences_[from];
    Sequence& target = sequences_[to];
    target.ids.resize(std::max(target.ids.size(), std::size_t(tokens)));
    std::copy_n(source.ids.begin(), tokens, target.ids.begin());
    for (std::size_t i = 0; i < source.states.size(); i++)
        if (source.states[i]) target.states[i]->copy(*source.states[i], tokens);
    target.length = tokens;
}

void Engine::fill(int number, int tokens) {
    Sequence& sequence = used(number);
    if (tokens < 0 || tokens > sequence.capacity)
        throw std::invalid_argument("sequence " + std::to_string(number) + " has no room for " + std::to_string(tokens) +
                                    " tokens");
    sequence.ids.assign(std::max(sequence.ids.size(), std::size_t(tokens)), 0);
    for (const auto& state : sequence.states)
        if (state) state->fill(tokens);
    sequence.length = tokens;
}

void Engine::step(const std::vector<Row>& rows, float* logits) {
    if (rows.empty() || rows.size() > kMaxRows)
        throw std::invalid_argument(std::to_string(rows.size()) + " rows; a step takes 1 to " + std::to_string(kMaxRows));
    std::vector<int> length;
    for (const Sequence& sequence : sequences_) length.push_back(sequence.length);
    std::vector<int> begin(sequences_.size(), -1);  // where a sequence goes on
    for (const Row& row : rows) {
        const Sequence& sequence = used(row.sequence);
        if (row.token < 0 || row.token >= model_.embedding->vocabulary())
            throw std::invalid_argument("token " + std::to_string(row.token) + " is outside the vocabulary of " +
                                        std::to_string(model_.embedding->vocabulary()));
        // A sequence may go back: tokens that were guessed wrong are written over.
        int& next = length[row.sequence];
        if (begin[row.sequence] < 0) {
            if (row.position >= 0 && row.position < next) next = row.position;
            begin[row.sequence] = next;
            if (const State* state = sequence.forgetful(next))
                throw std::invalid_argument("sequence " + std::to_string(row.sequence) + " cannot go back to position " +
                                            std::to_string(next) + ": " + state->name() + " has forgotten what came before");
        }
        if (row.position != next || row.position >= sequence.capacity)
            throw std::invalid_argument("position " + std::to_string(row.position) + " of sequence " +
                                        std::to_string(row.sequence) + "; the next is " + std::to_string(next) + " of " +
                                        std::to_string(sequence.capacity));
        next++;
    }
    step_.rows = rows;
    step_.sequences = sequences_;
    step_.count = int(rows.size());
    step_.longest = 0;
    logits_ = logits;
    wanted_.clear();
    std::vector<char> sparse(rows.size());
    for (int r = 0; r < step_.count; r++) {
        const Row& row = rows[r];
        if (row.wants_logits) wanted_.push_back(r);
        sparse[r] = row.sparse;
        step_.longest = std::max(step_.longest, row.position + 1);
        auto& ids = sequences_[row.sequence].ids;
        if (row.position >= int(ids.size())) ids.resize(row.position + 1);
        ids[row.position] = row.token;
    }
    step_.products.begin(std::move(sparse));
    std::size_t shared = 0;
    for (const auto& block : model_.blocks()) shared = std::max(shared, sizeof(float) * block->shared_floats(step_));
    if (step_.shared.size() < shared) step_.shared = Buffer(shared, false);
    Step::timed(0, step_.spent.all, [&] { pool_->run([this](int t) { run(t); }); });
    for (std::size_t i = 0; i < sequences_.size(); i++) {
        if (begin[i] < 0) continue;
        sequences_[i].length = length[i];
        for (const auto& state : sequences_[i].states)
            if (state) state->went_on(begin[i], length[i]);
    }
}

void Engine::run(int t) {
    for (int r = t; r < step_.count; r += threads()) {
        const Row& row = step_.rows[r];
        model_.embedding->read({sequences_[row.sequence].ids.data(), std::size_t(row.position) + 1}, step_.hidden.at(r));
    }
    pool_->barrier();
    for (int i = 0; i < int(model_.blocks().size()); i++) {
        const Block& block = *model_.blocks()[i];
        block.run(step_, t, i);
        step_.add(t, block.hidden, block.norms.after, block.norms.residual);  // hidden += block(hidden)
    }
    if (wanted_.empty()) return;
    const int wanted = int(wanted_.size());
    const Products::Input& input =
        step_.products.prepare(t, step_.hidden.at(0), wanted, step_.hidden.stride, model_.norm, model_.head, &wanted_);
    Step::timed(t, step_.spent.products, [&] {
        step_.products.multiply(t, model_.head, input, wanted, logits_, model_.head.out(), &wanted_);
        pool_->barrier();
    });
    if (model_.divisor == 1 && !model_.cap) return;
    const int width = model_.head.out();
    for (int r = t; r < wanted; r += threads())
        step_.kernels.cap(logits_ + std::size_t(r) * width, 1 / model_.divisor, model_.cap, width);
}

}  // namespace pennyweight
