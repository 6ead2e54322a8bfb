// Numbers as files store them, sixteen lanes at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace crf {

// IEEE half precision, as bits.
struct Half {
    uint16_t bits;
};

inline float to_single(Half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + 0x38000000u);
    } else {  // zero and subnormal numbers: a multiple of 2^-24
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float to_single(float x) { return x; }

inline vfloat load_some(const Half* from, int64_t count) {
    Half some[kLanes]{};
    if (count < kLanes) {
        for (int64_t i = 0; i < count; ++i) some[i] = from[i];
        from = some;
    }
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(0xffff), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    float values[kLanes];
    _mm256_storeu_ps(values, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    _mm256_storeu_ps(values + 8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8))));
    return load(values);
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = to_single(from[i]);
    return load(values);
#endif
}

}  // namespace crf
