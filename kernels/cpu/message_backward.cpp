#include "cpu/message_backward.h"

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {

namespace {

constexpr int kScratchRows = 7;  // per label: those of take_messages

template <class T>
double dot(const T* a, const T* b) {
    typename LanesOf<T>::type total{};
    for (int64_t i = 0; i < kVoxelBlock; i += kLanes) total += load(a + i) * load(b + i);
    return static_cast<double>(sum_lanes(total));
}

}  // namespace

template <class T>
MessageBackward<T>::MessageBackward(const Voxels& voxels, const std::vector<Kernel<T>>& kernels,
                                    const std::vector<FeatureColumns<T>>& features, const MeanFieldOptions<T>& options, bool wants_theta,
                                    bool wants_image, MeanFieldGradients& gradients, ThreadPool& pool, Workspace& workspace)
    : voxels_(voxels),
      kernels_(kernels),
      features_(features),
      options_(options),
      gradients_(gradients),
      pool_(pool),
      workspace_(workspace),
      wants_theta_(wants_theta),
      moments_wanted_(wants_theta || wants_image),
      num_labels_(options.num_labels),
      num_sent_(options.num_labels - 1),
      num_voxels_(voxels.num_voxels),
      num_blocks_(num_voxel_blocks(voxels.num_voxels)),
      num_sums_(num_labels_ + num_labels_ * num_labels_) {
    for (const FeatureColumns<T>& f : features) num_modalities_ = std::max(num_modalities_, f.num_modalities());
    grad_message_ = Buffer<T>(num_sent_ * num_voxels_);
    filtered_ = Buffer<T>(num_sent_ * num_voxels_);
    filtered_back_ = Buffer<T>(num_sent_ * num_voxels_);
    if (moments_wanted_) {
        sent_ = Buffer<T>(num_sent_ * num_voxels_);
        for (size_t m = 0; m < kernels.size(); ++m) {
            grad_degree_.emplace_back(num_voxels_);
            grad_ones_.emplace_back(num_voxels_);
            clear_rows(grad_degree_.back().get(), num_voxels_, 1, pool_);
            clear_rows(grad_ones_.back().get(), num_voxels_, 1, pool_);
        }
    }
    if (wants_image) {
        image_ = Buffer<T>(num_modalities_ * num_voxels_);
        clear_rows(image_.get(), num_voxels_, num_modalities_, pool_);
    }
    unit_.assign(num_labels_, T{1});
    block_sums_.resize(num_blocks_ * num_sums_);
    scratch_.resize(pool.num_threads());
    for (auto& s : scratch_) s = Buffer<T>(kScratchRows * num_labels_ * kVoxelBlock);
}

template <class T>
void MessageBackward<T>::pass_step(size_t m, const StepGradients<T>& step) {
    const Kernel<T>& kernel = kernels_[m];
    const std::vector<T>& weight = options_.weight[m];
    const T last_weight = weight[num_sent_];
    const T* const scale = kernel.scale.get();
    const T* const sent_scale = kernel.scales_sent ? scale : nullptr;
    // Marginals sum to 1, so a gradient with respect to them is known up to one number per voxel: the last label's is subtracted, and
    // its channel need not be filtered. The remainder for the normalization is kept in grad_ones_.
    for_blocks([&](int64_t block, int thread) {
        T *z = scratch_[thread].get(), *g = z + num_labels_ * kVoxelBlock;
        load_rows(step.z, num_voxels_, block, num_labels_, z);
        const T* last = z + num_sent_ * kVoxelBlock;
        for (int l = 0; l < num_sent_; ++l)
            for (int64_t i = 0; i < kVoxelBlock; i += kLanes)
                store(g + l * kVoxelBlock + i, load(last + i) * last_weight - load(z + l * kVoxelBlock + i) * weight[l]);
        store_rows(g, num_voxels_, block, num_sent_, grad_message_.get());
        if (!moments_wanted_) return;
        T* const ones = grad_ones_[m].get() + block * kVoxelBlock;
        for (int64_t i = 0; i < block_end(block, num_voxels_) - block * kVoxelBlock; ++i) ones[i] -= last_weight * last[i];
    });
    clear_rows(filtered_.get(), num_voxels_, num_sent_, pool_);
    clear_rows(filtered_back_.get(), num_voxels_, num_sent_, pool_);
    kernel.filter->accumulate(step.marginals, num_sent_, sent_scale, nullptr, unit_.data(), filtered_.get(), workspace_);
    kernel.filter->accumulate_transposed(grad_message_.get(), num_sent_, scale, nullptr, unit_.data(), filtered_back_.get(), workspace_);
    for_blocks([&](int64_t block, int thread) { take_messages(m, step, block, scratch_[thread].get()); });
    add_block_sums(m);
    if (!moments_wanted_) return;
    for_blocks([&](int64_t block, int) {
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        for (int l = 0; l < num_sent_; ++l) {
            T *u = grad_message_.get() + l * num_voxels_ + begin, *v = sent_.get() + l * num_voxels_ + begin;
            const T* q = step.marginals + l * num_voxels_ + begin;
            if (scale)
                for (int64_t i = 0; i < count; ++i) u[i] *= scale[begin + i];
            for (int64_t i = 0; i < count; ++i) v[i] = q[i] * (sent_scale ? sent_scale[begin + i] : T{1});
        }
    });
    add_moments_of(m, grad_message_.get(), sent_.get(), filtered_.get(), filtered_back_.get(), num_sent_);
}

// After filtering: sums for the weights and the compatibility, and gradients with respect to the marginals and the normalization.
template <class T>
void MessageBackward<T>::take_messages(size_t m, const StepGradients<T>& step, int64_t block, T* scratch) {
    const Kernel<T>& kernel = kernels_[m];
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
    const int rows = num_labels_ * kVoxelBlock;
    T *message = scratch, *back = scratch + rows, *y = scratch + 2 * rows, *z = scratch + 3 * rows, *g = scratch + 4 * rows,
      *q = scratch + 5 * rows, *scale = scratch + 6 * rows;
    load_rows(filtered_.get(), num_voxels_, block, num_sent_, message);
    load_rows(filtered_back_.get(), num_voxels_, block, num_sent_, back);
    load_rows(step.z, num_voxels_, block, num_labels_, z);
    load_rows(step.grad_x, num_voxels_, block, num_labels_, y);
    if (kernel.scale) load_rows(kernel.scale.get(), num_voxels_, block, 1, scale);
    if (moments_wanted_ && kernel.scale) {
        // K v and K^T u, before the scale of the receiver is applied.
        load_rows(grad_message_.get(), num_voxels_, block, num_sent_, g);
        load_rows(step.marginals, num_voxels_, block, num_sent_, q);
        T* const degree = grad_degree_[m].get() + begin;
        for (int l = 0; l < num_sent_; ++l) {
            const int64_t row = l * kVoxelBlock;
            for (int64_t i = 0; i < count; ++i) degree[i] += g[row + i] * message[row + i];
            if (kernel.scales_sent)
                for (int64_t i = 0; i < count; ++i) degree[i] += q[row + i] * back[row + i];
        }
    }
    for (int l = 0; l < num_sent_; ++l)
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            const int64_t at = l * kVoxelBlock + i;
            if (kernel.scale) store(message + at, load(message + at) * load(scale + i));
            if (kernel.scales_sent) store(back + at, load(back + at) * load(scale + i));
        }
    T* const last = message + num_sent_ * kVoxelBlock;
    if (kernel.ones) {
        load_rows(kernel.ones.get(), num_voxels_, block, 1, last);
    } else {
        std::fill(last, last + count, T{1});
        std::fill(last + count, last + kVoxelBlock, T{0});
    }
    for (int l = 0; l < num_sent_; ++l)
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) store(last + i, load(last + i) - load(message + l * kVoxelBlock + i));
    double* const sums = block_sums_.data() + block * num_sums_;
    for (int k = 0; k < num_labels_; ++k) {
        sums[k] = -dot(message + k * kVoxelBlock, z + k * kVoxelBlock);
        const double factor = -static_cast<double>(options_.weight[m][k]) * static_cast<double>(step.length);
        for (int l = 0; l < num_labels_; ++l)
            sums[num_labels_ + k * num_labels_ + l] = factor * dot(message + k * kVoxelBlock, y + l * kVoxelBlock);
    }
    for (int l = 0; l < num_sent_; ++l) {
        T* const to = step.grad_marginals + l * num_voxels_ + begin;
        for (int64_t i = 0; i < count; ++i) to[i] += back[l * kVoxelBlock + i];
    }
}

