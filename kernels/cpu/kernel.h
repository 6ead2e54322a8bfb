// A filter with its normalization: a kernel of the mean field.
#pragma once

#include "cpu/filter.h"

namespace crf {

enum class Normalization { kSymmetric, kAfter, kNone };  // kNone: of messages alone, not of a mean field

// A filter with its normalization.
struct Kernel {
    std::unique_ptr<Filter> filter;
    Buffer<float> scale;       // (voxel) factor of the normalization, empty = ones
    bool scales_sent = false;  // whether it scales the sent values too, not only the received ones
    Buffer<float> ones;        // (voxel) the normalized message of all ones, empty = ones once `find_ones` has been called
};

// Computes the `scale` of a kernel that has its filter, and `ones` if that takes no other filtering.
void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace);

// Computes `ones` of a normalized kernel unless it is known. Not all users of a kernel need it.
void find_ones(Kernel& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace);

}  // namespace crf
