// A step and a block of it: hidden += block(hidden).
#pragma once

#include <climits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "products.h"
#include "state.h"

namespace pennyweight {

struct Row {
    int sequence, position, token;
    bool wants_logits;
    bool sparse;  // matrices with a threshold leave columns out
};

// One step as blocks see it: rows of activations, and what all threads do with them together. Whatever takes the number
// `t` of a thread is called by every one of them.
struct Step {
    Step(ThreadPool& pool, const Kernels& kernels)
        : pool(pool), kernels(kernels), products(pool, kernels), scratch(pool.threads()) {}

    ThreadPool& pool;
    const Kernels& kernels;
    Products products;
    // kMaxRows of each: the residual stream, what the first matrices of blocks make, what the last ones read and make.
    Panel hidden, wide, mixed, out;
    Buffer shared;  // as large as the blocks ask for
    std::vector<std::vector<float>> scratch;

    std::span<const Row> rows;
    std::span<Sequence> sequences;
    int count = 0;    // rows
    int longest = 0;  // positions of the longest text, those of this step included

    // Seconds that steps have spent in products, in attention, and in all: by the first thread, waiting for the others
    // included.
    struct Spent {
        double products = 0, attention = 0, all = 0;
    } spent;

    template <class Kept>
    Kept& state(int block, int r) const {
        return static_cast<Kept&>(*sequences[rows[r].sequence].states[block]);
    }
    // So many floats that no other thread touches; they stay until the next call.
    float* own(int t, std::size_t n) {
        if (scratch[t].size() < n) scratch[t].resize(n);
        return scratch[t].data();
    }

    // to = linear (normed from). On return this thread's share_of_rows of every part is written.
    void times(int t, const Linear& linear, const Panel& from, const Panel& to, const Norm& norm = {});
    // A barrier whose wait belongs to what was done before it.
    void meet(int t, double& category) {
        timed(t, category, [&] { pool.barrier(); });
    }
    // hidden += factor * normed out, of which this thread has written its share_of_rows.
    void add(int t, int width, const Norm& norm, float factor);

    template <class Body>
    static void timed(int t, double& category, Body&& body) {
        const double started = t ? 0 : now();
        body();
        if (t == 0) category += now() - started;
    }
    static double now();
};

// Its norms, what it computes, and what it keeps of a sequence. Engines share blocks; nothing in them changes.
class Block {
public:
    struct Norms {
        Norm before, after;  // of what comes in; of what it computes, before that is added
        float residual = 1;  // multiplies what is added
    };

    // `last` makes the rows that are added. Constructors throw std::invalid_argument if their parts do not fit.
    Block(Norms norms, const Linear& last);
    virtual ~Block() = default;

    virtual std::vector<const Linear*> linears() const = 0;
    virtual int positions() const { return INT_MAX; }  // that a sequence may have by now
    // What it keeps of a sequence of up to `capacity` tokens; null: nothing.
    virtual std::unique_ptr<State> open(int capacity) const { return (void)capacity, nullptr; }
    virtual std::size_t reserved_bytes(int capacity) const { return (void)capacity, 0; }  // of such a state
    virtual std::size_t state_bytes(int tokens) const { return (void)tokens, 0; }  // that a token after so many looks at
    virtual std::size_t shared_floats(const Step& step) const { return (void)step, 0; }  // of step.shared
    // Called by all threads: step.out = what is computed from step.hidden, of which every thread writes its share_of_rows.
    // No thread may add to hidden while another reads it: there is a barrier after the last reading. `number`: of the
    // block, and so of its states.
    virtual void run(Step& step, int t, int number) const = 0;

    const Norms norms;
    const int hidden;
};

// Throw std::invalid_argument.
[[noreturn]] void misfit(const std::string& what);
void expect_shape(const std::string& name, const Linear& linear, std::int64_t out, std::int64_t in);
void expect_values(const std::string& name, const std::vector<float>& values, std::int64_t expected);

}  // namespace pennyweight
