// Takes the gradient of a loss back through the steps of the mean field.
#include "cpu/mean_field_backward.h"

#include "cpu/message_backward.h"
#include "cpu/update.h"
#include "cpu/volume.h"

namespace crf {
namespace {
// Names follow docs/reference/math.md: with x_t the logits after step t and Q = softmax(x), `y` is
// the gradient with respect to x_t, z_k = sum_l compatibility[k][l] y_l, and -weight z that with
// respect to a kernel's message.
class Backward {
   public:
    Backward(const KernelSet& set, const MeanFieldOptions& options, const BackwardInput& input,
             bool wants_image, ThreadPool& pool, Workspace& workspace)
        : set_(set),
          voxels_(set.voxels),
          options_(options),
          input_(input),
          pool_(pool),
          num_labels_(options.num_labels),
          num_sent_(options.num_labels - 1),
          num_channels_(options.num_channels()),
          num_voxels_(voxels_.num_voxels),
          num_blocks_(num_voxel_blocks(num_voxels_)),
          gradients_(empty_gradients()),
          messages_(set, options, input.wants_theta, wants_image, gradients_, pool, workspace) {
        grad_x_ = Buffer<float>(num_labels_ * num_voxels_);
        grad_start_ = Buffer<float>(num_labels_ * num_voxels_);
        z_ = Buffer<float>(num_labels_ * num_voxels_);
        grad_marginals_ = Buffer<float>(num_sent_ * num_voxels_);
        scratch_.resize(pool.num_threads());
        for (auto& s : scratch_) s = Buffer<float>(kScratchRows * num_labels_ * kBlockRow);
    }

    MeanFieldGradients run(float* grad_logits, float* grad_image) {
        for_blocks([&](int64_t block, int thread) {
            load_from_grid(voxels_, input_.gradient, 1.0f, block, num_labels_,
                           scratch_[thread].get());
            store_rows(scratch_[thread].get(), num_voxels_, block, num_labels_, grad_x_.get());
        });
        fill(grad_start_.get(), num_voxels_ * num_labels_, 0.0f, pool_);
        // No gradient depends on the numbers of voxels to keep.
        if (options_.keeps_volumes())
            volume_ = std::make_unique<VolumeTerm>(std::vector<double>(num_labels_),
                                                   options_.volume_slack);
        for (int t = options_.num_iterations - 1; t >= 0; --t) {
            if (volume_) volume_back(recorded(t + 1), input_.volume_bias[t]);
            step_back(recorded(t));
        }
        if (input_.wants_theta || grad_image)
            for (size_t m = 0; m < set_.kernels.size(); ++m) messages_.pass_normalization(m);
        finish(grad_logits);
        if (grad_image) messages_.store_image(grad_image);
        for (size_t m = 0; m < set_.kernels.size(); ++m)
            for (int f = 0; f < set_.inputs[m].num_features(); ++f)
                gradients_.theta[m][f] /= set_.inputs[m].theta(f);
        return gradients_;
    }

   private:
    static constexpr int kScratchRows = 4;  // per label: those of add_update_back

    MeanFieldGradients empty_gradients() const {
        MeanFieldGradients gradients;
        gradients.weight.assign(set_.kernels.size(), std::vector<double>(num_labels_));
        gradients.compatibility.assign(num_labels_ * num_labels_, 0);
        gradients.bias.assign(num_labels_, 0);
        for (const KernelInput& input : set_.inputs)
            gradients.theta.emplace_back(input.num_features());
        return gradients;
    }

    void for_blocks(FunctionRef<int64_t, int> body) { pool_.run(num_blocks_, body); }

    // The marginals of all labels; the last one follows from the others if it is not recorded.
    void load_marginals(const float* record, int64_t block, float* rows) const {
        load_rows(record, num_voxels_, block, num_channels_, rows);
        if (num_channels_ == num_labels_) return;
        float* last = rows + num_sent_ * kBlockRow;
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        std::fill(last + count, last + kBlockRow, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            float rest = 1;
            for (int l = 0; l < num_sent_; ++l) rest -= rows[l * kBlockRow + i];
            last[i] = rest > 0.0f ? rest : 0.0f;
        }
    }

    const float* recorded(int step) const {
        return input_.record + static_cast<int64_t>(step) * num_channels_ * num_voxels_;
    }

