#include "cpu/tile_filter.h"

#include "cpu/simd.h"
#include "cpu/spatial_rows.h"
#include "cpu/window.h"

namespace crf {
namespace {
// Exponent of voxels beyond the window in vectors that reach over its end: their weight is nothing
// beside any other.
constexpr float kBeyond = -100.0f;

// Spatial exponents of a row of the window from kLanes - 1 + kLanes voxels before its center on.
constexpr int64_t kTable = 4 * kLanes, kCenter = 2 * kLanes - 1;

// Half of the lanes: most rows with few open voxels have them within so many, and most rows of a
// voxel's window are no longer.
typedef LanesOfSize<float, 2 * kLanes> vhalf;
constexpr int64_t kHalfLanes = kLanes / 2;

// Costs of a row per voxel that sends, if its open voxels receive together, in all lanes or half;
// and of each voxel by itself.
constexpr int64_t kTogether = 8, kHalfTogether = 5, kAloneVector = 5, kAloneLabel = 8;

struct Offset {
    int64_t x;       // voxels along the row
    float exponent;  // log2 of the spatial part of the weight
};

// The offsets to one row of the neighborhood, in the order of their distance along it.
struct OffsetRow {
    int64_t z, y, reach;  // along the row
    int64_t begin, own_begin, own_end,
        end;          // of the offsets: to the left, none along the row, to the right
    int64_t away;     // rows of the neighborhood
    int64_t vectors;  // of half of the lanes, that hold the row of a voxel's window
};

class BilateralTileKernel final : public TileKernel {
   public:
    BilateralTileKernel(const Tiling& tiling, const DirectKernel& kernel, const int64_t (&reach)[3])
        : TileKernel(tiling, reach),
          kernel_(kernel),
          num_modalities_(static_cast<int>(kernel.intensity.size())) {
        for (double theta : kernel.theta_beta)
            precision_.push_back(static_cast<float>(0.5 * kLog2e / (theta * theta)));
        for (int64_t z = -reach[0]; z <= reach[0]; ++z)
            for (int64_t y = -reach[1]; y <= reach[1]; ++y) {
                OffsetRow row{z, y, -1, 0, 0, 0, 0, z * around.shape[1] + y, 0};
                row.begin = row.own_begin = row.own_end = static_cast<int64_t>(offsets_.size());
                std::vector<float> table(kTable, kBeyond);
                for (int64_t x = -reach[2]; x <= reach[2]; ++x) {
                    const double scaled[3] = {z / kernel.sigma[0], y / kernel.sigma[1],
                                              x / kernel.sigma[2]};
                    const double square =
                        scaled[0] * scaled[0] + scaled[1] * scaled[1] + scaled[2] * scaled[2];
                    if (square > kTruncationRadius * kTruncationRadius * (1 + 1e-6)) continue;
                    row.reach = std::max(row.reach, x);
                    const float exponent = static_cast<float>(-0.5 * square * kLog2e);
                    if (std::abs(x) <= kLanes) table[kCenter + x] = exponent;
                    if (z == 0 && y == 0 && x == 0) continue;
                    offsets_.push_back({x, exponent});
                    if (x < 0) row.own_begin = static_cast<int64_t>(offsets_.size());
                    if (x <= 0) row.own_end = static_cast<int64_t>(offsets_.size());
                }
                row.end = static_cast<int64_t>(offsets_.size());
                if (row.reach < 0) continue;
                row.vectors = 2 * row.reach / kHalfLanes + 1;
                offset_rows_.push_back(row);
                tables_.insert(tables_.end(), table.begin(), table.end());
            }
    }

    std::vector<WindowRow> window() const override {
        std::vector<WindowRow> rows;
        for (const OffsetRow& row : offset_rows_) rows.push_back({row.z, row.y, row.reach});
        return rows;
    }

