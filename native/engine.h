// Runs tokens through a model.
//
// `step` takes any mix of rows: the next token of several sequences, or a stretch of one prompt. Every row is computed
// by the same operations in the same order whatever it shares the step with, so batching, chunking a prompt and checking
// guessed tokens change no bit of the result.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "blocks/block.h"
#include "model.h"

namespace pennyweight {

class Engine {
public:
    Engine(Model model, std::shared_ptr<ThreadPool> pool, const Kernels& kernels);

    // Room for one more sequence of up to `capacity` tokens; its number. Or given back. Memory is taken as a text grows.
    int open(int capacity);
    void close(int sequence);
    // Whether a sequence still holds all that a token after its first `tokens` looks at: some blocks forget, and what
    // they wrote over does not come back when a text goes back.
    bool can_go_back(int sequence, int tokens) const;
    // Make the first `tokens` positions of `to` those of `from`, which must be able to go back there.
    void copy(int from, int to, int tokens);
    // As if so many tokens had been run, all alike: to time what comes after a long text.
    void fill(int sequence, int tokens);

    // Run rows; writes logits (vocabulary) of those that want them, in order. Positions of a sequence must come in
    // order, without gaps; the first may lie before the end, where can_go_back. Throws std::invalid_argument.
    void step(const std::vector<Row>& rows, float* logits);

    int threads() const { return pool_->threads(); }
    const Model& model() const { return model_; }
    const Kernels& kernels() const { return step_.kernels; }
    std::size_t state_bytes() const;   // reserved for all open sequences
    std::size_t work_bytes(int rows) const;  // that a step of so many rows writes, logits and threads' own apart
    std::size_t unused_bytes() const;  // of them, where no text has been yet
    std::string trouble(int sequence) const;  // what is wrong with what is kept of it, if anything is
    const Step::Spent& spent() const { return step_.spent; }
    const Products::Sparse& sparse() const { return step_.products.sparse(); }  // of the last step's sparse rows

    static constexpr int kMaxRows = Products::kMaxRows;

private:
    const Sequence& used(int sequence) const;
    Sequence& used(int sequence) { return const_cast<Sequence&>(std::as_const(*this).used(sequence)); }
    void run(int t);

    const Model model_;
    const std::shared_ptr<ThreadPool> pool_;
    std::vector<Sequence> sequences_;
    Step step_;
    std::vector<int> wanted_;  // rows whose logits are
    float* logits_ = nullptr;
};

}  // namespace pennyweight
