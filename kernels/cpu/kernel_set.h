// The kernels of one model on one image, normalized and ready to filter: built once, used in every
// step of the forward and backward pass.
#pragma once

#include "cpu/filter.h"

namespace crf {
Normalization parse_normalization(const std::string& name);

// Selects the box's axes from one value per grid axis.
std::vector<double> on_box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis);

// A kernel, as `KernelSpec` in crfrefine/parameters/specs.py.
struct KernelSpec {
    std::string kind;                     // "bilateral" or "spatial"
    std::vector<double> theta_position;   // along each axis of the grid
    std::vector<double> theta_intensity;  // of each modality; empty: only of position

    // Calls read(name, field) for the fields of the kernel.
    template <class Read>
    void read_model(Read&& read) {
        read("kind", kind);
        read("theta_position", theta_position);
        read("theta_intensity", theta_intensity);
    }
};

// The model of a case, without weights and compatibility, as `KernelSetSpec` in the same file.
struct KernelSetSpec {
    std::vector<KernelSpec> kernels;
    std::vector<std::string> names;  // of the kernels
    std::string normalization;
    std::string filter;  // of the bilateral kernels
    // The labels and the steps that "auto" chooses filters for; a run may have others.
    int num_labels = 0;
    int num_iterations = 0;
    std::optional<FeatureOrigin> origin;  // none: the mask's own

    template <class Read>
    void read_model(Read&& read) {
        read("kernels", kernels);
        read("names", names);
        read("normalization", normalization);
        read("filter", filter);
        read("num_labels", num_labels);
        read("num_iterations", num_iterations);
    }

    ExpectedCalls calls() const { return {num_labels - 1, num_iterations}; }
};

// Called before each kernel is built with its number and that of all kernels; may throw to stop.
using BuildCallback = FunctionRef<int, int>;

struct KernelSet {
    const Voxels& voxels;
    std::vector<Kernel> kernels;
    std::vector<KernelInput> inputs;  // of each kernel
    std::vector<std::string> descriptions;

    // Whether a filter reads the image when it filters.
    bool keeps_image() const {
        return std::any_of(kernels.begin(), kernels.end(),
                           [](const Kernel& kernel) { return kernel.filter->traits.keeps_image; });
    }

    KernelSet(const Voxels& voxels, const std::vector<const float*>& image,
              const KernelSetSpec& spec, ThreadPool& pool, Workspace& workspace,
              const BuildCallback& callback);
};
}  // namespace crf
