#include "kernels.h"

#include <stdexcept>

namespace pennyweight {

std::vector<const Kernels*> runnable_kernels() {
    std::vector<const Kernels*> found;
    for (const Kernels* table : {kernels_avx512(), kernels_avx2(), kernels_neon(), &kernels_scalar()})
        if (table) found.push_back(table);
    return found;
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* table : runnable_kernels())
        if (name == "best" || name == table->name) return *table;
    throw std::invalid_argument("no kernels named " + name + " on this processor; see kernel_names()");
}

}  // namespace pennyweight
