// Kernels without a GPU: launch.h's macros for a C++ compiler, so that tests run the same sources as the GPU.
//
// Threads run one after the other, in order or in reverse; threads of a block inside each phase.
//
// CRF_WATCHED: each access to memory is watched (tests/helpers/kernel_watch.cpp), and arithmetic is as inexact as a GPU's may be. Threads
// and blocks run one after the other in disorder then.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#if CRF_WATCHED
#define CRF_UNWATCHED __attribute__((no_sanitize("thread")))
extern "C" void watch_thread(int phase, int thread);
extern "C" void* watch_shared(std::size_t size, std::size_t granule);
extern "C" const char* watch_run(void (*run)(void*, long long), void* context, long long num_items, bool is_block, unsigned seed);
extern "C" void watch_other(int thread);
#else
#define CRF_UNWATCHED
#endif

namespace crf {
namespace emulation {

inline thread_local long long current_item = 0;  // number of the thread in a launch, or of the block
inline thread_local int current_order = 1;
inline thread_local int current_phase = 0;

CRF_UNWATCHED inline long long item() { return current_item; }
CRF_UNWATCHED inline void begin_item(long long number) {
    current_item = number;
    current_phase = 0;
}

// Like a driver's launch: `arguments` points to one value per parameter. order: 0 runs the items in reverse; watched, it is the seed of
// their order. Returns a fault, or nullptr.
template <class... Parameters, std::size_t... Index>
const char* run_each(void (*kernel)(Parameters...), [[maybe_unused]] bool is_block, long long num_items, int order, void** arguments,
                     std::index_sequence<Index...>) {
    const std::tuple<Parameters...> values{*static_cast<Parameters*>(arguments[Index])...};
    const auto run_item = [&](long long number) {
        begin_item(number);
        std::apply(kernel, values);
    };
#if CRF_WATCHED
    const auto call = [](void* context, long long number) { (*static_cast<decltype(run_item)*>(context))(number); };
    return watch_run(call, const_cast<void*>(static_cast<const void*>(&run_item)), num_items, is_block, static_cast<unsigned>(order));
#else
    current_order = order;
    for (long long i = 0; i < num_items; ++i) run_item(order == 0 ? num_items - 1 - i : i);
    return nullptr;
#endif
}
template <class... Parameters>
const char* run(void (*kernel)(Parameters...), bool is_block, long long num_items, int order, void** arguments) {
    return run_each(kernel, is_block, num_items, order, arguments, std::index_sequence_for<Parameters...>{});
}

// ---- Blocks ----------------------------------------------------------------------------------------------------------------------

// The thread to run next; -1 after the last one. Watched, each block has an order of its own.
CRF_UNWATCHED inline int begin_turn(int turn, int num_threads) {
    if (turn == 0) ++current_phase;
    int thread = turn;
    if (current_order == 0) thread = num_threads - 1 - turn;
#if CRF_WATCHED
    thread = static_cast<int>((turn * 37 + 11 * current_item) % num_threads);
#endif
    if (turn == num_threads) thread = -1;
#if CRF_WATCHED
    watch_thread(current_phase, thread);
#endif
    return thread;
}

// A variable per thread that keeps its value between phases.
template <class T, int NumThreads>
class PerThread {
   public:
    T& operator[](int thread) {
#if CRF_WATCHED
        watch_other(thread);
#endif
        return own_[thread];
    }

   private:
    T own_[NumThreads];
};

// An array that the threads of a block share; new, it holds no numbers.
template <class T, int Count>
class Shared {
   public:
    Shared() {
#if CRF_WATCHED
        elements_ = static_cast<T*>(watch_shared(sizeof(T) * Count, alignof(T) < 4 ? alignof(T) : 4));
#else
        std::memset(static_cast<void*>(elements_), 0xff, sizeof elements_);
#endif
    }
    T& operator[](int place) { return elements_[place]; }

   private:
#if CRF_WATCHED
    T* elements_;
#else
    T elements_[Count];
#endif
};

// ---- Arithmetic ------------------------------------------------------------------------------------------------------------------

#if CRF_WATCHED
// A number up to two units in the last place away, as CUDA's functions may be: always the same for the same number. What is exact there
// stays: zero, one, infinity.
template <class T>
T inexact(T x) {
    if (!(x != T(0)) || x == T(1) || !std::isfinite(x)) return x;
    std::uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    const std::int64_t off = static_cast<std::int64_t>((bits * 0x9E3779B97F4A7C15ull) >> 40) % 5 - 2;
    const T unit = std::nextafter(std::fabs(x), std::numeric_limits<T>::infinity()) - std::fabs(x);
    return x + static_cast<T>(off) * unit;
}
#else
template <class T>
T inexact(T x) {
    return x;
}
#endif

}  // namespace emulation

template <class T>
T exp(T x) {
    return emulation::inexact(std::exp(x));
}
template <class T>
T exp2(T x) {
    return emulation::inexact(std::exp2(x));
}
template <class T>
T log(T x) {
    return emulation::inexact(std::log(x));
}
using std::sqrt;

}  // namespace crf
