// The volume term (docs/reference/math.md, section 11): its sums over voxels, the bias per label
// that keeps the masses, and gradients.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {
// more than any problem needs whose labels do not have to vanish
constexpr int kMostVolumePasses = 100;

// A Newton step of this size, in nats, is the last one: the next step would be about its square.
inline constexpr double kLastVolumeChange = 1e-3;

// Sums over voxels of the marginals, and of the products of any two labels' marginals.
struct MassSums {
    explicit MassSums(int num_labels)
        : mass(num_labels), product(static_cast<size_t>(num_labels) * num_labels) {}

    std::vector<double> mass;     // (label)
    std::vector<double> product;  // (label, label), only above the diagonal

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
    std::vector<double> solve(const MassSums& sums, const std::vector<double>& balanced,
                              std::vector<double> right) const;

    std::vector<double> target_;  // with pseudo-voxels
    double slack_, total_;
};

inline void MassSums::add(float* rows, int64_t count) {
    // Labels with only smaller marginals are left out: the error is far below a pseudo-voxel.
    constexpr float least = std::numeric_limits<float>::epsilon() / 100;
    const int num_labels = static_cast<int>(mass.size());
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    present_.clear();
    for (int l = 0; l < num_labels; ++l) {
        float* row = rows + l * kBlockRow;
        std::fill(row + count, row + padded, 0.0f);
        vfloat total{}, largest{};
        for (int64_t i = 0; i < padded; i += kLanes) {
            const vfloat marginal = load(row + i);
            total += marginal;
            largest = vmax(largest, marginal);
        }
        mass[l] += sum_lanes(total);
        float most[kLanes];
        store(most, largest);
        if (*std::max_element(most, most + kLanes) > least) present_.push_back(l);
    }
    for (size_t a = 0; a < present_.size(); ++a)
        for (size_t b = a + 1; b < present_.size(); ++b) {
            const float* first = rows + present_[a] * kBlockRow;
            const float* second = rows + present_[b] * kBlockRow;
            vfloat total{};
            for (int64_t i = 0; i < padded; i += kLanes)
                total += load(first + i) * load(second + i);
            product[present_[a] * num_labels + present_[b]] += sum_lanes(total);
        }
}

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
        if (!options.volume_part.empty()) find_blocks(pool);
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
            for (int64_t i = 0; i < count; i += kLanes) {
                const auto valid =
                    first_lanes(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
                total += sum_lanes(select(valid, load(row + i), vfloat{}));
            }
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
        for (int pass = 0; pass < kMostVolumePasses; ++pass) {
            const MassSums sums = sum_masses(
                pool, num_blocks_, num_labels_, [&](int64_t block, int thread, MassSums& of_group) {
                    if (!applies(block)) return;
                    float* const rows = preview(block, thread);
                    multiply_rows(options_.volume_part, block, num_labels_, rows);
                    of_group.add(rows, block_end(block, num_voxels_) - block * kVoxelBlock);
                });
            if (term_->improve(sums, bias_) < kLastVolumeChange) break;
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
    // The main bodies of the labels are in few blocks, and the term has nothing to do in the
    // others.
    void find_blocks(ThreadPool& pool) {
        applies_.resize(num_blocks_);
        const float* const part = options_.volume_part.data();
        pool.run(num_blocks_, [&](int64_t block, int) {
            applies_[block] =
                std::any_of(part + block * kVoxelBlock, part + block_end(block, num_voxels_),
                            [](float factor) { return factor != 0; });
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
    std::vector<double> bias_;  // (label)
    std::vector<double> block_masses_,
        block_counts_;  // (block, label), of the marginals and of the labels of the network
    // (block), whether the term applies at any of its voxels; empty: at all
    std::vector<char> applies_;
};

// added to all masses, so that a label whose mass vanishes has a finite energy
constexpr double kPseudoVoxels = 1.0;
// relative; labels that no voxel is uncertain of would make the equations singular
constexpr double kRidge = 1e-9;
constexpr int64_t kMostGroups = 128;    // of blocks, each with its own sums
constexpr int64_t kMostSums = 1 << 24;  // of all groups together, where there is more than one

// Solves the equations of a symmetric positive definite matrix (size, size), which is overwritten,
// for `right`, in place.
inline void solve_definite(std::vector<double>& matrix, std::vector<double>& right) {
    const size_t size = right.size();
    for (size_t j = 0; j < size; ++j) {
        for (size_t i = j + 1; i < size; ++i) {
            const double factor = matrix[i * size + j] / matrix[j * size + j];
            if (factor == 0) continue;
            for (size_t k = j; k < size; ++k) matrix[i * size + k] -= factor * matrix[j * size + k];
            right[i] -= factor * right[j];
        }
    }
    for (size_t j = size; j-- > 0;) {
        for (size_t k = j + 1; k < size; ++k) right[j] -= matrix[j * size + k] * right[k];
        right[j] /= matrix[j * size + j];
    }
}

inline void subtract_mean(std::vector<double>& values) {
    double total = 0;
    for (double value : values) total += value;
    for (double& value : values) value -= total / static_cast<double>(values.size());
}

inline void MassSums::add(const MassSums& other) {
    for (size_t i = 0; i < mass.size(); ++i) mass[i] += other.mass[i];
    for (size_t i = 0; i < product.size(); ++i) product[i] += other.product[i];
}

// The sums over all blocks, added up in an order that depends only on their number. body(block,
// thread, sums) adds a block.
inline MassSums sum_masses(ThreadPool& pool, int64_t num_blocks, int num_labels,
                           FunctionRef<int64_t, int, MassSums&> body) {
    const int64_t of_group = int64_t{num_labels} * num_labels;
    const int64_t num_groups =
        std::min({num_blocks, kMostGroups, std::max<int64_t>(1, kMostSums / of_group)});
    std::vector<MassSums> groups(num_groups, MassSums(num_labels));
    pool.run(num_groups, [&](int64_t group, int thread) {
        for (int64_t block = group * num_blocks / num_groups;
             block < (group + 1) * num_blocks / num_groups; ++block)
            body(block, thread, groups[group]);
    });
    MassSums total(num_labels);
    for (const MassSums& group : groups) total.add(group);
    return total;
}

inline VolumeTerm::VolumeTerm(std::vector<double> target, double slack)
    : target_(std::move(target)), slack_(slack), total_(0) {
    for (double& value : target_) {
        value += kPseudoVoxels;
        total_ += value;
    }
}

inline double VolumeTerm::energy(const std::vector<double>& mass) const {
    if (slack_ == 0) return 0;
    double total = 0;
    for (size_t l = 0; l < mass.size(); ++l)
        total += (mass[l] + kPseudoVoxels) * std::log((mass[l] + kPseudoVoxels) / target_[l]);
    return total / slack_;
}

inline double VolumeTerm::improve(const MassSums& sums, std::vector<double>& bias) const {
    const size_t num_labels = bias.size();
    std::vector<double> balanced(num_labels), change(num_labels);
    double scaled = 0;
    for (size_t l = 0; l < num_labels; ++l)
        scaled += balanced[l] = target_[l] * std::exp(-slack_ * bias[l]);
    for (size_t l = 0; l < num_labels; ++l) {
        balanced[l] *= total_ / scaled;
        change[l] = balanced[l] - sums.mass[l] - kPseudoVoxels;
    }
    change = solve(sums, balanced, std::move(change));
    const auto [lowest, highest] = std::minmax_element(change.begin(), change.end());
    // With this length a Newton step never overshoots, whatever its start (Sun and Tran-Dinh 2019).
    const double size = std::max(1.0, slack_) * (*highest - *lowest);
    const double length = size > 0 ? std::log1p(size) / size : 1;
    for (size_t l = 0; l < num_labels; ++l) bias[l] += length * change[l];
    subtract_mean(bias);
    return size;
}

inline std::vector<double> VolumeTerm::backward(const MassSums& sums,
                                                const std::vector<double>& bias,
                                                const std::vector<double>& grad_bias,
                                                double& grad_slack) const {
    const size_t num_labels = bias.size();
    std::vector<double> mass = sums.mass, pull = grad_bias;
    for (double& value : mass) value += kPseudoVoxels;
    subtract_mean(pull);
    pull = solve(sums, mass, std::move(pull));
    for (size_t l = 0; l < num_labels; ++l) grad_slack -= pull[l] * mass[l] * bias[l];
    for (double& value : pull) value = -value;
    return pull;
}

inline std::vector<double> VolumeTerm::solve(const MassSums& sums,
                                             const std::vector<double>& balanced,
                                             std::vector<double> right) const {
    const size_t num_labels = right.size();
    std::vector<double> matrix(num_labels * num_labels);
    for (size_t l = 0; l < num_labels; ++l) {
        matrix[l * num_labels + l] += (slack_ + kRidge) * balanced[l];
        for (size_t k = 0; k < num_labels; ++k)
            matrix[l * num_labels + k] += (1 - slack_) * balanced[l] * balanced[k] / total_;
        for (size_t k = l + 1; k < num_labels; ++k) {
            const double shared = sums.product[l * num_labels + k];
            matrix[l * num_labels + l] += shared;
            matrix[k * num_labels + k] += shared;
            matrix[l * num_labels + k] -= shared;
            matrix[k * num_labels + l] -= shared;
        }
    }
    solve_definite(matrix, right);
    return right;
}
}  // namespace crf
