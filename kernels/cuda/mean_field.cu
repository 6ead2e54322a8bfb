// The mean-field iteration, except its filters (docs/reference/math.md, section 3): compatibility, softmax, energy, divergence, and the
// step's length. The sums of a step stay on the device: each thread sums its own voxels, and these sums are added up in a fixed order.
//
// CRF_LABELS. CRF_CHANNELS: of the labels that are filtered, all of them or all but the last, whose marginals follow from the others'.
// CRF_WIDTH: channels side by side; label l is in group l / CRF_WIDTH. Up to 32 labels are kept in a thread's registers.
#include "cuda/launch.h"

// Arrays of many labels are in the thread's local memory in any case; unrolled loops over them would take a compiler minutes.
#if CRF_LABELS <= 32
#define CRF_OVER_LABELS CRF_UNROLL
#else
#define CRF_OVER_LABELS CRF_ROLLED
#endif

namespace crf {

using Channels = Row<CRF_WIDTH>;
constexpr int kLabels = CRF_LABELS;
constexpr int kChannels = CRF_CHANNELS;
constexpr int kGroups = (kChannels + CRF_WIDTH - 1) / CRF_WIDTH;
constexpr Real kVanished = Real(-1e4);   // its exponential is 0, and so are products with it, even if a logit is minus infinity
constexpr Real kFarBelow = Real(100.0);  // nats under the largest logit: a rounding error of the marginal would count in the energy
constexpr bool kImplied = kChannels < kLabels;
constexpr double kEnergyRounding = 1e-6;      // relative rise of the energy that counts as rounding
constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

// Sums over the voxels. Without messages, the first two stay as they are.
enum { kLinear, kQuadratic, kNegativeEntropy, kLargest, kDivergence, kFlips, kNumSums };

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

CRF_D void load_channels(const Channels* rows, int64 num_voxels, int64 n, Real (&channel)[kLabels]) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        const Channels row = rows[g * num_voxels + n];
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kChannels) channel[g * CRF_WIDTH + c] = row.value[c];
    }
}

// Places of a row without a channel become zero.
CRF_D void store_channels(const Real (&channel)[kLabels], int64 num_voxels, int64 n, Channels* rows) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kChannels) row.value[c] = channel[g * CRF_WIDTH + c];
        rows[g * num_voxels + n] = row;
    }
}

