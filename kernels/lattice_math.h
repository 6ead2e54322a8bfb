// The geometry of the permutohedral lattice (Adams, Baek & Davis 2010; docs/reference/math.md),
// implemented only here. Pure functions of one point, templated on the number type: float and int
// on a GPU, sixteen lanes of them on a CPU. Every operation is exact or rounds in one fixed way,
// and none may be contracted into a fused multiply-add (-ffp-contract=off, -fmad=false): all
// backends find the same vertices, bit for bit. A vertex has D + 1 integer coordinates that sum to
// 0 and share one remainder r modulo D + 1: coordinate i is (D + 1) q_i + r.
#pragma once

#include "portable.h"

namespace crf {
CRF_HD constexpr int bits_for(int count) {
    return count <= 1 ? 0 : 1 + bits_for((count + 1) / 2);
}  // to number 0 .. count - 1

// A residual is sorted as one integer: fixed point, with the coordinate's index in its lowest bits.
// Its magnitude is below 1.5 (D + 1).
template <int D>
struct Residual {
    static constexpr int kIndexBits = bits_for(D + 1);
    static constexpr int kIndexMask = (1 << kIndexBits) - 1;
    static constexpr int kFractionBits = 31 - kIndexBits - bits_for(2 * (D + 1));
    static constexpr int kOne = 1 << kFractionBits;
};

// Batcher's odd-even merge sort of N numbers: the pairs to compare, in order.
template <int N>
struct SortingNetwork {
    int count = 0;
    unsigned char low[N * 8]{}, high[N * 8]{};
    CRF_HD constexpr SortingNetwork() {
        for (int p = 1; p < N; p *= 2)
            for (int k = p; k >= 1; k /= 2)
                for (int j = k % p; j + k < N; j += 2 * k)
                    for (int i = 0; i < k && i + j + k < N; ++i)
                        if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) {
                            low[count] = static_cast<unsigned char>(i + j);
                            high[count] = static_cast<unsigned char>(i + j + k);
                            ++count;
                        }
    }
};

template <int N, class Int>
CRF_HD void sort_descending(Int (&values)[N]) {
    constexpr SortingNetwork<N> network{};
    CRF_UNROLL for (int k = 0; k < network.count; ++k) {
        Int &a = values[network.low[k]], &b = values[network.high[k]];
        const Int first = larger(a, b), second = smaller(a, b);
        a = first;
        b = second;
    }
}

// values[p] becomes values[(p - shift) mod N]; shift differs between lanes, 0 <= shift < N.
template <int N, int Bit = 0, class Int>
CRF_HD void rotate_right(Int (&values)[N], const Int& shift) {
    if constexpr ((1 << Bit) < N) {
        Int moved[N];
        for (int p = 0; p < N; ++p)
            moved[p] = select(is_greater(shift & (1 << Bit), 0),
                              values[(p + N - ((1 << Bit) % N)) % N], values[p]);
        for (int p = 0; p < N; ++p) values[p] = moved[p];
        rotate_right<N, Bit + 1>(values, shift);
    }
}

// Factor of feature i before elevation: (D + 1) sqrt(2 / 3) spreads the features so that splatting,
// the [1 2 1] / 4 blur and slicing together have the variance of exp(-d^2 / 2); 1 / sqrt((i + 1)(i
// + 2)) makes the columns of the elevation unit vectors.
CRF_HD double feature_scale(int num_features, int i, double (*square_root)(double)) {
    return (num_features + 1) * square_root(2.0 / 3.0) / square_root((i + 1.0) * (i + 2.0));
}

// Elevates a point of D scaled features onto the hyperplane of points that sum to 0. Coordinate i
// depends on features i - 1 and above.
template <int D, class Real>
CRF_HD void elevate(const Real (&scaled)[D], Real (&elevated)[D + 1]) {
    Real sum = scaled[D - 1] - scaled[D - 1];
    for (int i = D; i > 0; --i) {
        elevated[i] = sum - static_cast<float>(i) * scaled[i - 1];
        sum = sum + scaled[i - 1];
    }
    elevated[0] = sum;
}

