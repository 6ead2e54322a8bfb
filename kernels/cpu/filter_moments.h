// Gradients of a filter's sums with respect to its kernel's bandwidths and the image, in moment
// form (docs/reference/math.md): for S = sum_c <u_c, K v_c> and K(n, m) = exp(-1/2 sum_f (x_f(n) -
// x_f(m))^2),
//   theta_f dS/dtheta_f = sum_c sum_nm u_c(n) K(n, m) v_c(m) (x_f(n) - x_f(m))^2,
// which needs one more filtering, of x_f v, for each feature f. For a lattice it is the derivative
// of the Gaussian under its weights.
#pragma once

#include "cpu/filter.h"

namespace crf {
// How moments are summed, and the memory for it, which is kept from one sum S to the next.
class MomentSums {
   public:
    // Adds cross[f] += sum_c <x_f u_c, K (x_f v_c)> for up to kFeatureGroup columns x_f; their
    // number and the sums follow.
    using CrossMoments = FunctionRef<const float* const*, int, double*>;

    MomentSums(int64_t num_voxels, ThreadPool& pool, Workspace& workspace)
        : num_voxels_(num_voxels), pool_(pool), workspace_(workspace) {}

    Workspace& workspace() { return workspace_; }

    // One feature after the other, for any filter.
    void add_singly(Filter& filter, const FilteredPair& pair, const KernelInput& input,
                    double* squared, float* image);

    // Several features at a time, for a filter that has their products side by side; not for the
    // image: squared[f] += <x_f^2, sum_c (v ktu + u kv)> - 2 cross_f.
    void add_together(const FilteredPair& pair, const KernelInput& input, double* squared,
                      CrossMoments cross_moments);

    // For a filter that sums pair by pair. Zeros, (modality, voxel), to which it adds
    //   pull[f][n] += sum_c sum_m K(n, m) (u[c][n] v[c][m] + v[c][n] u[c][m]) (x_f(n) - x_f(m)),
    // or nullptr without an image; and what `pull` means for the gradient of the image.
    float* cleared_pull(const KernelInput& input, const float* image);
    void add_pull(const KernelInput& input, float* image);

   private:
    const int64_t num_voxels_;
    ThreadPool& pool_;
    Workspace& workspace_;
    // Columns of features; channels that result from filtering one of them.
    Buffer<float> columns_, filtered_, filtered_back_;
    // of which all columns are in `columns_`; each step needs the same
    const KernelInput* filled_ = nullptr;
    Buffer<float> pull_;  // (modality, voxel)
};
}  // namespace crf
