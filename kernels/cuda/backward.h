// What the kernels of the backward pass have in common (docs/reference/math.md, section 9): x are the logits after a step, y is the
// gradient with respect to what a step adds to them, z = compatibility y, and -weight z the gradient with respect to a kernel's message.
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in labels.h. The last label is never filtered here.
#pragma once

#include "cuda/labels.h"

namespace crf {

static_assert(kChannels == kLast);

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
    const Real all = sum_of(y), last = penalty.weights[kLast] * penalty_of(y, all, penalty, kLast);
    store_rows(num_voxels, n, by_message, [&](int l) { return last - penalty.weights[l] * penalty_of(y, all, penalty, l); });
}

// The marginals of a step, as rows. record: (label, voxel) of all labels but perhaps the last.
CRF_D void store_marginals(const Real* record, int64 num_voxels, int64 n, Channels* marginals) {
    store_rows(num_voxels, n, marginals, [&](int l) { return record[l * num_voxels + n]; });
}

}  // namespace crf
