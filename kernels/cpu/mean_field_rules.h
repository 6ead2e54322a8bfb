// Sums of a step of the mean field over its voxels, and the stopping rule (docs/reference/math.md).
#pragma once

#include <cstdint>
#include <vector>

namespace crf {

inline constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

// Sums of a step over a block of voxels, or a tile.
struct StepSums {
    double unary = 0;       // sum Q log Q - <a / T, Q> of the new marginals, a relative to the largest of its voxel
    double largest = 0;     // sum of the largest a / T of each voxel
    double quadratic = 0;   // <Q, pairwise> of the old marginals
    double divergence = 0;  // sum of KL(new || old)
    int64_t flips = 0;

    StepSums& operator+=(const StepSums& other) {
        unary += other.unary;
        largest += other.largest;
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
