// Memory as a strict device has it: aligned to 256 bytes and no more, never zero by chance, and useless once it is free. numpy's arrays
// live in it (strict_device.py).
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::uint32_t kPoison = 0x7FF3A5C7;  // cuda_shim.POISON

struct Block {
    std::size_t size;
    std::int64_t number;  // no two blocks have the same, wherever they lie
};

std::mutex mutex;
std::map<char*, Block> blocks;
std::int64_t num_blocks, num_bytes, most_bytes;

void poison(char* block, std::size_t size) {
    for (std::size_t i = 0; i < size; i += sizeof kPoison)
        std::memcpy(block + i, &kPoison, size - i < sizeof kPoison ? size - i : sizeof kPoison);
}

char* take(std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    // The block begins at an odd multiple of the alignment, so that nothing larger holds by chance, and no other one is next to it.
    char* whole = static_cast<char*>(std::aligned_alloc(2 * kAlignment, (size / (2 * kAlignment) + 2) * 2 * kAlignment));
    if (whole == nullptr) return nullptr;
    char* block = whole + kAlignment;
    poison(block, size);
    blocks[block] = {size, ++num_blocks};
    num_bytes += static_cast<std::int64_t>(size);
    if (num_bytes > most_bytes) most_bytes = num_bytes;
    return block;
}

void give_back(char* block) {
    if (block == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks.find(block);
    if (found == blocks.end()) std::abort();
    const std::size_t size = found->second.size;
    blocks.erase(found);
    num_bytes -= static_cast<std::int64_t>(size);
    poison(block, size);
    std::free(block - kAlignment);
}

}  // namespace

extern "C" {

void* strict_malloc(void*, std::size_t size) { return take(size); }

void* strict_calloc(void*, std::size_t count, std::size_t size) {
    char* block = take(count * size);
    if (block != nullptr) std::memset(block, 0, count * size);
    return block;
}

void* strict_realloc(void*, void* from, std::size_t size) {
    char* block = take(size);
    if (block == nullptr || from == nullptr) return block;
    const std::size_t before = blocks.at(static_cast<char*>(from)).size;
    std::memcpy(block, from, before < size ? before : size);
    give_back(static_cast<char*>(from));
    return block;
}

void strict_free(void*, void* block, std::size_t) { give_back(static_cast<char*>(block)); }

// The number of the block that some bytes lie in; 0: not in one.
std::int64_t block_of(const void* place, std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    char* begin = static_cast<char*>(const_cast<void*>(place));
    auto found = blocks.upper_bound(begin);
    if (found == blocks.begin()) return 0;
    found = std::prev(found);
    return begin + size <= found->first + found->second.size ? found->second.number : 0;
}

// Allocations so far; bytes in use; the most there were since the last reset.
void read_counts(std::int64_t* counts, int resets) {
    const std::lock_guard<std::mutex> lock(mutex);
    counts[0] = num_blocks;
    counts[1] = num_bytes;
    counts[2] = most_bytes;
    if (resets) most_bytes = num_bytes;
}

}  // extern "C"
