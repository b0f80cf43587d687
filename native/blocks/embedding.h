// Where the residual stream begins: a row of a table for every token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "blocks/block.h"

namespace pennyweight {

class Embedding {
public:
    Embedding(std::shared_ptr<Matrix> table, float scale) : table_(std::move(table)), scale_(scale) {
        if (table_->layout == Matrix::Layout::zigzag) misfit("the embedding is zigzag, which has no rows to read");
    }

    int vocabulary() const { return table_->out(); }
    int hidden() const { return table_->in(); }
    const std::shared_ptr<Matrix>& table() const { return table_; }

    // out (hidden) for the last token of a text, of which all before it is given too.
    void read(std::span<const std::int32_t> text, float* out) const {
        dequantise_row(*table_, text.back(), out);
        for (int i = 0; scale_ != 1 && i < hidden(); i++) out[i] *= scale_;
    }

private:
    std::shared_ptr<Matrix> table_;
    float scale_;
};

}  // namespace pennyweight
