// Macros with which the kernels in cuda/*.cu compile with NVRTC and nvcc for a GPU, and with any
// C++ compiler for tests without one.
//
// CRF_KERNEL(name, parameters...) { body of one thread } has no barrier and shares nothing between
// threads.
//
// CRF_BLOCK_KERNEL(name, parameters...) { body of a block of CRF_THREADS threads } is written in
// phases:
//
//     CRF_SHARED(float, tile, 256);                        // shared by the threads of the block
//     CRF_PER_THREAD(float, total);                        // one per thread, kept between phases
//     CRF_PHASE(thread) { tile[thread] = from[thread]; }   // all threads; a barrier follows
//     CRF_PHASE(thread) { total[thread] = tile[255 - thread]; }
//
// Inside a phase `continue` ends it for the thread, and nothing may `return`. Code outside phases
// must be the same for all threads of the block. Compiled as C++, a phase is a loop over the
// block's threads (tests/helpers/emulation.h).
#pragma once

#include "portable.h"

#if !defined(__CUDACC__)
#include <emulation.h>
#endif

namespace crf {
using int64 = long long;
using uint64 = unsigned long long;
using uint32 = unsigned int;
using uint16 = unsigned short;
using uint8 = unsigned char;

// Type of all values.
using Real = float;
// smallest normal number: keeps divisors and arguments of logarithms above zero
constexpr Real kTiny = 1.17549435e-38f;
constexpr Real kLowest = -3.40282347e38f;  // least finite number
constexpr Real kEpsilon = 1.1920929e-7f;   // spacing of numbers at 1

#if defined(__CUDACC__)

#define CRF_KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
#define CRF_D __device__ __forceinline__
#define CRF_UNROLL_BY_4 _Pragma("unroll 4")
#define CRF_ROLLED _Pragma("unroll 1")

// Number of this thread in the whole launch.
CRF_D int64 thread_number() { return static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Atomically replaces `expected` with `desired`; returns the old value.
CRF_D uint64 compare_and_swap(uint64* place, uint64 expected, uint64 desired) {
    return atomicCAS(place, expected, desired);
}

// Reads memory that other threads of the same launch may write, never a cached value.
CRF_D uint64 read_shared(uint64* place) { return *static_cast<const volatile uint64*>(place); }

// 2^x by the hardware's instruction, within two units in the last place; results below the normal
// numbers are 0, unlike those of exp2.
CRF_D float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Resident threads per multiprocessor: 128 registers for each. Without this bound, the compiler
// spills registers to have more threads.
#define CRF_RESIDENT 512
#define CRF_BLOCK_KERNEL(name, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(CRF_THREADS, CRF_RESIDENT / CRF_THREADS) \
        name(__VA_ARGS__)
#define CRF_SHARED(type, name, count) __shared__ type name[count]
#define CRF_PER_THREAD(type, name) crf::PerThread<type> name
#define CRF_PHASE(thread) \
    for (int thread = threadIdx.x, crf_turn = 0; crf_turn < 1; ++crf_turn, __syncthreads())

CRF_D int64 block_number() { return blockIdx.x; }

template <class T>
struct PerThread {
    T own;
    CRF_D T& operator[](int) { return own; }
};

#else

#define CRF_EMULATED(name, is_block, ...)                                                   \
    static void name(__VA_ARGS__);                                                          \
    extern "C" const char* launch_##name(long long num_items, int order, void** arguments); \
    const char* launch_##name(long long num_items, int order, void** arguments) {           \
        return crf::emulation::run(&name, is_block, num_items, order, arguments);           \
    }                                                                                       \
    static void name(__VA_ARGS__)
#define CRF_KERNEL(name, ...) CRF_EMULATED(name, false, __VA_ARGS__)
#define CRF_D inline
#define CRF_UNROLL_BY_4
#define CRF_ROLLED

CRF_D int64 thread_number() { return emulation::item(); }

CRF_D uint64 compare_and_swap(uint64* place, uint64 expected, uint64 desired) {
    std::atomic_ref<uint64>(*place).compare_exchange_strong(expected, desired);
    return expected;
}
CRF_D uint64 read_shared(uint64* place) {
    return std::atomic_ref<uint64>(*place).load(std::memory_order_relaxed);
}

CRF_D Real power_of_two(Real x) { return exp2(x); }

#define CRF_BLOCK_KERNEL(name, ...) CRF_EMULATED(name, true, __VA_ARGS__)
#define CRF_SHARED(type, name, count) crf::emulation::Shared<type, count> name
#define CRF_PER_THREAD(type, name) crf::emulation::PerThread<type, CRF_THREADS> name
#define CRF_PHASE(thread)                                                       \
    for (int crf_turn = 0, thread = crf::emulation::begin_turn(0, CRF_THREADS); \
         crf_turn < CRF_THREADS;                                                \
         ++crf_turn, thread = crf::emulation::begin_turn(crf_turn, CRF_THREADS))

CRF_D int64 block_number() { return emulation::item(); }

#endif

// The channels of a voxel or vertex that are filtered together, side by side: one or two wide
// loads.
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

// to += factor * from. Rows are passed by value: with a reference, the compiler loads each number
// separately.
template <int Width>
CRF_D void add_scaled(Row<Width>& to, Row<Width> from, Real factor) {
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) to.value[c] += factor * from.value[c];
}

// sum[n] += channel_weight * factor * from; without `adds`, sum[n] is set and not read.
template <int Width>
CRF_D void put_weighted(Row<Width>* sum, int64 n, Row<Width> from, Real factor,
                        const Real* channel_weight, int adds) {
    Row<Width> out = adds ? sum[n] : zero_row<Width>();
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) out.value[c] += channel_weight[c] * factor * from.value[c];
    sum[n] = out;
}

CRF_D Real larger(Real a, Real b) { return a > b ? a : b; }
}  // namespace crf
