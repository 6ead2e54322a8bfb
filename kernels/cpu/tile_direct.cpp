// Direct sums tile by tile: a tile and its surroundings are copied into an array per label that is present in the tile, and each pair's
// weight is computed once for all of them. Work and memory follow the labels that are present.
#include <algorithm>
#include <cmath>

#include "cpu/row_map.h"
#include "cpu/simd.h"
#include "cpu/spatial_taps.h"
#include "cpu/tile_filter.h"
#include "cpu/window.h"

namespace crf {

namespace {

constexpr double kLog2e = 1.4426950408889634;  // exp(x) = 2^(x kLog2e)

// Labels whose sums stay in registers.
constexpr int kMostTogether = 8;

// Rows that are processed together, so that the latency of one row's exponentials hides behind the other's.
constexpr int kRowsTogether = 2;

struct Offset {
    int64_t linear;  // distance in the neighborhood's array
    float exponent;  // log2 of the spatial part of the weight
};

bool is_any_open(const uint8_t* rows, int64_t count) {
    return std::any_of(rows, rows + count, [](uint8_t open) { return open != 0; });
}

// Scratch of a thread: arrays of a neighborhood.
struct Scratch {
    std::vector<float> intensity, scale, sent, received, pass;
};

// A kernel without its normalization: sums over the neighborhood of a tile.
class TileKernel {
   public:
    TileKernel(const Tiling& tiling, const int64_t (&reach)[3]) : around(tiling, reach), tiling_(tiling) {}
    virtual ~TileKernel() = default;

    // Prepares the tile whose sums follow.
    virtual void enter(int64_t tile, Scratch& scratch) const = 0;
    // received: (label, voxel of the tile), from scratch.sent: (label, voxel of the neighborhood). is_open: (row of the tile), or nullptr
    // for all; other rows of `received` may be anything.
    virtual void sum(int num_labels, const uint8_t* is_open, Scratch& scratch) const = 0;

    const Neighborhood around;

   protected:
    const Tiling& tiling_;
};

class BilateralTileKernel final : public TileKernel {
   public:
    BilateralTileKernel(const Tiling& tiling, const DirectKernel& kernel, const int64_t (&reach)[3])
        : TileKernel(tiling, reach), kernel_(kernel), num_modalities_(static_cast<int>(kernel.intensity.size())) {
        for (int64_t z = -reach[0]; z <= reach[0]; ++z)
            for (int64_t y = -reach[1]; y <= reach[1]; ++y)
                for (int64_t x = -reach[2]; x <= reach[2]; ++x) {
                    const double scaled[3] = {z / kernel.sigma[0], y / kernel.sigma[1], x / kernel.sigma[2]};
                    const double square = scaled[0] * scaled[0] + scaled[1] * scaled[1] + scaled[2] * scaled[2];
                    if (square > kTruncationRadius * kTruncationRadius * (1 + 1e-6) || (z == 0 && y == 0 && x == 0)) continue;
                    offsets_.push_back({(z * around.shape[1] + y) * around.shape[2] + x, static_cast<float>(-0.5 * square * kLog2e)});
                }
    }

    void enter(int64_t tile, Scratch& scratch) const override {
        scratch.intensity.assign(num_modalities_ * around.size, 0.0f);
        for (int m = 0; m < num_modalities_; ++m) {
            const float scale = static_cast<float>(std::sqrt(0.5 * kLog2e) / kernel_.theta_beta[m]);
            float* to = scratch.intensity.data() + m * around.size;
            around.for_rows(tiling_, tile, [&](int64_t, int64_t, int64_t grid, int64_t place, int64_t length) {
                const float* from = kernel_.intensity[m] + grid;
                for (int64_t i = 0; i < length; ++i) to[place + i] = from[i] * scale;
            });
        }
    }

    void sum(int num_labels, const uint8_t* is_open, Scratch& scratch) const override {
        for (int first = 0; first < num_labels; first += kMostTogether) {
            switch (std::min(kMostTogether, num_labels - first)) {
                case 1:
                    sum_labels<1>(first, is_open, scratch);
                    break;
                case 2:
                    sum_labels<2>(first, is_open, scratch);
                    break;
                case 3:
                    sum_labels<3>(first, is_open, scratch);
                    break;
                case 4:
                    sum_labels<4>(first, is_open, scratch);
                    break;
                case 5:
                    sum_labels<5>(first, is_open, scratch);
                    break;
                case 6:
                    sum_labels<6>(first, is_open, scratch);
                    break;
                case 7:
                    sum_labels<7>(first, is_open, scratch);
                    break;
                default:
                    sum_labels<kMostTogether>(first, is_open, scratch);
                    break;
            }
        }
    }

