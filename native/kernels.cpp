#include "kernels.h"

#include <initializer_list>

namespace pennyweight {

const Kernels& best_kernels() {
    for (const Kernels* table : {kernels_avx512(), kernels_avx2(), kernels_neon()})
        if (table) return *table;
    return kernels_scalar();
}

}  // namespace pennyweight
