#include "cpu/tile_kernels.h"

#include <cmath>

#include "cpu/simd.h"
#include "cpu/spatial_taps.h"
#include "cpu/window.h"

namespace crf {

namespace {

constexpr double kLog2e = 1.4426950408889634;  // exp(x) = 2^(x kLog2e)

// Labels whose sums stay in registers.
constexpr int kMostTogether = 8;

// Rows that are processed together, so that the latency of one row's exponentials hides behind the other's.
constexpr int kRowsTogether = 2;

struct Offset {
    int64_t x;       // voxels along the row
    float exponent;  // log2 of the spatial part of the weight
};

// The offsets to one row of the neighborhood, in the order of their distance along it.
struct OffsetRow {
    int64_t z, y;
    int64_t begin, own_begin, own_end, end;  // of the offsets: to the left, none along the row, to the right
};

class BilateralTileKernel final : public TileKernel {
   public:
    BilateralTileKernel(const Tiling& tiling, const DirectKernel& kernel, const int64_t (&reach)[3])
        : TileKernel(tiling, reach), kernel_(kernel), num_modalities_(static_cast<int>(kernel.intensity.size())) {
        for (double theta : kernel.theta_beta) precision_.push_back(static_cast<float>(0.5 * kLog2e / (theta * theta)));
        for (int64_t z = -reach[0]; z <= reach[0]; ++z)
            for (int64_t y = -reach[1]; y <= reach[1]; ++y) {
                OffsetRow row{z, y, 0, 0, 0, 0};
                row.begin = row.own_begin = row.own_end = static_cast<int64_t>(offsets_.size());
                for (int64_t x = -reach[2]; x <= reach[2]; ++x) {
                    const double scaled[3] = {z / kernel.sigma[0], y / kernel.sigma[1], x / kernel.sigma[2]};
                    const double square = scaled[0] * scaled[0] + scaled[1] * scaled[1] + scaled[2] * scaled[2];
                    if (square > kTruncationRadius * kTruncationRadius * (1 + 1e-6) || (z == 0 && y == 0 && x == 0)) continue;
                    offsets_.push_back({x, static_cast<float>(-0.5 * square * kLog2e)});
                    if (x < 0) row.own_begin = static_cast<int64_t>(offsets_.size());
                    if (x <= 0) row.own_end = static_cast<int64_t>(offsets_.size());
                }
                row.end = static_cast<int64_t>(offsets_.size());
                if (row.begin < row.end) offset_rows_.push_back(row);
            }
    }

    // Intensities around the tile. Beyond the grid they may be any: nothing is sent from there. They are read from the image, and copied at
    // its ends, where this would lead out of the image.
    void enter(int64_t tile, TileScratch& scratch) const override {
        const int64_t row = tiling_.shape[2], plane = tiling_.shape[1] * row;
        int64_t at[3];
        tiling_.place(tile, at);
        const int64_t first = tiling_.begin(0, at[0]) * plane + tiling_.begin(1, at[1]) * row + tiling_.begin(2, at[2]);
        const int64_t before = around.halo[0] * plane + around.halo[1] * row + around.halo[2];
        const int64_t after = before + (tiling_.tile[0] - 1) * plane + (tiling_.tile[1] - 1) * row + tiling_.tile[2];
        scratch.image.resize(num_modalities_);
        if (first >= before && first + after <= tiling_.num_voxels()) {
            for (int m = 0; m < num_modalities_; ++m) scratch.image[m] = kernel_.intensity[m] + first;
            scratch.image_row = row;
            scratch.image_plane = plane;
            return;
        }
        scratch.intensity.resize(num_modalities_ * around.size);
        around.for_rows(tiling_, tile, [&](const Neighborhood::Piece& piece) {
            for (int m = 0; m < num_modalities_; ++m)
                std::copy_n(kernel_.intensity[m] + piece.grid, piece.length, scratch.intensity.data() + m * around.size + piece.place);
        });
        for (int m = 0; m < num_modalities_; ++m) scratch.image[m] = scratch.intensity.data() + m * around.size + around.own_row(0, 0);
        scratch.image_row = around.shape[2];
        scratch.image_plane = around.shape[1] * around.shape[2];
    }

