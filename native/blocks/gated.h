// Gated MLP: down (activation(gate x) * up x).
#pragma once

#include "blocks/block.h"

namespace pennyweight {

class Gated : public Block {
public:
    // gate_up: rows of gate, then as many of up.
    Gated(Norms norms, Linear gate_up, Linear down, Activation activation);

    std::vector<const Linear*> linears() const override { return {&gate_up_, &down_}; }
    void run(Step& step, int t, int number) const override;

private:
    Linear gate_up_, down_;
    Activation activation_;
};

}  // namespace pennyweight