    // Intensities around the tile, read from the image, and copied where this would lead out of it:
    // beyond the grid, and in the kBehind voxels after the neighborhood, they may be any.
    void enter(int64_t tile, TileScratch& scratch) const override {
        const int64_t row = tiling_.shape[2], plane = tiling_.shape[1] * row;
        int64_t at[3];
        tiling_.place(tile, at);
        const int64_t first = tiling_.begin(0, at[0]) * plane + tiling_.begin(1, at[1]) * row +
                              tiling_.begin(2, at[2]);
        const int64_t before = around.halo[0] * plane + around.halo[1] * row + around.halo[2];
        const int64_t after =
            before + (tiling_.tile[0] - 1) * plane + (tiling_.tile[1] - 1) * row + tiling_.tile[2];
        scratch.image.resize(num_modalities_);
        if (first >= before && first + after + kBehind <= tiling_.num_voxels()) {
            for (int m = 0; m < num_modalities_; ++m)
                scratch.image[m] = kernel_.intensity[m] + first;
            scratch.image_row = row;
            scratch.image_plane = plane;
            return;
        }
        scratch.intensity.resize(num_modalities_ * around.size + kBehind);
        around.for_rows(tiling_, tile, [&](const Neighborhood::Piece& piece) {
            for (int m = 0; m < num_modalities_; ++m)
                std::copy_n(kernel_.intensity[m] + piece.grid, piece.length,
                            scratch.intensity.data() + m * around.size + piece.place);
        });
        for (int m = 0; m < num_modalities_; ++m)
            scratch.image[m] = scratch.intensity.data() + m * around.size + around.own_row(0, 0);
        scratch.image_row = around.shape[2];
        scratch.image_plane = around.shape[1] * around.shape[2];
    }

    void sum(int num_labels, const LaneMask* open, TileScratch& scratch) const override {
        for (int first = 0; first < num_labels; first += kMostTogether)
            with_constant<1, 2, 3, 4, 5, 6, 7, kMostTogether>(
                std::min(kMostTogether, num_labels - first), [&](auto labels) {
                    with_constant<kHasWideRegisters, 2 * kHasWideRegisters, 0>(
                        num_modalities_, [&](auto modalities) {
                            sum_labels<labels(), modalities()>(first, open, scratch);
                        });
                });
    }

   private:
    // L: labels; M: modalities, 0 = any.
    template <int L, int M>
    void sum_labels(int first, const LaneMask* open, TileScratch& scratch) const {
        const int64_t num_rows = tiling_.tile[0] * tiling_.tile[1];
        const int64_t size = static_cast<int64_t>(offset_rows_.size());
        scratch.senders.resize(size);
        for (int64_t row = 0; row < num_rows; ++row) {
            if (!open[row]) continue;
            const int low = std::countr_zero(open[row]), span = std::bit_width(open[row]) - low;
            const bool is_half = span <= kHalfLanes;
            int64_t together = 0, vectors = 0, count = 0;
            const SentLanes* const sends =
                scratch.sends.data() + first / kMostTogether * num_rows_around() + own_row(row);
            for (int64_t n = 0; n < size; ++n) {
                const OffsetRow& offsets = offset_rows_[n];
                const SentLanes lanes = sends[offsets.away] & within(low, span, offsets);
                scratch.senders[count] = {n, lanes};
                count += lanes != 0;
                together += std::min<int64_t>(std::popcount(lanes), offsets.end - offsets.begin);
                vectors += lanes ? offsets.vectors : 0;
            }
            for (int l = 0; l < L; ++l) store(received(first + l, row, scratch), vfloat{});
            if (count == 0) continue;
            const int64_t alone =
                std::popcount(open[row]) * (kAloneVector * vectors + kAloneLabel * L);
            if (is_narrow() && alone < (is_half ? kHalfTogether : kTogether) * together) {
                for (uint32_t left = open[row]; left; left &= left - 1)
                    sum_alone<L, M>(first, row, std::countr_zero(left), count, scratch);
            } else if (is_half) {
                sum_together<vhalf, L, M>(first, row, std::min<int64_t>(low, kHalfLanes), count,
                                          scratch);
            } else if constexpr (sizeof(vfloat) <= kRegisterBytes) {
                sum_together<vfloat, L, M>(first, row, 0, count, scratch);
            } else {
                for (int64_t lane : {int64_t{0}, kHalfLanes})
                    sum_together<vhalf, L, M>(first, row, lane, count, scratch);
            }
        }
    }

