// The volume term (docs/reference/math.md, section 11): its sums over voxels, the bias per label
// that keeps the masses, and gradients.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/simd.h"

namespace crf {
// Sums over voxels of the marginals, and of their coupling for any two labels (update.h).
struct MassSums {
    explicit MassSums(int num_labels)
        : mass(num_labels), coupling(static_cast<size_t>(num_labels) * num_labels) {}

    std::vector<double> mass;      // (label)
    std::vector<double> coupling;  // (label, label), only above the diagonal

    void add(const MassSums& other);

    // Adds `count` voxels of a block. rows: (label) rows of kBlockRow; the last vector is padded
    // with zeros.
    void add(float* rows, int64_t count);

   private:
    std::vector<int> present_;  // labels with a marginal that counts in the block
};

// The masses to keep, and how strictly.
class VolumeTerm {
   public:
    // target: (label) V, sums to the number of voxels. slack: inverse of the term's strength; 0:
    // masses are kept exactly.
    VolumeTerm(std::vector<double> target, double slack);

    // The energy of marginals with these masses; 0 if the masses are kept exactly.
    double energy(const std::vector<double>& mass) const;

    // A Newton step towards the bias (label) that balances the masses of softmax(x + bias), from
    // their sums. Returns its size in nats.
    double improve(const MassSums& sums, std::vector<double>& bias) const;

    // Turns the gradient with respect to the bias into the gradient with respect to the masses.
    // Adds to the gradient with respect to the slack.
    std::vector<double> backward(const MassSums& sums, const std::vector<double>& bias,
                                 const std::vector<double>& grad_bias, double& grad_slack) const;

   private:
    // Whether a label has nothing to keep where masses are kept exactly: its bias has no limit, and
    // so no gradient. Divided by its mass, rounding errors would be one.
    bool is_gone(double mass) const { return slack_ == 0 && mass < 0.5; }
    std::vector<double> solve(const MassSums& sums, const std::vector<double>& balanced,
                              double doubt, std::vector<double> right) const;

    std::vector<double> target_;  // with pseudo-voxels
    double slack_, total_;
};

// The sums over all blocks, added up in an order that depends only on their number. body(block,
// thread, sums) adds a block.
MassSums sum_masses(ThreadPool& pool, int64_t num_blocks, int num_labels,
                    FunctionRef<int64_t, int, MassSums&> body);

// The volume term in the iteration: the masses of the labels, block by block, and the biases that
// keep them.
class KeptVolumes {
   public:
    KeptVolumes(const MeanFieldOptions& options, int64_t num_voxels, ThreadPool& pool)
        : options_(options),
          num_labels_(options.num_labels),
          num_voxels_(num_voxels),
          num_blocks_(num_voxel_blocks(num_voxels)) {
        if (!options.keeps_volumes()) return;
        block_masses_.resize(num_blocks_ * num_labels_);
        block_counts_.resize(num_blocks_ * num_labels_);
        if (options.volume_part.empty()) return;
        // The main bodies of the labels are in few blocks, and the term has nothing to do in the
        // others.
        applies_.resize(num_blocks_);
        const float* const part = options_.volume_part.data();
        pool.run(num_blocks_, [&](int64_t block, int) {
            applies_[block] =
                std::any_of(part + block * kVoxelBlock, part + block_end(block, num_voxels_),
                            [](float factor) { return factor != 0; });
        });
    }

    // Whether there is a volume term and its masses are known.
    explicit operator bool() const { return static_cast<bool>(term_); }

    // Whether `count` is to be called for a block, with the labels' numbers of voxels at the start.
    bool counts_labels(int64_t block) const { return !block_counts_.empty() && applies(block); }
    void count(int64_t voxel, int label) {
        const bool counts = options_.volume_part.empty() || options_.volume_part[voxel] != 0;
        block_counts_[voxel / kVoxelBlock * num_labels_ + label] += counts;
    }

    // Stores the masses of marginals, a row of kBlockRow per label. Clears voxels outside the part.
    void store_masses(int64_t block, float* rows) {
        if (block_masses_.empty() || !applies(block)) return;  // They stay 0.
        multiply_rows(options_.volume_part, block, num_labels_, rows);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int l = 0; l < num_labels_; ++l) {
            const float* row = rows + l * kBlockRow;
            double total = 0;
            for (int64_t i = 0; i < count; i += kLanes)
                total += sum_lanes(select(first_lanes(count - i), load(row + i), vfloat{}));
            block_masses_[block * num_labels_ + l] = total;
        }
    }

    // To be called once the masses and the numbers of voxels of all blocks are known.
    void start() {
        if (!options_.keeps_volumes()) return;
        term_ = std::make_unique<VolumeTerm>(total_by_label(block_counts_), options_.volume_slack);
        bias_.assign(num_labels_, 0);
    }

    double energy() const { return term_ ? term_->energy(total_by_label(block_masses_)) : 0; }

    // Finds the biases with which the new marginals have the right masses. preview(block, thread,
    // rows, add): computes the new marginals of a block with the present biases, and gives them to
    // add(rows); nothing is stored.
    template <class Preview>
    const std::vector<double>& balance(ThreadPool& pool, Preview&& preview) {
        for (int pass = 0; pass < numerics::MAX_PASSES; ++pass) {
            const MassSums sums = sum_masses(
                pool, num_blocks_, num_labels_, [&](int64_t block, int thread, MassSums& of_group) {
                    if (!applies(block)) return;
                    float* const rows = preview(block, thread);
                    multiply_rows(options_.volume_part, block, num_labels_, rows);
                    of_group.add(rows, block_end(block, num_voxels_) - block * kVoxelBlock);
                });
            if (term_->improve(sums, bias_) < numerics::LAST_CHANGE) break;
        }
        return bias_;
    }

    // Adds the biases to the new logits of a block, one row of kBlockRow per label.
    void add_bias(int64_t block, float* rows) const {
        if (!applies(block)) return;
        const std::vector<float>& part = options_.volume_part;
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        for (int l = 0; l < num_labels_; ++l) {
            const float bias = static_cast<float>(bias_[l]);
            float* const row = rows + l * kBlockRow;
            for (int64_t i = 0; part.empty() && i < count; i += kLanes)
                store(row + i, load(row + i) + bias);
            for (int64_t i = 0; !part.empty() && i < count; ++i) row[i] += bias * part[begin + i];
        }
    }

   private:
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
    std::vector<double> bias_;  // (label)
    std::vector<double> block_masses_,
        block_counts_;  // (block, label), of the marginals and of the labels of the network
    // (block), whether the term applies at any of its voxels; empty: at all
    std::vector<char> applies_;
};
}  // namespace crf
