// Gradients of a filter's sums with respect to its kernel's bandwidths and the image, in moment
// form (docs/reference/math.md): for S = sum_c <u_c, K v_c> and K(n, m) = exp(-1/2 sum_f (x_f(n) -
// x_f(m))^2),
//   theta_f dS/dtheta_f = sum_c sum_nm u_c(n) K(n, m) v_c(m) (x_f(n) - x_f(m))^2,
// which needs one more filtering, of x_f v, for each feature f. For a lattice it is the derivative
// of the Gaussian under its weights.
#pragma once

#include "cpu/filter.h"
#include "cpu/mean_field.h"
#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {
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
    void fill(int feature, float* column, ThreadPool& pool) const {
        const double center = this->center(feature), scale = 1 / theta(feature);
        pool.run(num_voxel_blocks(voxels_.num_voxels), [&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock;
            const int64_t end = std::min(begin + kVoxelBlock, voxels_.num_voxels);
            voxels_.for_pieces(
                begin, end, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
                    if (feature < num_modalities()) {
                        const float* values = intensity_[feature] + grid;
                        for (int64_t i = 0; i < length; ++i)
                            column[voxel + i] = static_cast<float>(
                                (static_cast<double>(values[i]) - center) * scale);
                        return;
                    }
                    const int axis = feature - num_modalities();
                    const double step = voxels_.spacing[axis];
                    int64_t place[kMaxAxes];
                    voxels_.coordinates(box, place);
                    const int64_t stride = axis == voxels_.num_axes - 1 ? 1 : 0;
                    for (int64_t i = 0; i < length; ++i)
                        column[voxel + i] = static_cast<float>(
                            (static_cast<double>(place[axis] + i * stride) * step - center) *
                            scale);
                });
        });
    }

   private:
    double center(int feature) const {
        if (feature >= num_modalities()) {
            const int axis = feature - num_modalities();
            return 0.5 * static_cast<double>(voxels_.box_shape[axis] - 1) * voxels_.spacing[axis];
        }
        for (int m = static_cast<int>(mean_.size()); m <= feature; ++m) {
            double total = 0;
            for (const Run& run : voxels_.runs)
                for (int32_t i = 0; i < run.length; ++i)
                    total += static_cast<double>(intensity_[m][run.grid + i]);
            mean_.push_back(total / static_cast<double>(voxels_.num_voxels));
        }
        return mean_[feature];
    }

    const Voxels& voxels_;
    std::vector<double> theta_position_, theta_beta_;
    std::vector<const float*> intensity_;
    // (modality), computed when first needed: most kernels have no backward pass
    mutable std::vector<double> mean_;
};

// Sums S of u and v, (channel, voxel), differentiated; kv = K v and ktu = transpose(K) u, not
// filtered again.
struct FilteredPair {
    const float *u, *v, *kv, *ktu;
    int num_channels;
};

// Adds up moments; keeps its memory from one sum to the next.
class Moments {
   public:
    Moments(int64_t num_voxels, ThreadPool& pool, Workspace& workspace)
        : num_voxels_(num_voxels), pool_(pool), workspace_(workspace) {}

    // Adds theta_f dS/dtheta_f to squared[f]; and dS/dimage to image, (modality, voxel), unless
    // that is nullptr.
    void add(Filter& filter, const FeatureColumns& features, const FilteredPair& pair,
             double* squared, float* image) {
        float* const pull = image ? cleared_pull(features.num_modalities()) : nullptr;
        if (filter.second_moments(pair.u, pair.v, pair.num_channels, squared, pull, workspace_)) {
            if (image) add_pull(features, image);
        } else if (!image && filter.has_cross_moments()) {
            add_together(filter, features, pair, squared);
        } else {
            add_singly(filter, features, pair, squared, image);
        }
    }

   private:
    static void resize(Buffer<float>& buffer, int64_t size) {
        if (buffer.size >= size) return;
        buffer = Buffer<float>();  // freed before more is allocated
        buffer = Buffer<float>(size);
    }

