// The softmax of two labels and its sums, for a vector of voxels at a time, from the difference of their logits: one exponential per voxel,
// and one logarithm for many. The general forms are in softmax_lanes.h; marginals have the same bits.
#pragma once

#include "cpu/simd.h"
#include "cpu/softmax_lanes.h"

namespace crf {

struct TwoLabelSoftmax {
    vfloat first, second;  // marginals
    vfloat weighted;       // sum of Q times its logarithm, the logarithm of `total` not subtracted
    vfloat total;          // sum of the exponentials relative to the larger logit, between 1 and 2
};

// x, y: the logits.
inline TwoLabelSoftmax softmax_of_two(vfloat x, vfloat y) {
    using Lanes = vfloat;
    const auto more = y > x;
    const Lanes gap = select(more, x - y, y - x);
    const Lanes e = exp_nonpositive(gap), total = 1.0f + e, larger = 1.0f / total, smaller = e * larger;
    // 0 times minus infinity counts as 0.
    const Lanes weighted = select(gap >= splat_lanes(std::numeric_limits<float>::lowest()), smaller * gap, Lanes{});
    return {select(more, smaller, larger), select(more, larger, smaller), weighted, total};
}

// The sum of logarithms of numbers between 1 and 2, taken of products that cannot overflow.
class SumOfLogarithms {
    using Lanes = vfloat;

   public:
    void add(Lanes value) {
        product_ *= value;
        if (++num_factors_ == kMostFactors) flush();
    }

    Lanes sum() {
        flush();
        return sum_;
    }

   private:
    static constexpr int kMostFactors = 64;

    void flush() {
        sum_ += log_positive(product_);
        product_ = splat_lanes(1.0f);
        num_factors_ = 0;
    }

    Lanes sum_{}, product_ = splat_lanes(1.0f);
    int num_factors_ = 0;
};

}  // namespace crf
