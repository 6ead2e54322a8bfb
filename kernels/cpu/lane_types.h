// Vectors of many lanes that the compiler keeps in registers.
// gcc 12 keeps vectors wider than the registers in memory, and computes them lane by lane; it is
// given structures of registers, halves of halves, because it keeps the members of a structure in
// registers, and the elements of an array often not.
#pragma once

#include "cpu/common.h"

namespace crf {
#if defined(__AVX512F__)
constexpr size_t kProcessorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kProcessorBytes = 32;
#else
constexpr size_t kProcessorBytes = 16;
#endif

// The widest vector that is left to the compiler.
#if defined(__clang__)
constexpr size_t kRegisterBytes = 128;  // the widest that simd.h uses
#else
constexpr size_t kRegisterBytes = kProcessorBytes;
#endif

// Whether code for each number of labels or modalities is worth its time to compile: registers that
// hold few lanes do not hold their loops.
constexpr bool kHasWideRegisters = kRegisterBytes > 16;

// A number in all lanes.
template <class V, class T>
inline V splat(T x) {
    if constexpr (std::is_class_v<V>) {
        return V(x);
    } else {
        return x - V{};  // V{} + x would be an addition, because of -0
    }
}

template <class V, class T>
inline V load_lanes(const T* from) {
    if constexpr (std::is_class_v<V>) {
        return {load_lanes<decltype(V::low)>(from), load_lanes<decltype(V::high)>(from + V::kHalf)};
    } else {
        V v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
}
template <class V, class T>
inline void store_lanes(T* to, V v) {
    if constexpr (std::is_class_v<V>) {
        store_lanes(to, v.low);
        store_lanes(to + V::kHalf, v.high);
    } else {
        std::memcpy(to, &v, sizeof v);
    }
}

template <class Half>
struct Halves {
    typedef std::remove_cvref_t<decltype(std::declval<const Half&>()[0])> Scalar;
    static constexpr int kHalf = sizeof(Half) / sizeof(Scalar);

    Half low, high;

    Halves() = default;
    Halves(Half of_low, Half of_high) : low(of_low), high(of_high) {}
    Halves(Scalar x)
        : low(splat<Half>(x)),
          high(low) {}  // implicit, as the compilers' vectors take numbers beside vectors
    template <class... Values>
        requires(sizeof...(Values) == 2 * kHalf)
    Halves(Values... values) {
        const Scalar lanes[] = {values...};
        *this = load_lanes<Halves>(lanes);
    }

    Scalar operator[](int lane) const { return lane < kHalf ? low[lane] : high[lane - kHalf]; }

    // The same bits as lanes of another type.
    template <class Other>
        requires(sizeof(Other) == sizeof(Half))
    explicit operator Halves<Other>() const {
        return {(Other)low, (Other)high};
    }

    Halves operator-() const { return {-low, -high}; }
    Halves operator~() const { return {~low, ~high}; }
    friend Halves operator<<(Halves a, int count) { return {a.low << count, a.high << count}; }
    friend Halves operator>>(Halves a, int count) { return {a.low >> count, a.high >> count}; }

#define CRF_OPERATOR(op)                                                                         \
    friend Halves operator op(Halves a, Halves b) { return {a.low op b.low, a.high op b.high}; } \
    friend Halves& operator op## = (Halves & a, Halves b) {                                      \
        return a = {a.low op b.low, a.high op b.high};                                           \
    }
    CRF_OPERATOR(+)
    CRF_OPERATOR(-)
    CRF_OPERATOR(*)
    CRF_OPERATOR(/)
    CRF_OPERATOR(&)
    CRF_OPERATOR(|)
#undef CRF_OPERATOR

// Integers of the same size: ones where it is true, zeros elsewhere.
#define CRF_COMPARISON(op)                                                         \
    friend auto operator op(Halves a, Halves b) {                                  \
        return Halves<decltype(a.low op b.low)>(a.low op b.low, a.high op b.high); \
    }
    CRF_COMPARISON(>)
    CRF_COMPARISON(<)
    CRF_COMPARISON(>=)
    CRF_COMPARISON(<=)
    CRF_COMPARISON(==)
    CRF_COMPARISON(!=)
#undef CRF_COMPARISON
};

template <class T, size_t Bytes>
struct LanesOfSizeHelper {
    typedef T Register
        __attribute__((vector_size(Bytes < kRegisterBytes ? Bytes : kRegisterBytes)));
    static auto make() {
        if constexpr (Bytes <= kRegisterBytes) {
            return Register{};
        } else {
            return Halves<decltype(LanesOfSizeHelper<T, Bytes / 2>::make())>{};
        }
    }
};

// Lanes of T in so many bytes: a vector of the compiler, or halves.
template <class T, size_t Bytes>
using LanesOfSize = decltype(LanesOfSizeHelper<T, Bytes>::make());

// `condition` has lanes of ones or zeros.
template <class Condition, class V>
inline V select(Condition condition, V a, V b) {
    if constexpr (std::is_class_v<V>) {
        return {select(condition.low, a.low, b.low), select(condition.high, a.high, b.high)};
    } else {
        return condition ? a : b;
    }
}

// The same numbers in another type of the same size.
template <class To, class From>
inline To convert(From from) {
    if constexpr (std::is_class_v<From>) {
        return {convert<decltype(To::low)>(from.low), convert<decltype(To::high)>(from.high)};
    } else {
        return __builtin_convertvector(from, To);
    }
}

template <int Register, class V>
inline auto register_of(V v) {
    if constexpr (std::is_class_v<V>) {
        constexpr int kOfHalf = sizeof v.low / kRegisterBytes;
        if constexpr (Register < kOfHalf) {
            return register_of<Register>(v.low);
        } else {
            return register_of<Register - kOfHalf>(v.high);
        }
    } else {
        return v;
    }
}

// Lanes of two registers one after the other.
template <class Register, class Place, int... Lane>
inline Register shuffle_registers(Register low, Register high, Place,
                                  std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(low, high, Place{}(Lane)...);
#else
    return __builtin_shuffle(low, high, decltype(low > high){Place{}(Lane)...});
#endif
}

// One register of a shuffle of all lanes of a and b, from lane `First` of the result on, from the
// registers from `Source` on. The lanes of the first register are not in their places until a
// second one comes, because one instruction takes the lanes of two.
template <class Pick, int First, int Source, bool kInPlace, class Register, class V>
inline Register pick_register(Register found, V a, V b) {
    constexpr int kCount = sizeof(Register) / sizeof(found[0]);
    constexpr int kSources = 2 * sizeof(V) / sizeof(Register);
    constexpr int kFirstSource = Pick{}(First) / kCount;
    constexpr auto used = [] {
        for (int i = 0; i < kCount; ++i)
            if (Pick{}(First + i) / kCount == Source) return true;
        return false;
    };
    struct Place {
        constexpr int operator()(int lane) const {
            const int picked = Pick{}(First + lane), source = picked / kCount;
            if (source == Source && Source != kFirstSource) return kCount + picked % kCount;
            return kInPlace || source != kFirstSource ? lane : picked % kCount;
        }
    };
    constexpr std::make_integer_sequence<int, kCount> kAll{};
    if constexpr (Source == kSources) {
        return kInPlace ? found : shuffle_registers(found, found, Place{}, kAll);
    } else if constexpr (Source == kFirstSource || !used()) {
        return pick_register<Pick, First, Source + 1, kInPlace>(found, a, b);
    } else {
        constexpr int kOfVector = kSources / 2;
        const V vector = Source < kOfVector ? a : b;
        found = shuffle_registers(found, register_of<Source % kOfVector>(vector), Place{}, kAll);
        return pick_register<Pick, First, Source + 1, true>(found, a, b);
    }
}

// Lanes of a and b one after the other: lane i of the result is lane Pick{}(First + i).
template <class Result, class Pick, int First, class V>
inline Result pick_lanes(V a, V b) {
    if constexpr (std::is_class_v<Result>) {
        return {pick_lanes<decltype(Result::low), Pick, First>(a, b),
                pick_lanes<decltype(Result::high), Pick, First + Result::kHalf>(a, b)};
    } else {
        constexpr int kSource = Pick{}(First) / static_cast<int>(sizeof(Result) / sizeof(a[0])),
                      kOfVector = sizeof(V) / sizeof(Result);
        return pick_register<Pick, First, 0, false>(
            register_of<kSource % kOfVector>(kSource < kOfVector ? a : b), a, b);
    }
}
}  // namespace crf
