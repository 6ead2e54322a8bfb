// Softmax and its divergence for a vector of voxels at a time, over rows of kBlockRow numbers, one per label (voxel_rows.h).
//
// L: number of labels, 0 = any; loops of known length stay in registers.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/voxels.h"

namespace crf {

// Smallest normal number: keeps logarithms of vanished marginals finite.
template <class T>
inline constexpr T kTiny = std::numeric_limits<T>::min();

// Largest rounding error of a marginal that is implied as 1 minus the others.
template <class T>
constexpr T rounding_of_implied(int num_labels) {
    return static_cast<T>(num_labels) * std::numeric_limits<T>::epsilon();
}

template <class T>
struct SoftmaxLanes {
    typename LanesOf<T>::type negative_entropy;  // sum Q log Q
    typename LanesOf<T>::type log_sum;           // logarithm of the sum of exponentials, relative to the largest row
    typename LanesOf<T>::integer label;          // the first of the largest rows
};

template <int L, class T>
typename LanesOf<T>::type largest_row(const T* x, int any_labels) {
    const int num_labels = L > 0 ? L : any_labels;
    auto largest = load(x);
    for (int l = 1; l < num_labels; ++l) largest = vmax(load(x + l * kBlockRow), largest);
    return largest;
}

// x, in place, becomes its softmax over rows.
template <int L, class T>
SoftmaxLanes<T> softmax_rows(T* x, int any_labels) {
    using Lanes = typename LanesOf<T>::type;
    using Integers = typename LanesOf<T>::integer;
    const int num_labels = L > 0 ? L : any_labels;
    Lanes largest = load(x);
    Integers label{};
    for (int l = 1; l < num_labels; ++l) {
        const Lanes v = load(x + l * kBlockRow);
        const Integers more = v > largest;
        largest = select(more, v, largest);
        label = select(more, Integers{} + l, label);
    }
    const Lanes lowest = splat_lanes(std::numeric_limits<T>::lowest());
    Lanes total{}, weighted{};
    for (int l = 0; l < num_labels; ++l) {
        const Lanes shifted = load(x + l * kBlockRow) - largest;
        const Lanes e = exp_nonpositive(shifted);
        total += e;
        weighted += select(shifted >= lowest, e * shifted, Lanes{});  // 0 times minus infinity counts as 0
        store(x + l * kBlockRow, e);
    }
    const Lanes inverse = T{1} / total;
    for (int l = 0; l < num_labels; ++l) store(x + l * kBlockRow, load(x + l * kBlockRow) * inverse);
    const Lanes log_sum = log_positive(total);
    return {weighted * inverse - log_sum, log_sum, label};
}

// A label's part of KL(new || old), p (r - 1 - log r) with r = old / new: not negative, and near r = 1 nothing cancels. Marginals below
// `least` count as that.
template <class Lanes>
Lanes divergence_of_label(Lanes now, Lanes old, Lanes least) {
    using T = std::remove_cvref_t<decltype(now[0])>;
    const Lanes p = vmax(now, least), ratio = vmax(old, least) / p;
    return vmax(p * (ratio - T{1} - log_positive(vmax(ratio, splat_lanes(kTiny<T>)))), Lanes{});
}

// KL(new || old). If the last marginal is implied, as 1 minus the others, differences below the rounding of the others count as zero.
template <int L, class T>
typename LanesOf<T>::type kl_divergence(const T* now, const T* old, int any_labels, bool last_is_implied) {
    using Lanes = typename LanesOf<T>::type;
    const int num_labels = L > 0 ? L : any_labels;
    const Lanes tiny = splat_lanes(kTiny<T>), rounding = splat_lanes(rounding_of_implied<T>(any_labels));
    Lanes total{};
    for (int l = 0; l < num_labels; ++l) {
        const Lanes least = last_is_implied && l == num_labels - 1 ? rounding : tiny;
        total += divergence_of_label(load(now + l * kBlockRow), load(old + l * kBlockRow), least);
    }
    return total;
}

}  // namespace crf
