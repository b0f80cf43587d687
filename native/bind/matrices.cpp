// Matrices, and linears that stack them.
#include <algorithm>

#include "bind/bind.h"
#include "pack.h"

namespace pennyweight {
namespace {

// Keeps an array alive for as long as a matrix uses its bytes.
template <class Array>
std::shared_ptr<void> lender(const Array& array) {
    return std::shared_ptr<void>(new Array(array), [](void* kept) {
        nb::gil_scoped_acquire gil;
        delete static_cast<Array*>(kept);
    });
}

}  // namespace

void bind_matrices(nb::module_& module) {
    nb::enum_<Wide::Type>(module, "Float", "How floats are stored.")
        .value("float16", Wide::Type::float16)
        .value("bfloat16", Wide::Type::bfloat16)
        .value("float32", Wide::Type::float32);

    nb::enum_<Scales>(module, "Scales", "What scales of zigzag matrices are.")
        .value("symmetric", Scales::symmetric)
        .value("affine", Scales::affine)
        .value("super", Scales::super);

    nb::class_<Matrix>(module, "Matrix", "A weight matrix in one of the layouts of docs/formats.md.")
        .def_static(
            "wide",
            [](In<std::uint8_t, 2> weights, Wide::Type type, bool in_place) {
                const int bytes = type == Wide::Type::float32 ? 4 : 2;
                expect(weights.shape(1) % bytes == 0, "weights is the bytes of (rows, columns) floats");
                return make_wide(weights.data(), size(weights.shape(0)), size(weights.shape(1) / bytes), type,
                                 in_place ? lender(weights) : nullptr);
            },
            "weights"_a.noconvert(), "type"_a, "in_place"_a = false)
        .def_static(
            "rows",
            [](In<std::uint8_t, 2> codes, In<std::uint16_t, 2> scales, std::optional<In<std::uint16_t, 2>> minima, int cols,
               int bits, int group, bool bfloat16) {
                expect(group >= 1, "groups of one column or more");
                const int rows = size(codes.shape(0)), groups = size(cols) / group;
                const std::size_t whole = bits == 4 || bits == 8 ? cols : round_up(cols, Rows::kBlock);
                expect(whole * bits <= codes.shape(1) * 8, "codes has too few bytes a row");
                expect(int(scales.shape(0)) == rows && int(scales.shape(1)) == groups, "scales is (rows, columns / group)");
                expect(!minima || (minima->shape(0) == scales.shape(0) && minima->shape(1) == scales.shape(1)),
                       "minima is (rows, columns / group)");
                nb::gil_scoped_release released;
                return make_rows(codes.data(), codes.shape(1), scales.data(), minima ? minima->data() : nullptr, rows, cols,
                                 bits, group, bfloat16 ? Half::bfloat16 : Half::float16);
            },
            "codes"_a.noconvert(), "scales"_a.noconvert(), "minima"_a.none(), "cols"_a, "bits"_a, "group"_a, "bfloat16"_a)
        .def_static(
            "trellis",
            [](In<std::uint8_t, 2> columns, In<std::uint8_t, 2> scales, In<float, 1> factors, int bits, int group) {
                expect(group >= 1 && bits >= 1 && bits <= 8, "groups of one column or more, 1 to 8 bits");
                const int rows = size(factors.size()), cols = size(columns.shape(0));
                expect(columns.shape(1) == (std::size_t(rows) * bits + 7) / 8, "columns is the bytes of (columns, rows) codes");
                expect(int(scales.shape(0)) == rows && int(scales.shape(1)) == cols / group, "scales is (rows, columns / group)");
                nb::gil_scoped_release released;
                return make_trellis(columns.data(), scales.data(), factors.data(), rows, cols, bits, group);
            },
            "columns"_a.noconvert(), "scales"_a.noconvert(), "factors"_a.noconvert(), "bits"_a, "group"_a)
        .def_static(
            "zigzag",
            [](In<std::uint8_t, 1> chunks, int rows, int cols, int tile_rows, int group, Scales scales,
               std::optional<In<float, 1>> row_scale, std::optional<In<std::int32_t, 1>> order, bool in_place) {
                for (int n : {rows, cols, tile_rows}) size(n);
                expect(!row_scale || int(row_scale->size()) == rows, "one row_scale per row");
                std::vector<char> named(cols);
                if (order) {
                    for (std::size_t i = 0; i < order->size(); i++)
                        if (order->data()[i] >= 0 && order->data()[i] < cols) named[order->data()[i]] = 1;
                    expect(int(order->size()) == cols && std::count(named.begin(), named.end(), 1) == cols,
                           "order names every column once");
                }
                auto made = make_zigzag(chunks.data(), chunks.size(), rows, cols, tile_rows, group, scales,
                                        in_place ? lender(chunks) : nullptr);
                if (row_scale) made->row_scale = values(*row_scale);
                if (order) made->order = values(*order);
                return made;
            },
            "chunks"_a.noconvert(), "rows"_a, "cols"_a, "tile_rows"_a, "group"_a, "scales"_a, "row_scale"_a = nb::none(),
            "order"_a = nb::none(), "in_place"_a = false)
        .def_prop_ro("shape", [](const Matrix& m) { return std::make_tuple(m.out(), m.in()); })
        .def_prop_ro("nbytes", &Matrix::nbytes)
        .def_rw("threshold", &Matrix::threshold)
        .def("set_importance", [](Matrix& m, In<float, 1> v) {
            expect(int(v.size()) == m.in(), "one importance per column");
            std::vector<float> room(m.in());
            const float* at = m.ordered(v.data(), room.data());
            m.importance.assign(at, at + m.in());
        })
        .def("row", [](const Matrix& m, int row, Out<float, 1> out) {
            expect(m.layout != Matrix::Layout::zigzag, "a zigzag matrix has no rows to read");
            expect(row >= 0 && row < m.out() && int(out.size()) == m.in(), "row within the matrix, out one row long");
            dequantise_row(m, row, out.data());
        });

    nb::class_<Linear>(module, "Linear", "Matrices stacked on one input, and a bias.")
        .def(nb::init<>())
        .def("add", [](Linear& l, std::shared_ptr<Matrix> m) {
            expect(l.empty() || l.in() == given(m)->in(), "stacked matrices have the same columns");
            expect(l.bias.empty(), "matrices come before the bias");
            l.parts.push_back(given(m));
        })
        .def("set_bias", [](Linear& l, In<float, 1> v) {
            expect(int(v.size()) == l.out(), "one bias per row");
            l.bias = values(v);
        });
}

}  // namespace pennyweight
