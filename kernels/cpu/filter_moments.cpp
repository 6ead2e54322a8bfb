// Moments of a filter by filtering products with the features (filter_moments.h).
#include "cpu/filter_moments.h"

#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {
void Filter::add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                         float* image, MomentSums& sums) {
    sums.add_singly(*this, pair, input, squared, image);
}

float* MomentSums::cleared_pull(const KernelInput& input, const float* image) {
    if (!image) return nullptr;
    const int num_modalities = input.num_modalities();
    pull_.grow(num_modalities * num_voxels_);
    fill(pull_.get(), num_voxels_ * num_modalities, 0.0f, pool_);
    return pull_.get();
}

void MomentSums::add_pull(const KernelInput& input, float* image) {
    if (!image) return;
    pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
        for (int f = 0; f < input.num_modalities(); ++f) {
            const float inverse = static_cast<float>(1 / input.theta(f));
            for (int64_t n = begin; n < end; ++n)
                image[f * num_voxels_ + n] -= pull_[f * num_voxels_ + n] * inverse;
        }
    });
}

void MomentSums::add_together(const FilteredPair& pair, const KernelInput& input, double* squared,
                              CrossMoments cross_moments) {
    constexpr int kColumns = kFeatureGroup;
    columns_.grow(kColumns * num_voxels_);
    const float* columns[kColumns];
    for (int i = 0; i < kColumns; ++i) columns[i] = columns_.get() + i * num_voxels_;
    std::vector<double> block_sums(num_voxel_blocks(num_voxels_) * kColumns);
    for (int first = 0; first < input.num_features(); first += kColumns) {
        const int count = std::min(kColumns, input.num_features() - first);
        if (filled_ != &input)
            for (int i = 0; i < count; ++i)
                input.fill_column(first + i, columns_.get() + i * num_voxels_, pool_);
        filled_ = input.num_features() <= kColumns ? &input : nullptr;
        std::vector<double> cross(count);
        cross_moments(columns, count, cross.data());
        pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
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
                block_sums[begin / kVoxelBlock * kColumns + i] =
                    static_cast<double>(sum_lanes(sums[i]));
        });
        for (int i = 0; i < count; ++i) {
            squared[first + i] -= 2 * cross[i];
            for (int64_t block = 0; block < num_voxel_blocks(num_voxels_); ++block)
                squared[first + i] += block_sums[block * kColumns + i];
        }
    }
}

void MomentSums::add_singly(Filter& filter, const FilteredPair& pair, const KernelInput& input,
                            double* squared, float* image) {
    columns_.grow(num_voxels_);
    filled_ = nullptr;
    filtered_.grow(pair.num_channels * num_voxels_);
    if (image) filtered_back_.grow(pair.num_channels * num_voxels_);
    std::vector<double> block_sums(num_voxel_blocks(num_voxels_));
    float* const column = columns_.get();
    float* const filtered = filtered_.get();
    float* const back = filtered_back_.get();
    for (int f = 0; f < input.num_features(); ++f) {
        float* const gradient =
            image && f < input.num_modalities() ? image + f * num_voxels_ : nullptr;
        input.fill_column(f, column, pool_);
        fill(filtered, num_voxels_ * pair.num_channels, 0.0f, pool_);
        filter.accumulate({pair.v, pair.num_channels, filtered, column}, workspace_);
        if (gradient) {
            fill(back, num_voxels_ * pair.num_channels, 0.0f, pool_);
            filter.accumulate_transposed({pair.u, pair.num_channels, back, column}, workspace_);
        }
        const float inverse = static_cast<float>(1 / input.theta(f));
        pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
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
            block_sums[begin / kVoxelBlock] = total;
        });
        for (double total : block_sums) squared[f] += total;
    }
}
}  // namespace crf
