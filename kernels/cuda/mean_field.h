// What the iteration has in common for few labels (mean_field.cu) and for many (many_labels.cu): the sums of a step, and single labels.
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in labels.h. The last label's marginals follow from the others' if it is not filtered.
#pragma once

#include "cuda/labels.h"

namespace crf {

constexpr Real kVanished = Real(-1e4);   // its exponential is 0, and so are products with it, even if a logit is minus infinity
constexpr Real kFarBelow = Real(100.0);  // nats under the largest logit: a rounding error of the marginal would count in the energy
constexpr bool kImplied = kChannels < kLabels;
constexpr double kEnergyRounding = 1e-6;      // relative rise of the energy that counts as rounding
constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

// Sums over the voxels.
enum { kNegativeEntropy, kLargest, kLinear, kQuadratic, kDivergence, kFlips, kNumSums };
using Sums = double[kNumSums];

// The run's state; the energies of the steps follow, then their lengths.
enum { kStep, kStartEntropy, kShift, kLastEnergy, kNumSteps, kConverged, kNumStates };

// Label l's part of KL(now || old), a sum of p (r - 1 - log r) with r = old / now: none is negative, and near r = 1 nothing cancels. An
// implied marginal is 1 minus the others: differences below the rounding of the others count as zero.
CRF_D Real divergence_of_label(int l, Real now, Real old) {
    const Real least = kImplied && l == kLabels - 1 ? kLabels * kEpsilon : kTiny;
    const Real p = larger(now, least);
    const Real ratio = larger(old, least) / p;
    return larger(p * (ratio - Real(1.0) - log(larger(ratio, kTiny))), Real(0.0));
}

// Whether a marginal may be no more than the rounding error that is left of an implied one where the label is absent.
CRF_D bool may_be_rounding(int l, Real logit, Real largest, Real marginal) {
    return kImplied && l == kLabels - 1 && logit < largest - kFarBelow && marginal <= kLabels * kEpsilon;
}

// The logit after a step of less than full length. from, to: before, and after a full one; both may be minus infinity.
CRF_D Real shortened(Real from, Real to, Real step) { return to != from ? from + (to - from) * step : to; }

// partial: (sum, thread).
template <int Count, class Number>
CRF_D void store_sums(const Number (&sums)[Count], int64 thread, int64 num_threads, double* partial) {
    CRF_UNROLL
    for (int i = 0; i < Count; ++i) partial[i * num_threads + thread] = static_cast<double>(sums[i]);
}

// Each thread takes every num_threads-th voxel, and stores its sums of what add(voxel, sums) adds to them.
template <class Add>
CRF_D void sum_over_voxels(int64 num_voxels, int64 num_threads, double* partial, Add add) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    Sums sums = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) add(n, sums);
    store_sums(sums, thread, num_threads, partial);
}

// The logit of label l with its bias, over the temperature. bias: (label), or nullptr: none.
CRF_D Real calibrated(Real logit, const Real* bias, int l, Real inverse_temperature) {
    return (bias ? logit + bias[l] : logit) * inverse_temperature;
}

}  // namespace crf
