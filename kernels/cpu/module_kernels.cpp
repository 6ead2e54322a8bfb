// The Python class of kernels that are kept between calls.
#include "cpu/module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {
namespace {
// The kernels of one model on one image, kept between calls; one call at a time.
class Kernels {
   public:
    // its rows need not follow one another, but the voxels of a row do
    using PartOfArray = nb::ndarray<const float, nb::device::cpu>;

    Kernels(const FloatArray& image, const std::optional<MaskArray>& mask,
            const std::vector<double>& spacing, KernelSetSpec spec,
            const std::vector<int>& user_axis, const std::optional<Origin>& origin, int threads,
            const nb::object& progress)
        : image_(image),
          grid_shape_(grid_shape(image)),
          num_modalities_(static_cast<int64_t>(image.shape(0))) {
        if (origin) spec.origin = FeatureOrigin{origin->first, origin->second};
        require_kernels(image, mask, spacing, spec);
        require(num_modalities_ > 0, "expected an image (modality, *grid), one modality or more");
        std::vector<int> sorted = user_axis;
        std::sort(sorted.begin(), sorted.end());
        for (size_t a = 0; a < sorted.size(); ++a)
            require(sorted[a] == static_cast<int>(a), "expected each axis of the user once");
        require(sorted.empty() || sorted.size() == grid_shape_.size(),
                "expected one axis of the user per axis of the grid");
        nb::gil_scoped_release release;
        const BlockCache cache;
        pool_ = std::make_unique<ThreadPool>(threads, check_signals, true);
        const Rest rest{*pool_};
        voxels_ = std::make_unique<Voxels>(grid_shape_, spacing, mask_data(mask), user_axis);
        Workspace workspace;
        set_ = std::make_unique<KernelSet>(*voxels_, channel_pointers(image, voxels_->grid_size),
                                           spec, *pool_, workspace, Reporter{progress, "build"});
    }

    int64_t num_voxels() const { return voxels_->num_voxels; }
    BuiltKernels built() { return {one_call_, *set_, *pool_, grid_shape_}; }
    std::vector<std::string> descriptions() const { return set_->descriptions; }

    // Runs until the stopping rule is met. The last run gives the image up before the first step,
    // and the kernels before the last step's logits are written. Without a mask it also returns the
    // marginals after the last possible step, (label, *grid): they are there anyway. part: (voxel)
    // where the volume term applies; None: everywhere. out: (label, *grid) or (label, *box of the
    // mask).
    nb::dict run(const PartOfArray& logits, const MeanFieldOptions& model,
                 const std::optional<MaskArray>& part, bool is_last_run, const nb::object& progress,
                 const FloatOut& out) {
        const bool reads_box = is_on_box(logits, model), writes_box = is_on_box(out, model);
        require(writes_box || !reads_box,
                "expected room for the whole grid only where there are logits on it");
        const GridView<const float> from = view_of(logits, reads_box);
        const GridView<float> to = dense_view(out.data(), grid_shape(out), writes_box);
        MeanFieldOutcome outcome;
        auto marginals = std::make_unique<Buffer<float>>();
        {
            EngineCall call(one_call_, *pool_);
            MeanFieldOptions options = options_of(model, part);
            options.is_last_run = is_last_run;
            options.gives_marginals = !to.is_box && num_voxels() == voxels_->grid_size;
            is_spent_ = is_last_run && !set_->kernels.empty();
            if (is_spent_ && !set_->keeps_image()) {
                const nb::gil_scoped_acquire gil;
                image_ = FloatArray();
            }
            outcome = run_mean_field(*set_, options, from, to, nullptr, marginals.get(), *pool_,
                                     call.workspace, Reporter{progress, "mean field"});
            if (is_last_run) set_->kernels.clear();
        }
        nb::dict result = as_dict(outcome);
        result["marginals"] = nb::none();
        if (*marginals) {
            std::vector<size_t> shape{static_cast<size_t>(model.num_labels)};
            shape.insert(shape.end(), grid_shape_.begin(), grid_shape_.end());
            Buffer<float>* const kept = marginals.release();
            const nb::capsule owner(
                kept, [](void* array) noexcept { delete static_cast<Buffer<float>*>(array); });
            result["marginals"] =
                nb::ndarray<nb::numpy, float>(kept->get(), shape.size(), shape.data(), owner);
        }
        return result;
    }

