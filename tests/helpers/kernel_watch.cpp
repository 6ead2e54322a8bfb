// What the threads of a launch do to memory: each access of a kernel that was compiled with -fsanitize=thread calls one of the functions
// at the end, which stand in for ThreadSanitizer's own. A fault ends the launch before the access happens.
//
// Of each element in the launch's arrays, and in what a block shares, there is a record of who wrote and read it. Threads are not run at
// the same time for this: whatever two of them do that no barrier orders is taken to happen at once, in whichever order they run here.
#include <pthread.h>

#include <algorithm>
#include <bit>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <xmmintrin.h>

namespace {

using Bytes = const char*;

// Who did something: block, phase and thread, each in bits of its own. Zero: nobody.
constexpr std::uint64_t kThreadBits = 11, kPhaseBits = 21;
constexpr std::uint64_t kSeveral = (1u << kThreadBits) - 1;  // threads of a block, in one phase
constexpr std::uint64_t kSeveralBlocks = ~std::uint64_t{0};
constexpr std::uint64_t thread_of(std::uint64_t who) { return who & kSeveral; }
constexpr std::uint64_t phase_of(std::uint64_t who) { return who & ~kSeveral; }  // and block
constexpr std::uint64_t block_of(std::uint64_t who) { return who >> (kThreadBits + kPhaseBits); }

enum Kind { kRead, kWrite, kAtomic, kNumKinds };
constexpr const char* kNames[] = {"read", "written", "used as an atomic"};

struct Element {
    std::uint64_t by[kNumKinds];  // the last ones; what they follow they are ordered with
};

struct Place {
    Bytes begin, end;
    int shift;         // of an element's size
    std::string name;  // empty: shared by a block
    Element* elements;
};

constexpr std::uint32_t kPoison = 0x7FF3A5C7;  // cuda_shim.POISON

std::vector<Place> places;
Bytes stack_begin, stack_end;
std::vector<char*> shared;
bool is_running = false;
std::uint64_t item, phase;
int thread;  // -1: between phases
std::jmp_buf after_fault;
char message[400];

std::uint64_t pack(std::uint64_t in_phase, std::uint64_t by_thread) {
    return (item + 1) << (kThreadBits + kPhaseBits) | (in_phase & ((1u << kPhaseBits) - 1)) << kThreadBits | by_thread;
}

// All threads of a block run what lies between phases, with nothing that makes them wait for each other before the next phase.
std::uint64_t present() { return thread < 0 ? pack(phase + 1, kSeveral) : pack(phase, static_cast<std::uint64_t>(thread) + 1); }

// Whether nothing orders the two.
bool at_once(std::uint64_t one, std::uint64_t other) {
    if (one == 0 || other == 0) return false;
    if (one == kSeveralBlocks || block_of(one) != block_of(other)) return true;
    return phase_of(one) == phase_of(other) && (one != other || thread_of(one) == kSeveral);
}

[[noreturn]] void fail(const char* what, const Place* place, Bytes address, std::uint64_t other = 0) {
    char who[80] = "", more[120] = "";
    if (phase > 0 && thread >= 0) std::snprintf(who, sizeof who, ", thread %d", thread);
    if (other == kSeveralBlocks)
        std::snprintf(more, sizeof more, " (by several)");
    else if (other != 0)
        std::snprintf(more, sizeof more, " (by item %llu)", static_cast<unsigned long long>(block_of(other)) - 1);
    if (place == nullptr)
        std::snprintf(message, sizeof message, "item %llu%s: %s", static_cast<unsigned long long>(item), who, what);
    else
        std::snprintf(message, sizeof message, "item %llu%s: %s: element %lld of %s, which has %lld%s",
                      static_cast<unsigned long long>(item), who, what, static_cast<long long>((address - place->begin) >> place->shift),
                      place->name.empty() ? "a shared array" : place->name.c_str(),
                      static_cast<long long>(place->end - place->begin) >> place->shift, more);
    is_running = false;
    std::longjmp(after_fault, 1);
}

const Place* nearest(Bytes address) {
    const Place* found = nullptr;
    std::ptrdiff_t least = 4096;
    for (const Place& place : places) {
        const std::ptrdiff_t distance = address < place.begin ? place.begin - address : address - place.end;
        if (distance < least) least = distance, found = &place;
    }
    return found;
}

const Place* place_at(Bytes address) {
    static std::size_t last[256];  // where places near an address were found
    std::size_t& guess = last[(reinterpret_cast<std::uintptr_t>(address) >> 10) % 256];
    const auto is_in = [&](std::size_t i) { return address >= places[i].begin && address < places[i].end; };
    if (guess < places.size() && is_in(guess)) return &places[guess];
    for (std::size_t i = 0; i < places.size(); ++i)
        if (is_in(i)) return &places[guess = i];
    return nullptr;
}

// Whether a number is part of what memory was filled with when it was new, or freed.
bool is_poison(const Place& place, Bytes address) {
    Bytes word = address - reinterpret_cast<std::uintptr_t>(address) % sizeof kPoison;
    return word >= place.begin && word + sizeof kPoison <= place.end && std::memcmp(word, &kPoison, sizeof kPoison) == 0;
}

void take_place(Element& element, Kind kind, std::uint64_t who) {
    std::uint64_t& before = element.by[kind];
    if (before == kSeveralBlocks || before == who) return;
    if (before == 0 || (phase_of(before) != phase_of(who) && block_of(before) == block_of(who)))
        before = who;
    else if (block_of(before) != block_of(who))
        before = kSeveralBlocks;
    else
        before |= kSeveral;
}

void access(const void* pointer, std::size_t size, Kind kind) {
    if (!is_running) return;
    Bytes address = static_cast<Bytes>(pointer);
    const Place* place = place_at(address);
    if (place == nullptr || address + size > place->end) {
        if (place == nullptr && address >= stack_begin && address < stack_end) return;  // a thread's own
        fail(kind == kRead ? "a read outside of all arrays" : "a write outside of all arrays", place ? place : nearest(address), address);
    }
    const std::uint64_t who = present();
    if (kind == kWrite && thread < 0) fail("a write between phases, by all threads", place, address);
    const std::size_t first = static_cast<std::size_t>(address - place->begin) >> place->shift;
    const std::size_t last = (static_cast<std::size_t>(address - place->begin) + size - 1) >> place->shift;
    for (std::size_t i = first; i <= last; ++i) {
        Element& element = place->elements[i];
        if (kind == kRead && element.by[kRead] != 0 && element.by[kWrite] == 0 && element.by[kAtomic] == 0) {  // as most are
            take_place(element, kind, who);
            continue;
        }
        Bytes at = place->begin + (i << place->shift);
        for (int other = 0; other < kNumKinds; ++other) {
            if (other == kind && kind != kWrite) continue;  // reads are no danger to each other, nor are atomics
            if (at_once(element.by[other], who)) {
                char what[100];
                std::snprintf(what, sizeof what, "%s by one thread and %s by another, with no barrier between", kNames[kind],
                              kNames[other]);
                fail(what, place, at, element.by[other]);
            }
        }
        if (kind != kWrite && element.by[kWrite] == 0 && element.by[kAtomic] == 0 && (place->name.empty() || is_poison(*place, at)))
            fail("read, though nobody has written it", place, at);
        take_place(element, kind, who);
    }
}

void forget_shared() {
    for (char* memory : shared) std::free(memory);
    shared.clear();
    while (!places.empty() && places.back().name.empty()) {
        std::free(places.back().elements);
        places.pop_back();
    }
}

void add_place(Bytes begin, std::size_t size, std::size_t granule, const char* name) {
    // Zeros that are not touched take no memory.
    auto* elements = static_cast<Element*>(std::calloc(size / granule + 1, sizeof(Element)));
    if (elements == nullptr) std::abort();
    places.push_back({begin, begin + size, std::countr_zero(granule), name, elements});
}

}  // namespace