// Finds the simplex around a point.
// quotient: q of the remainder-0 vertex, before the correction below.
// sorted: residuals in descending order (position = rank, ties by index), as Residual<D> integers.
// wrapped: number of coordinates that wrap. If the rounded quotients sum to h > 0, the h smallest
// residuals' coordinates are
//   rounded down instead and become the largest; if h < 0, the |h| largest are rounded up and
//   become the smallest. Forgetting this is the classic bug of points on the face of a simplex. The
//   caller lowers q of positions 0 .. h - 1 by one, or raises q of the last |h| positions: `sorted`
//   is already in the final order.
template <int D, class Real, class Int>
CRF_HD void enclosing_simplex(const Real (&elevated)[D + 1], Int (&quotient)[D + 1],
                              Int (&sorted)[D + 1], Int& wrapped) {
    using R = Residual<D>;
    constexpr float inverse = 1.0f / static_cast<float>(D + 1);
    Int sum{};
    for (int i = 0; i <= D; ++i) {
        const Real nearest = elevated[i] * inverse + 0.5f;
        quotient[i] = floor_to_int(nearest);
        sum = sum + quotient[i];
        const Real residual = elevated[i] - to_float(quotient[i]) * static_cast<float>(D + 1);
        // A smaller index wins a tie: it gets the larger low bits.
        sorted[i] = truncate_to_int(residual * static_cast<float>(R::kOne)) * (1 << R::kIndexBits) +
                    (R::kIndexMask - i);
    }
    sort_descending(sorted);
    wrapped = sum;
    rotate_right(sorted, select(is_greater(0, sum), sum + (D + 1), sum));
    constexpr int turn = (D + 1) * (1 << (R::kFractionBits + R::kIndexBits));
    for (int p = 0; p <= D; ++p)
        sorted[p] =
            sorted[p] + select(is_greater(sum, p), sum * 0 + turn,
                               select(is_greater(p + 1, sum + (D + 1)), sum * 0 - turn, sum * 0));
}

// Index of the coordinate at a position of `sorted`.
template <int D, class Int>
CRF_HD Int coordinate_index(const Int& sorted) {
    return Residual<D>::kIndexMask - (sorted & Residual<D>::kIndexMask);
}

// Barycentric weights of the simplex: weight[k] belongs to the vertex of remainder k. They sum
// to 1.
template <int D, class Real, class Int>
CRF_HD void barycentric_weights(const Int (&sorted)[D + 1], Real (&weight)[D + 1]) {
    using R = Residual<D>;
    constexpr float scale = 1.0f / (static_cast<float>(R::kOne) * static_cast<float>(D + 1));
    for (int k = 1; k <= D; ++k)
        weight[k] =
            to_float((sorted[D - k] >> R::kIndexBits) - (sorted[D - k + 1] >> R::kIndexBits)) *
            scale;
    weight[0] =
        1.0f + to_float((sorted[D] >> R::kIndexBits) - (sorted[0] >> R::kIndexBits)) * scale;
}

// A vertex packed into one integer: fields for q_D (highest) .. q_1 and r (lowest). q_0 follows
// from the sum. A step on the lattice is one addition, and cannot carry from field to field because
// each is as wide as its range, with room for a step either way.
struct KeyLayout {
    static constexpr int kMaxFeatures = 28;
    int num_features = 0;
    int lowest[kMaxFeatures + 1]{};  // smallest q of each field; stored as q - lowest
    int shift[kMaxFeatures + 1]{};
    int width[kMaxFeatures + 1]{};
};

// One unit of q_i in a packed key; q_0 has no field.
template <class Key>
CRF_HD Key key_unit(const KeyLayout& layout, int i) {
    return i == 0 ? Key(0) : Key(1) << layout.shift[i];
}
}  // namespace crf
