// Finding trellis codes, and what they mean.
#include "bind/bind.h"
#include "thread_pool.h"
#include "trellis_search.h"

namespace pennyweight {
namespace {

using Run = void (*)(const float* x, const float* weight, int n, std::uint8_t* symbols, float* made);

template <int kBits>
void run(const float* x, const float* weight, int n, std::uint8_t* symbols, float* made) {
    static thread_local TrellisSearch<kBits> search;
    search.nearest(x, weight, n, symbols, made);
}

Run run_of(int bits) {
    static constexpr Run kRuns[] = {run<2>, run<3>, run<4>, run<5>, run<6>};
    expect(bits >= kLeastTrellisBits && bits <= kMostTrellisBits, "2 to 6 bits");
    return kRuns[bits - kLeastTrellisBits];
}

// A code, and threads to search with.
struct Coder {
    Coder(int bits, int count) : search(run_of(bits)), pool(threads(count)) {}

    void nearest(In<float, 2> x, In<float, 2> weight, Out<std::uint8_t, 2> symbols, Out<float, 2> made) {
        const std::size_t columns = x.shape(0), rows = x.shape(1), parts = (rows + Trellis::kRestart - 1) / Trellis::kRestart;
        const auto same = [&](const auto& other) { return other.shape(0) == columns && other.shape(1) == rows; };
        expect(same(weight) && same(symbols) && same(made), "weight, symbols and made are as large as x");
        nb::gil_scoped_release released;
        pool.run([&](int t) {
            for (std::size_t i = t; i < columns * parts; i += pool.threads()) {
                const std::size_t row = i % parts * Trellis::kRestart, at = i / parts * rows + row;
                search(x.data() + at, weight.data() + at, int(std::min<std::size_t>(Trellis::kRestart, rows - row)),
                       symbols.data() + at, made.data() + at);
            }
        });
    }

    Run search;
    ThreadPool pool;
};

}  // namespace

void bind_trellis(nb::module_& module) {
    nb::class_<Coder>(module, "TrellisCoder", "Finds the trellis codes of columns of weights, with threads of its own.")
        .def(nb::init<int, int>(), "bits"_a, "threads"_a)
        .def("nearest", &Coder::nearest, "x"_a.noconvert(), "weight"_a.noconvert(), "symbols"_a.noconvert(),
             "made"_a.noconvert(),
             "Of x (columns, rows), in the unit of values, those symbols whose values come nearest: differences are squared, "
             "multiplied by weight and summed down each column.");
    module.def(
        "trellis_values",
        [](int bits, Out<std::int16_t, 1> out) {
            expect(bits >= kLeastTrellisBits && bits <= kMostTrellisBits, "2 to 6 bits");
            const TrellisCode& code = trellis_code(bits);
            expect(out.size() == std::size_t(1) << code.window, "one value for every state");
            for (unsigned state = 0; state < out.size(); state++) out.data()[state] = trellis_value(code, state);
        },
        "bits"_a, "out"_a.noconvert(), "The value of every state.");
    module.def(
        "trellis_window",
        [](int bits) {
            expect(bits >= kLeastTrellisBits && bits <= kMostTrellisBits, "2 to 6 bits");
            return trellis_code(bits).window;
        },
        "bits"_a, "Bits of a state.");
    module.attr("TRELLIS_RESTART") = Trellis::kRestart;
}

}  // namespace pennyweight
