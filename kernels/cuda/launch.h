// What lets the kernels in cuda/*.cu be compiled by NVRTC and nvcc for a GPU, and by any C++ compiler for tests without one.
//
// A kernel is written as CRF_KERNEL(name, parameters...) { body of one thread }. No kernel has a barrier or uses shared memory: what needs
// one is cut into several kernels. Compiled as C++ a kernel becomes a function `launch_<name>` that runs its threads one after the other,
// forth or back, or on several of the processor's at once, so that a result that depends on their order is found out.
#pragma once

#include "portable.h"

#if !defined(__CUDACC__)
#include <atomic>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>
#endif

namespace crf {

using int64 = long long;
using uint64 = unsigned long long;
using uint32 = unsigned int;
using uint16 = unsigned short;

// Of all values. Double for layers in float64; the lattice is built from single precision either way.
#if CRF_DOUBLE
using Real = double;
constexpr Real kTiny = 2.2250738585072014e-308;    // smallest normal number: keeps divisors and logarithms' arguments off zero
constexpr Real kLowest = -1.7976931348623157e308;  // least finite number
constexpr Real kEpsilon = 2.220446049250313e-16;   // spacing of numbers at 1
#else
using Real = float;
constexpr Real kTiny = 1.17549435e-38f;
constexpr Real kLowest = -3.40282347e38f;
constexpr Real kEpsilon = 1.1920929e-7f;
#endif

#if defined(__CUDACC__)

#define CRF_KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
#define CRF_D __device__ __forceinline__
#define CRF_UNROLL _Pragma("unroll")

// Number of this thread in the whole launch.
CRF_D int64 thread_number() { return static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Writes `desired` where `expected` stands; returns what stood there.
CRF_D uint64 compare_and_swap(uint64* place, uint64 expected, uint64 desired) { return atomicCAS(place, expected, desired); }

// What stands where other threads of the same launch may write: never a value kept from before.
CRF_D uint64 read_shared(uint64* place) { return *static_cast<const volatile uint64*>(place); }

#else

#define CRF_KERNEL(name, ...)                                                                \
    static void name(__VA_ARGS__);                                                           \
    extern "C" void launch_##name(long long num_threads, int num_workers, void** arguments); \
    void launch_##name(long long num_threads, int num_workers, void** arguments) {           \
        crf::emulation::run(&name, num_threads, num_workers, arguments);                     \
    }                                                                                        \
    static void name(__VA_ARGS__)
#define CRF_D inline
#define CRF_UNROLL

namespace emulation {

inline thread_local int64 current_thread = 0;

// As a driver's launch: `arguments` points at one value a parameter. num_workers: 1 runs the threads in order, 0 in reverse, more share
// them out.
template <class... Parameters, std::size_t... Index>
void run_each(void (*kernel)(Parameters...), int64 num_threads, int num_workers, void** arguments, std::index_sequence<Index...>) {
    const auto run_thread = [&](int64 number) {
        current_thread = number;
        kernel(*static_cast<Parameters*>(arguments[Index])...);
    };
    if (num_workers == 0) {
        for (int64 i = num_threads - 1; i >= 0; --i) run_thread(i);
        return;
    }
    const auto work = [&](int worker) {
        for (int64 i = worker; i < num_threads; i += num_workers) run_thread(i);
    };
    std::vector<std::thread> others;
    for (int worker = 1; worker < num_workers; ++worker) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
}
template <class... Parameters>
void run(void (*kernel)(Parameters...), int64 num_threads, int num_workers, void** arguments) {
    run_each(kernel, num_threads, num_workers, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace emulation

CRF_D int64 thread_number() { return emulation::current_thread; }

CRF_D uint64 compare_and_swap(uint64* place, uint64 expected, uint64 desired) {
    std::atomic_ref<uint64>(*place).compare_exchange_strong(expected, desired);
    return expected;
}
CRF_D uint64 read_shared(uint64* place) { return std::atomic_ref<uint64>(*place).load(std::memory_order_relaxed); }

using std::exp;
using std::exp2;
using std::log;
using std::sqrt;

#endif

// ---- Rows ------------------------------------------------------------------------------------------------------------------------

// The channels of a voxel or vertex that are filtered together, side by side: one or two wide loads.
template <int Width>
struct alignas(Width * sizeof(Real) >= 16 ? 16 : Width * sizeof(Real)) Row {
    Real value[Width];
};

template <int Width>
CRF_D Row<Width> zero_row() {
    Row<Width> row;
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) row.value[c] = Real(0);
    return row;
}

// to += factor * from.
template <int Width>
CRF_D void add_scaled(Row<Width>& to, const Row<Width>& from, Real factor) {
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) to.value[c] += factor * from.value[c];
}

CRF_D Real larger(Real a, Real b) { return a > b ? a : b; }

}  // namespace crf
