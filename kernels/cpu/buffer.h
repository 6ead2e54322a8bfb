// Memory for large arrays: not cleared, as they are written before they are read, and in huge pages where the system has them, since
// most time in first touching and in gathering from small pages goes into page faults and misses of the address cache.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace crf {

// An array of trivial elements, aligned to a cache line (the widest vector) or, where it is large, to a huge page.
template <class T>
struct Buffer {
    static_assert(std::is_trivially_destructible_v<T>);
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data;
    int64_t size = 0;

    Buffer() = default;
    explicit Buffer(int64_t n) : size(n) {
        constexpr size_t kLine = 64, kHugePage = size_t{1} << 21;
        const size_t bytes = static_cast<size_t>(n) * sizeof(T);
        const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kLine;
        const size_t rounded = (bytes + kLine) / kLine * kLine;
        void* memory = std::aligned_alloc(alignment, (rounded + alignment - 1) / alignment * alignment);
        if (!memory) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
        data.reset(static_cast<T*>(memory));
    }
    T* get() const { return data.get(); }
    T& operator[](int64_t i) const { return data[i]; }
    explicit operator bool() const { return static_cast<bool>(data); }
};

// Memory that filters take turns in: what one leaves there is lost when the next one works.
class Workspace {
   public:
    float* floats(int64_t count) {
        if (memory_.size < count) {
            memory_ = Buffer<float>();  // freed before more is taken
            memory_ = Buffer<float>(count);
        }
        return memory_.get();
    }

   private:
    Buffer<float> memory_;
};

}  // namespace crf
