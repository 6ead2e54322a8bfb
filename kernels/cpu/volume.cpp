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
    const double total = std::accumulate(values.begin(), values.end(), 0.0);
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
    const int64_t padded = whole_vectors(count);
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
}  // namespace crf
