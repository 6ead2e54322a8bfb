// Gradients of a filter's sums with respect to its kernel's bandwidths and the image, in moment form (docs/reference/math.md): for
// S = sum_c <u_c, K v_c> and K(n, m) = exp(-1/2 sum_f (x_f(n) - x_f(m))^2),
//   theta_f dS/dtheta_f = sum_c sum_nm u_c(n) K(n, m) v_c(m) (x_f(n) - x_f(m))^2,
// which needs one more filtering, of x_f v, for each feature f. Exact for a sum over pairs; for a lattice it is the derivative of the
// Gaussian under the lattice's weights, because the derivative of its own interpolation would be noise from voxel to voxel.
#pragma once

#include <vector>

#include "cpu/filter.h"

namespace crf {

// The features of one kernel, a column of all voxels at a time, centered: intensities first, box axes last. T: float or double.
template <class T>
class FeatureColumns {
   public:
    // theta_beta, intensity: empty for a spatial kernel; intensity: whole grid, one array per modality.
    FeatureColumns(const Voxels& voxels, std::vector<double> theta_position, std::vector<double> theta_beta,
                   std::vector<const T*> intensity);

    int num_modalities() const { return static_cast<int>(theta_beta_.size()); }
    int size() const { return num_modalities() + static_cast<int>(theta_position_.size()); }
    double theta(int feature) const {
        return feature < num_modalities() ? theta_beta_[feature] : theta_position_[feature - num_modalities()];
    }
    void fill(int feature, T* column, ThreadPool& pool) const;

   private:
    double center(int feature) const;

    const Voxels& voxels_;
    std::vector<double> theta_position_, theta_beta_;
    std::vector<const T*> intensity_;
    mutable std::vector<double> mean_;  // (modality), computed when first needed: most kernels have no backward pass
};

// Buffers for columns of features and for the channels that result from filtering one of them.
template <class T>
struct MomentBuffers {
    Buffer<T> columns, filtered, filtered_back;
    const FeatureColumns<T>* filled = nullptr;  // of which all columns are in `columns`; each step needs the same
    Buffer<T> pull;                             // (modality, voxel)
};

// Adds theta_f dS/dtheta_f to squared[f]; and dS/dimage to image, (modality, voxel), unless that is nullptr.
// u, v: (channel, voxel); kv = K v and ktu = transpose(K) u, which are already available and need not be filtered again.
template <class T>
void add_moments(BasicFilter<T>& filter, const FeatureColumns<T>& features, const T* u, const T* v, const T* kv, const T* ktu,
                 int num_channels, double* squared, T* image, MomentBuffers<T>& buffers, int64_t num_voxels, ThreadPool& pool,
                 Workspace& workspace);

}  // namespace crf
