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
    // What is wrong with what it keeps of the first `tokens` tokens, if anything is: why a model computed no number.
    virtual std::string trouble(int tokens) const { return (void)tokens, std::string(); }
};

struct Sequence {
    int capacity = 0;  // 0: not open
    int length = 0;
    std::vector<std::int32_t> ids;               // `length` of them or more
    std::vector<std::unique_ptr<State>> states;  // one per block, null where it keeps nothing

    bool used() const { return capacity > 0; }
    // A state that has lost what a token after the first `tokens` needs; null if all is there.
    const State* forgetful(int tokens) const {
        for (const auto& state : states)
            if (state && !state->can_go_back(tokens)) return state.get();
        return nullptr;
    }
};

}  // namespace pennyweight
