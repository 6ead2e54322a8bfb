// The backward pass of the mean field before its first step and after its last one (docs/reference/math.md, section 9).
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in backward.h.
#include "cuda/backward.h"

namespace crf {

// One thread per voxel: the gradient with respect to the last step's logits, and what the first kernel filters.
//
// by_out: (label, *grid). grid_index: (voxel). by_x, by_start: (label, voxel), with respect to the logits after a step and to those that it
// begins with. record: (label, voxel) marginals of the last step; nullptr: there is no step.
CRF_KERNEL(begin_backward, const Real* by_out, int64 grid_size, const int64* grid_index, int64 num_voxels, Real* by_x, Real* by_start,
           Real step, const Real* weights, const Real* compatibility, int is_potts, const Real* record, Channels* marginals,
           Channels* by_message) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const int64 place = grid_index[n];
    Real y[kLabels];
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) {
        const Real x = by_out[l * grid_size + place];
        by_x[l * num_voxels + n] = x;
        by_start[l * num_voxels + n] = Real(0.0);
        y[l] = step * x;
    }
    if (!record) return;
    store_by_message(y, Penalty{weights, compatibility, is_potts}, num_voxels, n, by_message);
    store_marginals(record, num_voxels, n, marginals);
}

// One thread per voxel: what the first kernel of a step filters, where the gradient with respect to the logits after the step has been
// changed since `take_messages`.
CRF_KERNEL(begin_step_back, const Real* by_x, int64 num_voxels, Real step, const Real* weights, const Real* compatibility, int is_potts,
           const Real* record, Channels* marginals, Channels* by_message) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Real y[kLabels];
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) y[l] = step * by_x[l * num_voxels + n];
    store_by_message(y, Penalty{weights, compatibility, is_potts}, num_voxels, n, by_message);
    store_marginals(record, num_voxels, n, marginals);
}

// The logit times its gradient. One of minus infinity has no gradient except for rounding, and is left out.
CRF_D double product(Real gradient, Real logit) {
    return logit >= kLowest && logit <= -kLowest ? static_cast<double>(gradient) * static_cast<double>(logit) : 0.0;
}

// Each thread takes every num_threads-th number of (label, *grid): the gradient outside the mask. partial: (thread), sums of products with
// the logits.
CRF_KERNEL(finish_outside, const Real* by_out, const Real* logits, int64 size, Real inverse_temperature, Real* by_logits, int64 num_threads,
           double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double total = 0.0;
    for (int64 i = thread; i < size; i += num_threads) {
        const Real gradient = by_out[i] * inverse_temperature;
        by_logits[i] = gradient;
        total += product(gradient, logits[i]);
    }
    partial[thread] = total;
}

// Each thread takes every num_threads-th voxel: the gradient inside the mask.
//
// replaces: whether by_logits has the number of finish_outside, which counts no longer. partial: (label + 1, thread), sums of the
// gradients, and of their products with the logits.
CRF_KERNEL(finish_inside, const Real* by_x, const Real* by_start, const Real* logits, int64 grid_size, const int64* grid_index,
           int64 num_voxels, Real inverse_temperature, int replaces, Real* by_logits, int64 num_threads, double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double sums[kLabels + 1] = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        const int64 place = grid_index[n];
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {
            const int64 at = l * grid_size + place;
            const Real gradient = (by_start[l * num_voxels + n] + by_x[l * num_voxels + n]) * inverse_temperature;
            sums[l] += static_cast<double>(gradient);
            sums[kLabels] += product(gradient, logits[at]);
            if (replaces) sums[kLabels] -= product(by_logits[at], logits[at]);
            by_logits[at] = gradient;
        }
    }
    CRF_OVER_LABELS
    for (int l = 0; l <= kLabels; ++l) partial[l * num_threads + thread] = sums[l];
}

// One thread per voxel: the gradient with respect to the message of all ones that a kernel normalizes, from those of all steps: the last
// label's message is what the others leave of it.
CRF_KERNEL(differentiate_ones, const Real* by_start, const Real* weights, const Real* compatibility, int is_potts, int64 num_voxels,
           Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Real y[kLabels];
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) y[l] = by_start[l * num_voxels + n];
    gradient[n] = -weights[kLast] * penalty_of(y, sum_of(y), Penalty{weights, compatibility, is_potts}, kLast);
}

}  // namespace crf
