// A decoder as a flat list of blocks between an embedding and a head.
#pragma once

#include "blocks/block.h"
#include "blocks/embedding.h"

namespace pennyweight {

class Model {
public:
    static constexpr int kMostContext = 1 << 30;  // so that numbers of positions can be rounded up

    // For sequences of up to `context` tokens. Throws std::invalid_argument if parts do not fit, as `add` does.
    // Logits are products over `divisor`; with a `cap` above 0 they become cap tanh(logit / cap).
    Model(std::shared_ptr<const Embedding> embedding, Norm norm, Linear head, int context, float divisor = 1, float cap = 0);
    void add(std::shared_ptr<const Block> block);

    std::vector<const Linear*> linears() const;  // of all blocks, then the head
    bool is_sparse() const;                      // whether any matrix leaves columns out for rows that are `sparse`
    std::size_t weight_bytes() const;
    std::size_t bytes_read_per_token() const;          // of weights
    std::size_t state_bytes(int tokens) const;         // that a token after so many looks at
    std::size_t reserved_bytes(int capacity) const;    // for a sequence of up to so many tokens
    int positions() const;                             // that rotary tables have by now

    const std::shared_ptr<const Embedding> embedding;
    const Norm norm;  // before the head
    const Linear head;
    const int context;
    const float divisor, cap;
    const std::vector<std::shared_ptr<const Block>>& blocks() const { return blocks_; }

private:
    std::vector<std::shared_ptr<const Block>> blocks_;
};

}  // namespace pennyweight