    float* cleared_pull(int num_modalities) {
        resize(pull_, num_modalities * num_voxels_);
        clear_rows(pull_.get(), num_voxels_, num_modalities, pool_);
        return pull_.get();
    }

    void add_pull(const FeatureColumns& features, float* image) {
        pool_.run(num_voxel_blocks(num_voxels_), [&](int64_t block, int) {
            for (int f = 0; f < features.num_modalities(); ++f) {
                const float inverse = static_cast<float>(1 / features.theta(f));
                for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n)
                    image[f * num_voxels_ + n] -= pull_[f * num_voxels_ + n] * inverse;
            }
        });
    }

    // Several features at a time: squared[f] += <x_f^2, sum_c (v ktu + u kv)> - 2 cross_f.
    void add_together(Filter& filter, const FeatureColumns& features, const FilteredPair& pair,
                      double* squared) {
        constexpr int kColumns = Filter::kMostColumns;
        resize(columns_, kColumns * num_voxels_);
        const float* columns[kColumns];
        for (int i = 0; i < kColumns; ++i) columns[i] = columns_.get() + i * num_voxels_;
        std::vector<double> block_sums(num_voxel_blocks(num_voxels_) * kColumns);
        for (int first = 0; first < features.size(); first += kColumns) {
            const int count = std::min(kColumns, features.size() - first);
            if (filled_ != &features)
                for (int i = 0; i < count; ++i)
                    features.fill(first + i, columns_.get() + i * num_voxels_, pool_);
            filled_ = features.size() <= kColumns ? &features : nullptr;
            std::vector<double> cross(count);
            filter.cross_moments(columns, count, pair.u, pair.v, pair.num_channels, cross.data(),
                                 workspace_);
            pool_.run(num_voxel_blocks(num_voxels_), [&](int64_t block, int) {
                const int64_t begin = block * kVoxelBlock;
                const int64_t end = std::min(begin + kVoxelBlock, num_voxels_);
                vfloat sums[kColumns]{};
                for (int64_t n = begin; n < end; n += kLanes) {
                    const int64_t left = end - n;
                    vfloat both{};
                    for (int c = 0; c < pair.num_channels; ++c) {
                        const int64_t at = c * num_voxels_ + n;
                        both += load_some(pair.v + at, left) * load_some(pair.ktu + at, left) +
                                load_some(pair.u + at, left) * load_some(pair.kv + at, left);
                    }
                    for (int i = 0; i < count; ++i) {
                        const vfloat x = load_some(columns[i] + n, left);
                        sums[i] += x * x * both;
                    }
                }
                for (int i = 0; i < count; ++i)
                    block_sums[block * kColumns + i] = static_cast<double>(sum_lanes(sums[i]));
            });
            for (int i = 0; i < count; ++i) {
                squared[first + i] -= 2 * cross[i];
                for (int64_t block = 0; block < num_voxel_blocks(num_voxels_); ++block)
                    squared[first + i] += block_sums[block * kColumns + i];
            }
        }
    }

    // One feature after the other, and the gradient with respect to the image if requested.
    void add_singly(Filter& filter, const FeatureColumns& features, const FilteredPair& pair,
                    double* squared, float* image) {
        resize(columns_, num_voxels_);
        filled_ = nullptr;
        resize(filtered_, pair.num_channels * num_voxels_);
        if (image) resize(filtered_back_, pair.num_channels * num_voxels_);
        const std::vector<float> unit(pair.num_channels, 1.0f);
        std::vector<double> block_sums(num_voxel_blocks(num_voxels_));
        float* const column = columns_.get();
        float* const filtered = filtered_.get();
        float* const back = filtered_back_.get();
        for (int f = 0; f < features.size(); ++f) {
            float* const gradient =
                image && f < features.num_modalities() ? image + f * num_voxels_ : nullptr;
            features.fill(f, column, pool_);
            clear_rows(filtered, num_voxels_, pair.num_channels, pool_);
            filter.accumulate(pair.v, pair.num_channels, column, nullptr, unit.data(), filtered,
                              workspace_);
            if (gradient) {
                clear_rows(back, num_voxels_, pair.num_channels, pool_);
                filter.accumulate_transposed(pair.u, pair.num_channels, column, nullptr,
                                             unit.data(), back, workspace_);
            }
            const float inverse = static_cast<float>(1 / features.theta(f));
            pool_.run(num_voxel_blocks(num_voxels_), [&](int64_t block, int) {
                const int64_t begin = block * kVoxelBlock;
                const int64_t end = std::min(begin + kVoxelBlock, num_voxels_);
                double total = 0;
                for (int64_t n = begin; n < end; n += kLanes) {
                    const int64_t left = end - n;
                    const vfloat x = load_some(column + n, left);
                    vfloat sum{}, change{};
                    for (int c = 0; c < pair.num_channels; ++c) {
                        const int64_t at = c * num_voxels_ + n;
                        const vfloat own_u = load_some(pair.u + at, left);
                        const vfloat own_v = load_some(pair.v + at, left);
                        const vfloat sent = load_some(pair.kv + at, left);
                        const vfloat sent_back = load_some(pair.ktu + at, left);
                        const vfloat moment = load_some(filtered + at, left);
                        sum += x * (x * (own_v * sent_back + own_u * sent) - own_u * moment * 2.0f);
                        if (gradient)
                            change += own_u * (x * sent - moment) +
                                      own_v * (x * sent_back - load_some(back + at, left));
                    }
                    total += static_cast<double>(sum_lanes(sum));
                    if (gradient)
                        store_some(gradient + n, load_some(gradient + n, left) - change * inverse,
                                   left);
                }
                block_sums[block] = total;
            });
            for (double total : block_sums) squared[f] += total;
        }
    }

    const int64_t num_voxels_;
    ThreadPool& pool_;
    Workspace& workspace_;
    Buffer<float> columns_, filtered_,
        filtered_back_;  // columns of features; channels that result from filtering one of them
    // of which all columns are in `columns_`; each step needs the same
    const FeatureColumns* filled_ = nullptr;
    Buffer<float> pull_;  // (modality, voxel)
};

