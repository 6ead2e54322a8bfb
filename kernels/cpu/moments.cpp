#include "cpu/moments.h"

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {

template <class T>
FeatureColumns<T>::FeatureColumns(const Voxels& voxels, std::vector<double> theta_position, std::vector<double> theta_beta,
                                  std::vector<const T*> intensity)
    : voxels_(voxels), theta_position_(std::move(theta_position)), theta_beta_(std::move(theta_beta)), intensity_(std::move(intensity)) {}

template <class T>
double FeatureColumns<T>::center(int feature) const {
    if (feature >= num_modalities()) {
        const int axis = feature - num_modalities();
        return 0.5 * static_cast<double>(voxels_.box_shape[axis] - 1) * voxels_.spacing[axis];
    }
    for (int m = static_cast<int>(mean_.size()); m <= feature; ++m) {
        double total = 0;
        for (const Run& run : voxels_.runs)
            for (int32_t i = 0; i < run.length; ++i) total += static_cast<double>(intensity_[m][run.grid + i]);
        mean_.push_back(total / static_cast<double>(voxels_.num_voxels));
    }
    return mean_[feature];
}

template <class T>
void FeatureColumns<T>::fill(int feature, T* column, ThreadPool& pool) const {
    const double center = this->center(feature), scale = 1 / theta(feature);
    pool.run(num_voxel_blocks(voxels_.num_voxels), [&](int64_t block, int) {
        const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, voxels_.num_voxels);
        voxels_.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
            if (feature < num_modalities()) {
                const T* values = intensity_[feature] + grid;
                for (int64_t i = 0; i < length; ++i) column[voxel + i] = static_cast<T>((static_cast<double>(values[i]) - center) * scale);
                return;
            }
            const int axis = feature - num_modalities();
            const double step = voxels_.spacing[axis];
            int64_t place[kMaxAxes];
            voxels_.coordinates(box, place);
            const int64_t stride = axis == voxels_.num_axes - 1 ? 1 : 0;
            for (int64_t i = 0; i < length; ++i)
                column[voxel + i] = static_cast<T>((static_cast<double>(place[axis] + i * stride) * step - center) * scale);
        });
    });
}

namespace {

template <class T>
void resize(Buffer<T>& buffer, int64_t size) {
    if (buffer.size < size) {
        buffer = Buffer<T>();  // freed before more is allocated
        buffer = Buffer<T>(size);
    }
}

template <class T>
T* clear_pull(const FeatureColumns<T>& features, MomentBuffers<T>& buffers, int64_t num_voxels, ThreadPool& pool) {
    resize(buffers.pull, features.num_modalities() * num_voxels);
    clear_rows(buffers.pull.get(), num_voxels, features.num_modalities(), pool);
    return buffers.pull.get();
}

template <class T>
void add_pull(const FeatureColumns<T>& features, const T* pull, T* image, int64_t num_voxels, ThreadPool& pool) {
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        for (int f = 0; f < features.num_modalities(); ++f) {
            const T inverse = static_cast<T>(1 / features.theta(f));
            for (int64_t n = block * kVoxelBlock; n < std::min((block + 1) * kVoxelBlock, num_voxels); ++n)
                image[f * num_voxels + n] -= pull[f * num_voxels + n] * inverse;
        }
    });
}

// Several features at a time: squared[f] += <x_f^2, sum_c (v ktu + u kv)> - 2 cross_f.
template <class T>
void add_moments_together(BasicFilter<T>& filter, const FeatureColumns<T>& features, const T* u, const T* v, const T* kv, const T* ktu,
                          int num_channels, double* squared, MomentBuffers<T>& buffers, int64_t num_voxels, ThreadPool& pool,
                          Workspace& workspace) {
    using Lanes = typename LanesOf<T>::type;
    constexpr int kColumns = BasicFilter<T>::kMostColumns;
    resize(buffers.columns, kColumns * num_voxels);
    const T* columns[kColumns];
    for (int i = 0; i < kColumns; ++i) columns[i] = buffers.columns.get() + i * num_voxels;
    std::vector<double> block_sums(num_voxel_blocks(num_voxels) * kColumns);
    for (int first = 0; first < features.size(); first += kColumns) {
        const int count = std::min(kColumns, features.size() - first);
        if (buffers.filled != &features)
            for (int i = 0; i < count; ++i) features.fill(first + i, buffers.columns.get() + i * num_voxels, pool);
        buffers.filled = features.size() <= kColumns ? &features : nullptr;
        std::vector<double> cross(count);
        filter.cross_moments(columns, count, u, v, num_channels, cross.data(), workspace);
        pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, num_voxels);
            Lanes sums[kColumns]{};
            for (int64_t n = begin; n < end; n += kLanes) {
                const int64_t left = end - n;
                Lanes both{};
                for (int c = 0; c < num_channels; ++c) {
                    const int64_t at = c * num_voxels + n;
                    both += load_some(v + at, left) * load_some(ktu + at, left) + load_some(u + at, left) * load_some(kv + at, left);
                }
                for (int i = 0; i < count; ++i) {
                    const Lanes x = load_some(columns[i] + n, left);
                    sums[i] += x * x * both;
                }
            }
            for (int i = 0; i < count; ++i) block_sums[block * kColumns + i] = static_cast<double>(sum_lanes(sums[i]));
        });
        for (int i = 0; i < count; ++i) {
            squared[first + i] -= 2 * cross[i];
            for (int64_t block = 0; block < num_voxel_blocks(num_voxels); ++block) squared[first + i] += block_sums[block * kColumns + i];
        }
    }
}

