// The only door between Python and the native code. Arrays come as numpy arrays, C-contiguous; the GIL is released
// wherever work is done.
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

template <class Array>
std::vector<std::remove_const_t<typename Array::Scalar>> values(const Array& array) {
    return {array.data(), array.data() + array.size()};
}

void bind_matrices(nb::module_& module);
void bind_blocks(nb::module_& module);
void bind_engine(nb::module_& module);
void bind_bench(nb::module_& module);

}  // namespace pennyweight
