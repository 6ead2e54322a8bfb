// Sixteen lanes of float or int32 in the compiler's vector extension (lane_types.h), so that one
// source serves SSE, AVX2, AVX-512 and NEON. Intrinsics are used only for operations that the
// extension cannot express well.
#pragma once

#include "cpu/lane_types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>  // read in a tenth of the time
#endif

namespace crf {
constexpr int kLanes = 16;
constexpr int64_t whole_vectors(int64_t count) { return whole(count, kLanes); }

typedef LanesOfSize<float, 4 * kLanes> vfloat;
typedef LanesOfSize<float, kProcessorBytes>
    vregister;  // the lanes that one register holds, for loops that need many
typedef LanesOfSize<int32_t, 4 * kLanes> vint;
typedef float vfloat4 __attribute__((vector_size(16)));

inline vfloat load(const float* p) { return load_lanes<vfloat>(p); }
inline void store(float* p, vfloat v) { store_lanes(p, v); }
inline vfloat4 load4(const float* p) { return load_lanes<vfloat4>(p); }

inline vfloat splat_lanes(float x) { return splat<vfloat>(x); }
inline vint splat_lanes(int32_t x) { return splat<vint>(x); }

// One instruction, which gcc does not find behind `select`, and of floats not beside a constant.
template <class V>
inline V vmax(V a, V b) {
    if constexpr (std::is_class_v<V>) {
        return {vmax(a.low, b.low), vmax(a.high, b.high)};
#if defined(__AVX512F__)
    } else if constexpr (std::is_same_v<V, vfloat>) {
        return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    } else if constexpr (std::is_same_v<V, vregister>) {
        return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
    } else {
        return a > b ? a : b;
    }
}
template <class V>
inline V vmin(V a, V b) {
    if constexpr (std::is_class_v<V>) {
        return {vmin(a.low, b.low), vmin(a.high, b.high)};
    } else {
        return a < b ? a : b;
    }
}
inline vint larger(vint a, vint b) { return vmax(a, b); }
inline vint smaller(vint a, vint b) { return vmin(a, b); }

// Lanes of ones where it is true, of zeros elsewhere.
inline vint is_greater(vfloat a, vfloat b) { return a > b; }
inline vint is_greater(vint a, vint b) { return a > b; }
inline vint is_greater(vint a, int b) { return a > b; }
inline vint is_greater(int a, vint b) { return a > b; }

// Lane forms of the operations in portable.h.
inline vfloat to_float(vint x) { return convert<vfloat>(x); }
inline vint truncate_to_int(vfloat x) { return convert<vint>(x); }
inline vint floor_to_int(vfloat x) {
    const vint i = truncate_to_int(x);
    return i + is_greater(to_float(i), x);  // a true comparison is -1
}

// Lane i plus lane i + 8, of these sums lane i plus lane i + 4, and so on.
template <class V, class T = float>
inline float sum_lanes(V v) {
    if constexpr (std::is_class_v<V>) {
        return sum_lanes(v.low + v.high);
    } else if constexpr (sizeof v > 2 * sizeof(T)) {
        typedef T Half __attribute__((vector_size(sizeof v / 2)));
        Half half[2];
        std::memcpy(half, &v, sizeof v);
        return sum_lanes(half[0] + half[1]);
    } else {
        return v[0] + v[1];
    }
}

template <class V>
inline bool has_no_bits(V v) {
    if constexpr (std::is_class_v<V>) {
        return has_no_bits(v.low | v.high);
    } else {
        uint64_t bits[sizeof v / 8], any = 0;
        std::memcpy(bits, &v, sizeof v);
        for (uint64_t two : bits) any |= two;
        return any == 0;
    }
}

// Whether all lanes are +0. False for -0.
inline bool is_zero_vector(vfloat v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) == 0;
#else
    return has_no_bits((vint)v);
#endif
}

// One bit for each of eight bytes, which are 0 or 1.
inline uint8_t bits_of_eight(const uint8_t* bytes) {
    uint64_t eight;
    std::memcpy(&eight, bytes, sizeof eight);
    return static_cast<uint8_t>(eight * 0x0102040810204080ull >>
                                56);  // moves byte k's bit to bit 56 + k
}

// The first `count` lanes are ones, the rest zeros.
inline vint first_lanes(int64_t count) {
    const vint index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return is_greater(splat_lanes(static_cast<int32_t>(std::min<int64_t>(count, kLanes))), index);
}

