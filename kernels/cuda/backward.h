// What the kernels of the backward pass have in common (docs/reference/math.md, section 9): x are the logits after a step, y is the
// gradient with respect to what a step adds to them, z = compatibility y, and -weight z the gradient with respect to a kernel's message.
//
// CRF_LABELS. CRF_WIDTH: channels side by side in the rows that are filtered: those of all labels but the last.
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
constexpr int kSent = kLabels - 1;
constexpr int kGroups = (kSent + CRF_WIDTH - 1) / CRF_WIDTH;

// What a kernel's messages are multiplied by. weights: (label). compatibility: (label, label), row: the neighbor's.
struct Penalty {
    const Real* weights;
    const Real* compatibility;
    int is_potts;
};

CRF_D Real penalty_of(const Real (&y)[kLabels], Real all, Penalty penalty, int k) {
    if (penalty.is_potts) return all - y[k];
    Real z = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) z += penalty.compatibility[k * kLabels + l] * y[l];
    return z;
}

CRF_D Real sum_of(const Real (&y)[kLabels]) {
    Real all = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) all += y[l];
    return all;
}

// The gradient with respect to a kernel's messages. Marginals sum to 1: the gradient of the last label is subtracted, so its channel need
// not be filtered.
CRF_D void store_by_message(const Real (&y)[kLabels], Penalty penalty, int64 num_voxels, int64 n, Channels* by_message) {
    const Real all = sum_of(y), last = penalty.weights[kSent] * penalty_of(y, all, penalty, kSent);
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c) {
            const int l = g * CRF_WIDTH + c;
            if (l < kSent) row.value[c] = last - penalty.weights[l] * penalty_of(y, all, penalty, l);
        }
        by_message[g * num_voxels + n] = row;
    }
}

// The marginals of a step, as rows. record: (label, voxel) of all labels but perhaps the last.
CRF_D void store_marginals(const Real* record, int64 num_voxels, int64 n, Channels* marginals) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kSent) row.value[c] = record[(g * CRF_WIDTH + c) * num_voxels + n];
        marginals[g * num_voxels + n] = row;
    }
}

}  // namespace crf