    // Adds the gradient from a step's biases to its logits, on which the biases depend through the
    // masses of the new marginals.
    void volume_back(const float* record, const std::vector<double>& bias) {
        std::vector<double> grad_sums(num_blocks_ * num_labels_), grad_bias(num_labels_);
        const MassSums sums = sum_masses(
            pool_, num_blocks_, num_labels_, [&](int64_t block, int thread, MassSums& of_group) {
                float* const rows = scratch_[thread].get();
                const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
                load_rows(grad_x_.get(), num_voxels_, block, num_labels_, rows);
                multiply_rows(options_.volume_part, block, num_labels_, rows);
                for (int l = 0; l < num_labels_; ++l) {
                    double total = 0;
                    for (int64_t i = 0; i < count; i += kLanes)
                        total += sum_lanes(load(rows + l * kBlockRow + i));
                    grad_sums[block * num_labels_ + l] = total;
                }
                load_marginals(record, block, rows);
                multiply_rows(options_.volume_part, block, num_labels_, rows);
                of_group.add(rows, count);
            });
        for (size_t i = 0; i < grad_sums.size(); ++i) grad_bias[i % num_labels_] += grad_sums[i];
        pull_masses(record, volume_->backward(sums, bias, grad_bias, gradients_.volume_slack),
                    grad_x_.get());
    }

    // Passes the gradient with respect to the masses (label) of the marginals on to the logits'
    // gradient.
    void pull_masses(const float* record, const std::vector<double>& grad_mass, float* grad) {
        for_blocks([&](int64_t block, int thread) {
            float *q = scratch_[thread].get(), *x = q + num_labels_ * kBlockRow;
            load_marginals(record, block, q);
            multiply_rows(options_.volume_part, block, num_labels_, q);
            load_rows(grad, num_voxels_, block, num_labels_, x);
            for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
                const LabelLanes to{x + i};
                const auto gradient = [&](int l) {
                    return splat_lanes(static_cast<float>(grad_mass[l]));
                };
                update_back({q + i}, num_labels_, num_labels_, gradient,
                            [&](int l, const vfloat& by_x) { to.set(l, to[l] + by_x); });
            }
            store_rows(x, num_voxels_, block, num_labels_, grad);
        });
    }

    void step_back(const float* record) {
        for_blocks([&](int64_t block, int thread) {
            float *y = scratch_[thread].get(), *z = y + num_labels_ * kBlockRow;
            load_rows(grad_x_.get(), num_voxels_, block, num_labels_, y);
            compatibility_times(y, z);
            store_rows(z, num_voxels_, block, num_labels_, z_.get());
        });
        fill(grad_marginals_.get(), num_voxels_ * num_sent_, 0.0f, pool_);
        const StepGradients gradients{record, grad_x_.get(), z_.get(), grad_marginals_.get()};
        for (size_t m = 0; m < set_.kernels.size(); ++m) messages_.pass_step(m, gradients);
        for_blocks([&](int64_t block, int thread) {
            add_update_back(record, block, scratch_[thread].get());
        });
    }

    // z_k = sum_l compatibility[k][l] y_l
    void compatibility_times(const float* y, float* z) const {
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            const auto gradient = [&](int l) { return load(y + l * kBlockRow + i); };
            vfloat all{};
            for (int l = 0; l < num_labels_; ++l) all += gradient(l);
            for (int k = 0; k < num_labels_; ++k) {
                const auto penalty = [&](int l) {
                    return options_.compatibility[k * num_labels_ + l];
                };
                store(z + k * kBlockRow + i,
                      pairwise_term(options_, num_labels_, k, all, gradient, penalty));
            }
        }
    }

    // Turns the gradient with respect to the marginals into the gradient with respect to the logits
    // that they are the update of.
    void add_update_back(const float* record, int64_t block, float* scratch) {
        const int rows = num_labels_ * kBlockRow;
        float* grad = scratch;
        float* start = scratch + rows;
        float* q = scratch + 2 * rows;
        float* back = scratch + 3 * rows;
        load_rows(grad_x_.get(), num_voxels_, block, num_labels_, grad);
        load_rows(grad_start_.get(), num_voxels_, block, num_labels_, start);
        load_marginals(record, block, q);
        load_rows(grad_marginals_.get(), num_voxels_, block, num_sent_, back);
        for (int64_t i = 0; i < kVoxelBlock; i += kLanes) {
            const LabelLanes marginals_back{back + i};
            const auto take = [&](int l, const vfloat& by_x) {
                const int64_t at = l * kBlockRow + i;
                store(start + at, load(start + at) + load(grad + at));
                store(grad + at, by_x);
            };
            update_back(
                {q + i}, num_labels_, num_sent_, [&](int l) { return marginals_back[l]; }, take);
        }
        store_rows(grad, num_voxels_, block, num_labels_, grad_x_.get());
        store_rows(start, num_voxels_, block, num_labels_, grad_start_.get());
    }

