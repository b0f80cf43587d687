// One matrix in the place of a block.
#pragma once

#include "blocks/block.h"

namespace pennyweight {

class Dense : public Block {
public:
    Dense(Norms norms, Linear matrix);

    std::vector<const Linear*> linears() const override { return {&matrix_}; }
    void run(Step& step, int t, int number) const override;

private:
    Linear matrix_;
};

}  // namespace pennyweight
