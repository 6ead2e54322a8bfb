// The features of a kernel, positions and intensities over their bandwidths: the input of a
// filter, and columns of them for gradients.
#pragma once

#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {
// The point that features count from: parts of a volume that share an origin share the points of a
// lattice and the cells of a grid.
struct FeatureOrigin {
    std::vector<int64_t> position;  // a voxel, one index per grid axis; may lie outside the grid
    std::vector<double> intensity;  // one per modality
};

// A kernel's inputs, not divided by bandwidths.
struct KernelInput {
    const Voxels* voxels = nullptr;
    // mm, one per box axis; empty for points, whose features are only the intensities
    std::vector<double> theta_position;
    // Of each modality, and its intensities on the whole grid; none for a spatial kernel.
    std::vector<double> theta_beta;
    std::vector<const float*> intensity;
    std::vector<float> lowest, highest;  // of each modality, inside the mask
    int64_t first[kMaxAxes]{};  // the box's first voxel along each axis, from the feature origin
    std::vector<float> zero;    // the feature origin's intensity of each modality

    // Computes the ranges of the intensities. Throws InputError if one is not finite. origin:
    // nullptr for the box's first voxel and the lowest intensities.
    KernelInput(const Voxels& voxels, std::vector<double> theta_position,
                std::vector<double> theta_beta, std::vector<const float*> intensity,
                ThreadPool& pool, const FeatureOrigin* origin = nullptr);

    // Throws CapacityError if a feature of a bilateral kernel spans too many bandwidths.
    void require_span() const;

    int num_modalities() const { return static_cast<int>(theta_beta.size()); }
    int num_features() const { return num_modalities() + static_cast<int>(theta_position.size()); }
    // The bandwidth of a feature: intensities first, box axes last.
    double theta(int feature) const {
        return feature < num_modalities() ? theta_beta[feature]
                                          : theta_position[feature - num_modalities()];
    }
    // The row of a feature among those of a lattice and of exact sums.
    int row_of(int feature) const {
        const int axis = feature - num_modalities();
        return axis < 0 ? feature : num_modalities() + voxels->feature[axis];
    }
    // Writes a feature of all voxels, minus its mean.
    void fill_column(int feature, float* column, ThreadPool& pool) const;

    // So many voxels along an axis, in bandwidths.
    double in_bandwidths(int axis, int64_t num_voxels) const {
        return num_voxels * voxels->spacing[axis] / theta_position[axis];
    }
    // The standard deviation along an axis, in voxels.
    double sigma(int axis) const { return theta_position[axis] / voxels->spacing[axis]; }
};

// A feature of `count` compact voxels from `first` on, from the feature origin on: by default the
// box's corner and the lowest intensities, so that large offsets cost no precision.
void gather_feature(const KernelInput& input, int feature, int64_t first, int64_t count, float* to);

// All features of `length` voxels that follow one another in a row, from a place in the whole grid
// and coordinates in the box, as rows of `stride` floats.
void piece_features(const KernelInput& input, int64_t grid, const int32_t* coordinate,
                    int64_t length, float* features, int64_t stride);
}  // namespace crf
