#include "cpu/mean_field_backward.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace crf {

namespace {

// Names follow docs/math.md: with x_t the logits after step t and Q = softmax(x), `y` is the derivative by what a step adds,
// z_k = sum_l compatibility[k][l] y_l, and -weight z the derivative by a kernel's message.
template <class T>
class Backward {
    using Lanes = typename LanesOf<T>::type;

   public:
    Backward(const Voxels& voxels, const std::vector<Kernel<T>>& kernels, const std::vector<FeatureColumns<T>>& features,
             const MeanFieldOptions<T>& options, const BackwardInput<T>& input, bool wants_image, ThreadPool& pool, Workspace& workspace)
        : voxels_(voxels),
          kernels_(kernels),
          features_(features),
          options_(options),
          input_(input),
          pool_(pool),
          workspace_(workspace),
          moments_wanted_(input.wants_theta || wants_image),
          num_labels_(options.num_labels),
          num_sent_(options.num_labels - 1),
          num_channels_(options.num_channels()),
          num_voxels_(voxels.num_voxels),
          num_blocks_(num_voxel_blocks(voxels.num_voxels)),
          num_sums_(num_labels_ + num_labels_ * num_labels_) {
        grad_x_ = Buffer<T>(num_labels_ * num_voxels_);
        grad_start_ = Buffer<T>(num_labels_ * num_voxels_);
        z_ = Buffer<T>(num_labels_ * num_voxels_);
        grad_message_ = Buffer<T>(num_sent_ * num_voxels_);
        filtered_ = Buffer<T>(num_sent_ * num_voxels_);
        filtered_back_ = Buffer<T>(num_sent_ * num_voxels_);
        grad_marginals_ = Buffer<T>(num_sent_ * num_voxels_);
        if (moments_wanted_) {
            sent_ = Buffer<T>(num_sent_ * num_voxels_);
            for (size_t m = 0; m < kernels.size(); ++m) {
                grad_degree_.emplace_back(num_voxels_);
                grad_ones_.emplace_back(num_voxels_);
                clear(grad_degree_.back(), 1);
                clear(grad_ones_.back(), 1);
            }
        }
        if (wants_image) {
            image_ = Buffer<T>(largest_num_modalities() * num_voxels_);
            clear(image_, largest_num_modalities());
        }
        unit_.assign(num_labels_, T{1});
        block_sums_.resize(num_blocks_ * num_sums_);
        scratch_.resize(pool.num_threads());
        for (auto& s : scratch_) s = Buffer<T>(7 * num_labels_ * kVoxelBlock);
        gradients_.weight.assign(kernels.size(), std::vector<double>(num_labels_));
        gradients_.compatibility.assign(num_labels_ * num_labels_, 0);
        for (const FeatureColumns<T>& f : features) gradients_.theta.emplace_back(f.size());
    }

    MeanFieldGradients run(T* grad_logits, T* grad_image) {
        for_blocks([&](int64_t block, int thread) {
            load_from_grid(input_.gradient, block, scratch_[thread].get());
            save(scratch_[thread].get(), block, grad_x_, num_labels_);
        });
        clear(grad_start_, num_labels_);
        const int num_steps = static_cast<int>(input_.step.size());
        for (int t = num_steps - 1; t >= 0; --t) {
            step_back(input_.record + static_cast<int64_t>(t) * num_channels_ * num_voxels_, static_cast<T>(input_.step[t]));
        }
        if (moments_wanted_)
            for (size_t m = 0; m < kernels_.size(); ++m) normalization_back(m);
        finish(grad_logits);
        if (grad_image) store_image(grad_image);
        for (size_t m = 0; m < kernels_.size(); ++m)
            for (int f = 0; f < features_[m].size(); ++f) gradients_.theta[m][f] /= features_[m].theta(f);
        return gradients_;
    }

   private:
    void for_blocks(const std::function<void(int64_t, int)>& body) { pool_.run(num_blocks_, body); }

    int64_t block_end(int64_t block) const { return std::min((block + 1) * kVoxelBlock, num_voxels_); }

    void clear(const Buffer<T>& buffer, int num_channels) {
        for_blocks([&](int64_t block, int) {
            for (int c = 0; c < num_channels; ++c)
                std::fill(buffer.get() + c * num_voxels_ + block * kVoxelBlock, buffer.get() + c * num_voxels_ + block_end(block), T{0});
        });
    }

    int largest_num_modalities() const {
        int largest = 0;
        for (const FeatureColumns<T>& f : features_) largest = std::max(largest, f.num_modalities());
        return largest;
    }