    // record: (step, channel, voxel), filled in; one channel fewer than labels where each kernel
    // has one weight for all labels, one entry more than steps with a volume term. Returns the
    // biases of each step with a volume term.
    std::vector<std::vector<double>> forward(const FloatArray& logits,
                                             const MeanFieldOptions& model,
                                             const std::optional<MaskArray>& part,
                                             const FloatOut& out, const FloatOut& record) {
        for (const auto& shape : {shape_of(logits), shape_of(out)})
            require_whole(shape, model.num_labels);
        EngineCall call(one_call_, *pool_);
        const MeanFieldOptions options = options_of_record(model, part, record);
        const GridView<const float> from = dense_view(logits.data(), grid_shape_);
        const GridView<float> to = dense_view(out.data(), grid_shape_);
        return run_mean_field(*set_, options, from, to, record.data(), nullptr, *pool_,
                              call.workspace, StepCallback())
            .volume_bias;
    }

    nb::dict backward(const FloatArray& logits, const FloatArray& record,
                      const std::vector<std::vector<double>>& volume_bias,
                      const FloatArray& gradient, const MeanFieldOptions& model,
                      const std::optional<MaskArray>& part, bool wants_theta,
                      const FloatOut& grad_logits, const std::optional<FloatOut>& grad_image) {
        const size_t num_labels = static_cast<size_t>(model.num_labels);
        require(!model.keeps_volumes() ||
                    (static_cast<int>(volume_bias.size()) == model.num_iterations &&
                     std::all_of(volume_bias.begin(), volume_bias.end(),
                                 [&](const auto& b) { return b.size() == num_labels; })),
                "expected one volume bias per step and label");
        for (const auto& shape : {shape_of(logits), shape_of(gradient), shape_of(grad_logits)})
            require_whole(shape, model.num_labels);
        if (grad_image) require_whole(shape_of(*grad_image), num_modalities_);
        MeanFieldGradients gradients;
        {
            EngineCall call(one_call_, *pool_);
            const MeanFieldOptions options = options_of_record(model, part, record);
            const BackwardInput input{logits.data(), record.data(), volume_bias,
                                      dense_view(gradient.data(), grid_shape_), wants_theta};
            for (Kernel& kernel : set_->kernels)
                find_ones(kernel, num_voxels(), *pool_, call.workspace);
            gradients = run_mean_field_backward(*set_, options, input, grad_logits.data(),
                                                grad_image ? grad_image->data() : nullptr, *pool_,
                                                call.workspace);
        }
        nb::dict result;
        result["weights"] = gradients.weight;
        result["compatibility"] = gradients.compatibility;
        result["temperature"] = gradients.temperature;
        result["bias"] = gradients.bias;
        result["volume_slack"] = gradients.volume_slack;
        std::vector<double> theta;
        for (const std::vector<double>& of_kernel : gradients.theta) {
            const std::vector<double> on_grid = on_grid_axes(of_kernel);
            theta.insert(theta.end(), on_grid.begin(), on_grid.end());
        }
        result["theta"] = theta;
        return result;
    }

   private:
    // Channels of all labels on the box of the mask; else they are on the whole grid.
    template <class Channels>
    bool is_on_box(const Channels& channels, const MeanFieldOptions& model) const {
        const std::vector<int64_t> shape = grid_shape(channels);
        require(static_cast<int64_t>(channels.shape(0)) == model.num_labels,
                "expected a channel per label of the model");
        if (shape == grid_shape_) return false;
        std::vector<int64_t> box(grid_shape_.size(), 1);
        for (int a = 0; a < voxels_->num_axes; ++a)
            box[voxels_->source_axis[a]] = voxels_->box_shape[a];
        require(shape == box, "expected logits on the grid of the image or on the box of its mask");
        return true;
    }

    void require_whole(std::vector<int64_t> shape, int64_t num_channels) const {
        require(
            !shape.empty() && shape.front() == num_channels &&
                std::equal(shape.begin() + 1, shape.end(), grid_shape_.begin(), grid_shape_.end()),
            "expected channels on the grid of the image");
    }

