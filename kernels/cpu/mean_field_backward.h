// The way back through the mean field: from the derivatives of a loss by the last step's logits to those by everything that went in
// (docs/math.md). Marginals of every step come from the record of the way forth; messages are filtered again.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/moments.h"

namespace crf {

// Partial derivatives, summed in double precision in a fixed order: the same for any number of threads.
struct MeanFieldGradients {
    std::vector<std::vector<double>> weight;  // (kernel, label)
    std::vector<double> compatibility;        // (label, label), the diagonal too
    double temperature = 0;
    std::vector<std::vector<double>> theta;  // (kernel, feature): intensities first, box axes last; zeros unless wanted
};

template <class T>
struct BackwardInput {
    const T* logits;  // (label, *grid)
    const T* record;  // (step, channel, voxel) as run_mean_field left it
    std::vector<double> step;
    const T* gradient;  // (label, *grid), by the logits that run_mean_field gave
    bool wants_theta = false;
};

// grad_logits: (label, *grid), written everywhere. grad_image: (modality, *grid), comes in as zeros and is written inside the mask, or
// nullptr. features: one a kernel.
template <class T>
MeanFieldGradients run_mean_field_backward(const Voxels& voxels, const std::vector<Kernel<T>>& kernels,
                                           const std::vector<FeatureColumns<T>>& features, const MeanFieldOptions<T>& options,
                                           const BackwardInput<T>& input, T* grad_logits, T* grad_image, ThreadPool& pool,
                                           Workspace& workspace);

}  // namespace crf