// One feature after the other, and the gradient with respect to the image if requested.
template <class T>
void add_moments_singly(BasicFilter<T>& filter, const FeatureColumns<T>& features, const T* u, const T* v, const T* kv, const T* ktu,
                        int num_channels, double* squared, T* image, MomentBuffers<T>& buffers, int64_t num_voxels, ThreadPool& pool,
                        Workspace& workspace) {
    using Lanes = typename LanesOf<T>::type;
    resize(buffers.columns, num_voxels);
    buffers.filled = nullptr;
    resize(buffers.filtered, num_channels * num_voxels);
    if (image) resize(buffers.filtered_back, num_channels * num_voxels);
    const std::vector<T> unit(num_channels, T{1});
    std::vector<double> block_sums(num_voxel_blocks(num_voxels));
    T *const column = buffers.columns.get(), *const filtered = buffers.filtered.get(), *const back = buffers.filtered_back.get();
    for (int f = 0; f < features.size(); ++f) {
        T* const gradient = image && f < features.num_modalities() ? image + f * num_voxels : nullptr;
        features.fill(f, column, pool);
        clear_rows(filtered, num_voxels, num_channels, pool);
        filter.accumulate(v, num_channels, column, nullptr, unit.data(), filtered, workspace);
        if (gradient) {
            clear_rows(back, num_voxels, num_channels, pool);
            filter.accumulate_transposed(u, num_channels, column, nullptr, unit.data(), back, workspace);
        }
        const T inverse = static_cast<T>(1 / features.theta(f));
        pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, num_voxels);
            double total = 0;
            for (int64_t n = begin; n < end; n += kLanes) {
                const int64_t left = end - n;
                const Lanes x = load_some(column + n, left);
                Lanes sum{}, change{};
                for (int c = 0; c < num_channels; ++c) {
                    const int64_t at = c * num_voxels + n;
                    const Lanes own_u = load_some(u + at, left), own_v = load_some(v + at, left);
                    const Lanes sent = load_some(kv + at, left), sent_back = load_some(ktu + at, left);
                    const Lanes moment = load_some(filtered + at, left);
                    sum += x * (x * (own_v * sent_back + own_u * sent) - own_u * moment * T{2});
                    if (gradient) change += own_u * (x * sent - moment) + own_v * (x * sent_back - load_some(back + at, left));
                }
                total += static_cast<double>(sum_lanes(sum));
                if (gradient) store_some(gradient + n, load_some(gradient + n, left) - change * inverse, left);
            }
            block_sums[block] = total;
        });
        for (double total : block_sums) squared[f] += total;
    }
}

}  // namespace

template <class T>
void add_moments(BasicFilter<T>& filter, const FeatureColumns<T>& features, const T* u, const T* v, const T* kv, const T* ktu,
                 int num_channels, double* squared, T* image, MomentBuffers<T>& buffers, int64_t num_voxels, ThreadPool& pool,
                 Workspace& workspace) {
    if (!image) {
        if (filter.second_moments(u, v, num_channels, squared, nullptr, workspace)) return;
    } else if (filter.second_moments(u, v, num_channels, squared, clear_pull(features, buffers, num_voxels, pool), workspace)) {
        return add_pull(features, buffers.pull.get(), image, num_voxels, pool);
    }
    if (!image && filter.has_cross_moments())
        return add_moments_together(filter, features, u, v, kv, ktu, num_channels, squared, buffers, num_voxels, pool, workspace);
    add_moments_singly(filter, features, u, v, kv, ktu, num_channels, squared, image, buffers, num_voxels, pool, workspace);
}

template class FeatureColumns<float>;
template class FeatureColumns<double>;
template void add_moments(BasicFilter<float>&, const FeatureColumns<float>&, const float*, const float*, const float*, const float*, int,
                          double*, float*, MomentBuffers<float>&, int64_t, ThreadPool&, Workspace&);
template void add_moments(BasicFilter<double>&, const FeatureColumns<double>&, const double*, const double*, const double*, const double*,
                          int, double*, double*, MomentBuffers<double>&, int64_t, ThreadPool&, Workspace&);

}  // namespace crf
