// Sixteen lanes of float or int32 in the compiler's vector extension, so that one source serves SSE, AVX2, AVX-512 and NEON.
// Intrinsics are used only for operations that the extension cannot express well. Lanes of double serve the few routines in both
// precisions; there clarity matters more than speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace crf {

constexpr int kLanes = 16;

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef float vfloat4 __attribute__((vector_size(16)));
typedef double vdouble __attribute__((vector_size(8 * kLanes)));
typedef int64_t vlong __attribute__((vector_size(8 * kLanes)));

// The lanes of a scalar type, and the integers that result from comparing them.
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
    typedef vfloat type;
    typedef vint integer;
};
template <>
struct LanesOf<double> {
    typedef vdouble type;
    typedef vlong integer;
};

inline vfloat load(const float* p) {
    vfloat v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline vdouble load(const double* p) {
    vdouble v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }
inline vfloat4 load4(const float* p) {
    vfloat4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store4(float* p, vfloat4 v) { std::memcpy(p, &v, sizeof v); }

// gcc computes comparisons, choices and copies of one number for vectors wider than the registers lane by lane, ten times as many
// instructions as part by part.
#if defined(__AVX512F__) || defined(__clang__) || !defined(__SSE2__)
template <class Result, class V, class Operation>
inline Result by_parts(V a, V b, Operation operation) {
    return operation(a, b);
}
inline vfloat splat_lanes(float x) { return vfloat{} + x; }
inline vint splat_lanes(int32_t x) { return vint{} + x; }
#else
#if defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
typedef float float_part __attribute__((vector_size(kRegisterBytes)));
typedef int32_t int_part __attribute__((vector_size(kRegisterBytes)));
template <class Result, class V, class Operation>
inline Result by_parts(V a, V b, Operation operation) {
    constexpr int kParts = sizeof(V) / kRegisterBytes;
    typedef std::conditional_t<std::is_same_v<V, vfloat>, float_part, int_part> Part;
    typedef std::conditional_t<std::is_same_v<Result, vfloat>, float_part, int_part> ResultPart;
    Part x[kParts], y[kParts];
    ResultPart results[kParts];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    for (int i = 0; i < kParts; ++i) results[i] = operation(x[i], y[i]);
    Result result;
    std::memcpy(&result, results, sizeof result);
    return result;
}
template <class V, class Part, class T>
inline V splat_parts(T x) {
    Part parts[sizeof(V) / kRegisterBytes];
    for (Part& part : parts) part = Part{} + x;
    V result;
    std::memcpy(&result, parts, sizeof result);
    return result;
}
inline vfloat splat_lanes(float x) { return splat_parts<vfloat, float_part>(x); }
inline vint splat_lanes(int32_t x) { return splat_parts<vint, int_part>(x); }
#endif
inline vdouble splat_lanes(double x) { return vdouble{} + x; }
inline vlong splat_lanes(int64_t x) { return vlong{} + x; }

inline vfloat vmax(vfloat a, vfloat b) {
    return by_parts<vfloat>(a, b, [](auto x, auto y) { return x > y ? x : y; });
}
inline vfloat vmin(vfloat a, vfloat b) {
    return by_parts<vfloat>(a, b, [](auto x, auto y) { return x < y ? x : y; });
}
inline vint larger(vint a, vint b) {
    return by_parts<vint>(a, b, [](auto x, auto y) { return x > y ? x : y; });
}
inline vint smaller(vint a, vint b) {
    return by_parts<vint>(a, b, [](auto x, auto y) { return x < y ? x : y; });
}
inline vdouble vmax(vdouble a, vdouble b) { return a > b ? a : b; }

// Lanes of ones where it is true, of zeros elsewhere.
inline vint is_greater(vfloat a, vfloat b) {
    return by_parts<vint>(a, b, [](auto x, auto y) { return x > y; });
}
inline vint is_greater(vint a, vint b) {
    return by_parts<vint>(a, b, [](auto x, auto y) { return x > y; });
}
inline vint is_greater(vint a, int b) { return is_greater(a, splat_lanes(int32_t{b})); }
inline vint is_greater(int a, vint b) { return is_greater(splat_lanes(int32_t{a}), b); }

// `condition` has lanes of ones or zeros.
inline vint select(vint condition, vint a, vint b) {
#if defined(__AVX512F__) || defined(__clang__)
    return condition ? a : b;
#else
    return (condition & a) | (~condition & b);
#endif
}

// Lane forms of the operations in portable.h.
inline vfloat to_float(vint x) { return __builtin_convertvector(x, vfloat); }
inline vint truncate_to_int(vfloat x) { return __builtin_convertvector(x, vint); }
inline vint floor_to_int(vfloat x) {
    const vint i = truncate_to_int(x);
    return i + is_greater(to_float(i), x);  // a true comparison is -1
}

template <class T, class V>
inline T sum_of_lanes(V v) {
    T s[kLanes];
    std::memcpy(s, &v, sizeof v);
    for (int w = kLanes / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) s[i] += s[i + w];
    return s[0];
}
inline float sum_lanes(vfloat v) { return sum_of_lanes<float>(v); }
inline double sum_lanes(vdouble v) { return sum_of_lanes<double>(v); }

// Whether all lanes are +0. False for -0.
inline bool is_zero_vector(vfloat v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) == 0;
#else
    uint64_t bits[kLanes / 2], any = 0;
    std::memcpy(bits, &v, sizeof v);
    for (uint64_t two : bits) any |= two;
    return any == 0;
#endif
}

// The first `count` lanes are ones, the rest zeros.
inline vint first_lanes(int count) {
    const vint index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return is_greater(splat_lanes(static_cast<int32_t>(count)), index);
}
template <class T>
inline typename LanesOf<T>::integer first_lanes_of(int count) {
    const typename LanesOf<T>::integer index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return index < count;
}

// 2^t for t <= 0, relative error below 3e-7; t below -126 gives 0 or the smallest normal number.
// Round-to-nearest split and a polynomial fitted to 2^f on [-1/2, 1/2] (least maximum relative error).
inline vfloat exp2_nonpositive(vfloat t) {
    constexpr float c1 = 0.693147182f, c2 = 0.240226462f, c3 = 0.0555032725f, c4 = 0.00961842779f, c5 = 0.00133952777f;
#if defined(__AVX512F__)
    constexpr __mmask16 kAll = 0xffff;  // the masked forms, because GCC 12 warns of the others' undefined pass-through operand
    const __m512 x = (__m512)t;
    const __m512 whole = _mm512_maskz_roundscale_ps(kAll, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vfloat f = t - (vfloat)whole;
    const vfloat p = 1.0f + f * (c1 + f * (c2 + f * (c3 + f * (c4 + f * c5))));
    return (vfloat)_mm512_maskz_scalef_ps(kAll, (__m512)p, whole);
#else
    t = vmax(t, splat_lanes(-126.0f));
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    const vfloat shifted = t + magic;
    const vfloat f = t - (shifted - magic);
    const vfloat p = 1.0f + f * (c1 + f * (c2 + f * (c3 + f * (c4 + f * c5))));
    return (vfloat)((vint)p + ((vint)shifted << 23));
#endif
}

// e^t for t <= 0; 0 where it would be below the smallest normal number. Filters skip zeros, and subnormal numbers are slow.
inline vfloat exp_nonpositive(vfloat t) {
    const vfloat power = t * 1.44269504f;
    constexpr float kBelow = -0x1.f80002p6f;  // the number before -126
    return (vfloat)select(is_greater(power, splat_lanes(kBelow)), (vint)exp2_nonpositive(power), vint{});
}

// Natural logarithm of a positive normal number, absolute error about 1e-7 of the mantissa's part.
// Splits off the exponent so that the mantissa is in [sqrt(1/2), sqrt(2)); atanh series in (m - 1) / (m + 1).
inline vfloat log_positive(vfloat x) {
    const vint bits = (vint)x;
    const vint exponent = (bits - 0x3f3504f3) >> 23;
    const vfloat m = (vfloat)(bits - (exponent << 23));
    const vfloat s = (m - 1.0f) / (m + 1.0f);
    const vfloat z = s * s;
    const vfloat tail = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
    return to_float(exponent) * 0.693147181f + s * (2.0f + tail);
}

inline vdouble exp_nonpositive(vdouble t) {
    vdouble e;
    for (int i = 0; i < kLanes; ++i) e[i] = std::exp(t[i]);
    return e;
}
inline vdouble log_positive(vdouble x) {
    vdouble l;
    for (int i = 0; i < kLanes; ++i) l[i] = std::log(x[i]);
    return l;
}

// `count` floats, the other lanes zero; the array is not read beyond them.
inline vfloat load_some(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
    float some[kLanes]{};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return load(some);
#endif
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
#else
    float some[kLanes];
    store(some, v);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
#endif
}

inline vdouble load_some(const double* from, int64_t count) {
    if (count >= kLanes) return load(from);
    double some[kLanes]{};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return load(some);
}
inline void store_some(double* to, vdouble v, int64_t count) {
    double some[kLanes];
    store(some, v);
    for (int64_t i = 0; i < (count < kLanes ? count : kLanes); ++i) to[i] = some[i];
}

// Sixteen of the lanes of two vectors one after the other: lane i of the result is lane pick(i).
template <class Pick>
inline vfloat shuffle(vfloat low, vfloat high, Pick) {
    return [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
        return __builtin_shufflevector(low, high, Pick{}(Lane)...);
#else
        return __builtin_shuffle(low, high, vint{Pick{}(Lane)...});
#endif
    }(std::make_integer_sequence<int, kLanes>{});
}

// Lanes, or pairs of lanes, of two vectors in turn, eight of each from lane `First` on.
template <int First>
inline vfloat zip_lanes(vfloat a, vfloat b) {
    return shuffle(a, b, [](int lane) { return First + lane / 2 + lane % 2 * kLanes; });
}
template <int First>
inline vfloat zip_pairs(vfloat a, vfloat b) {
    return shuffle(a, b, [](int lane) { return First + lane / 4 * 2 + lane % 2 + lane / 2 % 2 * kLanes; });
}
// Every `Step`-th lane of two vectors one after the other, from lane `First` on; beyond the last one from the start again.
template <int Step, int First>
inline vfloat every(vfloat low, vfloat high) {
    return shuffle(low, high, [](int lane) { return (First + lane * Step) % (2 * kLanes); });
}

// Sixteen rows of C floats from C channels of sixteen, and back. C is 1, 2 or 4.
template <int C>
inline void interleave(const vfloat (&channel)[C], float* rows) {
    if constexpr (C == 1) {
        store(rows, channel[0]);
    } else if constexpr (C == 2) {
        store(rows, zip_lanes<0>(channel[0], channel[1]));
        store(rows + kLanes, zip_lanes<8>(channel[0], channel[1]));
    } else {
        const vfloat low[] = {zip_lanes<0>(channel[0], channel[1]), zip_lanes<0>(channel[2], channel[3])};
        const vfloat high[] = {zip_lanes<8>(channel[0], channel[1]), zip_lanes<8>(channel[2], channel[3])};
        store(rows, zip_pairs<0>(low[0], low[1]));
        store(rows + kLanes, zip_pairs<8>(low[0], low[1]));
        store(rows + 2 * kLanes, zip_pairs<0>(high[0], high[1]));
        store(rows + 3 * kLanes, zip_pairs<8>(high[0], high[1]));
    }
}

template <int C>
inline void deinterleave(const float* rows, vfloat (&channel)[C]) {
    if constexpr (C == 1) {
        channel[0] = load(rows);
    } else if constexpr (C == 2) {
        const vfloat low = load(rows), high = load(rows + kLanes);
        channel[0] = every<2, 0>(low, high);
        channel[1] = every<2, 1>(low, high);
    } else {
        const vfloat quarter[] = {load(rows), load(rows + kLanes), load(rows + 2 * kLanes), load(rows + 3 * kLanes)};
        const auto collect = [&]<int First>(std::integral_constant<int, First>) {
            return shuffle(every<4, First>(quarter[0], quarter[1]), every<4, First>(quarter[2], quarter[3]),
                           [](int lane) { return lane % 8 + lane / 8 * kLanes; });
        };
        channel[0] = collect(std::integral_constant<int, 0>{});
        channel[1] = collect(std::integral_constant<int, 1>{});
        channel[2] = collect(std::integral_constant<int, 2>{});
        channel[3] = collect(std::integral_constant<int, 3>{});
    }
}

}  // namespace crf
