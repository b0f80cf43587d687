// The only door between Python and the native code. Arrays come as numpy arrays, C-contiguous; the GIL is released
// wherever work is done. What comes in wrong is a ValueError or a TypeError here or in the constructors behind, never a crash;
// an object is used by one thread at a time.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pennyweight {

template <class T, int kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T, int kDims>
using Out = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

inline void expect(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Numbers of rows and columns that the native code counts with.
inline int size(std::size_t n) {
    expect(n >= 1 && n <= std::size_t(1) << 30, "1 to 2^30 rows and columns");
    return int(n);
}

// A pool's threads spin while they wait for each other.
inline int threads(int count) {
    expect(count >= 1 && count <= 1024, "1 to 1024 threads");
    return count;
}

template <class T>
std::shared_ptr<T> given(std::shared_ptr<T> object) {
    expect(object != nullptr, "None is no part of a model");
    return object;
}

template <class Array>
std::vector<std::remove_const_t<typename Array::Scalar>> values(const Array& array) {
    return {array.data(), array.data() + array.size()};
}

void bind_matrices(nb::module_& module);
void bind_blocks(nb::module_& module);
void bind_engine(nb::module_& module);
void bind_bench(nb::module_& module);
void bind_trellis(nb::module_& module);

}  // namespace pennyweight
