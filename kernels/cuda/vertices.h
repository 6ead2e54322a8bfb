// Values at the vertices of a lattice as they are kept between the kernels of a filtering: as they are computed, or, with CRF_HALF, in 16
// bits, half the bytes. Sums are single precision either way.
#pragma once

#include "cuda/launch.h"

namespace crf {

#if CRF_HALF

// The channels of a vertex, each as the bits of a number in half precision.
template <int Width>
struct alignas(Width * sizeof(uint16) >= 16 ? 16 : Width * sizeof(uint16)) VertexRow {
    uint16 value[Width];
};

// To the nearest, ties to even; and back, exactly.
#if defined(__CUDACC__)
CRF_D uint16 half_of(float x) {
    uint16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
CRF_D float single_of(uint16 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
#else
using emulation::half_of;
using emulation::single_of;
#endif

template <int Width>
CRF_D Row<Width> unpacked(VertexRow<Width> from) {
    Row<Width> row;
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) row.value[c] = single_of(from.value[c]);
    return row;
}

template <int Width>
CRF_D VertexRow<Width> packed(Row<Width> from) {
    VertexRow<Width> row;
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) row.value[c] = half_of(from.value[c]);
    return row;
}

// What `blur` leaves of its sum: half of it, so that no value grows, and none leaves the range.
template <int Width>
CRF_D VertexRow<Width> blurred(Row<Width> total) {
    CRF_UNROLL
    for (int c = 0; c < Width; ++c) total.value[c] *= Real(0.5);
    return packed(total);
}

#else

template <int Width>
using VertexRow = Row<Width>;

template <int Width>
CRF_D Row<Width> unpacked(Row<Width> row) {
    return row;
}

template <int Width>
CRF_D Row<Width> packed(Row<Width> row) {
    return row;
}

template <int Width>
CRF_D Row<Width> blurred(Row<Width> total) {
    return total;
}

#endif

}  // namespace crf
