// The volume term in the iteration (docs/reference/math.md, section 11): the masses of the labels, block by block, and the biases that keep
// them.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/mean_field.h"
#include "cpu/simd.h"

namespace crf {

class KeptVolumes {
    using Lanes = vfloat;

   public:
    KeptVolumes(const MeanFieldOptions& options, int64_t num_voxels, ThreadPool& pool)
        : options_(options), num_labels_(options.num_labels), num_voxels_(num_voxels), num_blocks_(num_voxel_blocks(num_voxels)) {
        if (!options.keeps_volumes()) return;
        block_masses_.resize(num_blocks_ * num_labels_);
        block_counts_.resize(num_blocks_ * num_labels_);
        if (!options.volume_part.empty()) find_blocks(pool);
    }

    // Whether there is a term, and its masses are known.
    explicit operator bool() const { return static_cast<bool>(term_); }

    // Whether the numbers of voxels of the labels at the start are wanted, by `count`, for a block.
    bool counts_labels(int64_t block) const { return !block_counts_.empty() && applies(block); }
    void count(int64_t voxel, int label) {
        const bool counts = options_.volume_part.empty() || options_.volume_part[voxel] != 0;
        block_counts_[voxel / kVoxelBlock * num_labels_ + label] += counts;
    }

    // Of marginals, one row of kBlockRow per label; outside the part of the volume term they become 0.
    void store_masses(int64_t block, float* rows) {
        if (block_masses_.empty() || !applies(block)) return;  // They stay 0.
        multiply_rows(options_.volume_part, block, num_labels_, rows);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int l = 0; l < num_labels_; ++l) {
            const float* row = rows + l * kBlockRow;
            double total = 0;
            for (int64_t i = 0; i < count; i += kLanes) {
                const auto valid = first_lanes(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
                total += sum_lanes(select(valid, load(row + i), Lanes{}));
            }
            block_masses_[block * num_labels_ + l] = total;
        }
    }

    // Once the masses and the numbers of voxels of all blocks are known.
    void start() {
        if (!options_.keeps_volumes()) return;
        term_ = std::make_unique<VolumeTerm>(total_by_label(block_counts_), options_.volume_slack);
        bias_.assign(num_labels_, 0);
    }

    double energy() const { return term_ ? term_->energy(total_by_label(block_masses_)) : 0; }

    // Finds the biases with which the new marginals have the right masses. preview(block, thread, rows, add): computes the new marginals of
    // a block with the present biases, and gives them to add(rows); nothing is stored.
    template <class Preview>
    const std::vector<double>& balance(ThreadPool& pool, Preview&& preview) {
        for (int pass = 0; pass < kMostVolumePasses; ++pass) {
            const MassSums sums = sum_masses(pool, num_blocks_, num_labels_, [&](int64_t block, int thread, MassSums& of_group) {
                if (!applies(block)) return;
                float* const rows = preview(block, thread);
                multiply_rows(options_.volume_part, block, num_labels_, rows);
                of_group.add(rows, block_end(block, num_voxels_) - block * kVoxelBlock);
            });
            if (term_->improve(sums, bias_) < kLastVolumeChange) break;
        }
        return bias_;
    }

    // To the new logits of a block, one row of kBlockRow per label.
    void add_bias(int64_t block, float* rows) const {
        if (!applies(block)) return;
        const std::vector<float>& part = options_.volume_part;
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        for (int l = 0; l < num_labels_; ++l) {
            const float bias = static_cast<float>(bias_[l]);
            float* const row = rows + l * kBlockRow;
            for (int64_t i = 0; part.empty() && i < count; i += kLanes) store(row + i, load(row + i) + bias);
            for (int64_t i = 0; !part.empty() && i < count; ++i) row[i] += bias * part[begin + i];
        }
    }

   private:
    // The main bodies of the labels are in few blocks, and the term has nothing to do in the others.
    void find_blocks(ThreadPool& pool) {
        applies_.resize(num_blocks_);
        const float* const part = options_.volume_part.data();
        pool.run(num_blocks_, [&](int64_t block, int) {
            applies_[block] =
                std::any_of(part + block * kVoxelBlock, part + block_end(block, num_voxels_), [](float factor) { return factor != 0; });
        });
    }
    bool applies(int64_t block) const { return applies_.empty() || applies_[block]; }

    // (label), from (block, label).
    std::vector<double> total_by_label(const std::vector<double>& by_block) const {
        std::vector<double> totals(num_labels_);
        for (size_t i = 0; i < by_block.size(); ++i) totals[i % num_labels_] += by_block[i];
        return totals;
    }

    const MeanFieldOptions& options_;
    const int num_labels_;
    const int64_t num_voxels_, num_blocks_;
    std::unique_ptr<const VolumeTerm> term_;
    std::vector<double> bias_;                         // (label)
    std::vector<double> block_masses_, block_counts_;  // (block, label), of the marginals and of the labels of the network
    std::vector<char> applies_;                        // (block), whether the term applies at any of its voxels; empty: at all
};

}  // namespace crf