constexpr double kLog2e = 1.4426950408889634;          // exp(x) = 2^(x kLog2e)
constexpr double kSqrtHalfLog2e = 0.8493218002880191;  // exp(-d^2 / 2) = 2^-(d kSqrtHalfLog2e)^2

// Smallest normal number: keeps the logarithm of a vanished marginal, and the inverse of a vanished
// row sum, finite.
inline constexpr float kTiny = std::numeric_limits<float>::min();

// 2^t for t <= 0, relative error below 3e-7; t below -126 gives 0 or the smallest normal number.
// Constant: float, or V, which with AVX2 keeps the constants in registers through a loop: of floats
// the compiler reads most from memory each time.
template <class V, class Constant = float>
class Exp2 {
   public:
    V operator()(V t) const {
#if defined(__AVX512F__)
        // The masked forms, because GCC 12 warns of the others' undefined pass-through operand.
        constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, (__m512)t, kRounding);
        return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)of_fraction(t - (V)whole), whole);
#else
        typedef decltype(t > t) Integers;
        t = vmax(t, splat<V>(-126.0f));
        const V shifted = t + magic_;
        const Integers fraction = (Integers)of_fraction(t - (shifted - magic_));
        return (V)(fraction + ((Integers)shifted << 23));
#endif
    }

   private:
    static Constant constant(float x) {
        Constant number = splat<Constant>(x);
#if defined(__AVX2__)
        // not a constant any more, as far as the compiler knows
        if constexpr (!std::is_same_v<Constant, float>) asm("" : "+x"(number));
#endif
        return number;
    }

    // 2^f for f on [-1/2, 1/2]: least maximum relative error of its degree.
    V of_fraction(V f) const {
        return 1.0f + f * (c1_ + f * (c2_ + f * (c3_ + f * (c4_ + f * c5_))));
    }

    const Constant c1_ = constant(0.693147182f), c2_ = constant(0.240226462f),
                   c3_ = constant(0.0555032725f), c4_ = constant(0.00961842779f),
                   c5_ = constant(0.00133952777f);
    // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    const Constant magic_ = constant(12582912.0f);
};

// e^t for t <= 0; 0 where it would be below the smallest normal number. Filters skip zeros, and
// subnormal numbers are slow.
inline vfloat exp_nonpositive(vfloat t) {
    const vfloat power = t * 1.44269504f;
    constexpr float kBelow = -0x1.f80002p6f;  // the number before -126
    return (vfloat)select(is_greater(power, splat_lanes(kBelow)), (vint)Exp2<vfloat>()(power),
                          vint{});
}

