#include "cpu_features.h"

namespace pennyweight {

std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
    if (__builtin_cpu_supports("fma")) found.push_back("fma");
    if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
    if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512_vnni");
#if defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
#endif
#elif defined(__aarch64__)
    found.push_back("asimd");  // part of every 64-bit Arm
#endif
    return found;
}

}  // namespace pennyweight