// The backward pass of the mean field: from the gradient of a loss with respect to the last step's
// logits to the gradients with respect to all inputs (docs/reference/math.md, section 9). The
// forward pass has recorded the marginals of each step; messages are filtered again.

// Gradients of a loss with respect to parameters, summed in double precision in a fixed order: the
// same for any number of threads.
struct MeanFieldGradients {
    std::vector<std::vector<double>> weight;  // (kernel, label), of all labels, as in the options
    std::vector<double> compatibility;        // (label, label), including the diagonal
    double temperature = 0;
    double volume_slack = 0;   // 0 without a volume term
    std::vector<double> bias;  // (label), of all labels
    // (kernel, feature): intensities first, box axes last; zeros unless wanted
    std::vector<std::vector<double>> theta;
};

struct BackwardInput {
    const float* logits;  // (label, *grid)
    // (step, channel, voxel) from run_mean_field; with a volume term (steps + 1, channel, voxel)
    const float* record;
    // (step, label) from run_mean_field, if there is a volume term
    std::vector<std::vector<double>> volume_bias;
    GridView<const float> gradient;  // (label, *grid), with respect to the result of run_mean_field
    bool wants_theta = false;
};

// grad_logits: (label, *grid), written everywhere. grad_image: (modality, *grid), zeros, written
// inside the mask, or nullptr.
MeanFieldGradients run_mean_field_backward(const Voxels& voxels, const std::vector<Kernel>& kernels,
                                           const std::vector<FeatureColumns>& features,
                                           const MeanFieldOptions& options,
                                           const BackwardInput& input, float* grad_logits,
                                           float* grad_image, ThreadPool& pool,
                                           Workspace& workspace);
}  // namespace crf
