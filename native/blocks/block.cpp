#include "blocks/block.h"

#include <chrono>
#include <stdexcept>

namespace pennyweight {

double Step::now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void Step::times(int t, const Linear& linear, const Panel& from, const Panel& to, const Norm& norm) {
    const Products::Input& input = products.prepare(t, from.at(0), count, from.stride, norm, linear);
    timed(t, spent.products, [&] { products.multiply(t, linear, input, count, to.at(0), to.stride); });
}

void Step::add(int t, int width, const Norm& norm, float factor) {
    const auto multiply = [&](float* x, int n) {
        for (int i = 0; factor != 1 && i < n; i++) x[i] *= factor;
    };
    if (norm.empty()) {  // the same rows as `multiply` gave this thread, so that no barrier is needed in between
        const auto [first, last] = share_of_rows(width, t, pool.threads());
        for (int r = 0; r < count && first < last; r++) {
            multiply(out.at(r) + first, last - first);
            kernels.add(hidden.at(r) + first, out.at(r) + first, last - first);
        }
    } else {
        meet(t, spent.products);
        for (int r = t; r < count; r += pool.threads()) {
            kernels.rms_norm(out.at(r), norm.weight.data(), norm.epsilon, width, out.at(r));
            multiply(out.at(r), width);
            kernels.add(hidden.at(r), out.at(r), width);
        }
    }
    meet(t, spent.products);
}

Block::Block(Norms given, const Linear& last) : norms(std::move(given)), hidden(last.empty() ? 0 : last.out()) {
    if (last.parts.size() != 1) misfit("what is added has to come from one matrix, not " + std::to_string(last.parts.size()));
    if (!norms.before.empty()) expect_values("the norm", norms.before.weight, hidden);
    if (!norms.after.empty()) expect_values("the norm behind", norms.after.weight, hidden);
}

void misfit(const std::string& what) { throw std::invalid_argument("the model's parts do not fit: " + what); }

void expect_shape(const std::string& name, const Linear& linear, std::int64_t out, std::int64_t in) {
    if (linear.empty()) misfit(name + " is missing");
    if (linear.out() != out || linear.in() != in)
        misfit(name + " is " + std::to_string(linear.out()) + " x " + std::to_string(linear.in()) + ", expected " +
               std::to_string(out) + " x " + std::to_string(in));
}

void expect_values(const std::string& name, const std::vector<float>& values, std::int64_t expected) {
    if (std::int64_t(values.size()) != expected)
        misfit(name + " has " + std::to_string(values.size()) + " values, expected " + std::to_string(expected));
}

}  // namespace pennyweight
