// The Python class of the Gaussian filter on points of any features.
#include "cpu/filter_moments.h"
#include "cpu/module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {
namespace {
// The kernel exp(-|x_n - x_m|^2 / 2) of points, kept between calls; one call at a time.
class Points {
   public:
    // features: (feature, *grid), divided by their bandwidths; near points share a tile of the
    // lattice. filter: "exact" or "lattice".
    Points(const FloatArray& features, const std::string& filter, int threads)
        : features_(features) {
        require(features.ndim() >= 2 && features.size() > 0,
                "expected features (feature, *grid), one or more");
        require(features.ndim() <= kMaxAxes + 1, "expected a grid of at most eight axes");
        require(features.size() / features.shape(0) <= std::numeric_limits<int32_t>::max(),
                "expected at most 2^31 - 1 points");
        require(filter == "exact" || filter == "lattice",
                "expected the filter \"exact\" or \"lattice\"");
        nb::gil_scoped_release release;
        const BlockCache cache;
        pool_ = std::make_unique<ThreadPool>(threads, check_signals, true);
        const Rest rest{*pool_};
        voxels_ = std::make_unique<Voxels>(grid_shape(features),
                                           std::vector<double>(features.ndim() - 1, 1.0), nullptr);
        input_ = std::make_unique<KernelInput>(*voxels_, std::vector<double>(),
                                               std::vector<double>(features.shape(0), 1.0),
                                               channel_pointers(features, num_points()), *pool_);
        input_->require_span();
        filter_ = filter == "exact" ? make_exact_filter(*input_, *pool_)
                                    : make_lattice_filter(*input_, *pool_);
    }

    std::string description() const { return filter_->description(); }

    // out += K values, or its transpose times values, each point's times its scale; all (channel,
    // point), the scale (point).
    void apply(const FloatArray& values, const std::optional<FloatArray>& scale, bool transposed,
               const FloatOut& out) {
        require_points(values);
        require(shape_of(out) == shape_of(values),
                "expected room for the result in the shape of the values");
        require(
            !scale || (scale->ndim() == 1 && static_cast<int64_t>(scale->size()) == num_points()),
            "expected a scale per point");
        EngineCall call(one_call_, *pool_);
        const float* const post = scale ? scale->data() : nullptr;
        const Filtering wanted{values.data(), num_channels(values), out.data(), nullptr, post};
        if (transposed) {
            filter_->accumulate_transposed(wanted, call.workspace);
        } else {
            filter_->accumulate(wanted, call.workspace);
        }
    }

    // out += the sums of K values over those of K ones, whose inverses are the `scale`.
    // False: nothing was done, the filter cannot.
    bool mean(const FloatArray& values, const FloatOut& scale, const FloatOut& out) {
        require_points(values);
        require(shape_of(out) == shape_of(values),
                "expected room for the result in the shape of the values");
        require(scale.ndim() == 1 && static_cast<int64_t>(scale.size()) == num_points(),
                "expected room for a scale per point");
        EngineCall call(one_call_, *pool_);
        return accumulate_mean(*filter_, {values.data(), num_channels(values), out.data()},
                               scale.data(), call.workspace);
    }

    // gradient = the derivative of sum(u * K v) with respect to the features, in their shape, of
    // the Gaussian itself.
    void feature_gradient(const FloatArray& u, const FloatArray& v, const FloatOut& gradient) {
        for (const FloatArray* channels : {&u, &v}) require_points(*channels);
        require(u.shape(0) == v.shape(0), "expected two arrays of the same channels");
        require(shape_of(gradient) == shape_of(features_),
                "expected room for the gradient in the shape of the features");
        EngineCall call(one_call_, *pool_);
        const int count = num_channels(u);
        const Buffer<float> kv = filled(count * num_points(), 0.0f, *pool_);
        const Buffer<float> ktu = filled(count * num_points(), 0.0f, *pool_);
        filter_->accumulate({v.data(), count, kv.get()}, call.workspace);
        filter_->accumulate_transposed({u.data(), count, ktu.get()}, call.workspace);
        std::fill(gradient.data(), gradient.data() + gradient.size(), 0.0f);
        std::vector<double> squared(features_.shape(0));
        MomentSums sums(num_points(), *pool_, call.workspace);
        filter_->add_moments({u.data(), v.data(), kv.get(), ktu.get(), count}, *input_,
                             squared.data(), gradient.data(), sums);
    }

   private:
    int64_t num_points() const { return voxels_->num_voxels; }
    static int num_channels(const FloatArray& values) { return static_cast<int>(values.shape(0)); }

    void require_points(const FloatArray& channels) const {
        require(channels.ndim() == 2 && static_cast<int64_t>(channels.shape(1)) == num_points(),
                "expected values (channel, point)");
    }

    const FloatArray features_;
    std::unique_ptr<ThreadPool> pool_;
    std::unique_ptr<Voxels> voxels_;
    std::unique_ptr<KernelInput> input_;
    std::unique_ptr<Filter> filter_;
    OneCall one_call_;
};
}  // namespace

void define_points(nb::module_& m) {
    nb::class_<Points>(m, "Points")
        .def(nb::init<const FloatArray&, const std::string&, int>(), "features"_a, "filter"_a,
             "threads"_a)
        .def("description", &Points::description)
        .def("apply", &Points::apply, "values"_a, "scale"_a.none(), "transposed"_a,
             "out"_a.noconvert())
        .def("mean", &Points::mean, "values"_a, "scale"_a.noconvert(), "out"_a.noconvert())
        .def("feature_gradient", &Points::feature_gradient, "u"_a, "v"_a, "gradient"_a.noconvert());
}
}  // namespace crf