    // The voxels of a row of the window within reach of `span` voxels of a row of the tile, from
    // the voxel `low` on.
    SentLanes within(int low, int span, const OffsetRow& offsets) const {
        return is_narrow() ? ((SentLanes{1} << (span + 2 * offsets.reach)) - 1)
                                 << (kLanes + low - offsets.reach)
                           : kEverywhere;
    }

    // Whether the surroundings along a row are one tile on each side, all of whose voxels have a
    // bit of their own.
    bool is_narrow() const { return around.halo[2] == kLanes; }

    // A vector of voxels, or one voxel, that receives. M: modalities that are held in registers.
    template <class V, int L, int M>
    struct Receiver {
        int64_t voxel,
            sent;  // the first one, from the tile's first: in the image, and where it sends
        V total[L]{}, own[M > 0 ? M : 1]{};
    };

    template <class V, int L, int M>
    Receiver<V, L, M> receiver_of(int64_t row, int64_t lane, const TileScratch& scratch) const {
        Receiver<V, L, M> receiver;
        const int64_t z = row / tiling_.tile[1], y = row % tiling_.tile[1];
        receiver.voxel = z * scratch.image_plane + y * scratch.image_row + lane;
        receiver.sent = z * scratch.sent_plane + y * scratch.sent_row + lane;
        for (int m = 0; m < M; ++m)
            receiver.own[m] = load_lanes<V>(scratch.image[m] + receiver.voxel);
        return receiver;
    }

    float* received(int64_t label, int64_t row, TileScratch& scratch) const {
        return scratch.received.data() + label * tiling_.tile_voxels() + row * kLanes;
    }

    // What a row receives. Of each row of the window: of all its offsets or of all voxels that
    // send, whichever are fewer.
    template <class V, int L, int M>
    void sum_together(int first, int64_t row, int64_t lane, int64_t count,
                      TileScratch& scratch) const {
        Receiver<V, L, M> receiver = receiver_of<V, L, M>(row, lane, scratch);
        for (int64_t n = 0; n < count; ++n) {
            const SendingRow& sender = scratch.senders[n];
            const OffsetRow& offsets = offset_rows_[sender.number];
            if (is_narrow() && std::popcount(sender.lanes) < offsets.end - offsets.begin) {
                add_senders<V, L, M>(first, offsets, sender, lane, scratch, receiver);
            } else {
                add_offsets<V, L, M>(first, offsets, sender.lanes, scratch, receiver);
            }
        }
        for (int l = 0; l < L; ++l)
            store_lanes(received(first + l, row, scratch) + lane, receiver.total[l]);
    }

    // What one row of the neighborhood sends to a vector of voxels.
    template <class V, int L, int M>
    void add_offsets(int first, const OffsetRow& row, SentLanes lanes, const TileScratch& scratch,
                     Receiver<V, L, M>& receiver) const {
        const int64_t image_away = row.z * scratch.image_plane + row.y * scratch.image_row;
        const int64_t sent_away = row.z * scratch.sent_plane + row.y * scratch.sent_row;
        const float *sent[L], *image[M > 0 ? M : 1]{};
        V total[L], own[M > 0 ? M : 1]{};
        for (int l = 0; l < L; ++l) {
            sent[l] = scratch.sent_of[first + l] + receiver.sent + sent_away;
            total[l] = receiver.total[l];
            if (row.away == 0)
                total[l] += load_lanes<V>(sent[l]);  // The offsets leave out the voxel itself.
        }
        for (int m = 0; m < M; ++m) {
            image[m] = scratch.image[m] + receiver.voxel + image_away;
            own[m] = receiver.own[m];
        }
        const Offset* const begin =
            offsets_.data() + (lanes & (kLeft | kOwn) ? row.begin : row.own_end);
        const Offset* const end =
            offsets_.data() + (lanes & (kOwn | kRight) ? row.end : row.own_begin);
        for (const Offset* offset = begin; offset < end; ++offset) {
            V exponent = splat<V>(offset->exponent);
            for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
                const float* const its =
                    M > 0 ? image[M > 0 ? m : 0] : scratch.image[m] + receiver.voxel + image_away;
                const V difference =
                    (M > 0 ? own[M > 0 ? m : 0] : load_lanes<V>(its - image_away)) -
                    load_lanes<V>(its + offset->x);
                exponent -= difference * difference * precision_[m];
            }
            const V weight = exp2_nonpositive(exponent);
            for (int l = 0; l < L; ++l) total[l] += weight * load_lanes<V>(sent[l] + offset->x);
        }
        for (int l = 0; l < L; ++l) receiver.total[l] = total[l];
    }