    void sum(int num_labels, const uint8_t* is_open, TileScratch& scratch) const override {
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
    void sum_labels(int first, const uint8_t* is_open, TileScratch& scratch) const {
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
    void sum_modalities(int first, const uint8_t* is_open, TileScratch& scratch) const {
        constexpr int kHeld = M > 0 ? M : 1;
        const int64_t num_rows = tiling_.tile[0] * tiling_.tile[1];
        for (int64_t row = 0; row < num_rows; row += kRowsTogether) {
            if (!is_any_open(is_open + row, kRowsTogether)) continue;
            for (int64_t x = 0; x < tiling_.tile[2]; x += kLanes) {
                Receiver<L, kHeld> receivers[kRowsTogether];
                for (int r = 0; r < kRowsTogether; ++r) {
                    Receiver<L, kHeld>& receiver = receivers[r];
                    receiver.row = own_row(row + r);
                    receiver.voxel =
                        (row + r) / tiling_.tile[1] * scratch.image_plane + (row + r) % tiling_.tile[1] * scratch.image_row + x;
                    receiver.sent = (row + r) / tiling_.tile[1] * scratch.sent_plane + (row + r) % tiling_.tile[1] * scratch.sent_row + x;
                    for (int l = 0; l < L; ++l)
                        receiver.total[l] = scratch.sends[receiver.row] ? load(scratch.sent_of[first + l] + receiver.sent) : vfloat{};
                    for (int m = 0; m < M; ++m) receiver.own[m] = load(scratch.image[m] + receiver.voxel);
                }
                for (const OffsetRow& offsets : offset_rows_) {
                    uint8_t sends[kRowsTogether], all = 0;
                    bool both = true;
                    for (int r = 0; r < kRowsTogether; ++r) {
                        sends[r] =
                            is_open[row + r] ? scratch.sends[receivers[r].row + offsets.z * around.shape[1] + offsets.y] : uint8_t{0};
                        all |= sends[r];
                        both &= sends[r] != 0;
                    }
                    if (!all) continue;
                    const Offset* const begin = offsets_.data() + (all & (kLeft | kOwn) ? offsets.begin : offsets.own_end);
                    const Offset* const end = offsets_.data() + (all & (kOwn | kRight) ? offsets.end : offsets.own_begin);
                    if (both) {
                        add_row<L, M, kRowsTogether>(first, offsets, begin, end, scratch, receivers);
                    } else {
                        for (int r = 0; r < kRowsTogether; ++r)
                            if (sends[r]) add_row<L, M, 1>(first, offsets, begin, end, scratch, receivers + r);
                    }
                }
                for (int r = 0; r < kRowsTogether; ++r)
                    for (int l = 0; l < L; ++l)
                        store(scratch.received.data() + (first + l) * tiling_.tile_voxels() + (row + r) * tiling_.tile[2] + x,
                              receivers[r].total[l]);
            }
        }
    }

    // A vector of voxels that receive. H: modalities that are held in registers.
    template <int L, int H>
    struct Receiver {
        int64_t row;    // in the neighborhood
        int64_t voxel;  // the first one, from the tile's first
        int64_t sent;   // the same where it sends
        vfloat total[L], own[H];
    };

    // What one row of the neighborhood sends to each of R vectors of voxels.
    template <int L, int M, int R>
    void add_row(int first, const OffsetRow& row, const Offset* begin, const Offset* end, const TileScratch& scratch,
                 Receiver<L, (M > 0 ? M : 1)>* receivers) const {
        const int64_t image_away = row.z * scratch.image_plane + row.y * scratch.image_row;
        const int64_t sent_away = row.z * scratch.sent_plane + row.y * scratch.sent_row;
        const float* sent[R][L];
        vfloat total[R][L], own[R][M > 0 ? M : 1];
        for (int r = 0; r < R; ++r) {
            for (int l = 0; l < L; ++l) {
                total[r][l] = receivers[r].total[l];
                sent[r][l] = scratch.sent_of[first + l] + receivers[r].sent + sent_away;
            }
            for (int m = 0; m < M; ++m) own[r][m] = receivers[r].own[m];
        }
        for (const Offset* offset = begin; offset < end; ++offset) {
            for (int r = 0; r < R; ++r) {
                vfloat exponent = splat_lanes(offset->exponent);
                for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
                    const float* const image = scratch.image[m] + receivers[r].voxel;
                    const vfloat difference = (M > 0 ? own[r][M > 0 ? m : 0] : load(image)) - load(image + image_away + offset->x);
                    exponent -= difference * difference * precision_[m];
                }
                const vfloat weight = exp2_nonpositive(exponent);
                for (int l = 0; l < L; ++l) total[r][l] += weight * load(sent[r][l] + offset->x);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int l = 0; l < L; ++l) receivers[r].total[l] = total[r][l];
    }

    const DirectKernel& kernel_;
    int num_modalities_;
    std::vector<Offset> offsets_;
    std::vector<OffsetRow> offset_rows_;
    std::vector<float> precision_;  // (modality) turns the square of a difference into an exponent of 2
};

// Axis by axis: along the last axis in all rows of the neighborhood, then along the second in all planes, then along the first.
class SpatialTileKernel final : public TileKernel {
   public:
    SpatialTileKernel(const Tiling& tiling, std::vector<SpatialTaps> taps, const int64_t (&reach)[3])
        : TileKernel(tiling, reach), taps_(std::move(taps)) {}

    void enter(int64_t, TileScratch&) const override {}

    void sum(int num_labels, const uint8_t* /*is_open*/, TileScratch& scratch) const override {
        const int64_t width = tiling_.tile[2], rows = around.shape[1], planes = around.shape[0];
        scratch.pass.resize((planes * rows + planes * tiling_.tile[1]) * width);
        float* const along_x = scratch.pass.data();
        float* const along_y = along_x + planes * rows * width;
        for (int label = 0; label < num_labels; ++label) {
            const float* sent = scratch.sent.data() + label * around.size;
            for (int64_t row = 0; row < planes * rows; ++row) {
                if (scratch.sends[row]) {
                    blur(sent + row * around.shape[2] + around.halo[2], 1, taps_[2].weight, width, along_x + row * width);
                } else {
                    std::fill_n(along_x + row * width, width, 0.0f);
                }
            }
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

}  // namespace

std::unique_ptr<TileKernel> make_bilateral_tile_kernel(const Tiling& tiling, const DirectKernel& kernel) {
    int64_t reach[3];
    for (int a = 0; a < 3; ++a) reach[a] = window_radius(kernel.sigma[a], tiling.shape[a]);
    return std::make_unique<BilateralTileKernel>(tiling, kernel, reach);
}

std::unique_ptr<TileKernel> make_spatial_tile_kernel(const Tiling& tiling, const DirectKernel& kernel) {
    int64_t reach[3];
    std::vector<SpatialTaps> taps = spatial_taps(kernel.sigma, {tiling.shape[0], tiling.shape[1], tiling.shape[2]}, kSpatialRadius<float>);
    for (int a = 0; a < 3; ++a) reach[a] = static_cast<int64_t>(taps[a].weight.size()) - 1;
    return std::make_unique<SpatialTileKernel>(tiling, std::move(taps), reach);
}

}  // namespace crf
