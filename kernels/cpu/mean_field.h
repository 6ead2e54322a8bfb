// The mean-field loop (docs/reference/math.md): messages of every kernel, compatibility, softmax,
// energy, and the stopping rule.
#pragma once

#include "cpu/kernel_set.h"
#include "cpu/voxel_rows.h"

namespace crf {
// The model of a run, and how it is made.
struct MeanFieldOptions {
    int num_labels = 0;                      // L
    std::vector<std::vector<float>> weight;  // (kernel, label)
    bool is_potts = true;
    // (label, label), penalty, zero diagonal; row: the neighbor's label, column: the voxel's own;
    // Potts: empty
    std::vector<float> compatibility;
    int num_iterations = 5;
    double tolerance = 0;
    float temperature = 1;
    std::vector<float> bias;  // (label), added to the logits inside the mask; empty: none
    // inverse strength of the volume term; infinity: no volume term
    double volume_slack = std::numeric_limits<double>::infinity();

    // Calls read(name, field) for the fields of the model; the names are those of `MeanFieldSpec`
    // in crfrefine/parameters/specs.py.
    template <class Read>
    void read_model(Read&& read) {
        read("num_labels", num_labels);
        read("weights", weight);
        read("is_potts", is_potts);
        if (!is_potts) read("compatibility", compatibility);
        read("num_iterations", num_iterations);
        read("tolerance", tolerance);
        read("temperature", temperature);
        read("bias", bias);
        read("volume_slack", volume_slack);
    }

    // (voxel), 1 where the volume term applies and 0 elsewhere; empty: everywhere
    std::vector<float> volume_part;
    // free kernels and workspace before the last logits are written: both need not fit
    bool is_last_run = false;
    bool gives_marginals = false;  // keep the marginals after the last step for the caller
    // on tiles: a pair of voxels costs the same in both directions
    bool has_symmetric_pairs = true;

    // Whether filtering can skip the last label's channel: with one weight for all labels its
    // message follows from the others'.
    bool last_is_implied() const;
    bool has_one_weight(size_t kernel) const;
    bool has_symmetric_penalties() const;
    bool keeps_volumes() const { return volume_slack < std::numeric_limits<double>::infinity(); }
    int num_channels() const { return last_is_implied() ? num_labels - 1 : num_labels; }
};

// The pairwise term of a label, sum_k penalty(k) message(k), where penalty(k) =
// compatibility[k][label]; all: the sum of the messages. Backward, from gradients with respect to
// the pairwise terms to those with respect to the messages, the penalties are transposed.
template <class Message, class Penalty>
vfloat pairwise_term(const MeanFieldOptions& options, int num_labels, int label, const vfloat& all,
                     const Message& message, const Penalty& penalty) {
    if (options.is_potts) return all - message(label);
    vfloat sum{};
    for (int k = 0; k < num_labels; ++k) sum += message(k) * penalty(k);
    return sum;
}

struct MeanFieldOutcome {
    int num_iterations = 0;
    bool converged = false;
    std::vector<double> energy;  // free energy at the start of each step; empty if it is not known
    std::vector<std::vector<double>> volume_bias;  // (step, label), if there is a volume term
};

// Called before each step with its number and the number of steps; may throw to stop.
using StepCallback = FunctionRef<int, int>;

// logits: (label, *grid), without the bias. out: the same, or (label, *box of the mask), as the
// logits may be then; outside the mask it is the logits over the temperature. record: nullptr, or
// (step, channel, voxel) with room for the marginals at the start of each step, which the backward
// pass needs; with a volume term (steps + 1, channel, voxel), also for those after the last one.
// marginals: nullptr, or set to those after the last step, (label, voxel), if the options ask for
// them and no step was left out.
MeanFieldOutcome run_mean_field(KernelSet& set, const MeanFieldOptions& options,
                                const GridView<const float>& logits, const GridView<float>& out,
                                float* record, Buffer<float>* marginals, ThreadPool& pool,
                                Workspace& workspace, const StepCallback& callback);

// Sums of a step over a block of voxels, or a tile.
struct StepSums {
    // sum Q log Q - <a / T, Q> of the new marginals, a relative to the largest of its voxel
    double unary = 0;
    double largest = 0;     // sum of the largest a / T of each voxel
    double quadratic = 0;   // <Q, pairwise> of the old marginals
    double divergence = 0;  // sum of KL(new || old)
    int64_t flips = 0;

    StepSums& operator+=(const StepSums& other) {
        unary += other.unary;
        largest += other.largest;
        quadratic += other.quadratic;
        divergence += other.divergence;
        flips += other.flips;
        return *this;
    }
};

// The sums of all blocks, added in their order: the same bits at any number of threads.
inline StepSums total(const std::vector<StepSums>& of_blocks) {
    StepSums sums;
    for (const StepSums& block : of_blocks) sums += block;
    return sums;
}
}  // namespace crf
