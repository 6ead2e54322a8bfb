#include "cpu/volume.h"

#include <cmath>
#include <utility>

namespace crf {

namespace {

constexpr double kPseudoVoxels = 1.0;   // added to all masses, so that a label whose mass vanishes has a finite energy
constexpr double kRidge = 1e-9;         // relative; labels that no voxel is uncertain of would make the equations singular
constexpr int64_t kMostGroups = 128;    // of blocks, each with its own sums
constexpr int64_t kMostSums = 1 << 24;  // of all groups together, where there is more than one

// Solves the equations of a symmetric positive definite matrix (size, size), which is overwritten, for `right`, in place.
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
    for (size_t i = 0; i < product.size(); ++i) product[i] += other.product[i];
}

MassSums sum_masses(ThreadPool& pool, int64_t num_blocks, int num_labels, FunctionRef<int64_t, int, MassSums&> body) {
    const int64_t of_group = int64_t{num_labels} * num_labels;
    const int64_t num_groups = std::min({num_blocks, kMostGroups, std::max<int64_t>(1, kMostSums / of_group)});
    std::vector<MassSums> groups(num_groups, MassSums(num_labels));
    pool.run(num_groups, [&](int64_t group, int thread) {
        for (int64_t block = group * num_blocks / num_groups; block < (group + 1) * num_blocks / num_groups; ++block)
            body(block, thread, groups[group]);
    });
    MassSums total(num_labels);
    for (const MassSums& group : groups) total.add(group);
    return total;
}

VolumeTerm::VolumeTerm(std::vector<double> target, double slack) : target_(std::move(target)), slack_(slack), total_(0) {
    for (double& value : target_) {
        value += kPseudoVoxels;
        total_ += value;
    }
}

double VolumeTerm::energy(const std::vector<double>& mass) const {
    if (slack_ == 0) return 0;
    double total = 0;
    for (size_t l = 0; l < mass.size(); ++l) total += (mass[l] + kPseudoVoxels) * std::log((mass[l] + kPseudoVoxels) / target_[l]);
    return total / slack_;
}

double VolumeTerm::improve(const MassSums& sums, std::vector<double>& bias) const {
    const size_t num_labels = bias.size();
    std::vector<double> balanced(num_labels), change(num_labels);
    double scaled = 0;
    for (size_t l = 0; l < num_labels; ++l) scaled += balanced[l] = target_[l] * std::exp(-slack_ * bias[l]);
    for (size_t l = 0; l < num_labels; ++l) {
        balanced[l] *= total_ / scaled;
        change[l] = balanced[l] - sums.mass[l] - kPseudoVoxels;
    }
    change = solve(sums, balanced, std::move(change));
    const auto [lowest, highest] = std::minmax_element(change.begin(), change.end());
    // Sun and Tran-Dinh 2019: with this length a Newton step never overshoots, from wherever it starts.
    const double size = std::max(1.0, slack_) * (*highest - *lowest);
    const double length = size > 0 ? std::log1p(size) / size : 1;
    for (size_t l = 0; l < num_labels; ++l) bias[l] += length * change[l];
    subtract_mean(bias);
    return size;
}

std::vector<double> VolumeTerm::backward(const MassSums& sums, const std::vector<double>& bias, const std::vector<double>& grad_bias,
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

std::vector<double> VolumeTerm::solve(const MassSums& sums, const std::vector<double>& balanced, std::vector<double> right) const {
    const size_t num_labels = right.size();
    std::vector<double> matrix(num_labels * num_labels);
    for (size_t l = 0; l < num_labels; ++l) {
        matrix[l * num_labels + l] += (slack_ + kRidge) * balanced[l];
        for (size_t k = 0; k < num_labels; ++k) matrix[l * num_labels + k] += (1 - slack_) * balanced[l] * balanced[k] / total_;
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