extern "C" {

// An array of the next launch; two of them do not overlap.
void watch_array(const void* begin, std::size_t size, std::size_t granule, const char* name) {
    add_place(static_cast<Bytes>(begin), size, granule, name);
}

// Memory that a block shares, until its end.
void* watch_shared(std::size_t size, std::size_t granule) {
    constexpr std::size_t kGuard = 4096;
    char* memory = static_cast<char*>(std::aligned_alloc(64, (size + 2 * kGuard + 63) / 64 * 64));
    if (memory == nullptr) std::abort();
    shared.push_back(memory);
    add_place(memory + kGuard, size, granule, "");
    return memory + kGuard;
}

// Who runs now.
void watch_thread(int in_phase, int number) {
    phase = static_cast<std::uint64_t>(in_phase);
    thread = number;
}

// A thread takes a variable that is its own.
void watch_other(int number) {
    if (number != thread) fail("a thread takes what belongs to another thread", nullptr, nullptr);
}

// Run items in an order that depends on the seed. Returns the first fault, or nullptr.
const char* watch_run(void (*run)(void*, long long), void* context, long long num_items, bool is_block, unsigned seed) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* begin;
    std::size_t size;
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
    stack_begin = static_cast<Bytes>(begin), stack_end = stack_begin + size;

    std::vector<long long> order(static_cast<std::size_t>(num_items));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);  // numbers below the normal ones are zero
    const char* found = nullptr;
    if (setjmp(after_fault) == 0) {
        for (const long long number : order) {
            item = static_cast<std::uint64_t>(number);
            phase = 0;
            thread = is_block ? -1 : 0;
            is_running = true;
            run(context, number);
            is_running = false;
            forget_shared();
        }
    } else {
        found = message;
    }
    _mm_setcsr(control);
    forget_shared();
    for (const Place& place : places) std::free(place.elements);
    places.clear();
    return found;
}

// ---- What the compiler calls -----------------------------------------------------------------------------------------------------

#define WATCH(size)                                                               \
    void __tsan_read##size(void* place) { access(place, size, kRead); }           \
    void __tsan_write##size(void* place) { access(place, size, kWrite); }         \
    void __tsan_unaligned_read##size(void* place) { access(place, size, kRead); } \
    void __tsan_unaligned_write##size(void* place) { access(place, size, kWrite); }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)

void __ubsan_handle_out_of_bounds(void*, std::uintptr_t) {
    if (is_running) fail("an index outside of a thread's own array", nullptr, nullptr);
}

void __tsan_read_range(void* place, std::size_t size) { access(place, size, kRead); }
void __tsan_write_range(void* place, std::size_t size) { access(place, size, kWrite); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}

std::uint64_t __tsan_atomic64_load(const volatile std::uint64_t* place, int) {
    access(const_cast<const std::uint64_t*>(place), sizeof *place, kAtomic);
    return *place;
}

int __tsan_atomic64_compare_exchange_strong(volatile std::uint64_t* place, std::uint64_t* expected, std::uint64_t desired, int, int) {
    access(const_cast<const std::uint64_t*>(place), sizeof *place, kAtomic);
    const std::uint64_t before = *place;
    const bool is_same = before == *expected;
    if (is_same) *place = desired;
    *expected = before;
    return is_same;
}

}  // extern "C"