template <class T>
void MessageBackward<T>::add_block_sums(size_t m) {
    std::vector<double> total(num_sums_, 0.0);
    for (int64_t block = 0; block < num_blocks_; ++block)
        for (int i = 0; i < num_sums_; ++i) total[i] += block_sums_[block * num_sums_ + i];
    for (int l = 0; l < num_labels_; ++l) gradients_.weight[m][l] += total[l];
    for (int i = 0; i < num_labels_ * num_labels_; ++i) gradients_.compatibility[i] += total[num_labels_ + i];
}

template <class T>
void MessageBackward<T>::add_moments_of(size_t m, const T* u, const T* v, const T* kv, const T* ktu, int num_channels) {
    if (!wants_theta_ && features_[m].num_modalities() == 0) return;
    T* const image = features_[m].num_modalities() > 0 ? image_.get() : nullptr;
    add_moments(*kernels_[m].filter, features_[m], u, v, kv, ktu, num_channels, gradients_.theta[m].data(), image, moment_buffers_,
                num_voxels_, pool_, workspace_);
}

template <class T>
void MessageBackward<T>::pass_normalization(size_t m) {
    const Kernel<T>& kernel = kernels_[m];
    const T* const scale = kernel.scale.get();
    T *const u = grad_message_.get(), *const v = sent_.get(), *const kv = filtered_.get(), *const ktu = filtered_back_.get();
    // u: gradient with respect to the message of all ones, scaled; v: its sent values; kv = K v.
    for_blocks([&](int64_t block, int) {
        for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
            const T one = kernel.ones ? kernel.ones[n] : T{1};
            u[n] = grad_ones_[m][n] * (scale ? scale[n] : T{1});
            v[n] = kernel.scales_sent ? scale[n] : T{1};
            kv[n] = scale ? one / scale[n] : one;
        }
    });
    clear_rows(filtered_back_.get(), num_voxels_, 1, pool_);
    kernel.filter->accumulate_transposed(u, 1, nullptr, nullptr, unit_.data(), ktu, workspace_);
    add_moments_of(m, u, v, kv, ktu, 1);
    if (!scale) return;
    // With respect to D itself. Symmetric: the scale is D^-1/2, on both sides; after: D^-1, only on the receiver's side.
    for_blocks([&](int64_t block, int) {
        for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
            T total = grad_degree_[m][n] + grad_ones_[m][n] * kv[n];
            if (kernel.scales_sent) total += ktu[n];
            const T s = scale[n];
            u[n] = kernel.scales_sent ? static_cast<T>(-0.5) * s * s * s * total : -s * s * total;
            v[n] = 1;
            kv[n] = kernel.scales_sent ? 1 / (s * s) : 1 / s;
        }
    });
    clear_rows(filtered_back_.get(), num_voxels_, 1, pool_);
    kernel.filter->accumulate_transposed(u, 1, nullptr, nullptr, unit_.data(), ktu, workspace_);
    add_moments_of(m, u, v, kv, ktu, 1);
}

template <class T>
void MessageBackward<T>::store_image(T* grad_image) const {
    for (int m = 0; m < num_modalities_; ++m) {
        T* to = grad_image + m * voxels_.grid_size;
        for (const Run& run : voxels_.runs)
            std::copy(image_.get() + m * num_voxels_ + run.voxel, image_.get() + m * num_voxels_ + run.voxel + run.length, to + run.grid);
    }
}

template class MessageBackward<float>;
template class MessageBackward<double>;

}  // namespace crf
