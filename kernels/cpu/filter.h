// The interface of all filters: a symmetric kernel applied to values at the compact voxels.
#pragma once

#include "cpu/buffer.h"
#include "cpu/features.h"

namespace crf {
// Channels that the filters process together.
constexpr int kChannelGroup = numerics::CHANNEL_GROUP;

// Columns of features whose products with a channel are filtered side by side.
constexpr int kFeatureGroup = 4;

// Where kernels end, in standard deviations.
constexpr double kTruncationRadius = numerics::TRUNCATION_RADIUS;
constexpr double kSpatialRadius = numerics::SPATIAL_RADIUS;

// With so few voxels, a backward pass hands its filters more channels at a time; with more, the
// memory for them would show.
constexpr int64_t kFewVoxels = int64_t{1} << 18;

// sum[c][n] += weight[c] * post[n] * sum_m K(n, m) * pre[m] * values[c][m]
struct Filtering {
    const float* values;  // (channel, voxel)
    int num_channels;
    float* sum;  // (channel, voxel)
    // (voxel), (voxel), (channel); nullptr: ones
    const float *pre = nullptr, *post = nullptr, *weight = nullptr;

    float weight_of(int channel) const { return weight ? weight[channel] : 1.0f; }
    Filtering of_channels(int first, int count, int64_t num_voxels) const {
        return {values + first * num_voxels,      count, sum + first * num_voxels, pre, post,
                weight ? weight + first : nullptr};
    }
};

// Facts about a filter before it filters, to make the calls that are cheap.
struct FilterTraits {
    bool is_symmetric = true;  // transposed, it is the same operator
    bool keeps_image = false;  // it reads the image that it was built on whenever it filters
    // A further channel of a group takes little more time: most of it goes into weights of pairs.
    bool shares_weights = false;
    // Channels whose moments take little more time than those of one, and need no filtered values.
    int num_moment_channels = 1;
};

// Sums S = sum_c <u_c, K v_c> of (channel, voxel) that are differentiated; kv = K v and ktu =
// transpose(K) u, so that they are not filtered again.
struct FilteredPair {
    const float *u, *v, *kv, *ktu;
    int num_channels;
};

class MomentSums;

class Filter {
   public:
    explicit Filter(const FilterTraits& traits = FilterTraits()) : traits(traits) {}
    virtual ~Filter() = default;

    const FilterTraits traits;

    // The voxels whose sums matter: (voxel) 1, others 0; nullptr: all. At others, `accumulate` may
    // leave out what it adds.
    const uint8_t* receivers = nullptr;

    // The voxels whose values may differ from 0: (voxel) 1, others 0; nullptr: all.
    const uint8_t* senders = nullptr;

    virtual void accumulate(const Filtering& wanted, Workspace& workspace) = 0;

    // `accumulate` with K transposed: a different operator only where the kernel is not exactly
    // symmetric, as the lattice's.
    virtual void accumulate_transposed(const Filtering& wanted, Workspace& workspace) {
        accumulate(wanted, workspace);
    }

    // Derivatives of a sum S (filter_moments.h): squared[f] += theta_f dS/dtheta_f of each feature,
    // intensities first, box axes last; and image += dS/dimage, (modality, voxel), unless it is
    // nullptr. By default products with each feature are filtered.
    virtual void add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                             float* image, MomentSums& sums);

    // One line for display: the algorithm and its size.
    virtual std::string description() const = 0;
};

std::unique_ptr<Filter> make_exact_filter(const KernelInput& input, ThreadPool& pool);
std::unique_ptr<Filter> make_truncated_filter(const KernelInput& input, ThreadPool& pool);

// Pairs per voxel of the truncated sum: half of the other voxels of its window, counted without a
// list.
double num_window_pairs(const KernelInput& input);

std::unique_ptr<Filter> make_lattice_filter(const KernelInput& input, ThreadPool& pool);

// With scale[n] = 1 / sum_m K(n, m) as `post`, which is found in one go; false if the filter is no
// lattice.
bool accumulate_mean(Filter& filter, const Filtering& wanted, float* scale, Workspace& workspace);

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
std::string choose_filter(const std::string& requested, const KernelInput& input,
                          const ExpectedCalls& calls);

// requested: "auto", "exact", "truncated", "grid" or "lattice".
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested,
                                              const KernelInput& input, const ExpectedCalls& calls,
                                              ThreadPool& pool);

// kNone: of messages alone, not of a mean field
enum class Normalization { kSymmetric, kAfter, kNone };

// A filter with its normalization.
struct Kernel {
    std::unique_ptr<Filter> filter;
    Buffer<float> scale;       // (voxel) factor of the normalization, empty = ones
    bool scales_sent = false;  // whether it scales the sent values too, not only the received ones
    // (voxel) the normalized message of all ones, empty = ones once `find_ones` has been called
    Buffer<float> ones;

    // The normalized kernel. weight: (channel); nullptr: ones.
    void accumulate(const float* values, int num_channels, const float* weight, float* sum,
                    Workspace& workspace) const {
        const float* const pre = scales_sent ? scale.get() : nullptr;
        filter->accumulate({values, num_channels, sum, pre, scale.get(), weight}, workspace);
    }
};

// Computes the `scale` of a kernel that has its filter, and `ones` if that takes no other
// filtering.
void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization,
                      ThreadPool& pool, Workspace& workspace);

// The same of a spatial kernel, without filtering where there is no mask. theta_gamma: mm, one per
// box axis.
void normalize_spatial_kernel(Kernel& kernel, const Voxels& voxels,
                              const std::vector<double>& theta_gamma, Normalization normalization,
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

GridSize grid_size(const KernelInput& input);

// Whether the grid filter supports this input: one or two modalities, and not far more cells than
// voxels.
bool fits_grid(const KernelInput& input, const GridSize& size);

// Throws InputError or CapacityError if the input does not fit.
std::unique_ptr<Filter> make_grid_filter(const KernelInput& input, const GridSize& size,
                                         ThreadPool& pool);
}  // namespace crf
