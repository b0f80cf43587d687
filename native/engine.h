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
#include "thread_pool.h"

namespace pennyweight {

// A matrix of one of the layouts, and its bytes.
struct Matrix {
    enum class Layout { wide, rows, zigzag };
    Layout layout = Layout::wide;
    Wide wide;
    Rows rows;
    Zigzag zigzag;
    float threshold = -1;           // zigzag: columns with |x| at most this are left out; below 0 keeps all
    std::vector<float> importance;  // zigzag: multiplies |x| before it is compared; empty: 1
    Buffer bytes;

    int out() const;
    int in() const;
    std::size_t nbytes() const { return bytes.size(); }
};

// Matrices stacked on one input: y = [A x; B x; ...] + bias.
struct Linear {
    std::vector<std::shared_ptr<Matrix>> parts;
    std::vector<float> bias;  // empty, or one value per row

    int out() const;
    int in() const { return parts.front()->in(); }
    bool empty() const { return parts.empty(); }
};

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
};

class Engine {
public:
    Engine(Model model, int threads, const Kernels& kernels);

    // Room for the keys and values of one more sequence of up to `capacity` tokens; its number. Or one given back.
    int open(int capacity);
    void close(int sequence);
    // Make the first `tokens` positions of `to` those of `from`.
    void copy(int from, int to, int tokens);

    // Run rows; writes logits (vocab_size) of those that want them, in order. Positions of a sequence must come in
    // order, without gaps. `sparse`: matrices with a threshold leave columns out. Throws std::invalid_argument.
    void step(const std::vector<Row>& rows, bool sparse, float* logits);

    int threads() const { return pool_.threads(); }
    const Model& model() const { return model_; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t weight_bytes() const;
    std::size_t bytes_read_per_token() const;  // of weights
    std::size_t cache_bytes() const;
    std::size_t cache_bytes_of(int tokens) const;  // that a token after so many looks at
    double kept_share() const { return kept_of_ ? double(kept_) / double(kept_of_) : 1.0; }  // of columns, when sparse

    static constexpr int kMaxRows = 512;

private:
    struct Kept {  // keys and values of one layer and sequence
        Buffer keys, values;
        int blocks = 0;
    };
    struct Sequence {
        bool used = false;
        int length = 0, capacity = 0;
        std::vector<Kept> layers;
    };
    struct Input {  // what a linear reads, for all rows
        std::vector<const float*> x;
        std::vector<Activations> quantised;
    };
    struct Thread {  // scratch that no other thread touches
        std::vector<float> normed, scores;
        std::vector<std::int8_t> codes;
        std::vector<float> scale, sum;
        std::vector<std::int32_t> minus8, index;
        std::vector<float> value, head;
        Input input;
        long kept = 0, kept_of = 0;
    };

    void run(int t);
    const Input& prepare(int t, const float* x, int width, int stride, const std::vector<float>* norm,
                         const Linear& next, const std::vector<int>* rows = nullptr);
    void multiply(int t, const Linear& linear, const Input& input, int count, float* y, int stride);
    void multiply_zigzag(int t, const Matrix& w, const Input& input, int count, float* y, int stride);
    void attention(int t, int index);
    void store(Kept& cache, const Layer& layer, int head, int position, const float* key, const float* value, Thread& own);
    void embed(int token, float* out) const;

    Model model_;
    const Kernels& kernels_;
    ThreadPool pool_;
    std::vector<Thread> own_;
    std::vector<Sequence> sequences_;
    int widest_ = 0;

    // Of the step that runs.
    const std::vector<Row>* rows_ = nullptr;
    bool sparse_ = false;
    float* logits_ = nullptr;
    std::vector<int> wanted_;
    int count_ = 0;
    Buffer hidden_, wide_, mixed_, out_, partial_;  // (kMaxRows, width) float32
    Buffer codes_, scale_, sum_, minus8_, normed_;
    Input shared_;
    long kept_ = 0, kept_of_ = 0;
};

// One row of a matrix in float32.
void dequantise_row(const Matrix& matrix, int row, float* out);

}  // namespace pennyweight
