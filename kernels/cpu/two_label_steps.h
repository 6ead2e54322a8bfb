// The steps of the mean field for two labels whose marginals sum to 1: each in one pass, in registers. The marginals have the bits of the
// general steps (mean_field.cpp).
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/mean_field_messages.h"
#include "cpu/mean_field_rules.h"
#include "cpu/softmax_lanes.h"
#include "cpu/two_labels.h"

namespace crf {

class TwoLabelSteps {
    using Lanes = vfloat;
    using Integers = vint;

   public:
    TwoLabelSteps(const Voxels& voxels, const MeanFieldOptions& options, const GridView<const float>& logits)
        : voxels_(voxels),
          options_(options),
          logits_(logits),
          can_start_(options.num_labels == 2 && options.last_is_implied() && !options.keeps_volumes()) {}

    // Whether it is such a model: two labels, the same everywhere, without masses to sum.
    bool can_start() const { return can_start_; }

    // Whether its steps are such, too.
    bool can_update() const { return can_start_ && options_.is_potts; }

    // The marginals of the logits, and their sums, for a block. cleared: messages, reset to zero; nullptr: none are.
    StepSums start(int64_t block, float* marginals, float* cleared) const {
        const float scale = 1.0f / options_.temperature, first_bias = bias_of(0), second_bias = bias_of(1);
        vdouble largest{};
        SumOfLogarithms totals;
        voxels_.for_pieces(block * kVoxelBlock, block_end(block, voxels_.num_voxels),
                           [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) __attribute__((always_inline)) {
                               const float *first = logits_.data + logits_.place(logits_.is_box ? box : grid),
                                           *second = first + logits_.label_stride;
                               for (int64_t i = 0; i < length; i += kLanes) {
                                   const int64_t left = length - i;
                                   const Lanes a = (load_some(first + i, left) + first_bias) * scale;
                                   const Lanes b = (load_some(second + i, left) + second_bias) * scale;
                                   const TwoLabelSoftmax now = softmax_of_two(a, b);
                                   store_some(marginals + voxel + i, now.first, left);
                                   if (cleared) store_some(cleared + voxel + i, Lanes{}, left);
                                   const Integers valid = first_lanes(static_cast<int>(std::min<int64_t>(left, kLanes)));
                                   largest += to_double(select(valid, vmax(b, a), Lanes{}));
                                   totals.add(select(valid, now.total, splat_lanes(1.0f)));
                               }
                           });
        StepSums sums;
        sums.largest = sum_lanes(largest);
        sums.unary = -sum_lanes(totals.sum());
        return sums;
    }

    // A step of a Potts model for a block. num_stored: of the new marginals, 0 to 2. out: for the new logits; nullptr: none.
    StepSums update(int64_t block, const float* old_marginals, const Messages& sent, float* marginals, int num_stored,
                    const GridView<float>* out) const {
        const float scale = 1.0f / options_.temperature, first_bias = bias_of(0), second_bias = bias_of(1);
        const Lanes lowest = splat_lanes(std::numeric_limits<float>::lowest()), rounding = splat_lanes(rounding_of_implied(2));
        float* const messages = sent.received();
        const float* const all = sent.ones();
        const bool clears = !sent.overwrites();
        Lanes linear{}, quadratic{}, weighted{}, divergence{};
        Integers flips{};
        SumOfLogarithms totals;
        voxels_.for_pieces(block * kVoxelBlock, block_end(block, voxels_.num_voxels),
                           [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) __attribute__((always_inline)) {
                               const float *first = logits_.data + logits_.place(logits_.is_box ? box : grid),
                                           *second = first + logits_.label_stride;
                               for (int64_t i = 0; i < length; i += kLanes) {
                                   const int64_t left = length - i, n = voxel + i;
                                   const Lanes a = (load_some(first + i, left) + first_bias) * scale;
                                   const Lanes b = (load_some(second + i, left) + second_bias) * scale;
                                   const Lanes received = load_some(messages + n, left), ones = load_some(all + n, left);
                                   if (clears) store_some(messages + n, Lanes{}, left);
                                   Lanes p = load_some(old_marginals + n, left), q = vmax(1.0f - p, Lanes{});
                                   const Lanes other = ones - received, own = ones - other;
                                   const Lanes x = a - other, y = b - own;
                                   TwoLabelSoftmax now = softmax_of_two(x, y);
                                   if (out) {
                                       float* const refined = out->data + out->place(out->is_box ? box : grid) + i;
                                       store_some(refined, x, left);
                                       store_some(refined + out->label_stride, y, left);
                                   }
                                   if (num_stored > 0) store_some(marginals + n, now.first, left);
                                   if (num_stored > 1) store_some(marginals + voxels_.num_voxels + n, now.second, left);
                                   const Integers old_label = q > p, label = y > x;
                                   if (left < kLanes) {  // lanes beyond the end count nowhere
                                       const Integers valid = first_lanes(static_cast<int>(left));
                                       p = select(valid, p, Lanes{});
                                       q = select(valid, q, Lanes{});
                                       now.first = select(valid, now.first, Lanes{});
                                       now.second = select(valid, now.second, Lanes{});
                                       now.weighted = select(valid, now.weighted, Lanes{});
                                       now.total = select(valid, now.total, splat_lanes(1.0f));
                                   }
                                   const Lanes largest = vmax(b, a);
                                   linear += select(a >= lowest, (a - largest) * now.first, Lanes{});
                                   linear += select(b >= lowest, (b - largest) * now.second, Lanes{});
                                   quadratic += other * p + own * q;
                                   weighted += now.weighted;
                                   totals.add(now.total);
                                   if (options_.tolerance > 0) {
                                       const Integers valid = first_lanes(static_cast<int>(std::min<int64_t>(left, kLanes)));
                                       const Lanes change = divergence_of_label(now.first, p, splat_lanes(kTiny)) +
                                                            divergence_of_label(now.second, q, rounding);
                                       divergence += select(valid, change, Lanes{});
                                       flips += valid & (old_label != label);  // -1 where true
                                   }
                               }
                           });
        StepSums sums;
        sums.unary = sum_lanes(weighted - totals.sum() - linear);
        sums.quadratic = sum_lanes(quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int i = 0; i < kLanes; ++i) sums.flips -= flips[i];
        return sums;
    }

   private:
    float bias_of(int label) const { return options_.bias.empty() ? 0.0f : options_.bias[label]; }

    const Voxels& voxels_;
    const MeanFieldOptions& options_;
    const GridView<const float>& logits_;
    const bool can_start_;
};

}  // namespace crf
