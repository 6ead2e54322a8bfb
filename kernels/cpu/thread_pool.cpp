// Starts the threads of a pool, hands out items, and passes on their exceptions.
#include "cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace crf {
namespace {
// Subnormal numbers as zeros in the thread that computes. Marginals far from a border, their
// gradients and the weights of unlike voxels are so small that their products are subnormal:
// nothing in a sum, but on x86 each takes over a hundred cycles.

// While it lives, its thread takes subnormal operands for zeros and rounds subnormal results to
// zeros, on processors with that mode.
class SubnormalsAsZeros {
   public:
    SubnormalsAsZeros(const SubnormalsAsZeros&) = delete;
    SubnormalsAsZeros& operator=(const SubnormalsAsZeros&) = delete;
#if defined(__SSE2__)
    explicit SubnormalsAsZeros(bool is_on) : before_(_mm_getcsr()) {
        if (is_on) _mm_setcsr(before_ | kResults | kOperands);
    }
    ~SubnormalsAsZeros() { _mm_setcsr(before_); }

   private:
    static constexpr unsigned kResults = 1u << 15, kOperands = 1u << 6;
    const unsigned before_;
#else
    explicit SubnormalsAsZeros(bool) {}
    ~SubnormalsAsZeros() {}
#endif
};

constexpr std::chrono::milliseconds kPollInterval{50};
// Reading the clock takes as long as a small item. While items are short, it is read once in so
// many of them at most: no more pass unseen if they become longer.
constexpr std::chrono::milliseconds kShort{1};
constexpr int64_t kMostPerLook = 8;
}  // namespace

struct ThreadPool::Workers {
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable start, done;
    FunctionRef<int64_t, int> body;
    std::atomic<int64_t> next{0};
    int64_t num_items = 0;
    uint64_t generation = 0;
    std::chrono::steady_clock::time_point polled{}, looked{};
    int64_t items_per_look = 1, items_left = 1;
    int active = 0;
    bool stopping = false;
    std::exception_ptr error;
};

ThreadPool::ThreadPool(int num_threads, void (*poll)(), bool subnormals_are_zeros)
    : poll_(poll),
      subnormals_are_zeros_(subnormals_are_zeros),
      num_threads_(std::max(1, std::min(num_threads, numerics::MAX_THREADS))),
      workers_(std::make_unique<Workers>()) {}

void ThreadPool::start_workers() {
    if (!workers_->threads.empty()) return;
    try {
        const uint64_t seen = workers_->generation;
        for (int t = 1; t < num_threads_; ++t)
            workers_->threads.emplace_back([this, t, seen] { work(t, seen); });
    } catch (const std::system_error&) {
        // The system refuses more threads: the existing ones do the work, with the same result.
    }
}

ThreadPool::~ThreadPool() { rest(); }

void ThreadPool::rest() {
    {
        std::lock_guard lock(workers_->mutex);
        workers_->stopping = true;
    }
    workers_->start.notify_all();
    for (auto& thread : workers_->threads) thread.join();
    workers_->threads.clear();
    workers_->stopping = false;
}

void ThreadPool::take_items(int thread) {
    Workers& own = *workers_;
    try {
        for (int64_t item;
             (item = own.next.fetch_add(1, std::memory_order_relaxed)) < own.num_items;)
            take_item(own.body, item, thread);
    } catch (...) {
        std::lock_guard lock(own.mutex);
        if (!own.error) own.error = std::current_exception();
        own.next.store(own.num_items, std::memory_order_relaxed);
    }
}

void ThreadPool::take_item(FunctionRef<int64_t, int> body, int64_t item, int thread) {
    {
        // Only while the body runs: `poll` may run Python, whose numbers are not the engine's.
        const SubnormalsAsZeros mode(subnormals_are_zeros_);
        body(item, thread);
    }
    if (thread == 0) poll_if_due();
}

void ThreadPool::poll_if_due() {
    Workers& own = *workers_;
    if (--own.items_left > 0) return;
    const auto now = std::chrono::steady_clock::now();
    const bool are_short = now - own.looked < kShort;
    own.items_per_look = are_short ? std::min(2 * own.items_per_look, kMostPerLook) : 1;
    own.items_left = own.items_per_look;
    own.looked = now;
    if (now - own.polled < kPollInterval) return;
    own.polled = now;
    poll_();
}

void ThreadPool::work(int thread, uint64_t seen) {
    Workers& own = *workers_;
    for (;;) {
        {
            std::unique_lock lock(own.mutex);
            own.start.wait(lock, [&] { return own.stopping || own.generation != seen; });
            if (own.stopping) return;
            seen = own.generation;
        }
        take_items(thread);
        {
            std::lock_guard lock(own.mutex);
            --own.active;
        }
        own.done.notify_one();
    }
}

void ThreadPool::run(int64_t num_items, FunctionRef<int64_t, int> body) {
    Workers& own = *workers_;
    if (num_items <= 0) return;
    own.items_per_look = own.items_left = 1;
    if (num_threads_ > 1 && num_items > 1) start_workers();
    if (own.threads.empty() || num_items == 1) {
        for (int64_t item = 0; item < num_items; ++item) take_item(body, item, 0);
        return;
    }
    {
        std::lock_guard lock(own.mutex);
        own.body = body;
        own.num_items = num_items;
        own.next.store(0, std::memory_order_relaxed);
        own.active = static_cast<int>(own.threads.size());
        own.error = nullptr;
        ++own.generation;
    }
    own.start.notify_all();
    take_items(0);
    std::unique_lock lock(own.mutex);
    own.done.wait(lock, [&] { return own.active == 0; });
    if (own.error) std::rethrow_exception(own.error);
}
}  // namespace crf
