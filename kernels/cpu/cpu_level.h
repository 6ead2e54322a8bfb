// The highest instruction level that this processor and operating system run, which decides which
// module can be loaded. By the processor's own instruction for it: the compilers' builtin asks
// their run-time library, and zig's answers no to everything.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace crf {
#if defined(__x86_64__)

// The parts of the processor's state that the operating system saves: bit 1 SSE, 2 AVX, 5 to 7
// AVX-512.
inline uint32_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

inline const char* cpu_level() {
    constexpr uint32_t kFma = 1u << 12;
    constexpr uint32_t kMovbe = 1u << 22;
    constexpr uint32_t kOsSaves = 1u << 27;
    constexpr uint32_t kAvx = 1u << 28;
    constexpr uint32_t kF16c = 1u << 29;
    constexpr uint32_t kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;
    constexpr uint32_t kAvx512f = 1u << 16;
    constexpr uint32_t kAvx512dq = 1u << 17;
    constexpr uint32_t kAvx512cd = 1u << 28;
    constexpr uint32_t kAvx512bw = 1u << 30;
    constexpr uint32_t kAvx512vl = 1u << 31;
    constexpr uint32_t kLzcnt = 1u << 5;
    constexpr uint32_t kBasic = kFma | kMovbe | kOsSaves | kAvx | kF16c;
    constexpr uint32_t kThird = kBmi1 | kAvx2 | kBmi2;
    constexpr uint32_t kFourth = kAvx512f | kAvx512dq | kAvx512cd | kAvx512bw | kAvx512vl;

    uint32_t a, b, basic, extended, lzcnt, d;
    if (!__get_cpuid(1, &a, &b, &basic, &d) || (basic & kBasic) != kBasic ||
        (saved_state() & 0x6) != 0x6)
        return "baseline";
    if (!__get_cpuid_count(7, 0, &a, &extended, &b, &d) || (extended & kThird) != kThird)
        return "baseline";
    if (!__get_cpuid(0x80000001, &a, &b, &lzcnt, &d) || !(lzcnt & kLzcnt)) return "baseline";
    return (extended & kFourth) == kFourth && (saved_state() & 0xe6) == 0xe6 ? "avx512" : "avx2";
}

#else

inline const char* cpu_level() { return "baseline"; }

#endif
}  // namespace crf
