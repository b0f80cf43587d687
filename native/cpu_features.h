// Which instruction sets this processor has. Kernels of later files are chosen by it at run time.
#pragma once

#include <string>
#include <vector>

namespace pennyweight {

// Names as /proc/cpuinfo spells them, in a fixed order, e.g. {"avx2", "fma", "avx512f", "avx512_vnni"}.
std::vector<std::string> cpu_features();

}  // namespace pennyweight
