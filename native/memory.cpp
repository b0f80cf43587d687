#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>

namespace pennyweight {

Buffer::Buffer(std::size_t bytes, bool huge) : size_(bytes) {
    if (bytes == 0) return;
    constexpr std::size_t kPage = std::size_t(2) << 20;
    const bool aligned = huge && bytes >= kPage;
    mapped_ = aligned ? bytes + kPage : bytes;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw std::bad_alloc();
    }
    auto at = reinterpret_cast<std::uintptr_t>(mapping_);
    if (aligned) {
        at = (at + kPage - 1) & ~(kPage - 1);
#ifdef MADV_HUGEPAGE
        madvise(reinterpret_cast<void*>(at), bytes / kPage * kPage, MADV_HUGEPAGE);
#endif
    }
    data_ = reinterpret_cast<std::uint8_t*>(at);
}

Buffer::~Buffer() {
    if (mapping_) munmap(mapping_, mapped_);
}

void Buffer::swap(Buffer& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
}

namespace {

constexpr std::size_t kLine = 64;
using Words = std::uint64_t __attribute__((vector_size(16), may_alias));

// Adds kStreams parts of n bytes, one behind the other, a line of each in turn.
template <int kStreams>
Words sum_of_streams(const std::uint8_t* at, std::size_t n) {
    Words sum[kLine / sizeof(Words)] = {};
    for (std::size_t i = 0; i < n; i += kLine)
        for (int s = 0; s < kStreams; s++) {
            const std::uint8_t* line = at + s * n + i;
            // The hardware's prefetcher stops at every page, which one stream alone has nothing to hide behind.
            if (kStreams == 1) __builtin_prefetch(line + 4096, 0, 3);
            for (std::size_t k = 0; k < kLine / sizeof(Words); k++) sum[k] += reinterpret_cast<const Words*>(line)[k];
        }
    return sum[0] + sum[1] + sum[2] + sum[3];
}

}  // namespace

std::uint64_t read_sum(const std::uint8_t* at, std::size_t n, int streams) {
    constexpr std::size_t kPart = 128 << 10;
    Words sum = {};
    for (; streams == 4 && n >= 4 * kPart; at += 4 * kPart, n -= 4 * kPart) sum += sum_of_streams<4>(at, kPart);
    sum += sum_of_streams<1>(at, n);
    return sum[0] + sum[1];
}

}  // namespace pennyweight
