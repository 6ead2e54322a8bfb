// The gradients of a kernel's messages, step by step, and then those of its normalization.
#include "cpu/message_backward.h"

#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {
namespace {
double dot(const float* a, const float* b, int64_t count) {
    vfloat total{};
    for (int64_t i = 0; i < count; i += kLanes)
        total += load_some(a + i, count - i) * load_some(b + i, count - i);
    return static_cast<double>(sum_lanes(total));
}
}  // namespace

MessageBackward::MessageBackward(const Voxels& voxels, const std::vector<Kernel>& kernels,
                                 const std::vector<FeatureColumns>& features,
                                 const MeanFieldOptions& options, bool wants_theta,
                                 bool wants_image, MeanFieldGradients& gradients, ThreadPool& pool,
                                 Workspace& workspace)
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
      num_sums_(num_labels_ + num_labels_ * num_labels_),
      moments_(num_voxels_, pool, workspace) {
    for (const FeatureColumns& f : features)
        num_modalities_ = std::max(num_modalities_, f.num_modalities());
    const int64_t size = num_sent_ * num_voxels_;
    given_ = Buffer<float>((moments_wanted_ ? 2 : 1) * size);
    returned_ = Buffer<float>(2 * size);
    grad_message_ = given_.get();
    sent_ = moments_wanted_ ? given_.get() + size : nullptr;
    filtered_back_ = returned_.get();
    filtered_ = returned_.get() + size;
    if (moments_wanted_) {
        for (size_t m = 0; m < kernels.size(); ++m) {
            grad_degree_.emplace_back(num_voxels_);
            grad_ones_.emplace_back(num_voxels_);
            clear_rows(grad_degree_.back().get(), num_voxels_, 1, pool_);
            clear_rows(grad_ones_.back().get(), num_voxels_, 1, pool_);
            const int room = kernels[m].filter->traits.num_moment_channels;
            waiting_.push_back({room > num_sent_ ? room : 0, 0, {}, {}});
            waiting_.back().u = Buffer<float>(waiting_.back().room * num_voxels_);
            waiting_.back().v = Buffer<float>(waiting_.back().room * num_voxels_);
        }
    }
    if (wants_image) {
        image_ = Buffer<float>(num_modalities_ * num_voxels_);
        clear_rows(image_.get(), num_voxels_, num_modalities_, pool_);
    }
    unit_.assign(2 * num_labels_, 1.0f);
    part_sums_.resize(num_blocks_ * num_sums_);
    scratch_.resize(pool.num_threads());
    for (auto& s : scratch_) s = Buffer<float>(kScratchRows * num_labels_ * kBlockRow);
}

void MessageBackward::pass_step(size_t m, const StepGradients& step) {
    const Kernel& kernel = kernels_[m];
    for_blocks([&](int64_t block, int thread) {
        differentiate_messages(m, step, block, scratch_[thread].get());
    });
    clear_rows(returned_.get(), num_voxels_, 2 * num_sent_, pool_);
    if (moments_wanted_) {
        for_blocks([&](int64_t block, int) { scale_both(kernel, step.marginals, block); });
        if (kernel.filter->traits.is_symmetric &&
            num_voxels_ <= kFewVoxels) {  // Together: each weight is computed once.
            kernel.filter->accumulate(given_.get(), 2 * num_sent_, nullptr, nullptr, unit_.data(),
                                      returned_.get(), workspace_);
        } else {
            kernel.filter->accumulate(sent_, num_sent_, nullptr, nullptr, unit_.data(), filtered_,
                                      workspace_);
            kernel.filter->accumulate_transposed(grad_message_, num_sent_, nullptr, nullptr,
                                                 unit_.data(), filtered_back_, workspace_);
        }
    } else {
        const float* const scale = kernel.scale.get();
        kernel.filter->accumulate(step.marginals, num_sent_, kernel.scales_sent ? scale : nullptr,
                                  nullptr, unit_.data(), filtered_, workspace_);
        kernel.filter->accumulate_transposed(grad_message_, num_sent_, scale, nullptr, unit_.data(),
                                             filtered_back_, workspace_);
    }
    for_blocks([&](int64_t block, int thread) {
        double* const sums = part_sums_.data() + block * num_sums_;
        std::fill(sums, sums + num_sums_, 0.0);
        take_messages(m, step, block, scratch_[thread].get(), sums);
    });
    add_part_sums(m);
    if (moments_wanted_)
        add_moments_of(m, {grad_message_, sent_, filtered_, filtered_back_, num_sent_});
}

