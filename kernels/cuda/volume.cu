// The volume term (docs/reference/math.md, section 11): marginals with biases, and the gradient
// that goes back through their masses.
#include "cuda/launch.h"

namespace crf {
constexpr Real kVanished = Real(-1e4);  // its exponential is 0

// One thread per voxel: the softmax of its logits with biases.
// logits: (label, *grid). grid_index: (voxel). bias: (label). marginals: (label, voxel).
CRF_KERNEL(find_marginals, const Real* logits, int64 grid_size, const int64* grid_index,
           int64 num_voxels, int num_labels, const Real* bias, Real* marginals) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real* own = logits + grid_index[n];
    Real largest = kLowest, total = Real(0.0);
    for (int l = 0; l < num_labels; ++l) largest = larger(own[l * grid_size] + bias[l], largest);
    for (int l = 0; l < num_labels; ++l) {
        const Real e = exp(larger(own[l * grid_size] + bias[l] - largest, kVanished));
        marginals[l * num_voxels + n] = e;
        total += e;
    }
    for (int l = 0; l < num_labels; ++l) marginals[l * num_voxels + n] *= Real(1.0) / total;
}

// One thread per voxel: adds the biases to its logits where the term applies.
// part: (voxel), 1 where it does; nullptr: everywhere.
CRF_KERNEL(add_biases, Real* logits, int64 grid_size, const int64* grid_index, int64 num_voxels,
           int num_labels, const uint8* part, const Real* bias) {
    const int64 n = thread_number();
    if (n >= num_voxels || (part && !part[n])) return;
    for (int l = 0; l < num_labels; ++l) logits[l * grid_size + grid_index[n]] += bias[l];
}

// One thread per voxel: passes the gradient with respect to the masses of the softmax of its logits
// on to the logits' gradient. marginals, gradient: (label, voxel). by_mass: (label).
CRF_KERNEL(pull_masses, const Real* marginals, int64 num_voxels, int num_labels, const uint8* part,
           const Real* by_mass, Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_voxels || (part && !part[n])) return;
    Real mean = Real(0.0);
    for (int l = 0; l < num_labels; ++l) mean += marginals[l * num_voxels + n] * by_mass[l];
    for (int l = 0; l < num_labels; ++l)
        gradient[l * num_voxels + n] += marginals[l * num_voxels + n] * (by_mass[l] - mean);
}
}  // namespace crf
