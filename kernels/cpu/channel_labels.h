// Labels that share channels: the label of each channel from place to place (docs/reference/math.md, section 3).
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/voxel_rows.h"

namespace crf {

class ChannelLabels {
   public:
    // table: (channel, *tiles), labels below num_labels; -1 = none, which counts as label 0. tile: voxels along each axis of the grid.
    ChannelLabels(const Voxels& voxels, const std::vector<int64_t>& grid_shape, const std::vector<int64_t>& tile, const int32_t* table,
                  int num_channels, int num_labels);

    int num_labels() const { return num_labels_; }

    // Calls body(begin, end, label) for each stretch of a block's voxels, numbered from the block's first, with the same label[channel].
    template <class Body>
    void for_stretches(int64_t block, Body&& body) const {
        const int64_t first = block * kVoxelBlock, count = block_end(block, num_voxels_) - first;
        const auto is_after = [](int64_t voxel, const Stretch& s) { return voxel < s.voxel; };
        auto stretch = std::upper_bound(stretches_.begin(), stretches_.end(), first, is_after) - 1;
        for (int64_t begin = 0; begin < count; ++stretch) {
            const bool is_last = stretch + 1 == stretches_.end();
            const int64_t end = is_last ? count : std::min(count, (stretch + 1)->voxel - first);
            body(begin, end, sets_.data() + stretch->set * num_channels_);
            begin = end;
        }
    }

    // rows: (channel, voxel of the block), the value of the channel's label; padded with zeros. values: (label).
    template <class T>
    void expand(const T* values, int64_t block, T* rows) const {
        for_stretches(block, [&](int64_t begin, int64_t end, const int32_t* label) {
            for (int c = 0; c < num_channels_; ++c) std::fill(rows + c * kBlockRow + begin, rows + c * kBlockRow + end, values[label[c]]);
        });
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int c = 0; c < num_channels_; ++c) std::fill(rows + c * kBlockRow + count, rows + (c + 1) * kBlockRow, T{0});
    }

    // sum += weight[label] received and received = 0, for the block's part of (channel, voxel); or received *= weight[label] if both are
    // the same. rows: scratch.
    template <class T>
    void add_weighted(const T* weight, int64_t block, T* received, T* sum, T* rows) const {
        expand(weight, block, rows);
        const int64_t first = block * kVoxelBlock, count = block_end(block, num_voxels_) - first;
        for (int c = 0; c < num_channels_; ++c) {
            T *const from = received + c * num_voxels_ + first, *const to = sum + c * num_voxels_ + first;
            const T* const factor = rows + c * kBlockRow;
            if (from == to) {
                for (int64_t i = 0; i < count; ++i) to[i] *= factor[i];
            } else {
                for (int64_t i = 0; i < count; ++i) to[i] += from[i] * factor[i];
                std::fill(from, from + count, T{0});
            }
        }
    }

    // to_l = sum_k penalty(k, l) from_k over channels, with the penalty of the labels that they hold, for rows of a block. penalty:
    // (label, label), or its transpose if `is_transposed`.
    template <class T>
    void penalties(const T* penalty, bool is_transposed, int64_t block, const T* from, T* to) const {
        for_stretches(block, [&](int64_t begin, int64_t end, const int32_t* label) {
            for (int l = 0; l < num_channels_; ++l) {
                T* const sum = to + l * kBlockRow;
                std::fill(sum + begin, sum + end, T{0});
                for (int k = 0; k < num_channels_; ++k) {
                    const T factor =
                        is_transposed ? penalty[label[l] * num_labels_ + label[k]] : penalty[label[k] * num_labels_ + label[l]];
                    const T* const values = from + k * kBlockRow;
                    for (int64_t i = begin; i < end; ++i) sum[i] += factor * values[i];
                }
            }
        });
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int l = 0; l < num_channels_; ++l) std::fill(to + l * kBlockRow + count, to + (l + 1) * kBlockRow, T{0});
    }

   private:
    struct Stretch {
        int64_t voxel;  // compact index of the first; it ends where the next one begins
        int64_t set;
    };

    const int num_channels_, num_labels_;
    const int64_t num_voxels_;
    std::vector<int32_t> sets_;  // (set, channel), all different
    std::vector<Stretch> stretches_;
};

}  // namespace crf