void MessageBackward::pass_normalization(size_t m) {
    const Kernel& kernel = kernels_[m];
    const float* const scale = kernel.scale.get();
    float* const u = grad_message_;
    float* const v = sent_;
    float* const kv = filtered_;
    float* const ktu = filtered_back_;
    // u: gradient with respect to the message of all ones, scaled; v: its sent values; kv = K
    // v.
    for_blocks([&](int64_t block, int) {
        for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
            const float one = kernel.ones ? kernel.ones[n] : 1.0f;
            u[n] = grad_ones_[m][n] * (scale ? scale[n] : 1.0f);
            v[n] = kernel.scales_sent ? scale[n] : 1.0f;
            kv[n] = scale ? one / scale[n] : one;
        }
    });
    filter_back(m);
    add_moments_of(m, {u, v, kv, ktu, 1});
    if (scale) pass_degree(m);
    add_waiting_moments(m);
}

void MessageBackward::store_image(float* grad_image) const {
    for (int m = 0; m < num_modalities_; ++m) {
        float* to = grad_image + m * voxels_.grid_size;
        for (const Run& run : voxels_.runs)
            std::copy(image_.get() + m * num_voxels_ + run.voxel,
                      image_.get() + m * num_voxels_ + run.voxel + run.length, to + run.grid);
    }
}

void MessageBackward::pass_degree(size_t m) {
    const Kernel& kernel = kernels_[m];
    const float* const scale = kernel.scale.get();
    float* const u = grad_message_;
    float* const v = sent_;
    float* const kv = filtered_;
    float* const ktu = filtered_back_;
    // The gradient with respect to D. Symmetric: the scale is D^-1/2, on both sides; after:
    // D^-1, only on the receiver's side.
    for_blocks([&](int64_t block, int) {
        for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
            const float s = scale[n];
            float total = grad_degree_[m][n] / s + grad_ones_[m][n] * kv[n];
            if (kernel.scales_sent) total += ktu[n];
            u[n] =
                kernel.scales_sent ? static_cast<float>(-0.5) * s * s * s * total : -s * s * total;
            v[n] = 1;
            kv[n] = kernel.scales_sent ? 1 / (s * s) : 1 / s;
        }
    });
    if (waiting_[m].room == 0) filter_back(m);  // otherwise the moments need no filtered values
    add_moments_of(m, {u, v, kv, ktu, 1});
}

void MessageBackward::filter_back(size_t m) {
    clear_rows(filtered_back_, num_voxels_, 1, pool_);
    kernels_[m].filter->accumulate_transposed(grad_message_, 1, nullptr, nullptr, unit_.data(),
                                              filtered_back_, workspace_);
}

void MessageBackward::differentiate_messages(size_t m, const StepGradients& step, int64_t block,
                                             float* scratch) {
    const std::vector<float>& weight = options_.weight[m];
    const int rows = num_labels_ * kBlockRow;
    float *z = scratch, *g = scratch + rows;
    load_rows(step.z, num_voxels_, block, num_labels_, z);
    const float last_weight = weight[num_sent_];
    const float* const last = z + num_sent_ * kBlockRow;
    for (int l = 0; l < num_sent_; ++l) {
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes)
            store(g + l * kBlockRow + i,
                  load(last + i) * last_weight - load(z + l * kBlockRow + i) * weight[l]);
    }
    store_rows(g, num_voxels_, block, num_sent_, grad_message_);
    if (!moments_wanted_) return;
    float* const ones = grad_ones_[m].get() + block * kVoxelBlock;
    for (int64_t i = 0; i < block_end(block, num_voxels_) - block * kVoxelBlock; ++i)
        ones[i] -= last_weight * last[i];
}

void MessageBackward::scale_both(const Kernel& kernel, const float* marginals, int64_t block) {
    const float* const scale = kernel.scale.get();
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
    for (int l = 0; l < num_sent_; ++l) {
        float* u = grad_message_ + l * num_voxels_ + begin;
        float* v = sent_ + l * num_voxels_ + begin;
        const float* q = marginals + l * num_voxels_ + begin;
        if (scale)
            for (int64_t i = 0; i < count; ++i) u[i] *= scale[begin + i];
        for (int64_t i = 0; i < count; ++i)
            v[i] = q[i] * (kernel.scales_sent ? scale[begin + i] : 1.0f);
    }
}

