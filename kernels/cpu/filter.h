// What every way of computing messages has in common: a symmetric kernel applied to values at the compact voxels.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {

class Filter {
   public:
    virtual ~Filter() = default;

    // sum[c][n] += channel_weight[c] * post[n] * sum_m K(n, m) * pre[m] * values[c][m]
    //
    // values, sum: num_channels arrays of num_voxels floats. pre, post: num_voxels floats, or nullptr for all ones.
    virtual void accumulate(const float* values, int num_channels, const float* pre, const float* post, const float* channel_weight,
                            float* sum, Workspace& workspace) = 0;

    // Fills in the normalization without filtering, where a filter can: scale[n] = (K 1)^-1/2 and ones[n] = the message of all ones if
    // `symmetric`, else scale[n] = (K 1)^-1 (and `ones` is nullptr). False: it cannot.
    virtual bool normalize(bool /*symmetric*/, float* /*scale*/, float* /*ones*/) { return false; }

    // One line for people: which algorithm, with its size.
    virtual std::string description() const = 0;
};

// The bilateral kernel's inputs, divided by nothing yet.
struct BilateralInput {
    const Voxels* voxels = nullptr;
    std::vector<double> theta_alpha;      // mm, one a box axis
    std::vector<double> theta_beta;       // one a modality
    std::vector<const float*> intensity;  // whole grid, one array a modality
    std::vector<float> lowest, highest;   // of each modality, inside the mask

    // Single precision resolves a difference of one bandwidth up to about this many of them.
    static constexpr double kLargestFeature = 1e6;

    // Takes the ranges of the intensities. Throws std::invalid_argument when one is not finite or spans too many bandwidths.
    BilateralInput(const Voxels& voxels, std::vector<double> theta_alpha, std::vector<double> theta_beta,
                   std::vector<const float*> intensity, ThreadPool& pool);
};

std::unique_ptr<Filter> make_exact_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_truncated_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_lattice_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_spatial_filter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool);

}  // namespace crf