    // The same for one vector, voxel by voxel of those that send.
    template <class V, int L, int M>
    void add_senders(int first, const OffsetRow& row, const SendingRow& sender, int64_t lane,
                     const TileScratch& scratch, Receiver<V, L, M>& receiver) const {
        const int64_t image_away = row.z * scratch.image_plane + row.y * scratch.image_row;
        const int64_t sent_away = row.z * scratch.sent_plane + row.y * scratch.sent_row;
        const float* const table = tables_.data() + sender.number * kTable + kCenter;
        for (SentLanes left = sender.lanes; left; left &= left - 1) {
            const int64_t x = std::countr_zero(left) - kLanes;
            V exponent = load_lanes<V>(table + lane - x);
            for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
                const float* const image = scratch.image[m] + receiver.voxel;
                const V difference = (M > 0 ? receiver.own[M > 0 ? m : 0] : load_lanes<V>(image)) -
                                     splat<V>(image[image_away + x - lane]);
                exponent -= difference * difference * precision_[m];
            }
            const V weight = exp2_nonpositive(exponent);
            for (int l = 0; l < L; ++l)
                receiver.total[l] +=
                    weight * scratch.sent_of[first + l][receiver.sent + sent_away + x - lane];
        }
    }

    // What one voxel of a row receives: the lanes are the voxels that send.
    template <int L, int M>
    void sum_alone(int first, int64_t row, int lane, int64_t count, TileScratch& scratch) const {
        const Receiver<vhalf, L, M> receiver = receiver_of<vhalf, L, M>(row, lane, scratch);
        const float *image[M > 0 ? M : 1]{}, *sent[L];
        vhalf own[M > 0 ? M : 1]{}, total[L]{}, precision[M > 0 ? M : 1]{};
        for (int m = 0; m < M; ++m) {
            image[m] = scratch.image[m] + receiver.voxel;
            own[m] = splat<vhalf>(*image[m]);
            precision[m] = splat<vhalf>(precision_[m]);
        }
        for (int l = 0; l < L; ++l) sent[l] = scratch.sent_of[first + l] + receiver.sent;
        for (int64_t n = 0; n < count; ++n) {
            const OffsetRow& offsets = offset_rows_[scratch.senders[n].number];
            const float* const table =
                tables_.data() + scratch.senders[n].number * kTable + kCenter;
            const int64_t image_away =
                offsets.z * scratch.image_plane + offsets.y * scratch.image_row;
            const int64_t sent_away = offsets.z * scratch.sent_plane + offsets.y * scratch.sent_row;
            for (int64_t x = -offsets.reach; x <= offsets.reach; x += kHalfLanes) {
                vhalf exponent = load_lanes<vhalf>(table + x);
                for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
                    const float* const its =
                        M > 0 ? image[M > 0 ? m : 0] : scratch.image[m] + receiver.voxel;
                    const vhalf difference = (M > 0 ? own[M > 0 ? m : 0] : splat<vhalf>(*its)) -
                                             load_lanes<vhalf>(its + image_away + x);
                    exponent -= difference * difference *
                                (M > 0 ? precision[M > 0 ? m : 0] : splat<vhalf>(precision_[m]));
                }
                const vhalf weight = exp2_nonpositive(exponent);
                for (int l = 0; l < L; ++l)
                    total[l] += weight * load_lanes<vhalf>(sent[l] + sent_away + x);
            }
        }
        for (int l = 0; l < L; ++l)
            received(first + l, row, scratch)[lane] = sum_of_lanes<float>(total[l]);
    }

    const DirectKernel& kernel_;
    int num_modalities_;
    std::vector<Offset> offsets_;
    std::vector<OffsetRow> offset_rows_;
    // (row of the window, kTable) exponents at each distance along it, kBeyond outside the window
    std::vector<float> tables_;
    // (modality) turns the square of a difference into an exponent of 2
    std::vector<float> precision_;
};