void MessageBackward::take_messages(size_t m, const StepGradients& step, int64_t block,
                                    float* scratch, double* sums) {
    const Kernel& kernel = kernels_[m];
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
    const int rows = num_labels_ * kBlockRow;
    float* message = scratch;
    float* back = scratch + rows;
    float* y = scratch + 2 * rows;
    float* z = scratch + 3 * rows;
    float* u = scratch + 4 * rows;
    float* v = scratch + 5 * rows;
    float* scale = scratch + 6 * rows;
    load_rows(filtered_, num_voxels_, block, num_sent_, message);
    load_rows(filtered_back_, num_voxels_, block, num_sent_, back);
    load_rows(step.z, num_voxels_, block, num_labels_, z);
    load_rows(step.grad_x, num_voxels_, block, num_labels_, y);
    if (kernel.scale) load_rows(kernel.scale.get(), num_voxels_, block, 1, scale);
    if (moments_wanted_ && kernel.scale) {
        // K v and K^T u, before the scale of the receiver is applied; u and v have the
        // scale, which `pass_degree` takes out.
        load_rows(grad_message_, num_voxels_, block, num_sent_, u);
        load_rows(sent_, num_voxels_, block, num_sent_, v);
        float* const degree = grad_degree_[m].get() + begin;
        for (int l = 0; l < num_sent_; ++l) {
            const int64_t row = l * kBlockRow;
            for (int64_t i = 0; i < count; ++i) degree[i] += u[row + i] * message[row + i];
            if (kernel.scales_sent)
                for (int64_t i = 0; i < count; ++i) degree[i] += v[row + i] * back[row + i];
        }
    }
    for (int l = 0; l < num_sent_; ++l)
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            const int64_t at = l * kBlockRow + i;
            if (kernel.scale) store(message + at, load(message + at) * load(scale + i));
            if (kernel.scales_sent) store(back + at, load(back + at) * load(scale + i));
        }
    float* const last = message + num_sent_ * kBlockRow;
    if (kernel.ones) {
        load_rows(kernel.ones.get(), num_voxels_, block, 1, last);
    } else {
        std::fill(last, last + count, 1.0f);
        std::fill(last + count, last + kBlockRow, 0.0f);
    }
    for (int l = 0; l < num_sent_; ++l)
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes)
            store(last + i, load(last + i) - load(message + l * kBlockRow + i));
    sum_over_block(m, message, y, z, sums);
    for (int l = 0; l < num_sent_; ++l) {
        float* const to = step.grad_marginals + l * num_voxels_ + begin;
        for (int64_t i = 0; i < count; ++i) to[i] += back[l * kBlockRow + i];
    }
}

void MessageBackward::sum_over_block(size_t m, const float* message, const float* y, const float* z,
                                     double* sums) const {
    for (int k = 0; k < num_labels_; ++k) {
        const float* const of_k = message + k * kBlockRow;
        sums[k] -= dot(of_k, z + k * kBlockRow, kVoxelBlock);
        const double factor = -static_cast<double>(options_.weight[m][k]);
        double* const row = sums + num_labels_ + k * num_labels_;
        for (int l = 0; l < num_labels_; ++l)
            row[l] += factor * dot(of_k, y + l * kBlockRow, kVoxelBlock);
    }
}

void MessageBackward::add_part_sums(size_t m) {
    std::vector<double> total(num_sums_, 0.0);
    for (int64_t part = 0; part < num_blocks_; ++part)
        for (int i = 0; i < num_sums_; ++i) total[i] += part_sums_[part * num_sums_ + i];
    for (int l = 0; l < num_labels_; ++l) gradients_.weight[m][l] += total[l];
    for (int i = 0; i < num_labels_ * num_labels_; ++i)
        gradients_.compatibility[i] += total[num_labels_ + i];
}

void MessageBackward::add_moments_of(size_t m, const FilteredPair& pair) {
    if (!wants_theta_ && features_[m].num_modalities() == 0) return;
    WaitingMoments& waiting = waiting_[m];
    if (waiting.room == 0) return add_moments(m, pair);
    if (waiting.num_channels + pair.num_channels > waiting.room) add_waiting_moments(m);
    std::copy_n(pair.u, pair.num_channels * num_voxels_,
                waiting.u.get() + waiting.num_channels * num_voxels_);
    std::copy_n(pair.v, pair.num_channels * num_voxels_,
                waiting.v.get() + waiting.num_channels * num_voxels_);
    waiting.num_channels += pair.num_channels;
}

void MessageBackward::add_waiting_moments(size_t m) {
    WaitingMoments& waiting = waiting_[m];
    // A filter whose channels wait needs no filtered values.
    if (waiting.num_channels > 0)
        add_moments(m, {waiting.u.get(), waiting.v.get(), nullptr, nullptr, waiting.num_channels});
    waiting.num_channels = 0;
}

void MessageBackward::add_moments(size_t m, const FilteredPair& pair) {
    float* const image = features_[m].num_modalities() > 0 ? image_.get() : nullptr;
    kernels_[m].filter->add_moments(pair, features_[m], gradients_.theta[m].data(), image,
                                    moments_);
}
}  // namespace crf
