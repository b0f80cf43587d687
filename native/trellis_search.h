// The nearest sequence of a trellis code: Viterbi's algorithm over all states.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "trellis.h"

namespace pennyweight {

// Searches for one code. Numbers a state by its bits in reverse: the newest are the lowest then, and states that agree in
// all but their oldest bits, of which only the best goes on, lie 2^(L-k) apart.
template <int kBits>
class TrellisSearch {
public:
    // symbols (n): those whose values come nearest to x (n), differences squared and weighted by weight (n); made: values.
    void nearest(const float* x, const float* weight, int n, std::uint8_t* symbols, float* made) {
        from_.resize(std::size_t(n) * kRest);
        std::fill(best_, best_ + kRest, kNever);
        best_[0] = 0;
        for (int i = 0; i < n; i++) {
            if (i > 0) choose(from_.data() + std::size_t(i) * kRest);
            extend(x[i], weight[i]);
        }
        int state = int(std::min_element(cost_, cost_ + kStates) - cost_);
        for (int i = n - 1; i >= 0; i--) {
            symbols[i] = reversed(state % kChoices, kBits);
            made[i] = table_.value[state];
            const int rest = state / kChoices;
            state = rest | from_[std::size_t(i) * kRest + rest] << (kCode.window - kBits);
        }
    }

private:
    static constexpr const TrellisCode& kCode = trellis_code(kBits);
    static constexpr int kStates = 1 << kCode.window, kChoices = 1 << kBits, kRest = kStates / kChoices;
    static constexpr float kNever = 1e30f;
    static constexpr int kWide = 8;
    typedef float Floats __attribute__((vector_size(4 * kWide)));

    static constexpr std::uint8_t reversed(int value, int bits) {
        int out = 0;
        for (int i = 0; i < bits; i++) out |= (value >> i & 1) << (bits - 1 - i);
        return std::uint8_t(out);
    }

    struct Table {
        alignas(64) float value[kStates];
        Table() {
            for (int s = 0; s < kStates; s++) {
                unsigned state = 0;
                for (int i = 0; i < kCode.window; i++) state |= unsigned(s >> i & 1) << (kCode.window - 1 - i);
                value[s] = float(trellis_value(kCode, state));
            }
        }
    };

    // Of states that differ in their oldest bits alone the best one's cost, and which. The number takes the lowest bits of
    // the cost, so that one comparison finds both.
    void choose(std::uint8_t* from) {
        constexpr std::uint32_t kNumber = kChoices - 1;
        std::uint32_t least[kRest];
        for (int r = 0; r < kRest; r++) least[r] = 0x7fffffff;
        for (int b = 0; b < kChoices; b++)
            for (int r = 0; r < kRest; r++) {
                std::uint32_t bits;
                std::memcpy(&bits, cost_ + b * kRest + r, 4);
                least[r] = std::min(least[r], (bits & ~kNumber) | std::uint32_t(b));
            }
        for (int r = 0; r < kRest; r++) from[r] = std::uint8_t(least[r] & kNumber);
        std::memcpy(best_, least, sizeof(least));
    }

    void extend(float x, float weight) {
        for (int s = 0; s < kStates; s += kWide) {
            Floats value, before;
            std::memcpy(&value, table_.value + s, sizeof(value));
            if constexpr (kChoices >= kWide) {
                before = Floats{} + best_[s / kChoices];
            } else {
                const float a = best_[s / 4], b = best_[s / 4 + 1];
                before = Floats{a, a, a, a, b, b, b, b};
            }
            value -= x;
            before += weight * value * value;
            std::memcpy(cost_ + s, &before, sizeof(before));
        }
    }

    inline static const Table table_{};
    alignas(64) float cost_[kStates], best_[kRest];
    std::vector<std::uint8_t> from_;
};

}  // namespace pennyweight
