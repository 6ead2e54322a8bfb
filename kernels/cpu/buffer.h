// Memory for large arrays: not cleared, because they are written before they are read, and in huge
// pages if the system has them: with small pages, page faults and TLB misses dominate the time of
// first touches and gathers.
#pragma once

#include "cpu/common.h"

#include <malloc.h>
#include <sys/mman.h>

namespace crf {
inline constexpr size_t kHugePage = size_t{1} << 21;

// A block that starts at a huge page, of a whole number of them; the first `in_huge_pages` bytes
// are asked for in huge pages. It comes from the system and goes back to it at once when it is
// freed, which malloc does not do with blocks of up to 32 MiB.
inline void* allocate_large(size_t bytes, size_t in_huge_pages) {
    const size_t mapped = bytes + kHugePage;
    void* const start =
        mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    auto* const block = static_cast<std::byte*>(start) + before;
    if (before > 0) munmap(start, before);
    munmap(block + bytes,
           kHugePage - before);  // at least a page: `before` is less than a huge page
    madvise(block, in_huge_pages, MADV_HUGEPAGE);
    return block;
}

// Large freed blocks that are kept for reuse: touching fresh memory for the first time costs as
// much as many passes over it. Blocks are kept while a cache is active on this thread, and never
// beside a new block that they do not fit.
class BlockCache {
   public:
    static constexpr size_t kSmallest = 2 * kHugePage;
    static constexpr int64_t kFewBytes = int64_t{1} << 24;

    BlockCache() : outer_(current()) { current() = this; }
    ~BlockCache() {
        release();
        current() = outer_;
    }
    BlockCache(const BlockCache&) = delete;
    BlockCache& operator=(const BlockCache&) = delete;

    // `bytes`: the requested size; becomes the size of the block. A last huge page used to less
    // than 3/4 is left in small pages.
    static void* take(size_t& bytes) {
        constexpr size_t kLine = 64;
        bytes = (bytes + kLine) / kLine * kLine;
        if (bytes < kSmallest) {
            void* const memory = std::aligned_alloc(kLine, bytes);
            if (!memory) throw std::bad_alloc();
            return memory;
        }
        const size_t in_huge_pages = (bytes + kHugePage / 4) / kHugePage * kHugePage;
        bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        if (current()) {
            if (void* block = current()->find(bytes)) return block;
            current()->release();
        }
        return allocate_large(bytes, in_huge_pages);
    }

    static void give(void* block, size_t bytes) {
        if (bytes < kSmallest) {
            std::free(block);
        } else if (current()) {
            current()->idle_.push_back({block, bytes});
        } else {
            munmap(block, bytes);
        }
    }

    // Returns idle memory to the system before so many bytes are allocated. Before a small array
    // the heap is not trimmed: whatever is allocated next would have to touch its pages for the
    // first time again, which costs training on small crops a third of its time.
    static void release_idle(int64_t next_bytes) {
        if (current()) current()->release();
        if (next_bytes < kFewBytes) return;
#if defined(__GLIBC__)
        malloc_trim(0);  // otherwise small freed blocks keep the heap large
#endif
    }

   private:
    struct Block {
        void* memory;
        size_t bytes;
    };

    static BlockCache*& current() {
        thread_local BlockCache* cache = nullptr;
        return cache;
    }

    // The smallest block that fits and is not much too large.
    void* find(size_t& bytes) {
        size_t best = idle_.size();
        for (size_t i = 0; i < idle_.size(); ++i)
            if (idle_[i].bytes >= bytes && idle_[i].bytes <= 2 * bytes &&
                (best == idle_.size() || idle_[i].bytes < idle_[best].bytes))
                best = i;
        if (best == idle_.size()) return nullptr;
        void* memory = idle_[best].memory;
        bytes = idle_[best].bytes;
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
        return memory;
    }

    void release() {
        for (const Block& block : idle_) munmap(block.memory, block.bytes);
        idle_.clear();
    }

    std::vector<Block> idle_;
    BlockCache* outer_;
};

// An array of trivial elements, aligned to a cache line (the widest vector) or, if it is large, to
// a huge page.
template <class T>
struct Buffer {
    static_assert(std::is_trivially_destructible_v<T>);
    struct Free {
        size_t bytes = 0;
        void operator()(T* p) const { BlockCache::give(p, bytes); }
    };
    std::unique_ptr<T[], Free> data;
    int64_t size = 0;

    Buffer() = default;
    explicit Buffer(int64_t n) : size(n) {
        size_t bytes = static_cast<size_t>(n) * sizeof(T);
        T* memory = static_cast<T*>(BlockCache::take(bytes));
        data = std::unique_ptr<T[], Free>(memory, Free{bytes});
    }
    // Makes room for so many elements; what it held is lost.
    void grow(int64_t n) {
        if (size >= n) return;
        *this = Buffer();  // freed before more is allocated
        *this = Buffer(n);
    }
    T* get() const { return data.get(); }
    T& operator[](int64_t i) const { return data[i]; }
    explicit operator bool() const { return static_cast<bool>(data); }
};

// Memory that filters use in turn: the next one overwrites the contents.
class Workspace {
   public:
    float* floats(int64_t count) {
        memory_.grow(count);
        return memory_.get();
    }

   private:
    Buffer<float> memory_;
};
}  // namespace crf
