// The mean-field loop (docs/reference/math.md): messages of every kernel, compatibility, softmax, energy, and the stopping rule.
#pragma once

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/grid_view.h"
#include "cpu/kernel.h"
#include "cpu/volume.h"

namespace crf {

struct MeanFieldOptions {
    int num_labels = 0;                      // L
    std::vector<std::vector<float>> weight;  // (kernel, label)
    std::vector<float>
        compatibility;  // (label, label), penalty, zero diagonal; row: the neighbor's label, column: the voxel's own; Potts: empty
    bool is_potts = true;
    int num_iterations = 5;
    double tolerance = 0;
    float temperature = 1;
    std::vector<float> bias;                                        // (label), added to the logits inside the mask; empty: none
    double volume_slack = std::numeric_limits<double>::infinity();  // inverse strength of the volume term; infinity: there is none
    std::vector<float> volume_part;   // (voxel), 1 where the volume term applies and 0 elsewhere; empty: everywhere
    bool is_last_run = false;         // free kernels and workspace before the last step's logits are written: they need not fit together
    bool gives_marginals = false;     // keep those after the last step for the caller
    bool has_symmetric_pairs = true;  // on tiles: a pair of voxels costs the same in both directions

    // Whether filtering can skip the last label's channel: with one weight for all labels its message follows from the others', because
    // marginals sum to 1.
    bool last_is_implied() const;
    bool has_one_weight(size_t kernel) const;
    bool has_symmetric_penalties() const;
    bool keeps_volumes() const { return volume_slack < std::numeric_limits<double>::infinity(); }
    int num_channels() const { return last_is_implied() ? num_labels - 1 : num_labels; }
};

struct MeanFieldOutcome {
    int num_iterations = 0;
    bool converged = false;
    std::vector<double> energy;                    // free energy at the start of each step; empty if it is not known
    std::vector<std::vector<double>> volume_bias;  // (step, label), if there is a volume term
};

// Called before each step with its number and that of all steps; may throw to stop.
using StepCallback = FunctionRef<int, int>;

// logits: (label, *grid), without the bias. out: the same, or (label, *box of the mask), as the logits may be then; outside the mask it is
// the logits over the temperature.
//
// record: nullptr, or (step, channel, voxel) with room for the marginals at the start of each step, which the backward pass needs; with a
// volume term (steps + 1, channel, voxel), also for those after the last one.
//
// marginals: nullptr, or what becomes (label, voxel) after the last step if the options ask for it, unless the iteration has stopped early.
MeanFieldOutcome run_mean_field(const Voxels& voxels, std::vector<Kernel>& kernels, const MeanFieldOptions& options,
                                const GridView<const float>& logits, const GridView<float>& out, float* record, Buffer<float>* marginals,
                                ThreadPool& pool, Workspace& workspace, const StepCallback& callback);

}  // namespace crf
