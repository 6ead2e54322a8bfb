// The backward pass through the messages of the kernels (docs/reference/math.md, section 9).
#pragma once

#include "cpu/mean_field_backward.h"
#include "cpu/simd.h"

namespace crf {

// One step of the mean field in the backward pass. x: the logits after it.
template <class T>
struct StepGradients {
    T length;            // of the step
    const T* marginals;  // (channel, voxel), from the record
    const T* grad_x;     // (label, voxel)
    const T* z;          // (label, voxel): z_k = sum_l compatibility[k][l] y_l with y = length grad_x; -weight z is the messages' gradient
    T* grad_marginals;   // (sent, voxel), added to
};

template <class T>
class MessageBackward {
    using Lanes = typename LanesOf<T>::type;

   public:
    // gradients: added to; its theta is left multiplied by the bandwidths.
    MessageBackward(const Voxels& voxels, const std::vector<Kernel<T>>& kernels, const std::vector<FeatureColumns<T>>& features,
                    const MeanFieldOptions<T>& options, bool wants_theta, bool wants_image, MeanFieldGradients& gradients, ThreadPool& pool,
                    Workspace& workspace);

    // One kernel's part of a step: gradients with respect to its weights, its input marginals and, if wanted, its
    // bandwidths and image.
    void pass_step(size_t m, const StepGradients<T>& step);

    // After all steps. The kernel's row sums D normalize its messages, and depend on bandwidths and image as well: with the gradients with
    // respect to the message of all ones and to D, both collected over the steps, two more sums of the kind <u, K v>.
    void pass_normalization(size_t m);

    // (modality, *grid), inside the mask.
    void store_image(T* grad_image) const;

   private:
    static constexpr int kScratchRows = 7;  // per label: those of take_messages

    void for_blocks(const std::function<void(int64_t, int)>& body) { pool_.run(num_blocks_, body); }
    void differentiate_messages(size_t m, const StepGradients<T>& step, int64_t block, T* scratch);
    void take_messages(size_t m, const StepGradients<T>& step, int64_t block, T* scratch, double* sums);
    void sum_over_block(size_t m, T length, int64_t block, const T* message, const T* y, const T* z, double* sums) const;
    void add_part_sums(size_t m);
    void add_moments_of(size_t m, const T* u, const T* v, const T* kv, const T* ktu, int num_channels);

    const Voxels& voxels_;
    const std::vector<Kernel<T>>& kernels_;
    const std::vector<FeatureColumns<T>>& features_;
    const MeanFieldOptions<T>& options_;
    MeanFieldGradients& gradients_;
    ThreadPool& pool_;
    Workspace& workspace_;
    const bool wants_theta_, moments_wanted_;
    const int num_labels_, num_sent_;  // num_sent_: labels whose gradient is filtered: all except the last
    const int64_t num_voxels_, num_blocks_;
    const int num_all_labels_, num_sums_;
    const int64_t num_parts_;
    int num_modalities_ = 0;
    Buffer<T> grad_message_;                     // (sent, voxel)
    Buffer<T> filtered_, filtered_back_, sent_;  // (sent, voxel): K v, K^T u, v
    std::vector<Buffer<T>> grad_degree_;         // (kernel, voxel): with respect to the scale, before it is turned into one for D
    std::vector<Buffer<T>> grad_ones_;           // (kernel, voxel): with respect to the message of all ones
    Buffer<T> image_;                            // (modality, voxel)
    MomentBuffers<T> moment_buffers_;
    std::vector<T> unit_;
    std::vector<double> part_sums_;  // (part of the blocks, weights and compatibility)
    std::vector<Buffer<T>> scratch_;
};

}  // namespace crf
