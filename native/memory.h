// Memory for weights and caches: zeroed, in pages of 2 MiB where the system has them. At tens of gigabytes a second a
// page of 4 KiB is crossed every few hundred nanoseconds, and each costs a translation and restarts the prefetcher. What
// does not fill a large page lies in small ones: a matrix of 2.3 MiB would otherwise take 4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pennyweight {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes, bool huge = true);  // throws std::bad_alloc
    ~Buffer();
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    std::uint8_t* data() const { return data_; }
    float* floats() const { return reinterpret_cast<float*>(data_); }
    std::size_t size() const { return size_; }

private:
    void swap(Buffer& other) noexcept;

    void* mapping_ = nullptr;
    std::size_t mapped_ = 0;
    std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
};

// Rows of floats, `stride` from one to the next.
struct Panel {
    int stride = 0;
    Buffer bytes;

    Panel() = default;
    Panel(int rows, int stride) : stride(stride), bytes(sizeof(float) * std::size_t(rows) * stride, false) {}
    float* at(int r) const { return bytes.floats() + std::size_t(r) * stride; }
};

// Sum of the 64-bit words of n bytes, a multiple of 256: memory is read, in 1 or 4 streams, and nothing else is worth
// mentioning.
std::uint64_t read_sum(const std::uint8_t* at, std::size_t n, int streams);

}  // namespace pennyweight
