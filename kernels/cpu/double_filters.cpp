#include "cpu/double_filters.h"

#include <algorithm>
#include <cmath>

#include "cpu/cost_model.h"
#include "cpu/features.h"
#include "cpu/lattice_rows.h"
#include "cpu/spatial_taps.h"
#include "cpu/window.h"

namespace crf {

namespace {

// sum += channel_weight * post * (the sum received by each voxel), voxel by voxel.
template <class Receive>
void receive_all(const Voxels& voxels, int num_channels, const double* post, const double* channel_weight, double* sum, ThreadPool& pool,
                 Receive&& receive) {
    const int64_t num_voxels = voxels.num_voxels;
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        std::vector<double> received(num_channels);
        for (int64_t n = block * kVoxelBlock; n < std::min((block + 1) * kVoxelBlock, num_voxels); ++n) {
            std::fill(received.begin(), received.end(), 0.0);
            receive(n, received.data());
            for (int c = 0; c < num_channels; ++c) sum[c * num_voxels + n] += channel_weight[c] * (post ? post[n] : 1.0) * received[c];
        }
    });
}

// Coordinates in the box and intensities over theta_beta of every voxel.
struct DoubleFeatures {
    int num_axes, num_modalities;
    std::vector<int64_t> coordinate;  // (voxel, axis)
    std::vector<double> intensity;    // (voxel, modality)

    DoubleFeatures(const BilateralInput& input, const std::vector<const double*>& image)
        : num_axes(input.voxels->num_axes), num_modalities(static_cast<int>(image.size())) {
        const Voxels& voxels = *input.voxels;
        coordinate.resize(voxels.num_voxels * num_axes);
        intensity.resize(voxels.num_voxels * num_modalities);
        for (const Run& run : voxels.runs)
            for (int32_t i = 0; i < run.length; ++i) {
                voxels.coordinates(run.box + i, &coordinate[(run.voxel + i) * num_axes]);
                for (int m = 0; m < num_modalities; ++m)
                    intensity[(run.voxel + i) * num_modalities + m] = image[m][run.grid + i] / input.theta_beta[m];
            }
    }

    double squared_intensity(int64_t n, int64_t m) const {
        double total = 0;
        for (int c = 0; c < num_modalities; ++c) {
            const double difference = intensity[n * num_modalities + c] - intensity[m * num_modalities + c];
            total += difference * difference;
        }
        return total;
    }
};

class DoubleExactFilter final : public DoubleFilter {
   public:
    DoubleExactFilter(const BilateralInput& input, const std::vector<const double*>& image, ThreadPool& pool)
        : voxels_(*input.voxels), pool_(pool), features_(input, image) {
        for (int a = 0; a < voxels_.num_axes; ++a) step_.push_back(voxels_.spacing[a] / input.theta_alpha[a]);
    }

    void accumulate(const double* values, int num_channels, const double* pre, const double* post, const double* channel_weight,
                    double* sum, Workspace&) override {
        const int64_t num_voxels = voxels_.num_voxels;
        receive_all(voxels_, num_channels, post, channel_weight, sum, pool_, [&](int64_t n, double* received) {
            for (int64_t m = 0; m < num_voxels; ++m) {
                double squared = features_.squared_intensity(n, m);
                for (int a = 0; a < voxels_.num_axes; ++a) {
                    const int64_t apart = features_.coordinate[n * voxels_.num_axes + a] - features_.coordinate[m * voxels_.num_axes + a];
                    squared += step_[a] * static_cast<double>(apart) * step_[a] * static_cast<double>(apart);
                }
                const double weight = std::exp(-0.5 * squared) * (pre ? pre[m] : 1.0);
                for (int c = 0; c < num_channels; ++c) received[c] += weight * values[c * num_voxels + m];
            }
        });
    }

    std::string description() const override { return "exact (all " + std::to_string(voxels_.num_voxels) + " x N pairs), float64"; }

   private:
    const Voxels& voxels_;
    ThreadPool& pool_;
    DoubleFeatures features_;
    std::vector<double> step_;  // spacing over theta_alpha, one per box axis
};

class DoubleTruncatedFilter final : public DoubleFilter {
   public:
    DoubleTruncatedFilter(const BilateralInput& input, const std::vector<const double*>& image, ThreadPool& pool)
        : voxels_(*input.voxels), pool_(pool), features_(input, image), offsets_(list_window(input)) {
        compact_.assign(voxels_.box_size, -1);
        for (const Run& run : voxels_.runs)
            for (int32_t i = 0; i < run.length; ++i) compact_[run.box + i] = run.voxel + i;
    }

