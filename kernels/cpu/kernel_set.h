// The kernels of one model on one image, normalized and ready to filter: built once, used in every
// step of the forward and backward pass.
#pragma once

#include "cpu/filter.h"

namespace crf {
Normalization parse_normalization(const std::string& name);

// Selects the box's axes from one value per grid axis.
std::vector<double> on_box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis);

// Bandwidths of position, in mm along each axis of the grid, and of each modality's intensity: of
// each bilateral kernel.
using Bandwidths = std::vector<std::pair<std::vector<double>, std::vector<double>>>;

// The model of a case, without weights and compatibility.
struct KernelSpecs {
    Bandwidths bilateral;
    std::vector<double> theta_gamma;  // one per grid axis; empty: no spatial kernel
    Normalization normalization = Normalization::kSymmetric;
    std::optional<FeatureOrigin> origin;  // none: the mask's own
    std::string filter;                   // of the bilateral kernels
    ExpectedCalls calls;                  // for "auto"
};

// Called before each kernel is built with its number and that of all kernels; may throw to stop.
using BuildCallback = FunctionRef<int, int>;

struct KernelSet {
    const Voxels& voxels;
    std::vector<Kernel> kernels;           // the bilateral ones first
    std::vector<FeatureColumns> features;  // one per kernel
    std::vector<std::string> descriptions;

    // Whether a filter reads the image when it filters.
    bool keeps_image() const {
        return std::any_of(kernels.begin(), kernels.end(),
                           [](const Kernel& kernel) { return kernel.filter->traits.keeps_image; });
    }

    KernelSet(const Voxels& voxels, const std::vector<const float*>& image,
              const KernelSpecs& specs, ThreadPool& pool, Workspace& workspace,
              const BuildCallback& callback);
};
}  // namespace crf
