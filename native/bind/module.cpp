#include "bind/bind.h"
#include "cpu_features.h"

NB_MODULE(_native, module) {
    using namespace pennyweight;
    module.doc() = "Native half of pennyweight.";
    module.def("cpu_features", &cpu_features, "Instruction sets of this processor, e.g. ['avx2', 'fma', 'avx512f'].");
    module.def(
        "kernel_names",
        [] {
            std::vector<std::string> names;
            for (const Kernels* table : runnable_kernels()) names.emplace_back(table->name);
            return names;
        },
        "Kernel tables that run here, the fastest first.");
    bind_matrices(module);
    bind_blocks(module);
    bind_engine(module);
    bind_bench(module);
    bind_trellis(module);
}
