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

// Until `word` is no longer `old`. Spinning helps only while the other threads really run: after some tens of
// microseconds the processor is given up, so that threads without one of their own get one.
template <class T>
inline T changed(const std::atomic<T>& word, T old, int spins) {
    for (int i = 0; i < spins; i++) {
        if (const T now = word.load(std::memory_order_acquire); now != old) return now;
        pause();
    }
    for (;;) {
        word.wait(old, std::memory_order_acquire);
        if (const T now = word.load(std::memory_order_acquire); now != old) return now;
    }
}

constexpr int kSpins = 3000;

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {
    try {
        for (int t = 1; t < threads_; t++) workers_.emplace_back([this, t] { work(t); });
    } catch (...) {  // the system gave no more: those that run must end before they are forgotten
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stop_ = true;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
    const std::lock_guard<std::mutex> alone(running_);
    body_ = &body;
    finished_.store(0, std::memory_order_relaxed);
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    body(0);
    for (int done = 0; done < threads_ - 1;) done = changed(finished_, done, kSpins);
}

void ThreadPool::barrier() {
    const unsigned round = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.store(round + 1, std::memory_order_release);
        passed_.notify_all();
    } else {
        changed(passed_, round, kSpins);
    }
}

void ThreadPool::work(int thread) {
    for (unsigned seen = 0;; seen++) {
        changed(started_, seen, kSpins);
        if (stop_) return;
        (*body_)(thread);
        finished_.fetch_add(1, std::memory_order_release);
        finished_.notify_one();
    }
}

}  // namespace pennyweight
