// The volume term (docs/reference/math.md, section 11): sums over the voxels where it applies, and the biases that follow from them.
//
// Labels are summed in groups of kGroup, whose sums stay in registers: masses and products within a group, and products of two groups.
// There are so many threads that a thread's sums can have the values' precision.
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in mean_field.h.
#include "cuda/mean_field.h"

namespace crf {

constexpr int kGroup = kLabels < 8 ? kLabels : 8;
constexpr int kGroupSums = kGroup + kGroup * (kGroup - 1) / 2;

// Numbers of the labels at the voxels: (label, place), `stride` places apart. place: (voxel), or nullptr: that of voxel n is n.
// bias: (label), with which they are logits of the marginals that are wanted; nullptr: they are taken as they are.
struct Values {
    const Real* number;
    int64 stride;
    const int64* place;
    const Real* bias;
};

CRF_D Real logit_of(Values values, int64 place, int l) { return values.number[l * values.stride + place] + values.bias[l]; }

// largest, inverse: as from `normalize`.
CRF_D Real marginal_of(Real logit, Real largest, Real inverse) { return exp(larger(logit - largest, kVanished)) * inverse; }

// The largest logit of a voxel, and 1 over the sum of the exponentials relative to it.
CRF_D void normalize(Values values, int64 place, Real& largest, Real& inverse) {
    largest = kLowest;
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) largest = larger(logit_of(values, place, l), largest);
    Real total = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) total += exp(larger(logit_of(values, place, l) - largest, kVanished));
    inverse = Real(1.0) / total;
}

// Numbers of the labels from `first` on, 0 for those beyond the last. normalizer: as from normalize_logits; not read if a group has all
// labels.
CRF_D void load_group(Values values, const Real* normalizer, int64 num_voxels, int64 n, int first, Real (&q)[kGroup]) {
    const int64 place = values.place ? values.place[n] : n;
    Real largest = Real(0.0), inverse = Real(1.0);
    if (values.bias && kGroup < kLabels) {
        largest = normalizer[n];
        inverse = normalizer[num_voxels + n];
    } else if (values.bias) {
        normalize(values, place, largest, inverse);
    }
    CRF_UNROLL
    for (int i = 0; i < kGroup; ++i) {
        const int l = first + i;
        q[i] = Real(0.0);
        if (l >= kLabels) continue;
        if (values.bias)
            q[i] = marginal_of(logit_of(values, place, l), largest, inverse);
        else
            q[i] = values.number[l * values.stride + place];
    }
}

template <int Count>
using PartSums = Real[Count];

// Each thread takes every num_threads-th voxel, and stores its sums of what add(voxel, sums) adds to them where the term applies.
template <int Count, class Add>
CRF_D void sum_over_part(int64 num_voxels, const uint8* part, int64 num_threads, double* partial, Add add) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    PartSums<Count> sums = {};
    CRF_ROLLED
    for (int64 n = thread; n < num_voxels; n += num_threads)
        if (!part || part[n]) add(n, sums);
    store_sums(sums, thread, num_threads, partial);
}

// One thread per voxel: what the kernels below would compute for each group again.
//
// bias: (label), added to (label, place) logits. normalizer: (2, voxel).
CRF_KERNEL(normalize_logits, const Real* logits, int64 stride, const int64* place, int64 num_voxels, const Real* bias, Real* normalizer) {
    const int64 n = thread_number();
    if (n < num_voxels) normalize(Values{logits, stride, place, bias}, place[n], normalizer[n], normalizer[num_voxels + n]);
}

// Sums of the numbers of a group of labels.
//
// part: (voxel), 1 where the term applies; nullptr: everywhere. normalizer: as from normalize_logits; not read without a bias,
// or if the group has all labels. partial: (label, thread).
CRF_KERNEL(sum_labels, const Real* values, int64 stride, const int64* place, int64 num_voxels, const uint8* part, const Real* bias,
           const Real* normalizer, int first, int64 num_threads, double* partial) {
    const Values given{values, stride, place, bias};
    sum_over_part<kGroup>(num_voxels, part, num_threads, partial, [&](int64 n, PartSums<kGroup>& sums) {
        Real q[kGroup];
        load_group(given, normalizer, num_voxels, n, first, q);
        CRF_UNROLL
        for (int i = 0; i < kGroup; ++i) sums[i] += q[i];
    });
}

// The same, and of the products of any two of them. partial: (sum, thread), those of the numbers first, then of the products in order of
// the first label.
CRF_KERNEL(sum_group, const Real* values, int64 stride, const int64* place, int64 num_voxels, const uint8* part, const Real* bias,
           const Real* normalizer, int first, int64 num_threads, double* partial) {
    const Values given{values, stride, place, bias};
    sum_over_part<kGroupSums>(num_voxels, part, num_threads, partial, [&](int64 n, PartSums<kGroupSums>& sums) {
        Real q[kGroup];
        load_group(given, normalizer, num_voxels, n, first, q);
        int next = kGroup;
        CRF_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            sums[i] += q[i];
            CRF_UNROLL
            for (int j = i + 1; j < kGroup; ++j) sums[next++] += q[i] * q[j];
        }
    });
}

