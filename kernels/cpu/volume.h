// The volume term (docs/reference/math.md, section 11): the sums over voxels that it needs, the bias per label that keeps the masses, and
// gradients.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {

constexpr int kMostVolumePasses = 100;  // more than any problem needs whose labels do not have to vanish

// A Newton step of this size, in nats, is the last one: what follows is its square.
inline constexpr double kLastVolumeChange = 1e-3;

// Sums over voxels of the marginals, and of the products of any two labels' marginals.
struct MassSums {
    explicit MassSums(int num_labels) : mass(num_labels), product(static_cast<size_t>(num_labels) * num_labels) {}

    std::vector<double> mass;     // (label)
    std::vector<double> product;  // (label, label), only above the diagonal

    void add(const MassSums& other);

    // Adds `count` voxels of a block. rows: (label) rows of kBlockRow; the last vector is padded with zeros.
    void add(float* rows, int64_t count);

   private:
    std::vector<int> present_;  // labels with a marginal that counts in the block
};

// The sums over all blocks, added up in an order that depends only on their number. body(block, thread, sums) adds a block.
MassSums sum_masses(ThreadPool& pool, int64_t num_blocks, int num_labels, FunctionRef<int64_t, int, MassSums&> body);

// The masses to keep, and how closely.
class VolumeTerm {
   public:
    // target: (label) V, sums to the number of voxels. slack: inverse of the term's strength; 0: masses are kept exactly.
    VolumeTerm(std::vector<double> target, double slack);

    // Of marginals with these masses; 0 if they are kept exactly.
    double energy(const std::vector<double>& mass) const;

    // Takes one Newton step towards the bias (label) that balances the masses of softmax(x + bias), whose sums are given. Returns the size
    // of the step in nats.
    double improve(const MassSums& sums, std::vector<double>& bias) const;

    // From the gradient with respect to the bias to that with respect to the masses, the negative of v in math.md; adds to the gradient
    // with respect to the slack.
    std::vector<double> backward(const MassSums& sums, const std::vector<double>& bias, const std::vector<double>& grad_bias,
                                 double& grad_slack) const;

   private:
    std::vector<double> solve(const MassSums& sums, const std::vector<double>& balanced, std::vector<double> right) const;

    std::vector<double> target_;  // with pseudo-voxels
    double slack_, total_;
};

inline void MassSums::add(float* rows, int64_t count) {
    using Lanes = vfloat;
    // What is left out of a product, in any volume, is far below the pseudo-voxel that it is compared with.
    constexpr float least = std::numeric_limits<float>::epsilon() / 100;
    const int num_labels = static_cast<int>(mass.size());
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    present_.clear();
    for (int l = 0; l < num_labels; ++l) {
        float* row = rows + l * kBlockRow;
        std::fill(row + count, row + padded, 0.0f);
        Lanes total{}, largest{};
        for (int64_t i = 0; i < padded; i += kLanes) {
            const Lanes marginal = load(row + i);
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
            const float *first = rows + present_[a] * kBlockRow, *second = rows + present_[b] * kBlockRow;
            Lanes total{};
            for (int64_t i = 0; i < padded; i += kLanes) total += load(first + i) * load(second + i);
            product[present_[a] * num_labels + present_[b]] += sum_lanes(total);
        }
}

}  // namespace crf
