#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>

namespace pennyweight {

Buffer::Buffer(std::size_t bytes, bool huge) : size_(bytes) {
    if (bytes == 0) return;
    constexpr std::size_t kPage = std::size_t(2) << 20;
    const bool aligned = huge && bytes >= kPage / 2;
    mapped_ = aligned ? (bytes + kPage - 1) / kPage * kPage + kPage : bytes;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw std::bad_alloc();
    }
    auto at = reinterpret_cast<std::uintptr_t>(mapping_);
    if (aligned) {
        at = (at + kPage - 1) & ~(kPage - 1);
#ifdef MADV_HUGEPAGE
        madvise(reinterpret_cast<void*>(at), mapped_ - kPage, MADV_HUGEPAGE);
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

std::uint64_t read_sum(const std::uint8_t* at, std::size_t n) {
    constexpr std::size_t kBlock = 256;
    std::uint64_t sum[kBlock / 8] = {}, word[kBlock / 8];
    for (std::size_t i = 0; i < n; i += kBlock) {
        // 4 KiB ahead, as the products ask: the hardware prefetcher stops at every page.
        for (std::size_t line = 0; line < kBlock; line += 64) __builtin_prefetch(at + i + line + 4096, 0, 3);
        std::memcpy(word, at + i, kBlock);
        for (std::size_t k = 0; k < kBlock / 8; k++) sum[k] += word[k];
    }
    std::uint64_t total = 0;
    for (std::uint64_t part : sum) total += part;
    return total;
}

}  // namespace pennyweight