// Sums of the products of each label of one group with each of another. partial: (label of the first, of the second, thread).
CRF_KERNEL(sum_groups, const Real* values, int64 stride, const int64* place, int64 num_voxels, const uint8* part, const Real* bias,
           const Real* normalizer, int first, int second, int64 num_threads, double* partial) {
    const Values given{values, stride, place, bias};
    sum_over_part<kGroup * kGroup>(num_voxels, part, num_threads, partial, [&](int64 n, PartSums<kGroup * kGroup>& sums) {
        Real p[kGroup], q[kGroup];
        load_group(given, normalizer, num_voxels, n, first, p);
        load_group(given, normalizer, num_voxels, n, second, q);
        CRF_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            CRF_UNROLL
            for (int j = 0; j < kGroup; ++j) sums[i * kGroup + j] += p[i] * q[j];
        }
    });
}

// One thread per voxel: the label with the largest logit, the first of equal ones; kLabels where the term does not apply.
CRF_KERNEL(find_largest, const Real* logits, int64 stride, const int64* place, int64 num_voxels, const uint8* part, int* label) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Largest found{logits[place[n]]};
    CRF_OVER_LABELS
    for (int l = 1; l < kLabels; ++l) found.add(l, logits[l * stride + place[n]]);
    label[n] = part && !part[n] ? kLabels : found.label;
}

// The end of a step with a volume term, for the voxels that `update` gave the same thread: from its logits to those with the biases, and to
// their marginals.
//
// out: (label, *grid) logits. part, bias: as above. marginals, old: (group, voxel), new and old ones; old: nullptr if the divergence is not
// wanted. partial: (sum, thread), of which those of the new marginals are replaced.
CRF_KERNEL(add_biases, Real* out, int64 grid_size, const int64* grid_index, int64 num_voxels, const uint8* part, const Real* bias,
           Channels* marginals, const Channels* old, int64 num_threads, double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double negative_entropy = 0.0, divergence = 0.0, flips = 0.0;
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        const int64 place = grid_index[n];
        const bool applies = !part || part[n];
        Largest largest, largest_old;
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {
            Real x = out[l * grid_size + place];
            if (applies) {
                x += bias[l];
                out[l * grid_size + place] = x;
            }
            largest.add(l, x);
        }
        Real total = Real(0.0), weighted = Real(0.0);
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {
            const Real shifted = larger(out[l * grid_size + place] - largest.value, kVanished);
            const Real e = exp(shifted);
            total += e;
            weighted += e * shifted;
        }
        const Real inverse = Real(1.0) / total;
        negative_entropy += static_cast<double>(weighted * inverse - log(total));
        Real changed = Real(0.0), rest = Real(1.0);
        CRF_OVER_LABELS
        for (int g = 0; g < kGroups; ++g) {
            Channels now = zero_row<CRF_WIDTH>(), before = now;
            if (old) before = old[g * num_voxels + n];
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                const int l = g * CRF_WIDTH + c;
                if (l >= kChannels) continue;
                now.value[c] = marginal_of(out[l * grid_size + place], largest.value, inverse);
                changed += divergence_of_label(l, now.value[c], before.value[c]);
                rest -= before.value[c];
                largest_old.add(l, before.value[c]);
            }
            marginals[g * num_voxels + n] = now;
        }
        if (!old) continue;
        if (kImplied) {
            const Real now = marginal_of(out[kLast * grid_size + place], largest.value, inverse);
            changed += divergence_of_label(kLast, now, larger(rest, Real(0.0)));
            largest_old.add(kLast, rest);
        }
        divergence += static_cast<double>(changed);
        if (largest.label != largest_old.label) flips += 1.0;
    }
    partial[kNegativeEntropy * num_threads + thread] = negative_entropy;
    partial[kDivergence * num_threads + thread] = divergence;
    partial[kFlips * num_threads + thread] = flips;
}

// One thread per voxel: adds to the gradient with respect to logits what that with respect to the masses of their softmax passes on.
//
// marginals, gradient: (label, voxel). part: as above. by_mass: (label).
CRF_KERNEL(pull_masses, const Real* marginals, int64 num_voxels, const uint8* part, const Real* by_mass, Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_voxels || (part && !part[n])) return;
    Real mean = Real(0.0);
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) mean += marginals[l * num_voxels + n] * by_mass[l];
    CRF_OVER_LABELS
    for (int l = 0; l < kLabels; ++l) gradient[l * num_voxels + n] += marginals[l * num_voxels + n] * (by_mass[l] - mean);
}

}  // namespace crf
