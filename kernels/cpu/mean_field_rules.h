// What a step of the mean field sums over its voxels, when the iteration stops, and when a rise of the energy counts
// (docs/reference/math.md).
#pragma once

#include <cstdint>
#include <vector>

namespace crf {

inline constexpr double kEnergyRounding = 1e-6;      // relative rise of the energy that counts as rounding
inline constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

// Nats under the largest logit, from which on a rounding error of an implied marginal would count in the energy.
inline constexpr int kFarBelow = 100;

// Sums of a step over a block of voxels, or a tile.
struct StepSums {
    double negative_entropy = 0;  // sum Q log Q of the new marginals
    double largest = 0;           // sum of the largest a / T of each voxel
    double linear = 0;            // <a / T, Q> of the old marginals, with a relative to its largest label
    double quadratic = 0;         // <Q, pairwise> of the old ones
    double divergence = 0;        // sum of KL(new || old)
    int64_t flips = 0;

    StepSums& operator+=(const StepSums& other) {
        negative_entropy += other.negative_entropy;
        largest += other.largest;
        linear += other.linear;
        quadratic += other.quadratic;
        divergence += other.divergence;
        flips += other.flips;
        return *this;
    }
};

// The sums of all blocks, added in their order: the same bits at any number of threads.
inline StepSums total(const std::vector<StepSums>& of_blocks) {
    StepSums sums;
    for (const StepSums& block : of_blocks) sums += block;
    return sums;
}

}  // namespace crf
