// The interface of all filters: a symmetric kernel applied to values at the compact voxels.
#pragma once

#include "cpu/buffer.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {
// Channels that the filters process together.
constexpr int kChannelGroup = 4;

// Where kernels end, in standard deviations: engines/base.py has the same for Python.
// The truncated sum leaves out voxels farther apart, whose Gaussian is below 0.011: a radius of 4
// would take 2.4 times as many pairs.
constexpr double kTruncationRadius = 3.0;

// A tap of the spatial kernel has its full weight up to here, where a Gaussian is 3e-4, with 6e-5
// of its mass beyond; filtered axis by axis, a wider kernel costs little.
constexpr double kSpatialRadius = 4.0;

// With so few voxels, a backward pass hands its filters more channels at a time; with more, the
// memory for them would show.
constexpr int64_t kFewVoxels = int64_t{1} << 18;

class Filter {
   public:
    virtual ~Filter() = default;

    // The voxels whose sums matter: (voxel) 1, others 0; nullptr: all. At others, `accumulate` may
    // leave out what it adds.
    const uint8_t* receivers = nullptr;

    // The voxels whose values may differ from 0: (voxel) 1, others 0; nullptr: all.
    const uint8_t* senders = nullptr;

    // sum[c][n] += channel_weight[c] * post[n] * sum_m K(n, m) * pre[m] * values[c][m]
    // values, sum: num_channels arrays of num_voxels numbers. pre, post: num_voxels numbers, or
    // nullptr for all ones.
    virtual void accumulate(const float* values, int num_channels, const float* pre,
                            const float* post, const float* channel_weight, float* sum,
                            Workspace& workspace) = 0;

    // `accumulate` with K transposed: a different operator only where the kernel is not exactly
    // symmetric, as the lattice's.
    virtual void accumulate_transposed(const float* values, int num_channels, const float* pre,
                                       const float* post, const float* channel_weight, float* sum,
                                       Workspace& workspace) {
        accumulate(values, num_channels, pre, post, channel_weight, sum, workspace);
    }

    // sum[c][n] += scale[n] * sum_m K(n, m) * values[c][m], scale[n] = 1 / sum_m K(n, m), in one
    // go; false if the filter cannot.
    virtual bool accumulate_mean(const float* /*values*/, int /*num_channels*/, float* /*scale*/,
                                 float* /*sum*/, Workspace&) {
        return false;
    }

    virtual bool is_symmetric() const { return true; }

    // Computes the normalization without filtering, if the filter can: scale[n] = (K 1)^-1/2 and
    // ones[n] = the message of all ones if `symmetric`, else scale[n] = (K 1)^-1 (and `ones` is
    // nullptr). False: it cannot.
    virtual bool normalize(bool /*symmetric*/, float* /*scale*/, float* /*ones*/) { return false; }

    // Moments of the kernel (moments.h), if a filter has a better way than filtering products with
    // the features x; false: it has none. squared[f] += theta_f d/dtheta_f sum_c <u_c, K v_c>,
    // intensities first, box axes last; and for the intensities, unless `pull` is nullptr,
    // pull[f][n] += sum_c sum_m K(n, m) (u[c][n] v[c][m] + v[c][n] u[c][m]) (x_f(n) - x_f(m)).
    virtual bool second_moments(const float* /*u*/, const float* /*v*/, int /*num_channels*/,
                                double* /*squared*/, float* /*pull*/, Workspace&) {
        return false;
    }

    // Channels that `second_moments`, which then is there, takes together in little more time than
    // one of them; 1: that saves nothing.
    virtual int num_moment_channels() const { return 1; }

    // Whether the filter processes several columns of features faster together than one by one, and
    // the function for it: cross[f] += sum_c <x_f u_c, K (x_f v_c)> for up to kMostColumns columns
    // x_f.
    static constexpr int kMostColumns = 4;
    virtual bool has_cross_moments() const { return false; }
    virtual void cross_moments(const float* const* /*columns*/, int /*num_columns*/,
                               const float* /*u*/, const float* /*v*/, int /*num_channels*/,
                               double* /*cross*/, Workspace&) {}