   private:
    template <int L>
    void sum_labels(int first, const uint8_t* is_open, Scratch& scratch) const {
        switch (num_modalities_) {
            case 1:
                return sum_modalities<L, 1>(first, is_open, scratch);
            case 2:
                return sum_modalities<L, 2>(first, is_open, scratch);
            default:
                return sum_modalities<L, 0>(first, is_open, scratch);
        }
    }

    // L: labels; M: modalities, 0 = any.
    template <int L, int M>
    void sum_modalities(int first, const uint8_t* is_open, Scratch& scratch) const {
        const int num_modalities = M > 0 ? M : num_modalities_;
        const int64_t num_rows = tiling_.tile[0] * tiling_.tile[1];
        for (int64_t row = 0; row < num_rows; row += kRowsTogether) {
            if (is_open && !is_any_open(is_open + row, kRowsTogether)) continue;
            for (int64_t x = 0; x < tiling_.tile[2]; x += kLanes) {
                const float *intensity[kRowsTogether], *sent[kRowsTogether];
                vfloat total[kRowsTogether][L], own[kRowsTogether][M > 0 ? M : 1];
                for (int r = 0; r < kRowsTogether; ++r) {
                    const int64_t place = around.own_row((row + r) / tiling_.tile[1], (row + r) % tiling_.tile[1]) + x;
                    intensity[r] = scratch.intensity.data() + place;
                    sent[r] = scratch.sent.data() + first * around.size + place;
                    for (int l = 0; l < L; ++l) total[r][l] = load(sent[r] + l * around.size);
                    for (int m = 0; m < M; ++m) own[r][m] = load(intensity[r] + m * around.size);
                }
                for (const Offset& offset : offsets_) {
                    for (int r = 0; r < kRowsTogether; ++r) {
                        vfloat exponent = splat_lanes(offset.exponent);
                        for (int m = 0; m < num_modalities; ++m) {
                            const vfloat here = M > 0 ? own[r][M > 0 ? m : 0] : load(intensity[r] + m * around.size);
                            const vfloat difference = here - load(intensity[r] + m * around.size + offset.linear);
                            exponent -= difference * difference;
                        }
                        const vfloat weight = exp2_nonpositive(exponent);
                        for (int l = 0; l < L; ++l) total[r][l] += weight * load(sent[r] + l * around.size + offset.linear);
                    }
                }
                for (int r = 0; r < kRowsTogether; ++r)
                    for (int l = 0; l < L; ++l)
                        store(scratch.received.data() + (first + l) * tiling_.tile_voxels() + (row + r) * tiling_.tile[2] + x, total[r][l]);
            }
        }
    }

    const DirectKernel& kernel_;
    int num_modalities_;
    std::vector<Offset> offsets_;
};

// Axis by axis: along the last axis in all rows of the neighborhood, then along the second in all planes, then along the first.
class SpatialTileKernel final : public TileKernel {
   public:
    SpatialTileKernel(const Tiling& tiling, std::vector<SpatialTaps> taps, const int64_t (&reach)[3])
        : TileKernel(tiling, reach), taps_(std::move(taps)) {}

    void enter(int64_t, Scratch&) const override {}

    void sum(int num_labels, const uint8_t* /*is_open*/, Scratch& scratch) const override {
        const int64_t width = tiling_.tile[2], rows = around.shape[1], planes = around.shape[0];
        scratch.pass.resize((planes * rows + planes * tiling_.tile[1]) * width);
        float* const along_x = scratch.pass.data();
        float* const along_y = along_x + planes * rows * width;
        for (int label = 0; label < num_labels; ++label) {
            const float* sent = scratch.sent.data() + label * around.size;
            for (int64_t row = 0; row < planes * rows; ++row)
                blur(sent + row * around.shape[2] + around.halo[2], 1, taps_[2].weight, width, along_x + row * width);
            for (int64_t z = 0; z < planes; ++z)
                for (int64_t y = 0; y < tiling_.tile[1]; ++y)
                    blur(along_x + (z * rows + y + around.halo[1]) * width, width, taps_[1].weight, width,
                         along_y + (z * tiling_.tile[1] + y) * width);
            for (int64_t z = 0; z < tiling_.tile[0]; ++z)
                for (int64_t y = 0; y < tiling_.tile[1]; ++y)
                    blur(along_y + ((z + around.halo[0]) * tiling_.tile[1] + y) * width, tiling_.tile[1] * width, taps_[0].weight, width,
                         scratch.received.data() + label * tiling_.tile_voxels() + (z * tiling_.tile[1] + y) * width);
        }
    }

