// The backward pass through the messages of the kernels (docs/reference/math.md, section 9).
#pragma once

#include "cpu/filter_moments.h"
#include "cpu/mean_field_backward.h"
#include "cpu/simd.h"
#include "cpu/voxel_rows.h"

namespace crf {
// One step of the mean field in the backward pass. x: the logits after it.
struct StepGradients {
    const float* marginals;  // (channel, voxel), from the record
    const float* grad_x;     // (label, voxel)
    // (label, voxel): z_k = sum_l compatibility[k][l] grad_x_l; -weight z is the messages' gradient
    const float* z;
    float* grad_marginals;  // (sent, voxel), added to
};

class MessageBackward {
   public:
    // gradients: added to; its theta is left multiplied by the bandwidths.
    MessageBackward(const Voxels& voxels, const std::vector<Kernel>& kernels,
                    const std::vector<FeatureColumns>& features, const MeanFieldOptions& options,
                    bool wants_theta, bool wants_image, MeanFieldGradients& gradients,
                    ThreadPool& pool, Workspace& workspace);

    // One kernel's part of a step: gradients with respect to its weights, its input marginals and,
    // if wanted, its bandwidths and image.
    void pass_step(size_t m, const StepGradients& step);

    // To be called after all steps. The kernel's row sums D normalize its messages and depend on
    // bandwidths and image too. The gradients with respect to the message of all ones and to D,
    // both collected over the steps, thus give two more sums <u, K v>.
    void pass_normalization(size_t m);

    // Writes the gradient with respect to the image, (modality, *grid), inside the mask.
    void store_image(float* grad_image) const;

   private:
    static constexpr int kScratchRows = 7;  // per label: those of take_messages

    // The part of the normalization's gradients that depends on D itself. kv and ktu are those of
    // the message of all ones.
    void pass_degree(size_t m);

    // Computes K^T u of one channel.
    void filter_back(size_t m);

    void for_blocks(FunctionRef<int64_t, int> body) { pool_.run(num_blocks_, body); }
    // Before filtering: gradients with respect to the messages. Marginals sum to 1, so the last
    // label's gradient is subtracted, and its channel need not be filtered. The remainder for the
    // normalization is kept in grad_ones_.
    void differentiate_messages(size_t m, const StepGradients& step, int64_t block, float* scratch);

    // Computes u, the messages' gradients times the scale of the receiver, and v, the sent values.
    void scale_both(const Kernel& kernel, const float* marginals, int64_t block);

    // After filtering: adds to sums for weights and compatibility; gradients with respect to the
    // marginals and the normalization.
    void take_messages(size_t m, const StepGradients& step, int64_t block, float* scratch,
                       double* sums);

    // sums: (label), then (label, label).
    void sum_over_block(size_t m, const float* message, const float* y, const float* z,
                        double* sums) const;

    void add_part_sums(size_t m);

    // Adds the moments of a pair. Its channels wait if the filter takes more channels at a time.
    void add_moments_of(size_t m, const FilteredPair& pair);

    void add_waiting_moments(size_t m);

    void add_moments(size_t m, const FilteredPair& pair);

    const Voxels& voxels_;
    const std::vector<Kernel>& kernels_;
    const std::vector<FeatureColumns>& features_;
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
    float *grad_message_, *sent_;       // (sent, voxel): u, and v if moments are wanted
    float *filtered_back_, *filtered_;  // (sent, voxel): K^T u, K v
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
    std::vector<float> unit_;
    std::vector<double> part_sums_;  // (part of the blocks, weights and compatibility)
    std::vector<Buffer<float>> scratch_;
};
}  // namespace crf
