// Kernels without a GPU: launch.h's macros for a C++ compiler, so that tests run the same sources as the GPU.
//
// Threads run one after the other, in order or in reverse, or on several CPU threads at once; threads of a block run one after the other
// inside each phase. Shared arrays are checked: an element that is read before it is written, or that one thread writes and another
// reads or writes in the same phase, is a fault, which the launch returns. So is an index outside an array.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace crf {
namespace emulation {

inline thread_local long long current_item = 0;  // number of the thread in a launch, or of the block
inline thread_local int current_worker = 0, num_current_workers = 1;
inline thread_local int current_thread = -1;  // within its block; -1 between phases
inline thread_local int current_phase = 0;
inline std::atomic<const char*> fault = nullptr;

inline void report(const char* what) {
    const char* none = nullptr;
    fault.compare_exchange_strong(none, what);  // the first one is the cause
}

// Like a driver's launch: `arguments` points to one value per parameter. num_workers: 1 runs the items in order, 0 in reverse, more run
// in parallel. Returns a fault, or nullptr.
template <class... Parameters, std::size_t... Index>
const char* run_each(void (*kernel)(Parameters...), long long num_items, int num_workers, void** arguments, std::index_sequence<Index...>) {
    fault.store(nullptr);
    const auto run_item = [&](long long number) {
        current_item = number;
        kernel(*static_cast<Parameters*>(arguments[Index])...);
    };
    const auto work = [&](int worker) {
        current_worker = worker;
        num_current_workers = num_workers;
        if (num_workers == 0)
            for (long long i = num_items - 1; i >= 0; --i) run_item(i);
        else
            for (long long i = worker; i < num_items; i += num_workers) run_item(i);
    };
    std::vector<std::thread> others;
    for (int worker = 1; worker < num_workers; ++worker) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
    return fault.load();
}
template <class... Parameters>
const char* run(void (*kernel)(Parameters...), long long num_items, int num_workers, void** arguments) {
    return run_each(kernel, num_items, num_workers, arguments, std::index_sequence_for<Parameters...>{});
}

// ---- Blocks ----------------------------------------------------------------------------------------------------------------------

// The thread to run next; -1 after the last one. With several workers, each runs the threads in a different scrambled order.
inline int begin_turn(int turn, int num_threads) {
    if (turn == 0) ++current_phase;
    current_thread = turn;
    if (num_current_workers == 0) current_thread = num_threads - 1 - turn;
    if (num_current_workers > 1) current_thread = (turn * 37 + 11 * current_worker) % num_threads;
    if (turn == num_threads) current_thread = -1;
    return current_thread;
}

// A variable per thread that keeps its value between phases.
template <class T, int NumThreads>
class PerThread {
   public:
    T& operator[](int thread) {
        if (thread != current_thread) {
            report("a thread takes what belongs to another thread");
            thread = 0;
        }
        return own_[thread];
    }

   private:
    T own_[NumThreads];
};

// An array that the threads of a block share.
template <class T, int Count>
class Shared {
   public:
    Shared() : element_(new Element[Count]) {
        for (int i = 0; i < Count; ++i) std::memset(static_cast<void*>(&element_[i].value), 0xff, sizeof(T));  // not a number
    }
    class Reference {
       public:
        Reference(Shared& array, int place) : array_(array), place_(place) {}
        operator T() const { return array_.read(place_); }
        const Reference& operator=(const T& value) const {
            array_.write(place_, value);
            return *this;
        }

       private:
        Shared& array_;
        int place_;
    };
    Reference operator[](int place) {
        if (place < 0 || place >= Count) {
            report("a place outside of a shared array");
            place = 0;
        }
        return Reference(*this, place);
    }

   private:
    static constexpr int kSeveral = -2;
    struct Element {
        T value;
        int written_in = 0, writer = 0;  // phase and thread, the last
        int read_in = 0, reader = 0;
    };

    T read(int place) {
        Element& element = element_[place];
        if (current_thread < 0) report("a shared array is read between phases");
        if (element.written_in == 0) report("a shared element is read that nobody has written");
        if (element.written_in == current_phase && element.writer != current_thread)
            report("a shared element is read in the phase in which another thread writes it");
        element.reader = element.read_in == current_phase && element.reader != current_thread ? kSeveral : current_thread;
        element.read_in = current_phase;
        return element.value;
    }
    void write(int place, const T& value) {
        Element& element = element_[place];
        if (current_thread < 0) report("a shared array is written between phases");
        if (element.written_in == current_phase && element.writer != current_thread)
            report("a shared element is written by two threads in one phase");
        if (element.read_in == current_phase && element.reader != current_thread)
            report("a shared element is written in the phase in which another thread reads it");
        element.written_in = current_phase;
        element.writer = current_thread;
        element.value = value;
    }

    std::unique_ptr<Element[]> element_;
};

}  // namespace emulation

using std::exp;
using std::exp2;
using std::log;
using std::sqrt;

}  // namespace crf
