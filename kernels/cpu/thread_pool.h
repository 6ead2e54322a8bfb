// A pool of threads that process numbered items. The result of an item never depends on the thread that computes it, so results
// are the same for any number of threads.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace crf {

class ThreadPool {
   public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // The caller and its workers; fewer if the system refuses to start more.
    int num_threads() const { return num_threads_; }

    // Stops the workers until the next run: an idle pool must not hold threads, because a fork would lose them.
    void rest();

    // Calls body(item, thread) for every item in 0 .. num_items - 1; the caller's thread works too (as thread 0).
    // The first exception of a body is rethrown here once all threads are done.
    // The caller's thread also calls `poll` from time to time, if set; an exception from it ends the run.
    void run(int64_t num_items, const std::function<void(int64_t item, int thread)>& body);

    std::function<void()> poll;

    // Whether bodies compute with subnormal numbers as zeros (subnormals.h): in every thread, so that results do not depend on it.
    bool subnormals_are_zeros = false;

   private:
    void start_workers();
    void work(int thread, uint64_t seen);
    void take_items(int thread);
    void take_item(const std::function<void(int64_t, int)>& body, int64_t item, int thread) const;
    void poll_if_due();

    const int num_threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable start_, done_;
    const std::function<void(int64_t, int)>* body_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t num_items_ = 0;
    uint64_t generation_ = 0;
    std::chrono::steady_clock::time_point polled_{};
    int active_ = 0;
    bool stopping_ = false;
    std::exception_ptr error_;
};

}  // namespace crf
