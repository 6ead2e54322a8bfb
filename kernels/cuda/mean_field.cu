// The mean-field iteration, except its filters (docs/reference/math.md, section 3): compatibility, softmax, energy, divergence, and the
// step's length. The sums of a step stay on the device: each thread sums its own voxels, and folding adds these sums in a fixed order.
//
// For more than 32 labels the engine launches many_labels.cu: this is a form to compare with then.
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in mean_field.h. CRF_SLICES: 1 if `update` slices one kernel's message itself, from the lattice's
// vertices; all channels are one group then. CRF_HALF: as in lattice.cu, of that lattice.
#include "cuda/mean_field.h"
#include "cuda/slice.h"
#include "cuda/vertices.h"

namespace crf {

using Vertices = VertexRow<CRF_WIDTH>;

CRF_D void take_row(Channels row, int g, Real (&channel)[kLabels]) {
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (g * CRF_WIDTH + c < kChannels) channel[g * CRF_WIDTH + c] = row.value[c];
}

CRF_D void load_channels(const Channels* rows, int64 num_voxels, int64 n, Real (&channel)[kLabels]) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) take_row(rows[g * num_voxels + n], g, channel);
}

CRF_D void store_channels(const Real (&channel)[kLabels], int64 num_voxels, int64 n, Channels* rows) {
    store_rows(num_voxels, n, rows, [&](int l) { return channel[l]; });
}

CRF_D int largest_label(const Real (&x)[kLabels]) {
    Largest found{x[0]};
    CRF_OVER_LABELS
    for (int l = 1; l < kLabels; ++l) found.add(l, x[l]);
    return found.label;
}

CRF_D Real largest_of(const Real (&x)[kLabels]) {
    Real largest = x[0];
    CRF_OVER_LABELS
    for (int l = 1; l < kLabels; ++l) largest = larger(x[l], largest);
    return largest;
}

// x becomes its softmax; returns sum Q log Q.
CRF_D Real softmax(Real (&x)[kLabels]) {
    const Real largest = largest_of(x);
    Real total = Real(0.0), weighted = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) {
        const Real shifted = larger(x[l] - largest, kVanished);
        const Real e = exp(shifted);
        total += e;
        weighted += e * shifted;
        x[l] = e;
    }
    const Real inverse = Real(1.0) / total;
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) x[l] *= inverse;
    return weighted * inverse - log(total);
}

CRF_D Real divergence_of(const Real (&now)[kLabels], const Real (&old)[kLabels]) {
    Real total = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) total += divergence_of_label(l, now[l], old[l]);
    return total;
}

// One thread per number of (label, *grid): the logits over the temperature, which is the result outside the mask.
CRF_KERNEL(scale_logits, const Real* logits, int64 size, Real inverse_temperature, Real* out) {
    const int64 i = thread_number();
    if (i < size) out[i] = logits[i] * inverse_temperature;
}

// Each thread takes every num_threads-th voxel: the softmax of its calibrated logits.
//
// logits: (label, *grid). bias: (label) or nullptr. grid_index: (voxel). marginals: (group, voxel). out: (label, *grid), the
// calibrated logits, from which a shortened first step starts; nullptr: not stored. partial: (sum, thread).
CRF_KERNEL(start, const Real* logits, const Real* bias, int64 grid_size, const int64* grid_index, int64 num_voxels,
           Real inverse_temperature, Channels* marginals, Real* out, int64 num_threads, double* partial) {
    sum_over_voxels(num_voxels, num_threads, partial, [&](int64 n, Sums& sums) {
        const int64 place = grid_index[n];
        Real x[kLabels];
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) x[l] = calibrated(logits[l * grid_size + place], bias, l, inverse_temperature);
        if (out) {
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) out[l * grid_size + place] = x[l];
        }
        sums[kLargest] += static_cast<double>(largest_of(x));
        sums[kNegativeEntropy] += static_cast<double>(softmax(x));
        store_channels(x, num_voxels, n, marginals);
    });
}