    // Rows of kVoxelBlock numbers, padded with zeros, one a channel.
    void load_rows(const T* values, int64_t block, int num_rows, T* rows) const {
        const int64_t begin = block * kVoxelBlock, count = block_end(block) - begin;
        for (int c = 0; c < num_rows; ++c) {
            std::copy(values + c * num_voxels_ + begin, values + c * num_voxels_ + begin + count, rows + c * kVoxelBlock);
            std::fill(rows + c * kVoxelBlock + count, rows + (c + 1) * kVoxelBlock, T{0});
        }
    }

    void save(const T* rows, int64_t block, const Buffer<T>& values, int num_rows) const {
        const int64_t begin = block * kVoxelBlock, count = block_end(block) - begin;
        for (int c = 0; c < num_rows; ++c)
            std::copy(rows + c * kVoxelBlock, rows + c * kVoxelBlock + count, values.get() + c * num_voxels_ + begin);
    }

    void load_from_grid(const T* array, int64_t block, T* rows) const {
        const int64_t begin = block * kVoxelBlock, end = block_end(block);
        voxels_.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t, int64_t length) {
            for (int l = 0; l < num_labels_; ++l) {
                const T* from = array + l * voxels_.grid_size + grid;
                std::copy(from, from + length, rows + l * kVoxelBlock + (voxel - begin));
            }
        });
        for (int l = 0; l < num_labels_; ++l) std::fill(rows + l * kVoxelBlock + (end - begin), rows + (l + 1) * kVoxelBlock, T{0});
    }

    static double dot(const T* a, const T* b) {
        Lanes total{};
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) total += load(a + i) * load(b + i);
        return static_cast<double>(sum_lanes(total));
    }

    // The marginals of all labels; the last one's follows from the others' where it is not recorded.
    void load_marginals(const T* record, int64_t block, T* rows) const {
        load_rows(record, block, num_channels_, rows);
        if (num_channels_ == num_labels_) return;
        T* last = rows + num_sent_ * kVoxelBlock;
        const int64_t count = block_end(block) - block * kVoxelBlock;
        std::fill(last + count, last + kVoxelBlock, T{0});
        for (int64_t i = 0; i < count; ++i) {
            T rest = 1;
            for (int l = 0; l < num_sent_; ++l) rest -= rows[l * kVoxelBlock + i];
            last[i] = std::max(rest, T{0});
        }
    }

    void step_back(const T* record, T step) {
        for_blocks([&](int64_t block, int thread) {
            T *y = scratch_[thread].get(), *z = y + num_labels_ * kVoxelBlock;
            load_rows(grad_x_.get(), block, num_labels_, y);
            for (int64_t i = 0; i < num_labels_ * kVoxelBlock; i += kLanes) store(y + i, load(y + i) * step);
            compatibility_times(y, z);
            save(z, block, z_, num_labels_);
        });
        clear(grad_marginals_, num_sent_);
        for (size_t m = 0; m < kernels_.size(); ++m) kernel_back(m, record, step);
        for_blocks([&](int64_t block, int thread) { softmax_back(record, step, block, scratch_[thread].get()); });
    }

    // z_k = sum_l compatibility[k][l] y_l
    void compatibility_times(const T* y, T* z) const {
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            if (options_.is_potts) {
                Lanes all{};
                for (int l = 0; l < num_labels_; ++l) all += load(y + l * kVoxelBlock + i);
                for (int k = 0; k < num_labels_; ++k) store(z + k * kVoxelBlock + i, all - load(y + k * kVoxelBlock + i));
            } else {
                for (int k = 0; k < num_labels_; ++k) {
                    Lanes total{};
                    for (int l = 0; l < num_labels_; ++l)
                        total += load(y + l * kVoxelBlock + i) * options_.compatibility[k * num_labels_ + l];
                    store(z + k * kVoxelBlock + i, total);
                }
            }
        }
    }

    // One kernel's part of a step: derivatives by its weights, by the marginals it was sent and, where wanted, by its bandwidths.
    void kernel_back(size_t m, const T* record, T step) {
        const Kernel<T>& kernel = kernels_[m];
        const std::vector<T>& weight = options_.weight[m];
        const T last_weight = weight[num_sent_];
        const T* const scale = kernel.scale.get();
        const T* const sent_scale = kernel.scales_sent ? scale : nullptr;
        // Marginals sum to 1, so a derivative by them is known up to one number a voxel: the last label's is taken off, and its channel
        // need not be filtered. What that leaves for the normalization is kept in grad_ones_.
        for_blocks([&](int64_t block, int thread) {
            T *z = scratch_[thread].get(), *g = z + num_labels_ * kVoxelBlock;
            load_rows(z_.get(), block, num_labels_, z);
            const T* last = z + num_sent_ * kVoxelBlock;
            for (int l = 0; l < num_sent_; ++l)
                for (int64_t i = 0; i < kVoxelBlock; i += kLanes)
                    store(g + l * kVoxelBlock + i, load(last + i) * last_weight - load(z + l * kVoxelBlock + i) * weight[l]);
            save(g, block, grad_message_, num_sent_);
            if (!moments_wanted_) return;
            T* const ones = grad_ones_[m].get() + block * kVoxelBlock;
            for (int64_t i = 0; i < block_end(block) - block * kVoxelBlock; ++i) ones[i] -= last_weight * last[i];
        });
        clear(filtered_, num_sent_);
        clear(filtered_back_, num_sent_);
        kernel.filter->accumulate(record, num_sent_, sent_scale, nullptr, unit_.data(), filtered_.get(), workspace_);
        kernel.filter->accumulate_transposed(grad_message_.get(), num_sent_, scale, nullptr, unit_.data(), filtered_back_.get(),
                                             workspace_);
        for_blocks([&](int64_t block, int thread) { take_messages(m, record, step, block, scratch_[thread].get()); });
        add_sums([&](const double* sums) {
            for (int l = 0; l < num_labels_; ++l) gradients_.weight[m][l] += sums[l];
            for (int i = 0; i < num_labels_ * num_labels_; ++i) gradients_.compatibility[i] += sums[num_labels_ + i];
        });
        if (!moments_wanted_) return;
        for_blocks([&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock, count = block_end(block) - begin;
            for (int l = 0; l < num_sent_; ++l) {
                T *u = grad_message_.get() + l * num_voxels_ + begin, *v = sent_.get() + l * num_voxels_ + begin;
                const T* q = record + l * num_voxels_ + begin;
                if (scale)
                    for (int64_t i = 0; i < count; ++i) u[i] *= scale[begin + i];
                for (int64_t i = 0; i < count; ++i) v[i] = q[i] * (sent_scale ? sent_scale[begin + i] : T{1});
            }
        });
        moments(m, grad_message_.get(), sent_.get(), filtered_.get(), filtered_back_.get(), num_sent_);
    }

    void moments(size_t m, const T* u, const T* v, const T* kv, const T* ktu, int num_channels) {
        if (!input_.wants_theta && features_[m].num_modalities() == 0) return;
        T* const image = features_[m].num_modalities() > 0 ? image_.get() : nullptr;
        add_moments(*kernels_[m].filter, features_[m], u, v, kv, ktu, num_channels, gradients_.theta[m].data(), image, moment_buffers_,
                    num_voxels_, pool_, workspace_);
    }

    // After filtering: sums for the weights and the compatibility, and what goes back to the marginals and to the normalization.
    void take_messages(size_t m, const T* record, T step, int64_t block, T* scratch) {
        const Kernel<T>& kernel = kernels_[m];
        const int64_t begin = block * kVoxelBlock, count = block_end(block) - begin;
        const int rows = num_labels_ * kVoxelBlock;
        T *message = scratch, *back = scratch + rows, *y = scratch + 2 * rows, *z = scratch + 3 * rows, *g = scratch + 4 * rows,
          *q = scratch + 5 * rows, *scale = scratch + 6 * rows;
        load_rows(filtered_.get(), block, num_sent_, message);
        load_rows(filtered_back_.get(), block, num_sent_, back);
        load_rows(z_.get(), block, num_labels_, z);
        load_rows(grad_x_.get(), block, num_labels_, y);
        if (kernel.scale) load_rows(kernel.scale.get(), block, 1, scale);
        if (moments_wanted_ && kernel.scale) {
            // K v and its transpose's K^T u, before the scale of what is received is applied to them.
            load_rows(grad_message_.get(), block, num_sent_, g);
            load_rows(record, block, num_sent_, q);
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
            load_rows(kernel.ones.get(), block, 1, last);
        } else {
            std::fill(last, last + count, T{1});
            std::fill(last + count, last + kVoxelBlock, T{0});
        }
        for (int l = 0; l < num_sent_; ++l)
            for (int64_t i = 0; i < kVoxelBlock; i += kLanes) store(last + i, load(last + i) - load(message + l * kVoxelBlock + i));
        double* const sums = block_sums_.data() + block * num_sums_;
        for (int k = 0; k < num_labels_; ++k) {
            sums[k] = -dot(message + k * kVoxelBlock, z + k * kVoxelBlock);
            const double factor = -static_cast<double>(options_.weight[m][k]) * static_cast<double>(step);
            for (int l = 0; l < num_labels_; ++l)
                sums[num_labels_ + k * num_labels_ + l] = factor * dot(message + k * kVoxelBlock, y + l * kVoxelBlock);
        }
        for (int l = 0; l < num_sent_; ++l) {
            T* const to = grad_marginals_.get() + l * num_voxels_ + begin;
            for (int64_t i = 0; i < count; ++i) to[i] += back[l * kVoxelBlock + i];
        }
    }

    template <class Take>
    void add_sums(Take&& take) {
        std::vector<double> total(num_sums_, 0.0);
        for (int64_t block = 0; block < num_blocks_; ++block)
            for (int i = 0; i < num_sums_; ++i) total[i] += block_sums_[block * num_sums_ + i];
        take(total.data());
    }

    // From the marginals to the logits they are the softmax of; the part of the old logits in a damped step joins them.
    void softmax_back(const T* record, T step, int64_t block, T* scratch) {
        const int rows = num_labels_ * kVoxelBlock;
        T *grad = scratch, *start = scratch + rows, *q = scratch + 2 * rows, *back = scratch + 3 * rows;
        load_rows(grad_x_.get(), block, num_labels_, grad);
        load_rows(grad_start_.get(), block, num_labels_, start);
        load_marginals(record, block, q);
        load_rows(grad_marginals_.get(), block, num_sent_, back);
        const T kept = 1 - step;
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            Lanes mean{};
            for (int l = 0; l < num_sent_; ++l) mean += load(q + l * kVoxelBlock + i) * load(back + l * kVoxelBlock + i);
            for (int l = 0; l < num_labels_; ++l) {
                const int64_t at = l * kVoxelBlock + i;
                const Lanes own = l < num_sent_ ? load(back + at) : Lanes{};
                store(start + at, load(start + at) + load(grad + at) * step);
                store(grad + at, load(grad + at) * kept + load(q + at) * (own - mean));
            }
        }
        save(grad, block, grad_x_, num_labels_);
        save(start, block, grad_start_, num_labels_);
    }

    // The kernel's row sums D normalize its messages, and depend on bandwidths and image as well: with the derivatives by the message of
    // all ones and by D, both collected over the steps, two more sums of the kind <u, K v>.
    void normalization_back(size_t m) {
        const Kernel<T>& kernel = kernels_[m];
        const T* const scale = kernel.scale.get();
        T *const u = grad_message_.get(), *const v = sent_.get(), *const kv = filtered_.get(), *const ktu = filtered_back_.get();
        // u: derivative by the message of all ones, scaled; v: what was sent for it; kv = K v.
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < block_end(block); ++n) {
                const T one = kernel.ones ? kernel.ones[n] : T{1};
                u[n] = grad_ones_[m][n] * (scale ? scale[n] : T{1});
                v[n] = kernel.scales_sent ? scale[n] : T{1};
                kv[n] = scale ? one / scale[n] : one;
            }
        });
        clear(filtered_back_, 1);
        kernel.filter->accumulate_transposed(u, 1, nullptr, nullptr, unit_.data(), ktu, workspace_);
        moments(m, u, v, kv, ktu, 1);
        if (!scale) return;
        // By D itself. Symmetric: the scale is D^-1/2, on both sides; after: D^-1, on the side of what is received.
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < block_end(block); ++n) {
                T total = grad_degree_[m][n] + grad_ones_[m][n] * kv[n];
                if (kernel.scales_sent) total += ktu[n];
                const T s = scale[n];
                u[n] = kernel.scales_sent ? static_cast<T>(-0.5) * s * s * s * total : -s * s * total;
                v[n] = 1;
                kv[n] = kernel.scales_sent ? 1 / (s * s) : 1 / s;
            }
        });
        clear(filtered_back_, 1);
        kernel.filter->accumulate_transposed(u, 1, nullptr, nullptr, unit_.data(), ktu, workspace_);
        moments(m, u, v, kv, ktu, 1);
    }

    // All that reached x_0 = logits / temperature, whether as the start or as what each step adds.
    void finish(T* grad_logits) {
        const T inverse = 1 / options_.temperature;
        pool_.run(num_labels_, [&](int64_t label, int) {
            const T* from = input_.gradient + label * voxels_.grid_size;
            T* to = grad_logits + label * voxels_.grid_size;
            for (int64_t i = 0; i < voxels_.grid_size; ++i) to[i] = from[i] * inverse;
        });
        for_blocks([&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock;
            voxels_.for_pieces(begin, block_end(block), [&](int64_t voxel, int64_t grid, int64_t, int64_t length) {
                for (int l = 0; l < num_labels_; ++l) {
                    const int64_t at = l * num_voxels_ + voxel;
                    T* to = grad_logits + l * voxels_.grid_size + grid;
                    for (int64_t i = 0; i < length; ++i) to[i] = (grad_start_[at + i] + grad_x_[at + i]) * inverse;
                }
            });
        });
        std::vector<double> sums(num_voxel_blocks(voxels_.grid_size));
        pool_.run(static_cast<int64_t>(sums.size()), [&](int64_t block, int) {
            double total = 0;
            for (int l = 0; l < num_labels_; ++l) {
                const T* gradient = grad_logits + l * voxels_.grid_size;
                const T* logits = input_.logits + l * voxels_.grid_size;
                // A logit of minus infinity has no gradient but for rounding, and no part in the sum.
                for (int64_t i = block * kVoxelBlock; i < std::min((block + 1) * kVoxelBlock, voxels_.grid_size); ++i)
                    if (std::isfinite(logits[i])) total += static_cast<double>(gradient[i]) * static_cast<double>(logits[i]);
            }
            sums[block] = total;
        });
        for (double total : sums) gradients_.temperature -= total / static_cast<double>(options_.temperature);
    }

    void store_image(T* grad_image) {
        for (int m = 0; m < largest_num_modalities(); ++m) {
            T* to = grad_image + m * voxels_.grid_size;
            for (const Run& run : voxels_.runs)
                std::copy(image_.get() + m * num_voxels_ + run.voxel, image_.get() + m * num_voxels_ + run.voxel + run.length,
                          to + run.grid);
        }
    }

    const Voxels& voxels_;
    const std::vector<Kernel<T>>& kernels_;
    const std::vector<FeatureColumns<T>>& features_;
    const MeanFieldOptions<T>& options_;
    const BackwardInput<T>& input_;
    ThreadPool& pool_;
    Workspace& workspace_;
    const bool moments_wanted_;
    const int num_labels_, num_sent_, num_channels_;  // num_sent_: labels whose derivative is filtered, all but the last
    const int64_t num_voxels_, num_blocks_;
    const int num_sums_;
    Buffer<T> grad_x_, grad_start_;              // (label, voxel): by x_t; by logits / temperature as far as steps added it
    Buffer<T> z_, grad_message_;                 // (label, voxel), (sent, voxel)
    Buffer<T> filtered_, filtered_back_, sent_;  // (sent, voxel): K v, K^T u, v
    Buffer<T> grad_marginals_;                   // (sent, voxel)
    std::vector<Buffer<T>> grad_degree_;         // (kernel, voxel): by the scale, before it is turned into one by D
    std::vector<Buffer<T>> grad_ones_;           // (kernel, voxel): by the message of all ones
    Buffer<T> image_;                            // (modality, voxel)
    MomentBuffers<T> moment_buffers_;
    std::vector<T> unit_;
    std::vector<double> block_sums_;  // (block, weights and compatibility)
    std::vector<Buffer<T>> scratch_;
    MeanFieldGradients gradients_;
};

}  // namespace

template <class T>
MeanFieldGradients run_mean_field_backward(const Voxels& voxels, const std::vector<Kernel<T>>& kernels,
                                           const std::vector<FeatureColumns<T>>& features, const MeanFieldOptions<T>& options,
                                           const BackwardInput<T>& input, T* grad_logits, T* grad_image, ThreadPool& pool,
                                           Workspace& workspace) {
    Backward<T> backward(voxels, kernels, features, options, input, grad_image != nullptr, pool, workspace);
    return backward.run(grad_logits, grad_image);
}

template MeanFieldGradients run_mean_field_backward(const Voxels&, const std::vector<Kernel<float>>&,
                                                    const std::vector<FeatureColumns<float>>&, const MeanFieldOptions<float>&,
                                                    const BackwardInput<float>&, float*, float*, ThreadPool&, Workspace&);
template MeanFieldGradients run_mean_field_backward(const Voxels&, const std::vector<Kernel<double>>&,
                                                    const std::vector<FeatureColumns<double>>&, const MeanFieldOptions<double>&,
                                                    const BackwardInput<double>&, double*, double*, ThreadPool&, Workspace&);

}  // namespace crf
