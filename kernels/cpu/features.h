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

// The bilateral kernel's inputs, not divided by bandwidths.
struct BilateralInput {
    const Voxels* voxels = nullptr;
    // mm, one per box axis; empty for points, whose features are only the intensities
    std::vector<double> theta_position;
    std::vector<double> theta_beta;       // one per modality
    std::vector<const float*> intensity;  // whole grid, one array per modality
    std::vector<float> lowest, highest;   // of each modality, inside the mask
    int64_t first[kMaxAxes]{};  // the box's first voxel along each axis, from the feature origin
    std::vector<float> zero;    // the feature origin's intensity of each modality

    // Computes the ranges of the intensities. Throws InputError if one is not finite, CapacityError
    // if one spans too many bandwidths. origin: nullptr for the box's first voxel and the lowest
    // intensities.
    BilateralInput(const Voxels& voxels, std::vector<double> theta_position,
                   std::vector<double> theta_beta, std::vector<const float*> intensity,
                   ThreadPool& pool, const FeatureOrigin* origin = nullptr);

    // So many voxels along an axis, in bandwidths.
    double in_bandwidths(int axis, int64_t num_voxels) const {
        return num_voxels * voxels->spacing[axis] / theta_position[axis];
    }
    // The standard deviation along an axis, in voxels.
    double sigma(int axis) const { return theta_position[axis] / voxels->spacing[axis]; }

   private:
    void check_span() const;
};

// Features of `count` compact voxels from `first` on, as num_modalities + num_axes arrays of
// `stride` floats, from the feature origin on: by default the box's corner and the lowest
// intensities, so that large offsets cost no precision.
void gather_features(const BilateralInput& input, int64_t first, int64_t count, float* features,
                     int64_t stride);

// The same for `length` voxels that follow one another in a row, from a place in the whole grid and
// coordinates in the box.
void piece_features(const BilateralInput& input, int64_t grid, const int32_t* coordinate,
                    int64_t length, float* features, int64_t stride);

inline int num_features(const BilateralInput& input) {
    return static_cast<int>(input.intensity.size() + input.theta_position.size());
}

// The features of one kernel, a column of all voxels at a time, centered: intensities first, box
// axes last.
class FeatureColumns {
   public:
    // theta_beta, intensity: empty for a spatial kernel; intensity: whole grid, one array per
    // modality.
    FeatureColumns(const Voxels& voxels, std::vector<double> theta_position,
                   std::vector<double> theta_beta, std::vector<const float*> intensity)
        : voxels_(voxels),
          theta_position_(std::move(theta_position)),
          theta_beta_(std::move(theta_beta)),
          intensity_(std::move(intensity)) {}

    int num_modalities() const { return static_cast<int>(theta_beta_.size()); }
    int size() const { return num_modalities() + static_cast<int>(theta_position_.size()); }
    double theta(int feature) const {
        return feature < num_modalities() ? theta_beta_[feature]
                                          : theta_position_[feature - num_modalities()];
    }
    // Writes a feature of all voxels.
    void fill(int feature, float* column, ThreadPool& pool) const;

   private:
    double center(int feature) const;

    const Voxels& voxels_;
    std::vector<double> theta_position_, theta_beta_;
    std::vector<const float*> intensity_;
    // (modality), computed when first needed: most kernels have no backward pass
    mutable std::vector<double> mean_;
};
}  // namespace crf
