// A decoder as a flat list of layers, and one function that runs tokens through it.
//
// `step` takes any mix of rows: the next token of several sequences, or a stretch of one prompt. Every row is computed
// by the same operations in the same order whatever it shares the step with, so batching, chunking a prompt and checking
// guessed tokens change no bit of the result.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "products.h"
#include "thread_pool.h"

namespace pennyweight {

struct Layer {
    // Mixer: attention (qkv and o), one matrix (o alone), or nothing.
    std::vector<float> mixer_norm;
    Linear qkv, o;
    int heads = 0, kv_heads = 0, head_dim = 0;
    int window = 0;  // positions seen, the current one included; 0: all
    std::vector<float> q_norm, k_norm, sinks;
    // FFN: gated (gate_up and down), one matrix (down alone), or nothing.
    std::vector<float> ffn_norm;
    Linear gate_up, down;
};

struct Model {
    int hidden_size = 0, vocab_size = 0, max_positions = 0;
    float epsilon = 1e-5f;
    Cache cache = Cache::float16;
    std::shared_ptr<Matrix> embedding;
    Linear head;
    std::vector<float> final_norm;
    std::vector<float> cosine, sine;  // (max_positions, rotary_half)
    int rotary_half = 0;
    float attention_scale = 1;
    std::vector<Layer> layers;
};

struct Row {
    int sequence, position, token;
    bool wants_logits;
    bool sparse;  // matrices with a threshold leave columns out
};

class Engine {
public:
    Engine(Model model, int threads, const Kernels& kernels);

    // Room for the keys and values of one more sequence of up to `capacity` tokens; its number. Or one given back.
    int open(int capacity);
    void close(int sequence);
    // Whether a sequence still holds all that a token after its first `tokens` looks at: a layer with a window keeps its
    // last positions only, and those that were written over do not come back when a text goes back.
    bool can_go_back(int sequence, int tokens) const;
    // Make the first `tokens` positions of `to` those of `from`, which must be able to go back there.
    void copy(int from, int to, int tokens);
    // As if so many tokens had been run, with the same key and value everywhere: to time what comes after a long text.
    void fill(int sequence, int tokens);

    // Run rows; writes logits (vocab_size) of those that want them, in order. Positions of a sequence must come in
    // order, without gaps; the first may lie before the end, where can_go_back. Throws std::invalid_argument.
    void step(const std::vector<Row>& rows, float* logits);

    int threads() const { return pool_.threads(); }
    const Model& model() const { return model_; }
    const Kernels& kernels() const { return kernels_; }
    bool is_sparse() const;  // whether any matrix leaves columns out for rows that are `sparse`
    std::size_t weight_bytes() const;
    std::size_t bytes_read_per_token() const;  // of weights
    std::size_t cache_bytes() const;
    std::size_t cache_bytes_of(int tokens) const;  // that a token after so many looks at
    // Seconds that steps have spent, since the engine was made, in products, in attention, and in all: by the first
    // thread, waiting for the others included.
    struct Spent {
        double products = 0, attention = 0, all = 0;
    };
    const Spent& spent() const { return spent_; }
    const Products::Sparse& sparse() const { return products_.sparse(); }  // products of the last step's sparse rows

    static constexpr int kMaxRows = Products::kMaxRows;
    static constexpr int kMaxQueries = 128;  // that share a key-value head

private:
    struct Kept {  // keys and values of one layer and sequence
        Buffer keys, values;
        int blocks = 0;
        int oldest = 0;  // positions from here to the sequence's length are there
    };
    struct Sequence {
        bool used = false;
        int length = 0, capacity = 0;
        std::vector<Kept> layers;
    };
    struct Thread {  // scratch that no other thread touches
        std::vector<float> scores = std::vector<float>(Attention::kScratch), head, parts;
    };

    void check() const;  // that the model's parts fit; throws std::invalid_argument
    const Sequence& used(int sequence) const;
    // The layer that has lost what a token after the first `tokens` looks at; null if all is there.
    const Layer* forgetful(const Sequence& sequence, int tokens) const;
    void run(int t);
    void attention(int t, int index);
    void store(Kept& cache, const Layer& layer, int head, int position, const float* key, const float* value, Thread& own);

    Model model_;
    const Kernels& kernels_;
    ThreadPool pool_;
    Products products_;
    std::vector<Thread> own_;
    std::vector<Sequence> sequences_;
    int stride_ = 0;  // of the buffers below, in floats

    // Of the step that runs.
    const std::vector<Row>* rows_ = nullptr;
    float* logits_ = nullptr;
    std::vector<int> wanted_;
    int count_ = 0;
    Spent spent_;
    Buffer hidden_, wide_, mixed_, out_;  // (kMaxRows, stride_) float32
    int segments_ = 1;  // of the longest text, for attention
    Buffer parts_;      // what threads that share a head found in its segments
};

}  // namespace pennyweight
