#include "model.h"

#include <algorithm>

namespace pennyweight {

Model::Model(std::shared_ptr<const Embedding> embedding, Norm norm, Linear head, int context, float divisor, float cap)
    : embedding(std::move(embedding)), norm(std::move(norm)), head(std::move(head)), context(context), divisor(divisor),
      cap(cap) {
    if (!(divisor > 0) || !(cap >= 0)) misfit("logits over " + std::to_string(divisor) + ", at most " + std::to_string(cap));
    if (context < 1 || context > kMostContext) misfit("a context of " + std::to_string(context));
    expect_shape("the head", this->head, this->embedding->vocabulary(), this->embedding->hidden());
    if (!this->norm.empty()) expect_values("the last norm", this->norm.weight, this->embedding->hidden());
}

void Model::add(std::shared_ptr<const Block> block) {
    if (block->hidden != embedding->hidden())
        misfit("a block of width " + std::to_string(block->hidden) + " in a model of width " + std::to_string(embedding->hidden()));
    blocks_.push_back(std::move(block));
}

std::vector<const Linear*> Model::linears() const {
    std::vector<const Linear*> all;
    for (const auto& block : blocks_)
        for (const Linear* linear : block->linears()) all.push_back(linear);
    all.push_back(&head);
    return all;
}

bool Model::is_sparse() const {
    for (const Linear* linear : linears())
        for (const auto& part : linear->parts)
            if (part->threshold >= 0) return true;
    return false;
}

std::size_t Model::weight_bytes() const {
    std::size_t total = embedding->table()->nbytes();
    for (const Linear* linear : linears())
        for (const auto& part : linear->parts)
            if (part != embedding->table()) total += part->nbytes();
    return total;
}

std::size_t Model::bytes_read_per_token() const {
    const bool tied = std::find(head.parts.begin(), head.parts.end(), embedding->table()) != head.parts.end();
    return weight_bytes() - (tied ? 0 : embedding->table()->nbytes());
}

int Model::positions() const {
    int least = INT_MAX;
    for (const auto& block : blocks_) least = std::min(least, block->positions());
    return least;
}

std::size_t Model::reserved_bytes(int capacity) const {
    std::size_t total = 0;
    for (const auto& block : blocks_) total += block->reserved_bytes(capacity);
    return total;
}

std::size_t Model::state_bytes(int tokens) const {
    std::size_t total = 0;
    for (const auto& block : blocks_) total += block->state_bytes(tokens);
    return total;
}

}  // namespace pennyweight