// Axis by axis: along the last axis in all rows of the neighborhood, then along the second in all
// planes, then along the first.
class SpatialTileKernel final : public TileKernel {
   public:
    SpatialTileKernel(const Tiling& tiling, std::vector<SpatialTaps> taps,
                      const int64_t (&reach)[3])
        : TileKernel(tiling, reach), taps_(std::move(taps)) {}

    void enter(int64_t, TileScratch&) const override {}

    std::vector<WindowRow> window() const override {
        std::vector<WindowRow> rows;
        for (int64_t z = 1 - static_cast<int64_t>(taps_[0].weight.size());
             z < static_cast<int64_t>(taps_[0].weight.size()); ++z)
            for (int64_t y = 1 - static_cast<int64_t>(taps_[1].weight.size());
                 y < static_cast<int64_t>(taps_[1].weight.size()); ++y)
                rows.push_back({z, y, static_cast<int64_t>(taps_[2].weight.size()) - 1});
        return rows;
    }

    void sum(int num_labels, const LaneMask* /*open*/, TileScratch& scratch) const override {
        const int64_t width = tiling_.tile[2], rows = around.shape[1], planes = around.shape[0];
        scratch.pass.resize((planes * rows + planes * tiling_.tile[1]) * width);
        float* const along_x = scratch.pass.data();
        float* const along_y = along_x + planes * rows * width;
        for (int label = 0; label < num_labels; ++label) {
            const float* const sent = scratch.sent_of[label] - around.own_row(0, 0);
            const SentLanes* const sends =
                scratch.sends.data() + label / kMostTogether * num_rows_around();
            for (int64_t row = 0; row < planes * rows; ++row) {
                if (sends[row]) {
                    blur(sent + row * around.shape[2] + around.halo[2], 1, taps_[2].weight, width,
                         along_x + row * width);
                } else {
                    std::fill_n(along_x + row * width, width, 0.0f);
                }
            }
            for (int64_t z = 0; z < planes; ++z)
                for (int64_t y = 0; y < tiling_.tile[1]; ++y)
                    blur(along_x + (z * rows + y + around.halo[1]) * width, width, taps_[1].weight,
                         width, along_y + (z * tiling_.tile[1] + y) * width);
            for (int64_t z = 0; z < tiling_.tile[0]; ++z)
                for (int64_t y = 0; y < tiling_.tile[1]; ++y)
                    blur(along_y + ((z + around.halo[0]) * tiling_.tile[1] + y) * width,
                         tiling_.tile[1] * width, taps_[0].weight, width,
                         scratch.received.data() + label * tiling_.tile_voxels() +
                             (z * tiling_.tile[1] + y) * width);
        }
    }

   private:
    static void blur(const float* from, int64_t stride, const std::vector<double>& weight,
                     int64_t width, float* to) {
        for (int64_t x = 0; x < width; x += kLanes) {
            vfloat total = load(from + x) * static_cast<float>(weight[0]);
            for (size_t k = 1; k < weight.size(); ++k) {
                const int64_t away = static_cast<int64_t>(k) * stride;
                total +=
                    (load(from + x - away) + load(from + x + away)) * static_cast<float>(weight[k]);
            }
            store(to + x, total);
        }
    }

    const std::vector<SpatialTaps> taps_;
};
}  // namespace

std::unique_ptr<TileKernel> make_bilateral_tile_kernel(const Tiling& tiling,
                                                       const DirectKernel& kernel) {
    int64_t reach[3];
    for (int a = 0; a < 3; ++a) reach[a] = window_radius(kernel.sigma[a], tiling.shape[a]);
    return std::make_unique<BilateralTileKernel>(tiling, kernel, reach);
}

std::unique_ptr<TileKernel> make_spatial_tile_kernel(const Tiling& tiling,
                                                     const DirectKernel& kernel) {
    int64_t reach[3];
    std::vector<SpatialTaps> taps =
        spatial_taps(kernel.sigma, {tiling.shape[0], tiling.shape[1], tiling.shape[2]});
    for (int a = 0; a < 3; ++a) reach[a] = static_cast<int64_t>(taps[a].weight.size()) - 1;
    return std::make_unique<SpatialTileKernel>(tiling, std::move(taps), reach);
}
}  // namespace crf