   private:
    static void blur(const float* from, int64_t stride, const std::vector<double>& weight, int64_t width, float* to) {
        for (int64_t x = 0; x < width; x += kLanes) {
            vfloat total = load(from + x) * static_cast<float>(weight[0]);
            for (size_t k = 1; k < weight.size(); ++k) {
                const int64_t away = static_cast<int64_t>(k) * stride;
                total += (load(from + x - away) + load(from + x + away)) * static_cast<float>(weight[k]);
            }
            store(to + x, total);
        }
    }

    const std::vector<SpatialTaps> taps_;
};

class DirectTileFilter final : public TileFilter {
   public:
    DirectTileFilter(const TileSet& set, const uint8_t* is_open, std::unique_ptr<TileKernel> kernel, Normalization normalization,
                     ThreadPool& pool)
        : set_(set), kernel_(std::move(kernel)), pool_(pool), normalization_(normalization), scratch_(pool.num_threads()) {
        if (normalization_ != Normalization::kNone) normalize(is_open);
    }

    bool skips_rows() const override { return true; }

    void accumulate(const float* marginals, const uint8_t* is_open, const float* label_weight, float* message) override {
        const int64_t voxels = set_.tiling.tile_voxels(), width = set_.tiling.tile[2], num_rows = voxels / width;
        pool_.run(set_.num_active, [&](int64_t item, int thread) {
            Scratch& scratch = scratch_[thread];
            const uint8_t* open = is_open + item * num_rows;
            if (!is_any_open(open, num_rows)) return;
            const int64_t first = set_.first_entry[item], num_labels = set_.first_entry[item + 1] - first;
            kernel_->enter(set_.active[item], scratch);
            send(item, marginals, scratch);
            scratch.received.resize(num_labels * voxels);
            kernel_->sum(static_cast<int>(num_labels), open, scratch);
            const float* post = normalization_ == Normalization::kNone ? nullptr : scale_.get() + near_[set_.active[item]] * voxels;
            for (int64_t l = 0; l < num_labels; ++l) {
                const float weight = label_weight[set_.label[first + l]];
                const float* from = scratch.received.data() + l * voxels;
                float* to = message + (first + l) * voxels;
                for (int64_t row = 0; row < num_rows; ++row)
                    for (int64_t i = open[row] ? row * width : voxels; i < (row + 1) * width; ++i)
                        to[i] += weight * (post ? post[i] : 1.0f) * from[i];
            }
        });
    }

   private:
    // What the labels of an active tile send in its neighborhood.
    void send(int64_t item, const float* marginals, Scratch& scratch) const {
        const Neighborhood& around = kernel_->around;
        const int64_t voxels = set_.tiling.tile_voxels(), first = set_.first_entry[item];
        const int64_t num_labels = set_.first_entry[item + 1] - first;
        scratch.sent.assign(num_labels * around.size, 0.0f);
        int64_t last = -1, active = -1;
        std::vector<int64_t> entry(num_labels);
        around.for_rows(set_.tiling, set_.active[item], [&](int64_t tile, int64_t in_tile, int64_t grid, int64_t place, int64_t length) {
            if (tile != last) {
                last = tile;
                active = set_.index[tile];
                if (active >= 0)
                    for (int64_t l = 0; l < num_labels; ++l) entry[l] = set_.find_entry(active, set_.label[first + l]);
            }
            if (active < 0 && set_.settled[tile] < 0) return;
            if (normalization_ == Normalization::kSymmetric && near_[tile] < 0) return;  // out of reach of all rows that receive
            const float* scale = normalization_ == Normalization::kSymmetric ? scale_.get() + near_[tile] * voxels + in_tile : nullptr;
            for (int64_t l = 0; l < num_labels; ++l) {
                float* to = scratch.sent.data() + l * around.size + place;
                if (active >= 0) {
                    if (entry[l] < 0) continue;
                    const float* from = marginals + entry[l] * voxels + in_tile;  // 0 outside the mask
                    for (int64_t i = 0; i < length; ++i) to[i] = from[i] * (scale ? scale[i] : 1.0f);
                } else if (set_.settled[tile] == set_.label[first + l]) {
                    for (int64_t i = 0; i < length; ++i) to[i] = set_.is_inside(grid + i) ? (scale ? scale[i] : 1.0f) : 0.0f;
                }
            }
        });
    }