    // Whether filtering reads the image that the filter was built on.
    virtual bool keeps_image() const { return false; }

    // Whether a further channel of a group takes little more time, because most of it goes into the
    // weights of pairs.
    virtual bool shares_weights() const { return false; }

    // One line for display: the algorithm and its size.
    virtual std::string description() const = 0;
};

// The point that features count from: parts of a volume that share an origin share the points of a
// lattice and the cells of a grid.
struct FeatureOrigin {
    std::vector<int64_t> position;  // a voxel, one index per grid axis; may lie outside the grid
    std::vector<double> intensity;  // one per modality
};

// The bilateral kernel's inputs, not divided by bandwidths.
struct BilateralInput {
    const Voxels* voxels = nullptr;
    // mm, one per box axis; empty for points, whose features are the intensities alone
    std::vector<double> theta_position;
    std::vector<double> theta_beta;       // one per modality
    std::vector<const float*> intensity;  // whole grid, one array per modality
    std::vector<float> lowest, highest;   // of each modality, inside the mask
    int64_t first[kMaxAxes]{};  // the box's first voxel along each axis, from the feature origin
    std::vector<float> zero;    // the feature origin's intensity of each modality

    // Largest range, in bandwidths, at which single precision resolves a difference of one
    // bandwidth.
    static constexpr double kLargestFeature = 1e6;

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

std::unique_ptr<Filter> make_exact_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_truncated_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_lattice_filter(const BilateralInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_spatial_filter(const Voxels& voxels,
                                            const std::vector<double>& theta_gamma,
                                            ThreadPool& pool);

// The work that "auto" expects.
struct ExpectedCalls {
    int num_channels = 0;    // in each filtering
    int num_filterings = 0;  // besides the normalization's two of one channel
};

// Resolves "auto": the filter with the smallest estimated time, or a more accurate one that is
// hardly slower. Any other name is returned unchanged.
std::string choose_filter(const std::string& requested, const BilateralInput& input,
                          const ExpectedCalls& calls);

// requested: "auto", "exact", "truncated", "grid" or "lattice".
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested,
                                              const BilateralInput& input,
                                              const ExpectedCalls& calls, ThreadPool& pool);

enum class Normalization {
    kSymmetric,
    kAfter,
    kNone
};  // kNone: of messages alone, not of a mean field

// A filter with its normalization.
struct Kernel {
    std::unique_ptr<Filter> filter;
    Buffer<float> scale;       // (voxel) factor of the normalization, empty = ones
    bool scales_sent = false;  // whether it scales the sent values too, not only the received ones
    // (voxel) the normalized message of all ones, empty = ones once `find_ones` has been called
    Buffer<float> ones;
};

// Computes the `scale` of a kernel that has its filter, and `ones` if that takes no other
// filtering.
void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization,
                      ThreadPool& pool, Workspace& workspace);

// Computes `ones` of a normalized kernel unless it is known. Not all users of a kernel need it.
void find_ones(Kernel& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace);

// The dense bilateral grid: its cost depends on its size, which is known before it is built.

// Cells are counted from the feature origin, and only those that the box and its intensities need
// exist.
struct GridSize {
    int64_t first_cell[kMaxAxes]{};  // along each axis of the box
    int64_t cells[kMaxAxes]{};
    int32_t first_bin[2]{};  // along each modality
    int64_t bins[2]{1, 1};
    double num_cells = 0;
};

GridSize grid_size(const BilateralInput& input);

// Whether the grid filter supports this input: one or two modalities, and not far more cells than
// voxels.
bool fits_grid(const BilateralInput& input, const GridSize& size);

// Throws InputError or CapacityError if the input does not fit.
std::unique_ptr<Filter> make_grid_filter(const BilateralInput& input, const GridSize& size,
                                         ThreadPool& pool);
}  // namespace crf
