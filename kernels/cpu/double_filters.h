// The filters in double precision, for gradient checks and layers in float64: the same kernels, windows and lattice, plainly written.
#pragma once

#include <string>

#include "cpu/filter.h"

namespace crf {

using DoubleFilter = BasicFilter<double>;

// Like make_bilateral_filter, except for the dense grid, which exists only in single precision: "grid" throws InputError, "auto" never
// chooses it. input: with the intensities rounded to float, for the lattice's geometry; intensity: unrounded, one array per modality.
std::unique_ptr<DoubleFilter> make_double_bilateral_filter(const std::string& requested, const BilateralInput& input,
                                                           const std::vector<const double*>& intensity, int num_channels,
                                                           int num_filterings, ThreadPool& pool);
std::unique_ptr<DoubleFilter> make_double_spatial_filter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool);

}  // namespace crf
