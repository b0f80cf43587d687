// The only door between Python and the native code. Arrays come as numpy arrays, C-contiguous; the GIL is released
// wherever work is done.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "cpu_features.h"
#include "engine.h"
#include "kernels.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pennyweight;

namespace {

template <class T, int kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T, int kDims>
using Out = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

const Kernels& kernels_named(const std::string& name) {
    if (name == "best") return best_kernels();
    for (const Kernels* table : {kernels_avx512(), kernels_avx2(), kernels_neon(), &kernels_scalar()})
        if (table && name == table->name) return *table;
    throw std::invalid_argument("no kernels named " + name + " on this processor; see kernel_names()");
}

void expect(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Keeps an array alive for as long as a matrix uses its bytes.
template <class Array>
std::shared_ptr<void> lender(const Array& array) {
    return std::shared_ptr<void>(new Array(array), [](void* kept) {
        nb::gil_scoped_acquire gil;
        delete static_cast<Array*>(kept);
    });
}

std::vector<float> floats(const In<float, 1>& array) { return {array.data(), array.data() + array.size()}; }

// y = matrix x for every row of x, by one thread: for tests and benchmarks of single products.
void times(const Matrix& matrix, In<float, 2> x, Out<float, 2> y, const std::string& kernels, float threshold) {
    const Kernels& k = kernels_named(kernels);
    expect(int(x.shape(1)) == matrix.in() && int(y.shape(1)) == matrix.out() && x.shape(0) == y.shape(0),
           "x is (tokens, columns), y is (tokens, rows)");
    nb::gil_scoped_release released;
    const int count = int(x.shape(0)), cols = matrix.in(), rows = matrix.out();
    for (int t = 0; t < count; t++) {
        const float* from = x.data() + std::size_t(t) * cols;
        float* to = y.data() + std::size_t(t) * rows;
        if (matrix.layout == Matrix::Layout::wide) {
            k.wide_times(matrix.wide, &from, 1, to, rows, 0, rows);
        } else if (matrix.layout == Matrix::Layout::rows) {
            const int padded = matrix.rows.padded_cols();
            std::vector<float> full(padded), scale(padded / 32), sum(padded / 32), out(matrix.rows.tiles() * 16);
            std::vector<std::int8_t> codes(padded);
            std::vector<std::int32_t> minus8(padded / 32);
            std::copy(from, from + cols, full.begin());
            k.quantise(full.data(), padded, codes.data(), scale.data(), minus8.data(), sum.data());
            const Activations a{codes.data(), scale.data(), minus8.data(), sum.data()};
            k.rows_times(matrix.rows, &a, 1, out.data(), 0, 0, matrix.rows.tiles());
            std::copy(out.begin(), out.begin() + rows, to);
        } else {
            std::vector<std::int32_t> index(cols + 16);
            std::vector<float> value(cols + 16), out(matrix.zigzag.padded_rows());
            const float* importance = matrix.importance.empty() ? nullptr : matrix.importance.data();
            std::vector<float> room(cols);
            const int kept = k.collect(matrix.ordered(from, room.data()), importance, threshold, cols, index.data(), value.data());
            const float* values = value.data();
            const Zigzag& w = matrix.zigzag;
            for (int tile = 0; tile < w.tiles(); tile++)
                k.zigzag_times(w, tile, 0, w.tile_rows / Zigzag::kUnitRows, index.data(), &values, 1, kept,
                               out.data() + std::size_t(tile) * w.tile_rows, 0);
            std::copy(out.begin(), out.begin() + rows, to);
            for (std::size_t i = 0; i < matrix.row_scale.size(); i++) to[i] *= matrix.row_scale[i];
        }
    }
}

// One linear and a pool of its own: what benchmarks of single products time.
struct Product {
    Product(const Linear& l, int threads, const std::string& kernels)
        : linear(l), pool(threads), products(pool, kernels_named(kernels)) {
        products.expect(linear);
        products.reserve();
        out = Buffer(sizeof(float) * std::size_t(Products::kMaxRows) * products.stride());
    }

    // Threads that slept are awake for some microseconds, as they are in the middle of a model's step.
    void wake() { pool.run([](int) {}); }

    // y (tokens, rows) = linear x (tokens, columns); seconds from call to return.
    double run(In<float, 2> x, Out<float, 2> y, bool sparse) {
        expect(int(x.shape(1)) == linear.in() && int(y.shape(1)) == linear.out() && x.shape(0) == y.shape(0),
               "x is (tokens, columns), y is (tokens, rows)");
        expect(x.shape(0) >= 1 && x.shape(0) <= Products::kMaxRows, "1 to 512 tokens");
        nb::gil_scoped_release released;
        const int count = int(x.shape(0)), stride = products.stride();
        float* to = reinterpret_cast<float*>(out.data());
        products.begin(std::vector<char>(count, sparse));
        const auto started = std::chrono::steady_clock::now();
        pool.run([&](int t) {
            products.multiply(t, linear, products.prepare(t, x.data(), count, linear.in(), linear.in(), nullptr, 0, linear),
                              count, to, stride);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
        for (int r = 0; r < count; r++)
            std::memcpy(y.data() + std::size_t(r) * linear.out(), to + std::size_t(r) * stride, sizeof(float) * linear.out());
        return took.count();
    }

    Linear linear;
    ThreadPool pool;
    Products products;
    Buffer out;
};

// Reads memory as fast as the threads can: what no product with cold weights can beat.
struct Reader {
    Reader(std::size_t bytes, int threads) : pool(threads), memory(bytes / 256 * 256) {
        expect(bytes >= 256, "at least 256 bytes");
        std::memset(memory.data(), 1, memory.size());
    }

    void wake() { pool.run([](int) {}); }

    // Seconds to read bytes [first, last), a multiple of 256 each, every thread in 1 or 4 streams: which of them is
    // faster differs from processor to processor.
    double run(std::size_t first, std::size_t last, int streams) {
        expect(streams == 1 || streams == 4, "1 or 4 streams");
        expect(first % 256 == 0 && last % 256 == 0 && first < last && last <= memory.size(), "a range of whole 256 bytes");
        nb::gil_scoped_release released;
        const auto started = std::chrono::steady_clock::now();
        pool.run([&](int t) {
            const std::size_t blocks = (last - first) / 256, threads = pool.threads();
            sum += read_sum(memory.data() + first + 256 * (blocks * t / threads),
                            256 * (blocks * (t + 1) / threads - blocks * t / threads), streams);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
        return took.count();
    }

    ThreadPool pool;
    Buffer memory;
    std::atomic<std::uint64_t> sum{0};  // so that reading is not left out
};

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native half of pennyweight.";
    module.def("cpu_features", &cpu_features, "Instruction sets of this processor, e.g. ['avx2', 'fma', 'avx512f'].");
    module.def(
        "kernel_names",
        [] {
            std::vector<std::string> names;
            for (const Kernels* table : {kernels_avx512(), kernels_avx2(), kernels_neon(), &kernels_scalar()})
                if (table) names.emplace_back(table->name);
            return names;
        },
        "Kernel tables that run here, the fastest first.");

    nb::enum_<Cache>(module, "Cache", "How keys and values are kept.")
        .value("float16", Cache::float16)
        .value("fp8", Cache::fp8)
        .value("float32", Cache::float32);

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
                return make_wide(weights.data(), int(weights.shape(0)), int(weights.shape(1)) / bytes, type,
                                 in_place ? lender(weights) : nullptr);
            },
            "weights"_a.noconvert(), "type"_a, "in_place"_a = false)
        .def_static(
            "rows",
            [](In<std::uint8_t, 2> codes, In<std::uint16_t, 2> scales, std::optional<In<std::uint16_t, 2>> minima, int cols,
               int bits, int group, bool bfloat16) {
                const int rows = int(codes.shape(0)), groups = group ? cols / group : 0;
                expect(std::size_t(cols) * bits <= codes.shape(1) * 8, "codes has too few bytes a row");
                expect(int(scales.shape(0)) == rows && int(scales.shape(1)) == groups, "scales is (rows, columns / group)");
                expect(!minima || (minima->shape(0) == scales.shape(0) && minima->shape(1) == scales.shape(1)),
                       "minima is (rows, columns / group)");
                nb::gil_scoped_release released;
                return make_rows(codes.data(), codes.shape(1), scales.data(), minima ? minima->data() : nullptr, rows, cols,
                                 bits, group, bfloat16 ? Half::bfloat16 : Half::float16);
            },
            "codes"_a.noconvert(), "scales"_a.noconvert(), "minima"_a.none(), "cols"_a, "bits"_a, "group"_a, "bfloat16"_a)
        .def_static(
            "zigzag",
            [](In<std::uint8_t, 1> chunks, int rows, int cols, int tile_rows, int group, Scales scales,
               std::optional<In<float, 1>> row_scale, std::optional<In<std::int32_t, 1>> order, bool in_place) {
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
                if (row_scale) made->row_scale = floats(*row_scale);
                if (order) made->order.assign(order->data(), order->data() + order->size());
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
            expect(row >= 0 && row < m.out() && int(out.size()) == m.in(), "row within the matrix, out one row long");
            dequantise_row(m, row, out.data());
        })
        .def("times", &times, "x"_a.noconvert(), "y"_a.noconvert(), "kernels"_a = "best", "threshold"_a = -1.0f);

    nb::class_<Linear>(module, "Linear", "Matrices stacked on one input, and a bias.")
        .def(nb::init<>())
        .def("add", [](Linear& l, std::shared_ptr<Matrix> m) {
            expect(l.parts.empty() || l.in() == m->in(), "stacked matrices have the same columns");
            l.parts.push_back(std::move(m));
        })
        .def("set_bias", [](Linear& l, In<float, 1> v) {
            expect(int(v.size()) == l.out(), "one bias per row");
            l.bias = floats(v);
        });

    nb::class_<Layer> layer(module, "Layer");
    layer.def(nb::init<>())
        .def_rw("qkv", &Layer::qkv)
        .def_rw("o", &Layer::o)
        .def_rw("gate_up", &Layer::gate_up)
        .def_rw("down", &Layer::down)
        .def_rw("heads", &Layer::heads)
        .def_rw("kv_heads", &Layer::kv_heads)
        .def_rw("head_dim", &Layer::head_dim)
        .def_rw("window", &Layer::window)
        .def("set_mixer_norm", [](Layer& l, In<float, 1> v) { l.mixer_norm = floats(v); })
        .def("set_ffn_norm", [](Layer& l, In<float, 1> v) { l.ffn_norm = floats(v); })
        .def("set_q_norm", [](Layer& l, In<float, 1> v) { l.q_norm = floats(v); })
        .def("set_k_norm", [](Layer& l, In<float, 1> v) { l.k_norm = floats(v); })
        .def("set_sinks", [](Layer& l, In<float, 1> v) { l.sinks = floats(v); });

    nb::class_<Model>(module, "Model")
        .def(nb::init<>())
        .def_rw("hidden_size", &Model::hidden_size)
        .def_rw("vocab_size", &Model::vocab_size)
        .def_rw("epsilon", &Model::epsilon)
        .def_rw("cache", &Model::cache)
        .def_rw("embedding", &Model::embedding)
        .def_rw("head", &Model::head)
        .def_rw("attention_scale", &Model::attention_scale)
        .def("set_final_norm", [](Model& m, In<float, 1> v) { m.final_norm = floats(v); })
        .def_ro("max_positions", &Model::max_positions)
        .def("set_rotary",
             [](Model& m, In<float, 2> cosine, In<float, 2> sine) {
                 expect(cosine.shape(0) == sine.shape(0) && cosine.shape(1) == sine.shape(1), "cosine and sine alike");
                 m.max_positions = int(cosine.shape(0));
                 m.rotary_half = int(cosine.shape(1));
                 m.cosine.assign(cosine.data(), cosine.data() + cosine.size());
                 m.sine.assign(sine.data(), sine.data() + sine.size());
             })
        .def("add_layer", [](Model& m, const Layer& l) { m.layers.push_back(l); });

    nb::class_<Engine>(module, "Engine", "Runs tokens through a model; see runtime/engine.py for the face users see.")
        .def(
            "__init__",
            [](Engine* self, const Model& model, int threads, const std::string& kernels) {
                new (self) Engine(model, threads, kernels_named(kernels));
            },
            "model"_a, "threads"_a, "kernels"_a = "best")
        .def("open", &Engine::open, "capacity"_a)
        .def("close", &Engine::close)
        .def("can_go_back", &Engine::can_go_back, "sequence"_a, "tokens"_a)
        .def("copy", &Engine::copy, "source"_a, "target"_a, "tokens"_a)
        .def("fill", &Engine::fill, "sequence"_a, "tokens"_a)
        .def(
            "step",
            [](Engine& e, In<std::int32_t, 2> rows, Out<float, 2> logits) {
                expect(rows.shape(1) == 5, "rows is (n, 5): sequence, position, token, wants logits, sparse");
                std::vector<Row> list;
                std::size_t wanted = 0;
                for (std::size_t i = 0; i < rows.shape(0); i++) {
                    const std::int32_t* r = rows.data() + 5 * i;
                    list.push_back({r[0], r[1], r[2], r[3] != 0, r[4] != 0});
                    wanted += r[3] != 0;
                }
                expect(logits.shape(0) == wanted && int(logits.shape(1)) == e.model().vocab_size,
                       "logits is (rows that want them, vocabulary)");
                nb::gil_scoped_release released;
                e.step(list, logits.data());
            },
            "rows"_a.noconvert(), "logits"_a.noconvert())
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("kernels", [](const Engine& e) { return std::string(e.kernels().name); })
        .def_prop_ro("weight_bytes", &Engine::weight_bytes)
        .def_prop_ro("is_sparse", &Engine::is_sparse)
        .def_prop_ro("bytes_read_per_token", &Engine::bytes_read_per_token)
        .def_prop_ro("cache_bytes", &Engine::cache_bytes)
        .def("cache_bytes_of", &Engine::cache_bytes_of)
        .def_prop_ro("sparse",
                     [](const Engine& e) {
                         const auto& found = e.sparse();
                         return std::make_tuple(found.kept, found.columns, found.read, found.bytes);
                     })
        .def_prop_ro("spent",
                     [](const Engine& e) {
                         return std::make_tuple(e.spent().products, e.spent().attention, e.spent().all);
                     })
        .def_ro_static("max_rows", &Engine::kMaxRows);

    nb::class_<Product>(module, "Product", "One linear with threads of its own, for benchmarks of single products.")
        .def(nb::init<const Linear&, int, const std::string&>(), "linear"_a, "threads"_a, "kernels"_a = "best")
        .def("wake", &Product::wake)
        .def("run", &Product::run, "x"_a.noconvert(), "y"_a.noconvert(), "sparse"_a = false)
        .def_prop_ro("sparse", [](const Product& p) {
            return std::make_tuple(p.products.sparse().kept, p.products.sparse().columns);
        });

    nb::class_<Reader>(module, "Reader", "Memory of its own that it reads as fast as its threads can.")
        .def(nb::init<std::size_t, int>(), "bytes"_a, "threads"_a)
        .def("wake", &Reader::wake)
        .def("run", &Reader::run, "first"_a, "last"_a, "streams"_a = 1);
}
