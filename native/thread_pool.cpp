#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pennyweight {
namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spinning helps only while the other threads really run. When a processor is taken away, give ours up as well.
template <class Done>
inline void spin(Done done) {
    for (int i = 0; !done(); i++) {
        pause();
        if (i > 20000) std::this_thread::yield();
    }
}

constexpr int kSpinsBeforeSleep = 3000;  // some tens of microseconds

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {
    for (int t = 1; t < threads_; t++) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
    stop_ = true;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
    body_ = &body;
    finished_.store(0, std::memory_order_relaxed);
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    body(0);
    spin([&] { return finished_.load(std::memory_order_acquire) == threads_ - 1; });
}

void ThreadPool::barrier() {
    const unsigned round = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.store(round + 1, std::memory_order_release);
    } else {
        spin([&] { return passed_.load(std::memory_order_acquire) != round; });
    }
}

void ThreadPool::work(int thread) {
    for (unsigned seen = 0;; seen++) {
        for (int i = 0; started_.load(std::memory_order_acquire) == seen; i++) {
            pause();
            if (i > kSpinsBeforeSleep) started_.wait(seen, std::memory_order_acquire);
        }
        if (stop_) return;
        (*body_)(thread);
        finished_.fetch_add(1, std::memory_order_release);
    }
}

}  // namespace pennyweight
