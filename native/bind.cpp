// The only door between Python and the native code.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

NB_MODULE(_native, module) {
    module.doc() = "Native half of pennyweight.";
    module.def("cpu_features", &pennyweight::cpu_features,
               "Instruction sets of this processor, e.g. ['avx2', 'fma', 'avx512f'].");
}
