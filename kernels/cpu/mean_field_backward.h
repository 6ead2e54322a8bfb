// The backward pass of the mean field: from the gradient of a loss with respect to the last step's
// logits to the gradients with respect to all inputs (docs/reference/math.md, section 9). The
// forward pass has recorded the marginals of each step; messages are filtered again.
#pragma once

#include "cpu/mean_field.h"

namespace crf {
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
MeanFieldGradients run_mean_field_backward(const KernelSet& set, const MeanFieldOptions& options,
                                           const BackwardInput& input, float* grad_logits,
                                           float* grad_image, ThreadPool& pool,
                                           Workspace& workspace);
}  // namespace crf