// Natural logarithm of a positive normal number, absolute error about 1e-7 of the mantissa's part.
// Splits off the exponent so that the mantissa is in [sqrt(1/2), sqrt(2)); atanh series in (m - 1)
// / (m + 1).
inline vfloat log_positive(vfloat x) {
    const vint bits = (vint)x;
    const vint exponent = (bits - 0x3f3504f3) >> 23;
    const vfloat m = (vfloat)(bits - (exponent << 23));
    const vfloat s = (m - 1.0f) / (m + 1.0f);
    const vfloat z = s * s;
    const vfloat tail = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
    return to_float(exponent) * 0.693147181f + s * (2.0f + tail);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The first `count` of eight lanes are ones. gcc makes `rep movs`, which is slow for a few bytes,
// of loops over them.
inline __m256i first_eight(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// `count` floats, the other lanes zero; the array is not read beyond them.
inline vfloat load_some(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(__AVX2__)
    float some[kLanes];
    for (int i = 0; i < kLanes; i += 8)
        _mm256_storeu_ps(some + i, _mm256_maskload_ps(from + i, first_eight(count - i)));
    return load(some);
#else
    float some[kLanes]{};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return load(some);
#endif
}

// The range of numbers, sixteen at a time; NaN if one is not finite.
struct LaneRange {
    vfloat least = splat_lanes(std::numeric_limits<float>::infinity()), most = -least, poison{};

    void add(const float* values, int64_t count) {
        for (int64_t i = 0; i < count; i += kLanes) {
            const vint valid = first_lanes(count - i);
            const vfloat v = load_some(values + i, count - i);
            poison += v * 0.0f;  // NaN from now on once a value is NaN or infinite
            least = select(valid & (v < least), v, least);
            most = select(valid & (v > most), v, most);
        }
    }
    std::pair<float, float> ends() const {
        if (!(sum_lanes(poison) == 0.0f))
            return {std::numeric_limits<float>::quiet_NaN(),
                    std::numeric_limits<float>::quiet_NaN()};
        std::pair<float, float> found{least[0], most[0]};
        for (int lane = 1; lane < kLanes; ++lane)
            found = {std::min(found.first, least[lane]), std::max(found.second, most[lane])};
        return found;
    }
};

// The ends of what add(begin, end, range) adds to the ranges of all blocks of so many items.
template <class Pool, class Add>
std::pair<float, float> range_of_blocks(int64_t num_items, int64_t size, Pool& pool, Add&& add) {
    std::vector<float> ends(2 * divided_up(num_items, size));
    pool.run_blocks(num_items, size, [&](int64_t begin, int64_t end, int) {
        LaneRange range;
        add(begin, end, range);
        const int64_t block = begin / size;
        std::tie(ends[2 * block], ends[2 * block + 1]) = range.ends();
    });
    LaneRange all;
    all.add(ends.data(), static_cast<int64_t>(ends.size()));
    return all.ends();
}

// Whether `count` floats are all +0; stops at the first vector that is not.
inline bool is_zero(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
        if (!is_zero_vector(load_some(values + i, count - i))) return false;
    return true;
}

// The first `count` lanes; the array is not written beyond them.
inline void store_some(float* to, vfloat v, int64_t count) {
    if (count >= kLanes) return store(to, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    float some[kLanes];
    store(some, v);
    for (int i = 0; i < kLanes; i += 8)
        _mm256_maskstore_ps(to + i, first_eight(count - i), _mm256_loadu_ps(some + i));
#else
    float some[kLanes];
    store(some, v);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
#endif
}

// Sixteen of the lanes of two vectors one after the other: lane i of the result is lane Pick{}(i).
template <class Pick>
inline vfloat shuffle(vfloat low, vfloat high, Pick) {
    return pick_lanes<vfloat, Pick, 0>(low, high);
}

// Blocks of `Size` lanes of two vectors in turn, eight lanes of each from lane `First` on.
template <int Size, int First>
inline vfloat zip(vfloat a, vfloat b) {
    return shuffle(a, b, [](int lane) {
        return First + lane / (2 * Size) * Size + lane % Size + lane / Size % 2 * kLanes;
    });
}
// Every second block of `Size` lanes of two vectors one after the other, from the first or second
// one on.
template <int Size, int First>
inline vfloat unzip(vfloat low, vfloat high) {
    return shuffle(low, high,
                   [](int lane) { return (lane / Size * 2 + First) * Size + lane % Size; });
}

// Sixteen rows of C floats from C channels of sixteen, and back. C is 1, 2, 4 or 8.
template <int C>
inline void interleave(const vfloat* channel, vfloat* rows) {
    if constexpr (C == 1) {
        rows[0] = channel[0];
    } else {
        constexpr int kHalf = C / 2;
        vfloat low[kHalf], high[kHalf];
        interleave<kHalf>(channel, low);
        interleave<kHalf>(channel + kHalf, high);
        for (int i = 0; i < kHalf; ++i) {
            rows[2 * i] = zip<kHalf, 0>(low[i], high[i]);
            rows[2 * i + 1] = zip<kHalf, 8>(low[i], high[i]);
        }
    }
}
template <int C>
inline void interleave(const vfloat (&channel)[C], float* rows) {
    vfloat row[C];
    interleave<C>(channel, row);
    for (int i = 0; i < C; ++i) store(rows + i * kLanes, row[i]);
}

template <int C>
inline void deinterleave(const vfloat* rows, vfloat* channel) {
    if constexpr (C == 1) {
        channel[0] = rows[0];
    } else {
        constexpr int kHalf = C / 2;
        vfloat low[kHalf], high[kHalf];
        for (int i = 0; i < kHalf; ++i) {
            low[i] = unzip<kHalf, 0>(rows[2 * i], rows[2 * i + 1]);
            high[i] = unzip<kHalf, 1>(rows[2 * i], rows[2 * i + 1]);
        }
        deinterleave<kHalf>(low, channel);
        deinterleave<kHalf>(high, channel + kHalf);
    }
}
template <int C>
inline void deinterleave(const float* rows, vfloat (&channel)[C]) {
    vfloat row[C];
    for (int i = 0; i < C; ++i) row[i] = load(rows + i * kLanes);
    deinterleave<C>(row, channel);
}

// Calls body with the constant that equals `value`, as a std::integral_constant; the last one
// is for all other values.
template <int First, int... Others, class Body>
void with_constant(int value, Body&& body) {
    if constexpr (sizeof...(Others) > 0) {
        if (value != First) return with_constant<Others...>(value, body);
    }
    body(std::integral_constant<int, First>());
}
}  // namespace crf