    void accumulate(const double* values, int num_channels, const double* pre, const double* post, const double* channel_weight,
                    double* sum, Workspace&) override {
        const int64_t num_voxels = voxels_.num_voxels;
        receive_all(voxels_, num_channels, post, channel_weight, sum, pool_, [&](int64_t n, double* received) {
            const auto take = [&](const WindowOffset& offset, int sign) {
                int64_t box = 0;
                for (int a = 0; a < voxels_.num_axes; ++a) {
                    const int64_t place = features_.coordinate[n * voxels_.num_axes + a] + sign * offset.distance[a];
                    if (place < 0 || place >= voxels_.box_shape[a]) return;
                    box = box * voxels_.box_shape[a] + place;
                }
                const int64_t m = compact_[box];
                if (m < 0) return;
                const double weight = std::exp(-0.5 * (offset.squared + features_.squared_intensity(n, m))) * (pre ? pre[m] : 1.0);
                for (int c = 0; c < num_channels; ++c) received[c] += weight * values[c * num_voxels + m];
            };
            for (int c = 0; c < num_channels; ++c) received[c] = (pre ? pre[n] : 1.0) * values[c * num_voxels + n];
            for (const WindowOffset& offset : offsets_) {
                take(offset, 1);
                take(offset, -1);
            }
        });
    }

    std::string description() const override { return "truncated (" + std::to_string(offsets_.size()) + " pairs per voxel), float64"; }

   private:
    const Voxels& voxels_;
    ThreadPool& pool_;
    DoubleFeatures features_;
    std::vector<WindowOffset> offsets_;
    std::vector<int64_t> compact_;  // voxel's number by place in the box; -1 outside the mask
};

class DoubleLatticeFilter final : public DoubleFilter {
   public:
    DoubleLatticeFilter(const BilateralInput& input, ThreadPool& pool)
        : voxels_(*input.voxels),
          pool_(pool),
          lattice_(build_lattice(input, pool, false)),
          vertex_of_further_(lattice_.num_slots - lattice_.num_vertices) {
        for (const Lattice::Shared& shared : lattice_.shared)
            std::fill_n(vertex_of_further_.begin() + (shared.first_slot - lattice_.num_vertices), shared.num_slots, shared.vertex);
    }

    void accumulate(const double* values, int num_channels, const double* pre, const double* post, const double* channel_weight,
                    double* sum, Workspace& workspace) override {
        for (int c = 0; c < num_channels; ++c)
            filter(values + c * voxels_.num_voxels, pre, post, channel_weight[c], sum + c * voxels_.num_voxels, workspace, false);
    }

    bool is_symmetric() const override { return false; }
    void accumulate_transposed(const double* values, int num_channels, const double* pre, const double* post, const double* channel_weight,
                               double* sum, Workspace& workspace) override {
        for (int c = 0; c < num_channels; ++c)
            filter(values + c * voxels_.num_voxels, pre, post, channel_weight[c], sum + c * voxels_.num_voxels, workspace, true);
    }

    std::string description() const override { return describe(lattice_, voxels_.num_voxels) + ", float64"; }

   private:
    uint32_t vertex_of(uint32_t slot) const {
        return slot < lattice_.num_vertices ? slot : vertex_of_further_[slot - lattice_.num_vertices];
    }

    // Calls body(voxel, vertex, weight) for every corner of every voxel of a tile.
    template <class Body>
    void for_corners(const Lattice::Tile& tile, Body&& body) const {
        const int num_corners = lattice_.num_features + 1;
        int64_t entry = tile.first_entry * num_corners;
        for (int64_t p = tile.first_piece; p < tile.first_piece + tile.num_pieces; ++p)
            for (int64_t n = lattice_.pieces[p].voxel; n < lattice_.pieces[p].voxel + lattice_.pieces[p].length; ++n)
                for (int k = 0; k < num_corners; ++k, ++entry)
                    body(n, vertex_of(lattice_.slot[tile.first_vertex + lattice_.local[entry]]),
                         static_cast<double>(lattice_.weight[entry]));
    }

