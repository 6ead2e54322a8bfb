// A pool of threads that process numbered items. An item's result does not depend on its thread,
// nor on the number of threads.
#pragma once

#include "cpu/common.h"

namespace crf {
// A function that is called only while the caller waits: copies nothing, and compiles faster than
// std::function. May be empty.
template <class... Arguments>
class FunctionRef {
   public:
    FunctionRef() = default;
    template <class Function>
    FunctionRef(const Function& function)
        : function_(&function), call_([](const void* called, Arguments... arguments) {
              (*static_cast<const Function*>(called))(arguments...);
          }) {}

    explicit operator bool() const { return function_ != nullptr; }
    void operator()(Arguments... arguments) const { call_(function_, arguments...); }

   private:
    const void* function_ = nullptr;
    void (*call_)(const void*, Arguments...) = nullptr;
};

class ThreadPool {
   public:
    // poll: called from time to time while the pool works. subnormals_are_zeros: whether bodies
    // compute with subnormal numbers as zeros, in every thread, so that results do not depend on
    // it.
    ThreadPool(int num_threads, void (*poll)(), bool subnormals_are_zeros = false);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // The caller and its workers; fewer if the system refuses to start more.
    int num_threads() const { return num_threads_; }

    // Stops the workers until the next run: an idle pool must not hold threads, because a fork
    // would lose them.
    void rest();

    // Calls body(item, thread) for every item in 0 .. num_items - 1; the caller's thread works too
    // (as thread 0), and calls `poll`. The first exception of a body or of `poll` is rethrown once
    // all threads are done.
    void run(int64_t num_items, FunctionRef<int64_t, int> body);

    // Calls body(begin, end, thread) for blocks of so many items; the last may be shorter.
    void run_blocks(int64_t num_items, int64_t size, FunctionRef<int64_t, int64_t, int> body) {
        run(divided_up(num_items, size), [&](int64_t block, int thread) {
            body(block * size, std::min((block + 1) * size, num_items), thread);
        });
    }

   private:
    struct Workers;  // whose headers the files of the filters need not read

    void start_workers();
    void work(int thread, uint64_t seen);
    void take_items(int thread);
    void take_item(FunctionRef<int64_t, int> body, int64_t item, int thread);
    void poll_if_due();

    void (*const poll_)();
    const bool subnormals_are_zeros_;
    const int num_threads_;
    const std::unique_ptr<Workers> workers_;
};
}  // namespace crf
