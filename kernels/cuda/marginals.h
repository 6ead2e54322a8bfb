// What all kernels of a step know of the marginals: how they lie in memory, and which sums a step takes over the voxels.
//
// CRF_LABELS. CRF_CHANNELS: of the marginals that are filtered, one less if the last label's follow from the others'.
// CRF_WIDTH: channels side by side; label l is in group l / CRF_WIDTH.
#pragma once

#include "cuda/launch.h"

namespace crf {

// Arrays of many labels are in the thread's local memory in any case; unrolled loops over them would take a compiler minutes.
#if CRF_LABELS <= 32
#define CRF_OVER_LABELS CRF_UNROLL
#else
#define CRF_OVER_LABELS CRF_ROLLED
#endif

using Channels = Row<CRF_WIDTH>;
constexpr int kLabels = CRF_LABELS;
constexpr int kChannels = CRF_CHANNELS;
constexpr int kGroups = (kChannels + CRF_WIDTH - 1) / CRF_WIDTH;
constexpr Real kVanished = Real(-1e4);  // its exponential is 0, and so are products with it, even if a logit is minus infinity
constexpr bool kImplied = kChannels < kLabels;

// Sums over the voxels.
enum { kNegativeEntropy, kLargest, kLinear, kQuadratic, kDivergence, kFlips, kNumSums };

// A label's part of KL(now || old), which is a sum of p (r - 1 - log r) with r = old / now: no term is negative, and near r = 1 nothing
// cancels. An implied marginal is 1 minus the others: differences below the rounding of the others count as zero.
CRF_D Real divergence_of_label(Real now, Real old, int l) {
    const Real least = kImplied && l == kLabels - 1 ? kLabels * kEpsilon : kTiny;
    const Real p = larger(now, least);
    const Real ratio = larger(old, least) / p;
    return larger(p * (ratio - Real(1.0) - log(larger(ratio, kTiny))), Real(0.0));
}

}  // namespace crf