    // The sum of all gradients that reached x_0 = (logits + bias) / temperature, as the start or as
    // the update of a step.
    void finish(float* grad_logits) {
        const float inverse = 1 / options_.temperature;
        pool_.run(num_labels_, [&](int64_t label, int) {
            const float* from = input_.gradient.data + label * voxels_.grid_size;
            float* to = grad_logits + label * voxels_.grid_size;
            for (int64_t i = 0; i < voxels_.grid_size; ++i) to[i] = from[i] * inverse;
        });
        for_blocks([&](int64_t block, int) {
            const int64_t begin = block * kVoxelBlock;
            voxels_.for_pieces(begin, block_end(block, num_voxels_),
                               [&](int64_t voxel, int64_t grid, int64_t, int64_t length) {
                                   for (int l = 0; l < num_labels_; ++l) {
                                       const int64_t at = l * num_voxels_ + voxel;
                                       float* to = grad_logits + l * voxels_.grid_size + grid;
                                       for (int64_t i = 0; i < length; ++i)
                                           to[i] =
                                               (grad_start_[at + i] + grad_x_[at + i]) * inverse;
                                   }
                               });
        });
        std::vector<double> sums(num_voxel_blocks(voxels_.grid_size));
        pool_.run(static_cast<int64_t>(sums.size()), [&](int64_t block, int) {
            double total = 0;
            for (int l = 0; l < num_labels_; ++l) {
                const float* gradient = grad_logits + l * voxels_.grid_size;
                const float* logits = input_.logits + l * voxels_.grid_size;
                // A logit of minus infinity has no gradient except rounding errors, and is excluded
                // from the sum.
                for (int64_t i = block * kVoxelBlock;
                     i < std::min((block + 1) * kVoxelBlock, voxels_.grid_size); ++i)
                    if (std::isfinite(logits[i]))
                        total += static_cast<double>(gradient[i]) * static_cast<double>(logits[i]);
            }
            sums[block] = total;
        });
        for (double total : sums)
            gradients_.temperature -= total / static_cast<double>(options_.temperature);
        pool_.run(num_labels_, [&](int64_t label, int) {
            const float* start = grad_start_.get() + label * num_voxels_;
            const float* x = grad_x_.get() + label * num_voxels_;
            double& sum = gradients_.bias[label];
            for (int64_t i = 0; i < num_voxels_; ++i)
                sum += static_cast<double>((start[i] + x[i]) * inverse);
        });
        for (size_t l = 0; l < options_.bias.size(); ++l)
            gradients_.temperature -= gradients_.bias[l] * static_cast<double>(options_.bias[l]) /
                                      static_cast<double>(options_.temperature);
    }

    const KernelSet& set_;
    const Voxels& voxels_;
    const MeanFieldOptions& options_;
    const BackwardInput& input_;
    ThreadPool& pool_;
    const int num_labels_, num_sent_,
        num_channels_;  // num_sent_: labels whose gradient is filtered: all except the last
    const int64_t num_voxels_, num_blocks_;
    MeanFieldGradients gradients_;
    MessageBackward messages_;
    std::unique_ptr<const VolumeTerm> volume_;
    // (label, voxel): with respect to x_t; with respect to logits / temperature in the updates
    Buffer<float> grad_x_, grad_start_;
    Buffer<float> z_;               // (label, voxel)
    Buffer<float> grad_marginals_;  // (sent, voxel)
    std::vector<Buffer<float>> scratch_;
};
}  // namespace

MeanFieldGradients run_mean_field_backward(const KernelSet& set, const MeanFieldOptions& options,
                                           const BackwardInput& input, float* grad_logits,
                                           float* grad_image, ThreadPool& pool,
                                           Workspace& workspace) {
    Backward backward(set, options, input, grad_image != nullptr, pool, workspace);
    return backward.run(grad_logits, grad_image);
}
}  // namespace crf
