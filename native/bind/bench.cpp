// Single products and plain reading, for benchmarks.
#include <atomic>
#include <chrono>
#include <cstring>

#include "bind/bind.h"
#include "products.h"

namespace pennyweight {
namespace {

// One linear and a pool of its own: what benchmarks of single products time.
struct Product {
    Product(const Linear& l, int count, const std::string& kernels)
        : linear(l), pool(threads(count)), products(pool, kernels_named(kernels)) {
        expect(!linear.empty(), "a linear without matrices");
        products.expect(linear, false);
        products.reserve();
        out = Panel(Products::kMaxRows, products.out_stride());
    }

    // Threads that slept are awake for some microseconds, as they are in the middle of a model's step.
    void wake() { pool.run([](int) {}); }

    // y (tokens, rows) = linear x (tokens, columns); seconds from call to return.
    double run(In<float, 2> x, Out<float, 2> y, bool sparse) {
        expect(int(x.shape(1)) == linear.in() && int(y.shape(1)) == linear.out() && x.shape(0) == y.shape(0),
               "x is (tokens, columns), y is (tokens, rows)");
        expect(x.shape(0) >= 1 && x.shape(0) <= Products::kMaxRows, "1 to 512 tokens");
        nb::gil_scoped_release released;
        const int count = int(x.shape(0));
        products.begin(std::vector<char>(count, sparse));
        const auto started = std::chrono::steady_clock::now();
        pool.run([&](int t) {
            products.multiply(t, linear, products.prepare(t, x.data(), count, linear.in(), {}, linear),
                              count, out.at(0), out.stride);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
        for (int r = 0; r < count; r++)
            std::memcpy(y.data() + std::size_t(r) * linear.out(), out.at(r), sizeof(float) * linear.out());
        return took.count();
    }

    Linear linear;
    ThreadPool pool;
    Products products;
    Panel out;
};

// Reads memory as fast as the threads can: what no product with cold weights can beat.
struct Reader {
    Reader(std::size_t bytes, int count) : pool(threads(count)), memory(bytes / 256 * 256) {
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

void bind_bench(nb::module_& module) {
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

}  // namespace pennyweight
