// Softmax and its divergence for a vector of voxels at a time, over rows of kBlockRow numbers, one per label (voxel_rows.h).
// L: number of labels, 0 = any; loops of known length stay in registers.
#pragma once

#include "cpu/simd.h"
#include "cpu/voxels.h"

namespace crf {

// Smallest normal number: keeps logarithms of vanished marginals finite.
inline constexpr float kTiny = std::numeric_limits<float>::min();

// Largest rounding error of a marginal that is implied as 1 minus the others.
constexpr float rounding_of_implied(int num_labels) { return static_cast<float>(num_labels) * std::numeric_limits<float>::epsilon(); }

struct SoftmaxLanes {
    vfloat negative_entropy;  // sum Q log Q
    vfloat log_sum;           // logarithm of the sum of exponentials, relative to the largest row
    vint label;               // the first of the largest rows
};

template <int L>
vfloat largest_row(const float* x, int any_labels) {
    const int num_labels = L > 0 ? L : any_labels;
    auto largest = load(x);
    for (int l = 1; l < num_labels; ++l) largest = vmax(load(x + l * kBlockRow), largest);
    return largest;
}

// x, in place, becomes its softmax over rows.
template <int L>
SoftmaxLanes softmax_rows(float* x, int any_labels) {
    const int num_labels = L > 0 ? L : any_labels;
    vfloat largest = load(x);
    vint label{};
    for (int l = 1; l < num_labels; ++l) {
        const vfloat v = load(x + l * kBlockRow);
        const vint more = v > largest;
        largest = select(more, v, largest);
        label = select(more, vint{} + l, label);
    }
    const vfloat lowest = splat_lanes(std::numeric_limits<float>::lowest());
    vfloat total{}, weighted{};
    for (int l = 0; l < num_labels; ++l) {
        const vfloat shifted = load(x + l * kBlockRow) - largest;
        const vfloat e = exp_nonpositive(shifted);
        total += e;
        weighted += select(shifted >= lowest, e * shifted, vfloat{});  // 0 times minus infinity counts as 0
        store(x + l * kBlockRow, e);
    }
    const vfloat inverse = 1.0f / total;
    for (int l = 0; l < num_labels; ++l) store(x + l * kBlockRow, load(x + l * kBlockRow) * inverse);
    const vfloat log_sum = log_positive(total);
    return {weighted * inverse - log_sum, log_sum, label};
}

// A label's part of KL(new || old), p (r - 1 - log r) with r = old / new: not negative, and near r = 1 nothing cancels. Marginals below
// `least` count as that.
template <class Lanes>
Lanes divergence_of_label(Lanes now, Lanes old, Lanes least) {
    const Lanes p = vmax(now, least), ratio = vmax(old, least) / p;
    return vmax(p * (ratio - 1.0f - log_positive(vmax(ratio, splat_lanes(kTiny)))), Lanes{});
}

// KL(new || old). If the last marginal is implied, as 1 minus the others, differences below the rounding of the others count as zero.
template <int L>
vfloat kl_divergence(const float* now, const float* old, int any_labels, bool last_is_implied) {
    const int num_labels = L > 0 ? L : any_labels;
    const vfloat tiny = splat_lanes(kTiny), rounding = splat_lanes(rounding_of_implied(any_labels));
    vfloat total{};
    for (int l = 0; l < num_labels; ++l) {
        const vfloat least = last_is_implied && l == num_labels - 1 ? rounding : tiny;
        total += divergence_of_label(load(now + l * kBlockRow), load(old + l * kBlockRow), least);
    }
    return total;
}

}  // namespace crf
