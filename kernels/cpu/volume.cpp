// The volume term: sums of masses, Newton steps towards the biases that keep them, and gradients.
#include "cpu/volume.h"

#include "cpu/update.h"

namespace crf {
namespace {
constexpr int64_t kMostGroups = 128;    // of blocks, each with its own sums
constexpr int64_t kMostSums = 1 << 24;  // of all groups together, where there is more than one

// Solves the equations of a symmetric positive definite matrix (size, size), which is overwritten,
// for `right`, in place.
void solve_definite(std::vector<double>& matrix, std::vector<double>& right) {
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

void subtract_mean(std::vector<double>& values) {
    double total = 0;
    for (double value : values) total += value;
    for (double& value : values) value -= total / static_cast<double>(values.size());
}
}  // namespace

void MassSums::add(const MassSums& other) {
    for (size_t i = 0; i < mass.size(); ++i) mass[i] += other.mass[i];
    for (size_t i = 0; i < coupling.size(); ++i) coupling[i] += other.coupling[i];
}

MassSums sum_masses(ThreadPool& pool, int64_t num_blocks, int num_labels,
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

VolumeTerm::VolumeTerm(std::vector<double> target, double slack)
    : target_(std::move(target)), slack_(slack), total_(0) {
    for (double& value : target_) {
        value += numerics::PSEUDO_VOXELS;
        total_ += value;
    }
}

double VolumeTerm::energy(const std::vector<double>& mass) const {
    if (slack_ == 0) return 0;
    double total = 0;
    for (size_t l = 0; l < mass.size(); ++l)
        total += (mass[l] + numerics::PSEUDO_VOXELS) *
                 std::log((mass[l] + numerics::PSEUDO_VOXELS) / target_[l]);
    return total / slack_;
}

double VolumeTerm::improve(const MassSums& sums, std::vector<double>& bias) const {
    const size_t num_labels = bias.size();
    std::vector<double> balanced(num_labels), change(num_labels);
    double scaled = 0;
    for (size_t l = 0; l < num_labels; ++l)
        scaled += balanced[l] = target_[l] * std::exp(-slack_ * bias[l]);
    for (size_t l = 0; l < num_labels; ++l) {
        balanced[l] *= total_ / scaled;
        change[l] = balanced[l] - sums.mass[l] - numerics::PSEUDO_VOXELS;
    }
    change = solve(sums, balanced, 0, std::move(change));
    const auto [lowest, highest] = std::minmax_element(change.begin(), change.end());
    // With this length a Newton step never overshoots, whatever its start (Sun and Tran-Dinh 2019).
    const double size = std::max(1.0, slack_) * (*highest - *lowest);
    const double length = size > 0 ? std::log1p(size) / size : 1;
    for (size_t l = 0; l < num_labels; ++l) bias[l] += length * change[l];
    subtract_mean(bias);
    return size;
}

std::vector<double> VolumeTerm::backward(const MassSums& sums, const std::vector<double>& bias,
                                         const std::vector<double>& grad_bias,
                                         double& grad_slack) const {
    const size_t num_labels = bias.size();
    std::vector<double> mass = sums.mass, pull(num_labels), moved;
    for (size_t l = 0; l < num_labels; ++l)
        if (!is_gone(sums.mass[l])) moved.push_back(grad_bias[l]);
    subtract_mean(moved);
    for (size_t l = 0, place = 0; l < num_labels; ++l)
        if (!is_gone(sums.mass[l])) pull[l] = moved[place++];
    for (double& value : mass) value += numerics::PSEUDO_VOXELS;
    pull = solve(sums, mass, numerics::LEAST_DOUBT, std::move(pull));
    for (size_t l = 0; l < num_labels; ++l) grad_slack -= pull[l] * mass[l] * bias[l];
    for (double& value : pull) value = -value;
    return pull;
}

std::vector<double> VolumeTerm::solve(const MassSums& sums, const std::vector<double>& balanced,
                                      double doubt, std::vector<double> right) const {
    const size_t num_labels = right.size();
    std::vector<double> matrix(num_labels * num_labels);
    for (size_t l = 0; l < num_labels; ++l) {
        matrix[l * num_labels + l] += (slack_ + numerics::RIDGE) * balanced[l] + doubt;
        for (size_t k = 0; k < num_labels; ++k)
            matrix[l * num_labels + k] += (1 - slack_) * balanced[l] * balanced[k] / total_;
        for (size_t k = l + 1; k < num_labels; ++k) {
            const double shared = sums.coupling[l * num_labels + k];
            matrix[l * num_labels + l] += shared;
            matrix[k * num_labels + k] += shared;
            matrix[l * num_labels + k] -= shared;
            matrix[k * num_labels + l] -= shared;
        }
    }
    solve_definite(matrix, right);
    return right;
}

void MassSums::add(float* rows, int64_t count) {
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
    add_couplings(rows, padded, present_, num_labels, coupling.data());
}

KeptVolumes::KeptVolumes(const MeanFieldOptions& options, int64_t num_voxels, ThreadPool& pool)
    : options_(options),
      num_labels_(options.num_labels),
      num_voxels_(num_voxels),
      num_blocks_(num_voxel_blocks(num_voxels)) {
    if (!options.keeps_volumes()) return;
    block_masses_.resize(num_blocks_ * num_labels_);
    block_counts_.resize(num_blocks_ * num_labels_);
    if (!options.volume_part.empty()) find_blocks(pool);
}

void KeptVolumes::count(int64_t voxel, int label) {
    const bool counts = options_.volume_part.empty() || options_.volume_part[voxel] != 0;
    block_counts_[voxel / kVoxelBlock * num_labels_ + label] += counts;
}

void KeptVolumes::store_masses(int64_t block, float* rows) {
    if (block_masses_.empty() || !applies(block)) return;  // They stay 0.
    multiply_rows(options_.volume_part, block, num_labels_, rows);
    const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
    for (int l = 0; l < num_labels_; ++l) {
        const float* row = rows + l * kBlockRow;
        double total = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
            const auto valid = first_lanes(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
            total += sum_lanes(select(valid, load(row + i), vfloat{}));
        }
        block_masses_[block * num_labels_ + l] = total;
    }
}

void KeptVolumes::start() {
    if (!options_.keeps_volumes()) return;
    term_ = std::make_unique<VolumeTerm>(total_by_label(block_counts_), options_.volume_slack);
    bias_.assign(num_labels_, 0);
}

void KeptVolumes::add_bias(int64_t block, float* rows) const {
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

void KeptVolumes::find_blocks(ThreadPool& pool) {
    applies_.resize(num_blocks_);
    const float* const part = options_.volume_part.data();
    pool.run(num_blocks_, [&](int64_t block, int) {
        applies_[block] =
            std::any_of(part + block * kVoxelBlock, part + block_end(block, num_voxels_),
                        [](float factor) { return factor != 0; });
    });
}

std::vector<double> KeptVolumes::total_by_label(const std::vector<double>& by_block) const {
    std::vector<double> totals(num_labels_);
    for (size_t i = 0; i < by_block.size(); ++i) totals[i % num_labels_] += by_block[i];
    return totals;
}
}  // namespace crf