    void filter(const double* values, const double* pre, const double* post, double channel_weight, double* sum, Workspace& workspace,
                bool transposed) {
        double* const rows = workspace.values<double>(lattice_.num_vertices);
        std::fill(rows, rows + lattice_.num_vertices, 0.0);
        for (const Lattice::Tile& tile : lattice_.tiles)
            for_corners(tile,
                        [&](int64_t n, uint32_t vertex, double weight) { rows[vertex] += weight * values[n] * (pre ? pre[n] : 1.0); });
        for (size_t i = 0; i < lattice_.directions.size(); ++i) {
            const Lattice::Chains& chains = lattice_.directions[transposed ? lattice_.directions.size() - 1 - i : i];
            pool_.run(static_cast<int64_t>(chains.pieces.size()) - 1, [&](int64_t piece, int) { blur_chains(chains, piece, rows); });
        }
        const double factor = lattice_.amplitude() * channel_weight;
        pool_.run(static_cast<int64_t>(lattice_.tiles.size()), [&](int64_t t, int) {
            for_corners(lattice_.tiles[t], [&](int64_t n, uint32_t vertex, double weight) {
                sum[n] += factor * (post ? post[n] : 1.0) * weight * rows[vertex];
            });
        });
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    const Lattice lattice_;
    std::vector<uint32_t> vertex_of_further_;  // of each slot that is not a vertex's own
};

class DoubleSpatialFilter final : public DoubleFilter {
   public:
    DoubleSpatialFilter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool)
        : voxels_(voxels), pool_(pool), taps_(spatial_taps(voxels, theta_gamma, kSpatialRadius<double>)) {}

    void accumulate(const double* values, int num_channels, const double* pre, const double* post, const double* channel_weight,
                    double* sum, Workspace& workspace) override {
        for (int c = 0; c < num_channels; ++c) {
            const double* const filtered = filter(values + c * voxels_.num_voxels, pre, kNoAxis, workspace);
            for (const Run& run : voxels_.runs)
                for (int32_t i = 0; i < run.length; ++i)
                    sum[c * voxels_.num_voxels + run.voxel + i] +=
                        channel_weight[c] * (post ? post[run.voxel + i] : 1.0) * filtered[run.box + i];
        }
    }

    bool second_moments(const double* u, const double* v, int num_channels, double* squared, double* /*pull*/,
                        Workspace& workspace) override {
        for (int c = 0; c < num_channels; ++c)
            for (int axis = 0; axis < voxels_.num_axes; ++axis) {
                const double* const filtered = filter(v + c * voxels_.num_voxels, nullptr, axis, workspace);
                for (const Run& run : voxels_.runs)
                    for (int32_t i = 0; i < run.length; ++i)
                        squared[axis] += u[c * voxels_.num_voxels + run.voxel + i] * filtered[run.box + i];
            }
        return true;
    }

    std::string description() const override { return "separable, float64"; }

   private:
    static constexpr int kNoAxis = -1;

    // One channel over the box, with the slopes instead of the weights for the axis `differentiated`; in the workspace.
    const double* filter(const double* values, const double* pre, int differentiated, Workspace& workspace) {
        double *from = workspace.values<double>(2 * voxels_.box_size), *to = from + voxels_.box_size;
        std::fill(from, from + voxels_.box_size, 0.0);
        for (const Run& run : voxels_.runs)
            for (int32_t i = 0; i < run.length; ++i) from[run.box + i] = values[run.voxel + i] * (pre ? pre[run.voxel + i] : 1.0);
        int64_t inner = voxels_.box_size;
        for (int a = 0; a < voxels_.num_axes; ++a) {
            inner /= voxels_.box_shape[a];
            filter_axis(a == differentiated ? taps_[a].slope : taps_[a].weight, voxels_.box_shape[a], inner, from, to);
            std::swap(from, to);
        }
        return from;
    }

    void filter_axis(const std::vector<double>& taps, int64_t length, int64_t inner, const double* from, double* to) {
        const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
        pool_.run(voxels_.box_size / inner, [&](int64_t row, int) {
            const int64_t place = row % length;
            double* const out = to + row * inner;
            std::fill(out, out + inner, 0.0);
            for (int64_t k = std::max(-radius, -place); k <= std::min(radius, length - 1 - place); ++k)
                for (int64_t i = 0; i < inner; ++i) out[i] += taps[std::abs(k)] * from[(row + k) * inner + i];
        });
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    std::vector<SpatialTaps> taps_;
};

}  // namespace

std::unique_ptr<DoubleFilter> make_double_bilateral_filter(const std::string& requested, const BilateralInput& input,
                                                           const std::vector<const double*>& intensity, int num_channels,
                                                           int num_filterings, ThreadPool& pool) {
    const std::string chosen = choose_filter(requested, input, num_channels, num_filterings, false);
    if (chosen == "exact") return std::make_unique<DoubleExactFilter>(input, intensity, pool);
    if (chosen == "truncated") return std::make_unique<DoubleTruncatedFilter>(input, intensity, pool);
    if (chosen == "lattice") return std::make_unique<DoubleLatticeFilter>(input, pool);
    if (chosen == "grid") throw InputError("the filter 'grid' works in single precision only; use float32, or another filter for float64");
    throw InputError("unknown filter '" + requested + "'");
}

std::unique_ptr<DoubleFilter> make_double_spatial_filter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool) {
    return std::make_unique<DoubleSpatialFilter>(voxels, theta_gamma, pool);
}

}  // namespace crf
