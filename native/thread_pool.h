// Threads that run one function together, with barriers inside it.
//
// A decode step has a few dozen points where all threads must have arrived, some microseconds of work apart; waking
// threads for each would cost more than the work. So a step is one `run`, threads spin at its barriers, and between
// steps they spin for a moment (the next token usually follows at once) before they sleep.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pennyweight {

class ThreadPool {
public:
    // At least 1; thread 0 is whoever calls run. Throws std::system_error where the system gives no thread.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // body(t) on every thread; returns when all have finished. Callers from several threads take turns: models of one
    // process share a pool, as they share its processors. body must not throw.
    void run(const std::function<void(int)>& body);

    // Inside a body: wait until every thread is here. What they wrote before is visible to all after.
    void barrier();

private:
    void work(int thread);
    void stop();

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex running_;
    const std::function<void(int)>* body_ = nullptr;
    alignas(64) std::atomic<unsigned> started_{0};
    alignas(64) std::atomic<int> finished_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> passed_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace pennyweight
