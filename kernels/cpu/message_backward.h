// The backward pass through the messages of the kernels (docs/reference/math.md, section 9).
#pragma once

#include "cpu/filter_moments.h"
#include "cpu/mean_field_backward.h"

namespace crf {
// One step of the mean field in the backward pass. x: the logits after it.
struct StepGradients {
    const float* marginals;  // (channel, voxel), from the record
    const float* grad_x;     // (label, voxel)
    // (label, voxel): z_k = sum_l compatibility[k][l] grad_x_l; -weight z is the messages' gradient
    const float* z;
    float* grad_marginals;  // (sent, voxel), added to
};

// Sum of the products of a block's numbers.
inline double dot(const float* a, const float* b, int64_t count) {
    vfloat total{};
    for (int64_t i = 0; i < count; i += kLanes)
        total += load_some(a + i, count - i) * load_some(b + i, count - i);
    return static_cast<double>(sum_lanes(total));
}

class MessageBackward {
   public:
    // gradients: added to; its theta is left multiplied by the bandwidths.
    MessageBackward(const KernelSet& set, const MeanFieldOptions& options, bool wants_theta,
                    bool wants_image, MeanFieldGradients& gradients, ThreadPool& pool,
                    Workspace& workspace)
        : set_(set),
          options_(options),
          gradients_(gradients),
          pool_(pool),
          workspace_(workspace),
          wants_theta_(wants_theta),
          moments_wanted_(wants_theta || wants_image),
          num_labels_(options.num_labels),
          num_sent_(options.num_labels - 1),
          num_voxels_(set.voxels.num_voxels),
          num_blocks_(num_voxel_blocks(num_voxels_)),
          num_sums_(num_labels_ + num_labels_ * num_labels_),
          moments_(num_voxels_, pool, workspace),
          part_sums_(num_blocks_ * num_sums_),
          scratch_(pool.num_threads()) {
        for (const KernelInput& input : set.inputs)
            num_modalities_ = std::max(num_modalities_, input.num_modalities());
        const int64_t size = num_sent_ * num_voxels_;
        given_ = Buffer<float>((moments_wanted_ ? 2 : 1) * size);
        returned_ = Buffer<float>(2 * size);
        u_ = given_.get();
        v_ = moments_wanted_ ? u_ + size : nullptr;
        ktu_ = returned_.get();
        kv_ = ktu_ + size;
        for (size_t m = 0; moments_wanted_ && m < set.kernels.size(); ++m) {
            grad_degree_.push_back(filled(num_voxels_, 0.0f, pool));
            grad_ones_.push_back(filled(num_voxels_, 0.0f, pool));
            const int room = set.kernels[m].filter->traits.num_moment_channels;
            WaitingMoments& waiting = waiting_.emplace_back();
            if (room <= num_sent_) continue;
            waiting.room = room;
            waiting.u = Buffer<float>(room * num_voxels_);
            waiting.v = Buffer<float>(room * num_voxels_);
        }
        if (wants_image) image_ = filled(num_modalities_ * num_voxels_, 0.0f, pool);
        for (auto& s : scratch_) s = Buffer<float>(kScratchRows * num_labels_ * kBlockRow);
    }

    // One kernel's part of a step: gradients with respect to its weights, its input marginals and,
    // if wanted, its bandwidths and image.
    void pass_step(size_t m, const StepGradients& step) {
        const Kernel& kernel = set_.kernels[m];
        Filter& filter = *kernel.filter;
        for_blocks([&](int64_t block, int thread) {
            differentiate_messages(m, step, block, scratch_[thread].get());
        });
        fill(returned_.get(), 2 * num_sent_ * num_voxels_, 0.0f, pool_);
        if (moments_wanted_) {
            for_blocks([&](int64_t block, int) { scale_both(kernel, step.marginals, block); });
            if (filter.traits.is_symmetric && num_voxels_ <= kFewVoxels) {
                // Together: each weight is computed once.
                filter.accumulate({u_, 2 * num_sent_, ktu_}, workspace_);
            } else {
                filter.accumulate({v_, num_sent_, kv_}, workspace_);
                filter.accumulate_transposed({u_, num_sent_, ktu_}, workspace_);
            }
        } else {
            const float* const scale = kernel.scale.get();
            const float* const sent_scale = kernel.scales_sent ? scale : nullptr;
            filter.accumulate({step.marginals, num_sent_, kv_, sent_scale}, workspace_);
            filter.accumulate_transposed({u_, num_sent_, ktu_, scale}, workspace_);
        }
        for_blocks([&](int64_t block, int thread) {
            double* const sums = part_sums_.data() + block * num_sums_;
            std::fill(sums, sums + num_sums_, 0.0);
            take_messages(m, step, block, scratch_[thread].get(), sums);
        });
        std::vector<double> total(num_sums_, 0.0);
        for (int64_t part = 0; part < num_blocks_; ++part)
            for (int i = 0; i < num_sums_; ++i) total[i] += part_sums_[part * num_sums_ + i];
        for (int l = 0; l < num_labels_; ++l) gradients_.weight[m][l] += total[l];
        for (int i = 0; i < num_labels_ * num_labels_; ++i)
            gradients_.compatibility[i] += total[num_labels_ + i];
        if (moments_wanted_) add_moments_of(m, {u_, v_, kv_, ktu_, num_sent_});
    }