// The first of the labels with the largest number.
CRF_D int largest_label(const Real (&x)[kLabels]) {
    Real largest = x[0];
    int label = 0;
    CRF_OVER_LABELS
    for (int l = 1; l < kLabels; ++l) {
        if (x[l] > largest) label = l;
        largest = larger(x[l], largest);
    }
    return label;
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

// Each thread takes every num_threads-th voxel: from its logits, messages and old marginals to the new marginals.
//
// logits: (label, *grid). bias: (label) or nullptr. grid_index: (voxel). old, marginals: (group, voxel), may be the same; old: nullptr if
// there are none. messages: (group, voxel), or nullptr: the marginals of the logits are wanted. weighted_ones: (voxel) the weighted message
// of all ones, only if the last label is implied. compatibility: (label, label), row: the neighbor's. kept: (label, *grid) the logits that
// a shortened step starts from, or nullptr: the marginals' logarithms replace them. out: (label, *grid) or nullptr; may be `kept`. partial:
// (sum, thread). What is `__restrict__` is written by nobody meanwhile: it is loaded by way of the cache for such data, once per voxel and
// before the stores.
CRF_KERNEL(update, const Real* __restrict__ logits, const Real* __restrict__ bias, int64 grid_size, const int64* __restrict__ grid_index,
           int64 num_voxels, Real inverse_temperature, const Channels* old_marginals, Channels* marginals,
           const Channels* __restrict__ messages, const Real* __restrict__ weighted_ones, const Real* __restrict__ compatibility,
           int is_potts, int wants_divergence, const double* state, const Real* kept, Real* out, int64 num_threads, double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    const Real step = static_cast<Real>(state[kStep]);
    double sums[kNumSums] = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        const int64 place = grid_index[n];
        Real x[kLabels], old[kLabels], message[kLabels];
        if (old_marginals) {
            load_channels(old_marginals, num_voxels, n, old);
            if (kImplied) {
                Real rest = Real(1.0);
                CRF_OVER_LABELS
                for (int c = 0; c < kChannels; ++c) rest -= old[c];
                old[kLabels - 1] = larger(rest, Real(0.0));
            }
        }
        if (messages) load_channels(messages, num_voxels, n, message);
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {  // before anything is stored
            const Real logit = logits[l * grid_size + place];
            x[l] = (bias ? logit + bias[l] : logit) * inverse_temperature;
        }
        const Real largest = largest_of(x);
        sums[kLargest] += static_cast<double>(largest);
        if (messages) {
            Real all = Real(0.0), linear = Real(0.0), quadratic = Real(0.0);
            CRF_OVER_LABELS
            for (int c = 0; c < kChannels; ++c) all += message[c];
            if (kImplied) {
                const Real ones = weighted_ones[n];
                message[kLabels - 1] = ones - all;
                all = ones;
            }
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
            sums[kLinear] += static_cast<double>(linear);
            sums[kQuadratic] += static_cast<double>(quadratic);
            if (step < Real(1.0)) {
                CRF_OVER_LABELS
                for (int l = 0; l < kLabels; ++l) {
                    const Real from = kept ? kept[l * grid_size + place] : log(larger(old[l], kTiny));
                    if (x[l] != from) x[l] = from + (x[l] - from) * step;  // both may be minus infinity
                }
            }
        }
        if (out) {
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) out[l * grid_size + place] = x[l];
        }
        if (wants_divergence && largest_label(x) != largest_label(old)) sums[kFlips] += 1.0;
        sums[kNegativeEntropy] += static_cast<double>(softmax(x));
        if (wants_divergence) {
            Real divergence = Real(0.0);
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) divergence += divergence_of_label(l, x[l], old[l]);
            sums[kDivergence] += static_cast<double>(divergence);
        }
        store_channels(x, num_voxels, n, marginals);
    }
    CRF_UNROLL
    for (int i = 0; i < kNumSums; ++i)
        if (messages || i > kQuadratic) partial[i * num_threads + thread] = sums[i];
}

// A single thread, after the first marginals. totals: (sum).
CRF_KERNEL(begin_run, const double* totals, double step, double* state) {
    if (thread_number() != 0) return;
    state[kStep] = step;
    state[kStartEntropy] = totals[kNegativeEntropy];
    state[kShift] = totals[kLargest];
    state[kLastEnergy] = state[kNumSteps] = state[kConverged] = 0.0;
}

// A single thread: the energy at the start of the step, the length of the next one, and whether the run has converged.
//
// of_volumes: energy of the volume term, 0 without it. tolerance: mean divergence per voxel that counts as converged; 0: never.
CRF_KERNEL(end_step, const double* totals, int64 num_voxels, int watches_energy, double of_volumes, double tolerance, int most_steps,
           double* state) {
    if (thread_number() != 0) return;
    // Each voxel's largest logit is added only at the end: it shifts the energy, and says nothing about its rounding.
    const double linear = totals[kLinear], quadratic = 0.5 * totals[kQuadratic], negative_entropy = state[kStartEntropy];
    const double energy = negative_entropy - linear + quadratic + of_volumes;
    const double size = (negative_entropy < 0 ? -negative_entropy : negative_entropy) + (linear < 0 ? -linear : linear) +
                        (quadratic < 0 ? -quadratic : quadratic);
    const int t = static_cast<int>(state[kNumSteps]);
    state[kNumStates + t] = energy - state[kShift];
    state[kNumStates + most_steps + t] = state[kStep];
    if (watches_energy && t > 0 && energy > state[kLastEnergy] + kEnergyRounding * size) state[kStep] *= 0.5;
    state[kLastEnergy] = energy;
    state[kStartEntropy] = totals[kNegativeEntropy];
    state[kNumSteps] = t + 1;
    const double voxels = static_cast<double>(num_voxels);
    if (tolerance > 0.0 && totals[kDivergence] / voxels < tolerance && totals[kFlips] < kFlipsAtConvergence * voxels)
        state[kConverged] = 1.0;
}

}  // namespace crf
