// The volume term (docs/reference/math.md, section 11): marginals with biases, and the gradient
// that goes back through their masses.
#include "cuda/update.h"

namespace crf {
// One thread per voxel: the update of its logits with biases.
// logits: (label, *grid). grid_index: (voxel). bias: (label). marginals: (label, voxel).
CRF_KERNEL(find_marginals, const Real* logits, int64 grid_size, const int64* grid_index,
           int64 num_voxels, int num_labels, const Real* bias, Real* marginals) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const OfVoxel<Real> q{marginals + n, num_voxels};
    const Real* const own = logits + grid_index[n];
    const auto biased = [&](int l) { return own[l * grid_size] + bias[l]; };
    update_marginals(num_labels, ByLabel{biased}, q);
}

// One thread per voxel: adds the biases to its logits where the term applies.
// part: (voxel), 1 where it does; nullptr: everywhere.
CRF_KERNEL(add_biases, Real* logits, int64 grid_size, const int64* grid_index, int64 num_voxels,
           int num_labels, const uint8* part, const Real* bias) {
    const int64 n = thread_number();
    if (n >= num_voxels || (part && !part[n])) return;
    for (int l = 0; l < num_labels; ++l) logits[l * grid_size + grid_index[n]] += bias[l];
}

// One thread per voxel: passes the gradient with respect to the masses of its marginals on to the
// logits' gradient. marginals, gradient: (label, voxel). by_mass: (label).
CRF_KERNEL(pull_masses, const Real* marginals, int64 num_voxels, int num_labels, const uint8* part,
           const Real* by_mass, Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_voxels || (part && !part[n])) return;
    const OfVoxel<Real> to{gradient + n, num_voxels};
    update_back(num_labels, num_labels, OfVoxel<const Real>{marginals + n, num_voxels}, by_mass,
                [&](int l, Real by_x) { to[l] += by_x; });
}
}  // namespace crf
