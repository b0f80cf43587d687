// Attention of queries in groups on cached keys and values, with or without rotary embedding, windows and sinks.
#pragma once

#include "blocks/block.h"
#include "cache.h"

namespace pennyweight {

// Cosines and sines (positions, half) that blocks share. They grow with the texts: a model may allow many more positions than
// any has.
struct Rotary {
    int positions = 0, half = 0;
    std::vector<float> cosine, sine;
};

class Attention : public Block {
public:
    static constexpr int kMaxQueries = 128;  // that share a key-value head

    struct Parts {
        Linear qkv, o;
        int heads = 0, kv_heads = 0;
        int head_dim = 0, value_dim = 0;  // of queries and keys, and of values
        std::int64_t window = 0;          // positions seen, the current one included; 0: all
        float scale = 1, cap = 0;         // of scores; a cap above 0: cap tanh(score / cap)
        Cache cache = Cache::float16;
        std::shared_ptr<const Rotary> rotary;  // null: none
        bool neighbours = false;               // it turns each channel with the next, not halves with each other
        Norm q_norm, k_norm;  // as long as a head: of each; as all heads: of all together, before they are rotated
        std::vector<float> sinks;  // logits that take part and have no value, one per head
    };

    Attention(Norms norms, Parts parts);

    std::vector<const Linear*> linears() const override { return {&parts_.qkv, &parts_.o}; }
    int positions() const override { return parts_.rotary ? parts_.rotary->positions : INT_MAX; }
    std::unique_ptr<State> open(int capacity) const override;
    std::size_t reserved_bytes(int capacity) const override;
    std::size_t state_bytes(int tokens) const override;
    std::size_t shared_floats(const Step& step) const override;
    void run(Step& step, int t, int number) const override;

private:
    void norm_whole_rows(Step& step, int t) const;
    void mix(Step& step, int t, int number) const;
    bool threads_share_heads(const Step& step) const;

    Parts parts_;
};

}  // namespace pennyweight