    // To be called after all steps. The kernel's row sums D normalize its messages and depend on
    // bandwidths and image too. The gradients with respect to the message of all ones and to D,
    // both collected over the steps, thus give two more sums <u, K v>.
    void pass_normalization(size_t m) {
        const Kernel& kernel = set_.kernels[m];
        const float* const scale = kernel.scale.get();
        // u: gradient with respect to the message of all ones, scaled; v: its sent values.
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
                const float one = kernel.ones ? kernel.ones[n] : 1.0f;
                u_[n] = grad_ones_[m][n] * (scale ? scale[n] : 1.0f);
                v_[n] = kernel.scales_sent ? scale[n] : 1.0f;
                kv_[n] = scale ? one / scale[n] : one;
            }
        });
        filter_back(m);
        add_moments_of(m, {u_, v_, kv_, ktu_, 1});
        if (scale) pass_degree(m);
        add_waiting_moments(m);
    }

    // Writes the gradient with respect to the image, (modality, *grid), inside the mask.
    void store_image(float* grad_image) const {
        for (int m = 0; m < num_modalities_; ++m) {
            float* to = grad_image + m * set_.voxels.grid_size;
            for (const Run& run : set_.voxels.runs)
                std::copy(image_.get() + m * num_voxels_ + run.voxel,
                          image_.get() + m * num_voxels_ + run.voxel + run.length, to + run.grid);
        }
    }

   private:
    static constexpr int kScratchRows = 7;  // per label: those of take_messages

    // The part of the normalization's gradients that depends on D itself. kv and ktu are those of
    // the message of all ones.
    void pass_degree(size_t m) {
        const Kernel& kernel = set_.kernels[m];
        const float* const scale = kernel.scale.get();
        // The gradient with respect to D. Symmetric: the scale is D^-1/2, on both sides; after:
        // D^-1, only on the receiver's side.
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < block_end(block, num_voxels_); ++n) {
                const float s = scale[n];
                float total = grad_degree_[m][n] / s + grad_ones_[m][n] * kv_[n];
                if (kernel.scales_sent) total += ktu_[n];
                u_[n] = kernel.scales_sent ? static_cast<float>(-0.5) * s * s * s * total
                                           : -s * s * total;
                v_[n] = 1;
                kv_[n] = kernel.scales_sent ? 1 / (s * s) : 1 / s;
            }
        });
        if (waiting_[m].room == 0) filter_back(m);  // otherwise the moments need no filtered values
        add_moments_of(m, {u_, v_, kv_, ktu_, 1});
    }

    // Computes K^T u of one channel.
    void filter_back(size_t m) {
        fill(ktu_, num_voxels_, 0.0f, pool_);
        set_.kernels[m].filter->accumulate_transposed({u_, 1, ktu_}, workspace_);
    }

    void for_blocks(FunctionRef<int64_t, int> body) { pool_.run(num_blocks_, body); }

    // Before filtering: gradients with respect to the messages. Marginals sum to 1, so the last
    // label's gradient is subtracted, and its channel need not be filtered. The remainder for the
    // normalization is kept in grad_ones_.
    void differentiate_messages(size_t m, const StepGradients& step, int64_t block,
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
        store_rows(g, num_voxels_, block, num_sent_, u_);
        if (!moments_wanted_) return;
        float* const ones = grad_ones_[m].get() + block * kVoxelBlock;
        for (int64_t i = 0; i < block_end(block, num_voxels_) - block * kVoxelBlock; ++i)
            ones[i] -= last_weight * last[i];
    }

    // Computes u, the messages' gradients times the scale of the receiver, and v, the sent values.
    void scale_both(const Kernel& kernel, const float* marginals, int64_t block) {
        const float* const scale = kernel.scale.get();
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        for (int l = 0; l < num_sent_; ++l) {
            float* u = u_ + l * num_voxels_ + begin;
            float* v = v_ + l * num_voxels_ + begin;
            const float* q = marginals + l * num_voxels_ + begin;
            if (scale)
                for (int64_t i = 0; i < count; ++i) u[i] *= scale[begin + i];
            for (int64_t i = 0; i < count; ++i)
                v[i] = q[i] * (kernel.scales_sent ? scale[begin + i] : 1.0f);
        }
    }

    // After filtering: adds to sums for weights and compatibility, (label) and (label, label);
    // gradients with respect to the marginals and the normalization.
    void take_messages(size_t m, const StepGradients& step, int64_t block, float* scratch,
                       double* sums) {
        const Kernel& kernel = set_.kernels[m];
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        const int rows = num_labels_ * kBlockRow;
        float* message = scratch;
        float* back = scratch + rows;
        float* y = scratch + 2 * rows;
        float* z = scratch + 3 * rows;
        float* u = scratch + 4 * rows;
        float* v = scratch + 5 * rows;
        float* scale = scratch + 6 * rows;
        load_rows(kv_, num_voxels_, block, num_sent_, message);
        load_rows(ktu_, num_voxels_, block, num_sent_, back);
        load_rows(step.z, num_voxels_, block, num_labels_, z);
        load_rows(step.grad_x, num_voxels_, block, num_labels_, y);
        if (kernel.scale) load_rows(kernel.scale.get(), num_voxels_, block, 1, scale);
        if (moments_wanted_ && kernel.scale) {
            // K v and K^T u, before the scale of the receiver is applied; u and v have the
            // scale, which `pass_degree` takes out.
            load_rows(u_, num_voxels_, block, num_sent_, u);
            load_rows(v_, num_voxels_, block, num_sent_, v);
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
        for (int k = 0; k < num_labels_; ++k) {
            const float* const of_k = message + k * kBlockRow;
            sums[k] -= dot(of_k, z + k * kBlockRow, kVoxelBlock);
            const double factor = -static_cast<double>(options_.weight[m][k]);
            double* const row = sums + num_labels_ + k * num_labels_;
            for (int l = 0; l < num_labels_; ++l)
                row[l] += factor * dot(of_k, y + l * kBlockRow, kVoxelBlock);
        }
        for (int l = 0; l < num_sent_; ++l) {
            float* const to = step.grad_marginals + l * num_voxels_ + begin;
            for (int64_t i = 0; i < count; ++i) to[i] += back[l * kBlockRow + i];
        }
    }

    // Adds the moments of a pair. Its channels wait if the filter takes more channels at a time.
    void add_moments_of(size_t m, const FilteredPair& pair) {
        if (!wants_theta_ && set_.inputs[m].num_modalities() == 0) return;
        WaitingMoments& waiting = waiting_[m];
        if (waiting.room == 0) return add_moments(m, pair);
        if (waiting.num_channels + pair.num_channels > waiting.room) add_waiting_moments(m);
        std::copy_n(pair.u, pair.num_channels * num_voxels_,
                    waiting.u.get() + waiting.num_channels * num_voxels_);
        std::copy_n(pair.v, pair.num_channels * num_voxels_,
                    waiting.v.get() + waiting.num_channels * num_voxels_);
        waiting.num_channels += pair.num_channels;
    }

    void add_waiting_moments(size_t m) {
        WaitingMoments& waiting = waiting_[m];
        // A filter whose channels wait needs no filtered values.
        if (waiting.num_channels > 0)
            add_moments(m,
                        {waiting.u.get(), waiting.v.get(), nullptr, nullptr, waiting.num_channels});
        waiting.num_channels = 0;
    }

    void add_moments(size_t m, const FilteredPair& pair) {
        float* const image = set_.inputs[m].num_modalities() > 0 ? image_.get() : nullptr;
        set_.kernels[m].filter->add_moments(pair, set_.inputs[m], gradients_.theta[m].data(), image,
                                            moments_);
    }

    const KernelSet& set_;
    const MeanFieldOptions& options_;
    MeanFieldGradients& gradients_;
    ThreadPool& pool_;
    Workspace& workspace_;
    const bool wants_theta_, moments_wanted_;
    const int num_labels_,
        num_sent_;  // num_sent_: labels whose gradient is filtered: all except the last
    const int64_t num_voxels_, num_blocks_;
    const int num_sums_;
    int num_modalities_ = 0;
    Buffer<float> given_,
        returned_;  // inputs and outputs of a filter; both halves adjacent, to be filtered at once
    // (sent, voxel): u, the gradient with respect to the messages, v, what is sent, K v and K^T u;
    // v only if moments are wanted.
    float *u_, *v_, *kv_, *ktu_;
    // (kernel, voxel): with respect to the scale, times the scale, before it is turned into one for
    // D
    std::vector<Buffer<float>> grad_degree_;
    // (kernel, voxel): with respect to the message of all ones
    std::vector<Buffer<float>> grad_ones_;
    struct WaitingMoments {
        int room = 0;  // 0: channels do not wait
        int num_channels = 0;
        Buffer<float> u, v;  // (channel, voxel)
    };
    std::vector<WaitingMoments> waiting_;  // (kernel)
    Buffer<float> image_;                  // (modality, voxel)
    MomentSums moments_;
    std::vector<double> part_sums_;  // (part of the blocks, weights and compatibility)
    std::vector<Buffer<float>> scratch_;
};
}  // namespace crf
