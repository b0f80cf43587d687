#include "blocks/dense.h"

namespace pennyweight {

Dense::Dense(Norms norms, Linear matrix) : Block(std::move(norms), matrix), matrix_(std::move(matrix)) {
    expect_shape("the matrix", matrix_, hidden, hidden);
}

void Dense::run(Step& step, int t, int) const {
    step.times(t, matrix_, step.hidden, step.out, norms.before);
    step.pool.barrier();  // every thread has read hidden before any adds to it
}

}  // namespace pennyweight
