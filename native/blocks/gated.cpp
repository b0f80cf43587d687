#include "blocks/gated.h"

namespace pennyweight {

Gated::Gated(Norms norms, Linear gate_up, Linear down, Activation activation)
    : Block(std::move(norms), down), gate_up_(std::move(gate_up)), down_(std::move(down)), activation_(activation) {
    expect_shape("gate and up", gate_up_, 2 * down_.in(), hidden);
}

void Gated::run(Step& step, int t, int) const {
    step.times(t, gate_up_, step.hidden, step.wide, norms.before);
    step.meet(t, step.spent.products);
    const int width = down_.in();
    const auto [first, last] = share_of_rows(width, t, step.pool.threads());
    for (int r = 0; r < step.count && first < last; r++) {
        const float* gate = step.wide.at(r);
        step.kernels.gate[int(activation_)](gate + first, gate + width + first, last - first, step.mixed.at(r) + first);
    }
    step.pool.barrier();
    step.times(t, down_, step.mixed, step.out);
}

}  // namespace pennyweight
