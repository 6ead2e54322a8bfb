// Subnormal numbers as zeros in the thread that computes. Marginals far from a border, their gradients and the weights of unlike voxels
// are so small that their products are subnormal: nothing in a sum, but on x86 each takes over a hundred cycles.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace crf {

// While it lives, its thread takes subnormal operands for zeros and rounds subnormal results to zeros. Where the processor has no such
// mode that matters, it does nothing.
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

}  // namespace crf
