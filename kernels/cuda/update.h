// The update of the mean field, from logits x to marginals Q = softmax(x), with its part of the
// energy, and its Jacobian for gradients: cpu/update.h for the GPU. Another update instead of the
// softmax changes this file. Logits, marginals and gradients are anything with a number per label.
#pragma once

#include "cuda/launch.h"

// Arrays of many labels are in the thread's local memory in any case; unrolled loops over them
// would take a compiler minutes. Where the number of labels is no constant, loops are the
// compiler's.
#if !defined(CRF_LABELS)
#define CRF_OVER_LABELS
#elif CRF_LABELS <= 32
#define CRF_OVER_LABELS CRF_UNROLL
#else
#define CRF_OVER_LABELS CRF_ROLLED
#endif

namespace crf {
// Its exponential is 0, and so are products with it, even if a logit is minus infinity.
constexpr Real kVanished = Real(-1e4);

// The numbers of a voxel, one per label, in an array (label, voxel) or (label, *grid).
template <class Number>
struct OfVoxel {
    Number* first;  // of the first label
    int64 stride;   // from one label to the next

    CRF_D Number& operator[](int label) const { return first[label * stride]; }
};

// The same from a function of a label.
template <class Function>
struct ByLabel {
    Function number;

    CRF_D Real operator[](int label) const { return number(label); }
};

template <class Function>
ByLabel(Function) -> ByLabel<Function>;

template <class Logits>
CRF_D Real largest_of(int num_labels, const Logits& x) {
    Real largest = x[0];
    CRF_OVER_LABELS
    for (int l = 1; l < num_labels; ++l) largest = larger(x[l], largest);
    return largest;
}

// Turns logits into marginals, which may take their place; returns sum Q log Q.
template <class Logits, class Marginals>
CRF_D Real update_marginals(int num_labels, const Logits& x, Marginals&& q) {
    const Real largest = largest_of(num_labels, x);
    Real total = Real(0.0), weighted = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < num_labels; ++l) {
        const Real shifted = larger(x[l] - largest, kVanished);
        const Real e = exp(shifted);
        total += e;
        weighted += e * shifted;
        q[l] = e;
    }
    const Real inverse = Real(1.0) / total;
    CRF_OVER_LABELS
    for (int l = 0; l < num_labels; ++l) q[l] *= inverse;
    return weighted * inverse - log(total);
}

// The product of the Jacobian dQ/dx, which is symmetric, and a gradient with respect to Q: calls
// take(l, Q_l (g_l - sum_k Q_k g_k)) for each label. The gradient is given for the first labels,
// and is zero for the others.
template <class Marginals, class Gradient, class Take>
CRF_D void update_back(int num_labels, int num_given, const Marginals& q, const Gradient& gradient,
                       const Take& take) {
    Real mean = Real(0.0);
    for (int l = 0; l < num_given; ++l) mean += q[l] * gradient[l];
    for (int l = 0; l < num_labels; ++l)
        take(l, q[l] * ((l < num_given ? gradient[l] : Real(0.0)) - mean));
}
}  // namespace crf
