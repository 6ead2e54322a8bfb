// The update of the mean field, from logits x to marginals Q = softmax(x): with what the energy and
// the stopping rule need of it, and its Jacobian for the backward pass. Another update instead of
// the softmax changes this file. All functions work on sixteen voxels at a time.
#pragma once

#include "cpu/simd.h"
#include "cpu/voxels.h"

namespace crf {
// Sixteen voxels of rows, one per label.
struct LabelLanes {
    float* first;                // of the first label
    int64_t stride = kBlockRow;  // from one label to the next

    vfloat operator[](int label) const { return load(first + label * stride); }
    void set(int label, const vfloat& value) const { store(first + label * stride, value); }
};

// The largest number of the labels at each voxel, and the first label that has it.
struct LargestLanes {
    vfloat largest;
    vint label;
};
// L: number of labels, 0 = any; loops of known length stay in registers.
template <int L, class Lanes>
[[gnu::always_inline]] inline LargestLanes largest_label(const Lanes& x, int any_labels) {
    LargestLanes found{x[0], vint{}};
    for (int l = 1; l < (L > 0 ? L : any_labels); ++l) {
        const vfloat v = x[l];
        const vint more = v > found.largest;
        found.largest = select(more, v, found.largest);
        found.label = select(more, vint{} + l, found.label);
    }
    return found;
}

// Results of an update besides the marginals.
struct UpdateLanes {
    vfloat negative_entropy;  // sum Q log Q
    // The largest of <Q, x> - sum Q log Q over all Q, which the new marginals attain, with x
    // relative to the largest logit: the logarithm of the sum of exponentials.
    vfloat log_sum;
    vfloat largest;  // the largest logit
    vint label;      // the first of the largest logits
};

// Turns logits into marginals, which may take their place.
template <int L, class Logits, class Marginals>
[[gnu::always_inline]] inline UpdateLanes update_marginals(const Logits& x, const Marginals& q,
                                                           int any_labels) {
    const int num_labels = L > 0 ? L : any_labels;
    const auto [largest, label] = largest_label<L>(x, any_labels);
    const vfloat lowest = splat_lanes(std::numeric_limits<float>::lowest());
    const vfloat of_lower = L == 2 ? exp_nonpositive(vmin(x[0], x[1]) - largest) : vfloat{};
    vfloat total{}, weighted{};
    for (int l = 0; l < num_labels; ++l) {
        const vfloat shifted = x[l] - largest;
        const vfloat e =
            L == 2 ? select(shifted < 0.0f, of_lower, splat_lanes(1.0f)) : exp_nonpositive(shifted);
        total += e;
        // 0 times minus infinity counts as 0
        weighted += select(shifted >= lowest, e * shifted, vfloat{});
        q.set(l, e);
    }
    const vfloat inverse = 1.0f / total;
    for (int l = 0; l < num_labels; ++l) q.set(l, q[l] * inverse);
    const vfloat log_sum = log_positive(total);
    return {weighted * inverse - log_sum, log_sum, largest, label};
}

// The product of the Jacobian dQ/dx, which is symmetric, and a gradient with respect to Q: calls
// take(l, Q_l (g_l - sum_k Q_k g_k)) for each label. The gradient is given for the first labels,
// and is zero for the others.
template <class Gradient, class Take>
[[gnu::always_inline]] inline void update_back(const LabelLanes& q, int num_labels, int num_given,
                                               const Gradient& gradient, const Take& take) {
    vfloat mean{};
    for (int l = 0; l < num_given; ++l) mean += q[l] * gradient(l);
    for (int l = 0; l < num_labels; ++l)
        take(l, q[l] * ((l < num_given ? gradient(l) : vfloat{}) - mean));
}

// Adds the Jacobian of some labels, summed over voxels, to `sums` (label, label), above the
// diagonal and without its sign, for the Newton steps of the volume term: the entries of a label
// add up to 0. marginals: rows of kBlockRow, one per label, and 0 where there is no voxel.
inline void add_couplings(const float* marginals, int64_t num_voxels,
                          const std::vector<int>& labels, int num_labels, double* sums) {
    for (size_t a = 0; a < labels.size(); ++a)
        for (size_t b = a + 1; b < labels.size(); ++b) {
            const float* first = marginals + labels[a] * kBlockRow;
            const float* second = marginals + labels[b] * kBlockRow;
            vfloat total{};
            for (int64_t i = 0; i < num_voxels; i += kLanes)
                total += load(first + i) * load(second + i);
            sums[labels[a] * num_labels + labels[b]] += sum_lanes(total);
        }
}

// A label's part of KL(new || old), p (r - 1 - log r) with r = old / new: accurate near r = 1.
// Marginals are `least` or more.
template <class Lanes>
Lanes divergence_of_label(Lanes now, Lanes old, Lanes least) {
    const Lanes p = vmax(now, least), ratio = vmax(old, least) / p;
    return vmax(p * (ratio - 1.0f - log_positive(vmax(ratio, splat_lanes(kTiny)))), Lanes{});
}

// Largest rounding error of a marginal that is implied as 1 minus the others.
constexpr float rounding_of_implied(int num_labels) {
    return static_cast<float>(num_labels) * std::numeric_limits<float>::epsilon();
}

// KL(new || old). If the last marginal is implied, as 1 minus the others, differences below the
// rounding of the others count as zero.
template <int L>
vfloat kl_divergence(const LabelLanes& now, const LabelLanes& old, int any_labels,
                     bool last_is_implied) {
    const int num_labels = L > 0 ? L : any_labels;
    const vfloat tiny = splat_lanes(kTiny), rounding = splat_lanes(rounding_of_implied(any_labels));
    vfloat total{};
    for (int l = 0; l < num_labels; ++l) {
        const vfloat least = last_is_implied && l == num_labels - 1 ? rounding : tiny;
        total += divergence_of_label(now[l], old[l], least);
    }
    return total;
}
}  // namespace crf
