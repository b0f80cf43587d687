// Blocks, and the model they make.
#include <cmath>

#include "bind/bind.h"
#include "blocks/attention.h"
#include "blocks/dense.h"
#include "blocks/gated.h"
#include "model.h"

namespace pennyweight {
namespace {

using Vector = std::optional<In<float, 1>>;

Norm norm_of(const Vector& weight, float epsilon) { return {weight ? values(*weight) : std::vector<float>(), epsilon}; }

Block::Norms norms_of(const Vector& before, const Vector& after, float epsilon, float residual) {
    return {norm_of(before, epsilon), norm_of(after, epsilon), residual};
}

void extend(Rotary& rotary, In<float, 2> cosine, In<float, 2> sine) {
    expect(cosine.shape(0) == sine.shape(0) && cosine.shape(1) == sine.shape(1), "cosine and sine alike");
    expect(int(cosine.shape(1)) == rotary.half, "as many columns as the rows before");
    rotary.positions = size(rotary.positions + cosine.shape(0));
    rotary.cosine.insert(rotary.cosine.end(), cosine.data(), cosine.data() + cosine.size());
    rotary.sine.insert(rotary.sine.end(), sine.data(), sine.data() + sine.size());
}

template <auto kOf>
std::size_t counted(const Model& model, int tokens) {
    expect(tokens >= 0 && tokens <= Model::kMostContext, "0 to 2^30 tokens");
    return (model.*kOf)(tokens);
}

}  // namespace

void bind_blocks(nb::module_& module) {
    nb::enum_<Cache>(module, "Cache", "How keys and values are kept.")
        .value("float16", Cache::float16)
        .value("int8", Cache::int8)
        .value("float32", Cache::float32);

    nb::enum_<Activation>(module, "Activation", "Of gated MLPs.")
        .value("silu", Activation::silu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("relu2", Activation::relu2)
        .value("clamped", Activation::clamped);

    nb::class_<Rotary>(module, "Rotary", "Cosines and sines (positions, half), which blocks share.")
        .def(
            "__init__",
            [](Rotary* self, In<float, 2> cosine, In<float, 2> sine) {
                new (self) Rotary{.half = size(cosine.shape(1))};
                extend(*self, cosine, sine);
            },
            "cosine"_a, "sine"_a)
        .def("extend", extend, "cosine"_a, "sine"_a, "Rows for the positions that follow. No engine may be in a step.")
        .def_ro("positions", &Rotary::positions);

    nb::class_<Embedding>(module, "Embedding", "A row of a table for every token, times `scale`.")
        .def(
            "__init__",
            [](Embedding* self, std::shared_ptr<Matrix> table, float scale) {
                new (self) Embedding(given(std::move(table)), scale);
            },
            "table"_a, "scale"_a = 1.0f);

    // `norm` is of what comes in, `norm_after` of what a block computes, before that is added; `residual` multiplies it.
    nb::class_<Block>(module, "Block", "hidden += block(hidden)");
    nb::class_<Dense, Block>(module, "Dense", "One matrix.")
        .def(
            "__init__",
            [](Dense* self, const Linear& matrix, const Vector& norm, const Vector& norm_after, float epsilon,
               float residual) { new (self) Dense(norms_of(norm, norm_after, epsilon, residual), matrix); },
            "matrix"_a, nb::kw_only(), "norm"_a = nb::none(), "norm_after"_a = nb::none(), "epsilon"_a = 1e-5f,
            "residual"_a = 1.0f);
    nb::class_<Gated, Block>(module, "Gated", "down (activation(gate x) * up x); gate_up: rows of gate, then of up.")
        .def(
            "__init__",
            [](Gated* self, const Linear& gate_up, const Linear& down, Activation activation, const Vector& norm,
               const Vector& norm_after, float epsilon, float residual) {
                new (self) Gated(norms_of(norm, norm_after, epsilon, residual), gate_up, down, activation);
            },
            "gate_up"_a, "down"_a, nb::kw_only(), "activation"_a = Activation::silu, "norm"_a = nb::none(),
            "norm_after"_a = nb::none(), "epsilon"_a = 1e-5f, "residual"_a = 1.0f);
    nb::class_<Attention, Block>(module, "Attention", "Keys and values of `heads` on `kv_heads`; see blocks/attention.h.")
        .def(
            "__init__",
            [](Attention* self, const Linear& qkv, const Linear& o, int heads, int kv_heads, int head_dim,
               std::optional<int> value_dim, std::int64_t window, std::optional<float> scale, float cap,
               Cache cache, std::shared_ptr<Rotary> rotary, bool neighbours, const Vector& q_norm, const Vector& k_norm,
               const Vector& sinks, const Vector& norm, const Vector& norm_after, float epsilon, float residual) {
                new (self) Attention(norms_of(norm, norm_after, epsilon, residual),
                                     {qkv, o, heads, kv_heads, head_dim, value_dim.value_or(head_dim), window,
                                      scale.value_or(1.0f / std::sqrt(float(head_dim))), cap, cache, rotary, neighbours,
                                      norm_of(q_norm, epsilon), norm_of(k_norm, epsilon),
                                      sinks ? values(*sinks) : std::vector<float>()});
            },
            "qkv"_a, "o"_a, nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "value_dim"_a = nb::none(),
            "window"_a = 0, "scale"_a = nb::none(), "cap"_a = 0.0f, "cache"_a = Cache::float16, "rotary"_a = nb::none(),
            "neighbours"_a = false, "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "sinks"_a = nb::none(), "norm"_a = nb::none(),
            "norm_after"_a = nb::none(), "epsilon"_a = 1e-5f, "residual"_a = 1.0f);

    nb::class_<Model>(module, "Model", "Blocks between an embedding and a head, for sequences of up to `context` tokens.")
        .def(
            "__init__",
            [](Model* self, std::shared_ptr<Embedding> embedding, const Linear& head, int context, const Vector& norm,
               float epsilon, float divisor, float cap) {
                new (self) Model(given(embedding), norm_of(norm, epsilon), head, context, divisor, cap);
            },
            "embedding"_a, "head"_a, "context"_a, nb::kw_only(), "norm"_a = nb::none(), "epsilon"_a = 1e-5f,
            "divisor"_a = 1.0f, "cap"_a = 0.0f)
        .def("add", [](Model& m, std::shared_ptr<Block> block) { m.add(given(std::move(block))); }, "block"_a)
        .def_prop_ro("vocabulary", [](const Model& m) { return m.embedding->vocabulary(); })
        .def_ro("context", &Model::context)
        .def_prop_ro("is_sparse", &Model::is_sparse)
        .def_prop_ro("weight_bytes", &Model::weight_bytes)
        .def_prop_ro("bytes_read_per_token", &Model::bytes_read_per_token)
        .def("reserved_bytes", counted<&Model::reserved_bytes>, "capacity"_a)
        .def("state_bytes", counted<&Model::state_bytes>, "tokens"_a);
}

}  // namespace pennyweight
