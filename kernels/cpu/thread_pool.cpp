#include "cpu/thread_pool.h"

#include <algorithm>
#include <system_error>

#include "cpu/subnormals.h"

namespace crf {

namespace {

constexpr int kMostThreads = 512;  // more than the number of items of the parallel loops; a larger request is a mistake

constexpr std::chrono::milliseconds kPollInterval{50};

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, std::min(num_threads, kMostThreads))) {}

void ThreadPool::start_workers() {
    if (!workers_.empty()) return;
    try {
        const uint64_t seen = generation_;
        for (int t = 1; t < num_threads_; ++t) workers_.emplace_back([this, t, seen] { work(t, seen); });
    } catch (const std::system_error&) {
        // The system refuses more threads: the existing ones do the work, with the same result.
    }
}

ThreadPool::~ThreadPool() { rest(); }

void ThreadPool::rest() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    start_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
}

void ThreadPool::take_items(int thread) {
    try {
        for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < num_items_;) {
            take_item(*body_, item, thread);
            if (thread == 0) poll_if_due();
        }
    } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(num_items_, std::memory_order_relaxed);
    }
}

// Only while the body runs: `poll` may run Python, whose numbers are not the engine's.
void ThreadPool::take_item(const std::function<void(int64_t, int)>& body, int64_t item, int thread) const {
    const SubnormalsAsZeros mode(subnormals_are_zeros);
    body(item, thread);
}

void ThreadPool::poll_if_due() {
    if (!poll) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - polled_ < kPollInterval) return;
    polled_ = now;
    poll();
}

void ThreadPool::work(int thread, uint64_t seen) {
    for (;;) {
        {
            std::unique_lock lock(mutex_);
            start_.wait(lock, [&] { return stopping_ || generation_ != seen; });
            if (stopping_) return;
            seen = generation_;
        }
        take_items(thread);
        {
            std::lock_guard lock(mutex_);
            --active_;
        }
        done_.notify_one();
    }
}

void ThreadPool::run(int64_t num_items, const std::function<void(int64_t, int)>& body) {
    if (num_items <= 0) return;
    if (num_threads_ > 1 && num_items > 1) start_workers();
    if (workers_.empty() || num_items == 1) {
        for (int64_t item = 0; item < num_items; ++item) {
            take_item(body, item, 0);
            poll_if_due();
        }
        return;
    }
    {
        std::lock_guard lock(mutex_);
        body_ = &body;
        num_items_ = num_items;
        next_.store(0, std::memory_order_relaxed);
        active_ = static_cast<int>(workers_.size());
        error_ = nullptr;
        ++generation_;
    }
    start_.notify_all();
    take_items(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
}

}  // namespace crf