    // Fills `scale_`: the factor of the normalization in the rows that receive, or send to them.
    void normalize(const uint8_t* is_open) {
        const Tiling& tiling = set_.tiling;
        const Neighborhood& around = kernel_->around;
        const int64_t voxels = tiling.tile_voxels(), num_rows = voxels / tiling.tile[2];
        RowMap needed(tiling);
        for (int64_t item = 0; item < set_.num_active; ++item) needed.mark(set_.active[item], is_open + item * num_rows);
        if (normalization_ == Normalization::kSymmetric) needed.widen(around.halo);
        near_.assign(tiling.num_tiles(), -1);
        std::vector<int64_t> tiles;
        std::vector<uint8_t> rows;
        for (int64_t tile = 0; tile < tiling.num_tiles(); ++tile) {
            const std::vector<uint8_t> of_tile = needed.rows(tile);
            if (!is_any_open(of_tile.data(), num_rows)) continue;
            near_[tile] = static_cast<int64_t>(tiles.size());
            tiles.push_back(tile);
            rows.insert(rows.end(), of_tile.begin(), of_tile.end());
        }
        scale_ = Buffer<float>(static_cast<int64_t>(tiles.size()) * voxels);
        pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t item, int thread) {
            Scratch& scratch = scratch_[thread];
            const uint8_t* const needed_rows = rows.data() + item * num_rows;
            kernel_->enter(tiles[item], scratch);
            scratch.sent.assign(around.size, 0.0f);
            around.for_rows(tiling, tiles[item], [&](int64_t, int64_t, int64_t grid, int64_t place, int64_t length) {
                for (int64_t i = 0; i < length; ++i) scratch.sent[place + i] = set_.is_inside(grid + i) ? 1.0f : 0.0f;
            });
            scratch.received.resize(voxels);
            kernel_->sum(1, needed_rows, scratch);
            float* scale = scale_.get() + item * voxels;
            for (int64_t i = 0; i < voxels; ++i) {
                // A voxel inside the mask counts itself with weight 1; the others do not matter.
                const float total = needed_rows[i / tiling.tile[2]] ? scratch.received[i] : 0.0f,
                            inverse = total >= 0.5f ? 1 / total : 0.0f;
                scale[i] = normalization_ == Normalization::kSymmetric ? std::sqrt(inverse) : inverse;
            }
        });
    }

    const TileSet& set_;
    const std::unique_ptr<TileKernel> kernel_;
    ThreadPool& pool_;
    const Normalization normalization_;
    std::vector<Scratch> scratch_;
    std::vector<int64_t> near_;  // (tile) where its voxels are in `scale_`, or -1
    Buffer<float> scale_;
};

}  // namespace

std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const uint8_t* is_open, const DirectKernel& kernel,
                                                    Normalization normalization, ThreadPool& pool) {
    int64_t reach[3];
    if (!kernel.intensity.empty()) {
        for (int a = 0; a < 3; ++a) reach[a] = window_radius(kernel.sigma[a], set.tiling.shape[a]);
        return std::make_unique<DirectTileFilter>(set, is_open, std::make_unique<BilateralTileKernel>(set.tiling, kernel, reach),
                                                  normalization, pool);
    }
    std::vector<SpatialTaps> taps =
        spatial_taps(kernel.sigma, {set.tiling.shape[0], set.tiling.shape[1], set.tiling.shape[2]}, kSpatialRadius<float>);
    for (int a = 0; a < 3; ++a) reach[a] = static_cast<int64_t>(taps[a].weight.size()) - 1;
    return std::make_unique<DirectTileFilter>(set, is_open, std::make_unique<SpatialTileKernel>(set.tiling, std::move(taps), reach),
                                              normalization, pool);
}

}  // namespace crf
