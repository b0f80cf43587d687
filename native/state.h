// A sequence between steps: its tokens, and what every block keeps of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pennyweight {

// What one block keeps of one sequence.
class State {
public:
    virtual ~State() = default;
    virtual std::string name() const = 0;  // of the block, for messages
    virtual std::size_t bytes() const = 0;

    // Whether all that a token after the first `tokens` needs is there. One that cannot be rewound says no except at its
    // present length, and at 0, where it begins anew.
    virtual bool can_go_back(int tokens) const = 0;
    // Be what `from`, of the same block, is after its first `tokens` tokens; it can go back there.
    virtual void copy(const State& from, int tokens) = 0;
    // As if so many tokens had been run.
    virtual void fill(int tokens) = 0;
    // A step has run the tokens at positions [first, last).
    virtual void went_on(int first, int last) = 0;
};

struct Sequence {
    std::vector<std::int32_t> ids;  // as many as it has room for; none: not open
    int length = 0;
    std::vector<std::unique_ptr<State>> states;  // one per block, null where it keeps nothing

    bool used() const { return !ids.empty(); }
    int capacity() const { return int(ids.size()); }
    // A state that has lost what a token after the first `tokens` needs; null if all is there.
    const State* forgetful(int tokens) const {
        for (const auto& state : states)
            if (state && !state->can_go_back(tokens)) return state.get();
        return nullptr;
    }
};

}  // namespace pennyweight
