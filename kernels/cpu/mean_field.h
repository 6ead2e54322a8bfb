// The mean-field loop (docs/math.md): messages of every kernel, compatibility, softmax, energy, and when to stop.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/filter.h"

namespace crf {

enum class Normalization { kSymmetric, kAfter, kNone };

struct Kernel {
    std::unique_ptr<Filter> filter;
    std::vector<float> weight;  // one a label
    Buffer<float> scale;        // (voxel) factor of the normalization, empty = ones
    bool scales_sent = false;   // whether it is applied to what is sent too, not only to what is received
    Buffer<float> ones;         // (voxel) the normalized message of all ones, empty = ones
};

struct MeanFieldOptions {
    int num_labels = 0;
    std::vector<float> compatibility;  // (label, label), penalty, zero diagonal
    bool is_potts = true;
    int num_iterations = 5;
    double tolerance = 0;
    float temperature = 1;
    float damping = 0;
    bool watch_energy = true;  // halve the step when the energy rises
};

struct MeanFieldOutcome {
    int num_iterations = 0;
    bool converged = false;
    std::vector<double> energy;
};

// Called before each step; may throw to stop.
using StepCallback = std::function<void(int step, int num_steps)>;

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace);

// The kernels and the workspace are given up before the last step's logits are written, so that they and the logits need not fit into
// memory together. logits, out: (label, *grid) float32. Outside the mask `out` is the logits over the temperature.
MeanFieldOutcome run_mean_field(const Voxels& voxels, std::vector<Kernel> kernels, const MeanFieldOptions& options, const float* logits,
                                float* out, ThreadPool& pool, Workspace workspace, const StepCallback& callback);

}  // namespace crf