// One step for every num_threads-th voxel: from the messages and old marginals to the new marginals.
//
// messages: (group, voxel) of the kernels that store theirs, or nullptr: none does. rows, corner_*, num_corners, amplitude, scale,
// channel_weight: as in slice_values, of the kernel whose message is sliced here.
// weighted_ones: (voxel) the weighted message of all ones, only if the last label is implied. compatibility: (label, label), row: the
// neighbor's. kept: (label, *grid) the logits that a shortened step starts from, or nullptr: the marginals' logarithms replace them.
// out: (label, *grid) or nullptr; may be `kept`. What is `__restrict__` is written by nobody meanwhile: it is loaded by way of the cache
// for such data, once per voxel and before the stores.
CRF_KERNEL(update, const Real* __restrict__ logits, const Real* __restrict__ bias, int64 grid_size, const int64* __restrict__ grid_index,
           int64 num_voxels, Real inverse_temperature, Channels* marginals, const Channels* __restrict__ messages,
           const Vertices* __restrict__ rows, const uint32* __restrict__ corner_vertex, const uint16* __restrict__ corner_weight,
           int num_corners, Real amplitude, const Real* __restrict__ scale, const Real* __restrict__ channel_weight,
           const Real* __restrict__ weighted_ones, const Real* __restrict__ compatibility, int is_potts, int wants_divergence,
           const double* state, const Real* kept, Real* out, int64 num_threads, double* partial) {
    const Real step = static_cast<Real>(state[kStep]);
    sum_over_voxels(num_voxels, num_threads, partial, [&](int64 n, Sums& sums) {
        const int64 place = grid_index[n];
        Real x[kLabels], old[kLabels], message[kLabels];
#if CRF_SLICES
        static_assert(kGroups == 1);
        const Channels sliced = interpolated(rows, corner_vertex, corner_weight, num_corners, num_voxels, n);
        Channels all_kernels = messages ? messages[n] : zero_row<CRF_WIDTH>();
        add_weighted(all_kernels, sliced, scale ? amplitude * scale[n] : amplitude, channel_weight);
        take_row(all_kernels, 0, message);
#else
        load_channels(messages, num_voxels, n, message);
#endif
        load_channels(marginals, num_voxels, n, old);
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l)  // before anything is stored
            x[l] = calibrated(logits[l * grid_size + place], bias, l, inverse_temperature);
        Real rest = Real(1.0), all = Real(0.0);
        CRF_OVER_LABELS
        for (int c = 0; c < kChannels; ++c) {
            rest -= old[c];
            all += message[c];
        }
        if (kImplied) {
            const Real ones = weighted_ones[n];
            old[kLabels - 1] = larger(rest, Real(0.0));
            message[kLabels - 1] = ones - all;
            all = ones;
        }
        const Real largest = largest_of(x);
        Real linear = Real(0.0), quadratic = Real(0.0);
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {
            Real pairwise = Real(0.0);
            if (is_potts) {
                pairwise = all - message[l];
            } else {
                CRF_OVER_LABELS
                for (int k = 0; k < kLabels; ++k) pairwise += message[k] * compatibility[k * kLabels + l];
            }
            // A label with a logit of minus infinity is excluded from the sum, and so is rounding.
            if (x[l] >= kLowest && !may_be_rounding(l, x[l], largest, old[l])) linear += (x[l] - largest) * old[l];
            quadratic += pairwise * old[l];
            x[l] -= pairwise;
        }
        if (step < Real(1.0)) {
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) {
                const Real from = kept ? kept[l * grid_size + place] : log(larger(old[l], kTiny));
                x[l] = shortened(from, x[l], step);
            }
        }
        if (out) {
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) out[l * grid_size + place] = x[l];
        }
        sums[kLinear] += static_cast<double>(linear);
        sums[kQuadratic] += static_cast<double>(quadratic);
        if (wants_divergence && largest_label(x) != largest_label(old)) sums[kFlips] += 1.0;
        sums[kNegativeEntropy] += static_cast<double>(softmax(x));
        if (wants_divergence) sums[kDivergence] += static_cast<double>(divergence_of(x, old));
        store_channels(x, num_voxels, n, marginals);
    });
}

// One thread per sum and remainder modulo num_folded: sums the values with that remainder.
CRF_KERNEL(fold_sums, const double* partial, int64 count, int64 num_folded, double* folded) {
    const int64 i = thread_number();
    if (i >= kNumSums * num_folded) return;
    const int64 sum = i / num_folded;
    double total = 0.0;
    for (int64 j = i % num_folded; j < count; j += num_folded) total += partial[sum * count + j];
    folded[i] = total;
}

// A single thread. partial: (sum, count), a few of them.
CRF_KERNEL(begin_run, const double* partial, int64 count, double step, double* state) {
    if (thread_number() != 0) return;
    double total[kNumSums] = {};
    for (int i = 0; i < kNumSums; ++i)
        for (int64 j = 0; j < count; ++j) total[i] += partial[i * count + j];
    state[kStep] = step;
    state[kStartEntropy] = total[kNegativeEntropy];
    state[kShift] = total[kLargest];
    state[kLastEnergy] = state[kNumSteps] = state[kConverged] = 0.0;
}

// A single thread: the energy at the start of the step, the length of the next one, and whether the run has converged.
//
// of_volumes: energy of the volume term, 0 without it. tolerance: mean divergence per voxel that counts as converged; 0: never.
CRF_KERNEL(end_step, const double* partial, int64 count, int64 num_voxels, int watches_energy, double of_volumes, double tolerance,
           int most_steps, double* state) {
    if (thread_number() != 0) return;
    double total[kNumSums] = {};
    for (int i = 0; i < kNumSums; ++i)
        for (int64 j = 0; j < count; ++j) total[i] += partial[i * count + j];
    // Each voxel's largest logit is added only at the end: it shifts the energy, and says nothing about its rounding.
    const double linear = total[kLinear], quadratic = 0.5 * total[kQuadratic], negative_entropy = state[kStartEntropy];
    const double energy = negative_entropy - linear + quadratic + of_volumes;
    const double size = (negative_entropy < 0 ? -negative_entropy : negative_entropy) + (linear < 0 ? -linear : linear) +
                        (quadratic < 0 ? -quadratic : quadratic);
    const int t = static_cast<int>(state[kNumSteps]);
    state[kNumStates + t] = energy - state[kShift];
    state[kNumStates + most_steps + t] = state[kStep];
    if (watches_energy && t > 0 && energy > state[kLastEnergy] + kEnergyRounding * size) state[kStep] *= 0.5;
    state[kLastEnergy] = energy;
    state[kStartEntropy] = total[kNegativeEntropy];
    state[kNumSteps] = t + 1;
    const double voxels = static_cast<double>(num_voxels);
    if (tolerance > 0.0 && total[kDivergence] / voxels < tolerance && total[kFlips] < kFlipsAtConvergence * voxels) state[kConverged] = 1.0;
}

}  // namespace crf