    GridView<const float> view_of(const PartOfArray& channels, bool is_box) const {
        const std::vector<int64_t> shape = grid_shape(channels);
        require(channels.stride(channels.ndim() - 1) == 1 || shape.back() == 1,
                "the voxels of a row of the logits do not follow one another");
        GridView<const float> view{channels.data(), is_box, channels.stride(0), shape, {}};
        for (size_t a = 1; a < channels.ndim(); ++a) view.stride.push_back(channels.stride(a));
        return view;
    }

    // Called while `one_call_` is locked: a last run of another thread leaves no kernels.
    MeanFieldOptions options_of(const MeanFieldOptions& model,
                                const std::optional<MaskArray>& part) const {
        require(!is_spent_, kSpent);
        require_model(model, set_->kernels.size());
        MeanFieldOptions options = model;
        if (part) {
            require_size(*part, num_voxels(),
                         "expected one value per voxel of the mask for the part of the volumes");
            options.volume_part.assign(part->data(), part->data() + part->size());
        }
        return options;
    }

    // All steps are taken. With a volume term, the marginals after the last step are recorded, too.
    template <class Record>
    MeanFieldOptions options_of_record(const MeanFieldOptions& model,
                                       const std::optional<MaskArray>& part,
                                       const Record& record) const {
        MeanFieldOptions options = options_of(model, part);
        options.tolerance = 0;
        require(shape_of(record) ==
                    std::vector<int64_t>{int64_t{options.num_iterations} + options.keeps_volumes(),
                                         options.num_channels(), num_voxels()},
                "expected a record (steps, channels, voxels) of forward() with this model");
        return options;
    }

    // Intensities first, then all axes of the grid; the bandwidths of axes with one voxel have no
    // effect.
    std::vector<double> on_grid_axes(const std::vector<double>& theta) const {
        const size_t num_modalities = theta.size() - voxels_->num_axes;
        std::vector<double> values(theta.begin(),
                                   theta.begin() + static_cast<std::ptrdiff_t>(num_modalities));
        values.resize(num_modalities + grid_shape_.size(), 0.0);
        for (int a = 0; a < voxels_->num_axes; ++a)
            values[num_modalities + voxels_->source_axis[a]] = theta[num_modalities + a];
        return values;
    }

    FloatArray image_;  // the source of the features; given up before the last run
    const std::vector<int64_t> grid_shape_;
    const int64_t num_modalities_;
    bool is_spent_ = false;
    std::unique_ptr<ThreadPool> pool_;
    std::unique_ptr<Voxels> voxels_;
    std::unique_ptr<KernelSet> set_;
    OneCall one_call_;
};
}  // namespace

BuiltKernels kernels_in(const nb::handle& kernels) {
    require(nb::isinstance<Kernels>(kernels), "expected an object of Kernels");
    return nb::cast<Kernels&>(kernels).built();
}

void define_kernels(nb::module_& m) {
    using K = Kernels;
    nb::class_<K>(m, "Kernels")
        .def(nb::init<const FloatArray&, const std::optional<MaskArray>&,
                      const std::vector<double>&, KernelSetSpec, const std::vector<int>&,
                      const std::optional<Origin>&, int, const nb::object&>(),
             "image"_a, "mask"_a.none(), "spacing"_a, "spec"_a, "user_axis"_a, "origin"_a.none(),
             "threads"_a, "progress"_a.none())
        .def("num_voxels", &K::num_voxels)
        .def("descriptions", &K::descriptions)
        .def("run", &K::run, "logits"_a, "model"_a, "part"_a.none(), "is_last_run"_a,
             "progress"_a.none(), "out"_a.noconvert())
        .def("forward", &K::forward, "logits"_a, "model"_a, "part"_a.none(), "out"_a.noconvert(),
             "record"_a.noconvert())
        .def("backward", &K::backward, "logits"_a, "record"_a, "volume_bias"_a, "gradient"_a,
             "model"_a, "part"_a.none(), "wants_theta"_a, "grad_logits"_a.noconvert(),
             "grad_image"_a.noconvert().none());
}
}  // namespace crf
