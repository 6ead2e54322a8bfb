// Direct sums tile by tile: what a tile and its surroundings send is read for each label that takes
// part in the tile, and each pair's weight is computed once for all of them. Work and memory follow
// the labels that are present, and the rows that send and receive.

#include "cpu/filter.h"
#include "cpu/simd.h"
#include "cpu/tile_filter.h"
#include "cpu/tile_set.h"

namespace crf {
namespace {
class DirectTileFilter final : public TileFilter {
   public:
    // at_once: the kernel, if its row sums may take arrays of the whole volume; nullptr: they may
    // not.
    DirectTileFilter(const TileSet& set, const LaneMask* open, std::unique_ptr<TileKernel> kernel,
                     Normalization normalization, const DirectKernel* at_once, ThreadPool& pool)
        : set_(set),
          kernel_(std::move(kernel)),
          pool_(pool),
          normalization_(normalization),
          at_once_(at_once),
          scratch_(pool.num_threads()) {
        normalize(open);
    }

    void accumulate(const SentVoxels& sent, const LaneMask* open, const float* label_weight,
                    float* message) override {
        const int64_t voxels = set_.tiling.tile_voxels();
        const int64_t width = set_.tiling.tile[2];
        const int64_t num_rows = voxels / width;
        pool_.run(set_.num_active, [&](int64_t item, int thread) {
            TileScratch& scratch = scratch_[thread];
            const LaneMask* const own = open + item * num_rows;
            if (!any_marked(own, num_rows)) return;
            kernel_->find_needed(own, scratch);
            const std::vector<int64_t> labels = send(item, sent, scratch);
            if (labels.empty()) return;
            kernel_->enter(set_.active[item], scratch);
            scratch.received.resize(labels.size() * voxels);
            kernel_->sum(static_cast<int>(labels.size()), own, scratch);
            const float* post = scale_.get() + near_[set_.active[item]] * voxels;
            for (size_t l = 0; l < labels.size(); ++l) {
                const int64_t e = set_.first_entry[item] + labels[l];
                const float weight = label_weight[set_.label[e]];
                const float* from = scratch.received.data() + l * voxels;
                float* to = message + e * voxels;
                for (int64_t row = 0; row < num_rows; ++row)
                    for (int64_t i = own[row] ? row * width : voxels; i < (row + 1) * width; ++i)
                        to[i] += weight * post[i] * from[i];
            }
        });
    }

   private:
    // Gathers the values that labels send to an active tile. Returns these labels by their number
    // of rows: few rows are summed together.
    std::vector<int64_t> send(int64_t item, const SentVoxels& sent, TileScratch& scratch) const {
        const Neighborhood& around = kernel_->around;
        const int64_t voxels = set_.tiling.tile_voxels();
        const int64_t width = set_.tiling.tile[2];
        const int64_t num_rows = voxels / width;
        const int64_t first = set_.first_entry[item];
        const int64_t num_labels = set_.first_entry[item + 1] - first;
        scratch.sent.resize(num_labels * around.size + kBehind);
        scratch.sends_label.assign(num_labels * kernel_->num_rows_around(), 0);
        int64_t last = -1, active = -1;
        std::vector<int64_t> rows_of(num_labels), labels;
        // of the tile that sends: the label's, -1: it sends nothing; 0: a settled tile sends it
        std::vector<int64_t> entry(num_labels);
        around.for_rows(set_.tiling, set_.active[item], [&](const Neighborhood::Piece& piece) {
            if (piece.tile != last) {
                last = piece.tile;
                active = set_.index[last];
                for (int64_t l = 0; l < num_labels; ++l) {
                    const int32_t label = set_.label[first + l];
                    const bool is_settled = sent.from_settled && set_.settled[last] == label;
                    entry[l] = active >= 0 ? set_.find_entry(active, label) : is_settled ? 0 : -1;
                }
            }
            const LaneMask lanes = active >= 0 ? sent.voxels[active * num_rows + piece.tile_row]
                                               : first_lanes_mask(piece.length);
            if (!scratch.needed[piece.row] || !is_heard(lanes, last, piece.tile_row)) return;
            const float* const scale = normalization_ == Normalization::kSymmetric
                                           ? scale_.get() + near_[last] * voxels + piece.tile_place
                                           : nullptr;
            for (int64_t l = 0; l < num_labels; ++l) {
                if (entry[l] < 0 ||
                    (active >= 0 && !sent.labels[entry[l] * num_rows + piece.tile_row]))
                    continue;
                SentLanes& sends = scratch.sends_label[l * kernel_->num_rows_around() + piece.row];
                if (!sends)
                    std::fill_n(scratch.sent.data() + l * around.size + piece.row * around.shape[2],
                                around.shape[2], 0.0f);
                sends |= kernel_->lanes_around(lanes, piece.column);
                ++rows_of[l];
                float* const to = scratch.sent.data() + l * around.size + piece.place;
                if (active >= 0) {
                    const float* const from = sent.values + entry[l] * voxels + piece.tile_place;
                    for (int64_t i = 0; i < width; i += kLanes)
                        store(to + i, scale ? load(from + i) * load(scale + i) : load(from + i));
                } else {
                    for (int64_t i = 0; i < piece.length; ++i)
                        to[i] = set_.is_inside(piece.grid + i) ? (scale ? scale[i] : 1.0f) : 0.0f;
                }
            }
        });
        for (int64_t l = 0; l < num_labels; ++l)
            if (rows_of[l] > 0) labels.push_back(l);
        std::stable_sort(labels.begin(), labels.end(),
                         [&](int64_t a, int64_t b) { return rows_of[a] > rows_of[b]; });
        kernel_->read_copies(labels, scratch);
        return labels;
    }

    // Whether voxels that send are within reach of one that receives; without a normalization of
    // what is sent, that is not known.
    bool is_heard(LaneMask lanes, int64_t tile, int64_t row) const {
        if (normalization_ != Normalization::kSymmetric) return lanes != 0;
        const int64_t num_rows = set_.tiling.tile_voxels() / kLanes;
        return near_[tile] >= 0 && (lanes & near_lanes_[near_[tile] * num_rows + row]) != 0;
    }

    // Fills `scale_`: the factor of the normalization at the voxels that receive, or send to them;
    // 0 at the others.
    void normalize(const LaneMask* open) {
        const Tiling& tiling = set_.tiling;
        const int64_t voxels = tiling.tile_voxels(), num_rows = voxels / kLanes;
        const std::vector<WindowRow> window = kernel_->window();
        RowMap needed(tiling);
        for (int64_t item = 0; item < set_.num_active; ++item)
            needed.mark(set_.active[item], open + item * num_rows);
        if (normalization_ == Normalization::kSymmetric) needed.widen(window);
        near_.assign(tiling.num_tiles(), -1);
        std::vector<int64_t> tiles;
        std::vector<LaneMask>& lanes = near_lanes_;
        for (int64_t tile = 0; tile < tiling.num_tiles(); ++tile) {
            const std::vector<LaneMask> of_tile = needed.rows(tile);
            if (!any_marked(of_tile.data(), num_rows)) continue;
            near_[tile] = static_cast<int64_t>(tiles.size());
            tiles.push_back(tile);
            lanes.insert(lanes.end(), of_tile.begin(), of_tile.end());
        }
        scale_ = Buffer<float>(static_cast<int64_t>(tiles.size()) * voxels);
        if (at_once_ && !tiles.empty()) {
            needed.widen(window);
            sum_rows_at_once(needed);
        } else {
            pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t item, int thread) {
                sum_rows(tiles[item], lanes.data() + item * num_rows, scratch_[thread],
                         scale_.get() + item * voxels);
            });
        }
        pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t item, int) {
            for (int64_t row = 0; row < num_rows; ++row) {
                float* const scale = scale_.get() + item * voxels + row * kLanes;
                const LaneMask needed_lanes = lanes[item * num_rows + row];
                // A voxel inside the mask counts itself with weight 1; the others do not matter.
                for (int64_t i = 0; i < kLanes; ++i) {
                    const float total = needed_lanes >> i & 1 ? scale[i] : 0.0f;
                    const float inverse = total >= 0.5f ? 1 / total : 0.0f;
                    scale[i] =
                        normalization_ == Normalization::kSymmetric ? std::sqrt(inverse) : inverse;
                }
            }
        });
    }

    // The kernel's row sums at some voxels of a tile.
    void sum_rows(int64_t tile, const LaneMask* needed, TileScratch& scratch, float* sums) const {
        const Neighborhood& around = kernel_->around;
        scratch.sends_label.assign(kernel_->num_rows_around(), kEverywhere);
        kernel_->enter(tile, scratch);
        scratch.sent.assign(around.size + kBehind, 0.0f);
        around.for_rows(set_.tiling, tile, [&](const Neighborhood::Piece& piece) {
            for (int64_t i = 0; i < piece.length; ++i)
                scratch.sent[piece.place + i] = set_.is_inside(piece.grid + i) ? 1.0f : 0.0f;
        });
        scratch.received.resize(set_.tiling.tile_voxels());
        kernel_->read_copies({0}, scratch);
        kernel_->sum(1, needed, scratch);
        std::copy_n(scratch.received.data(), set_.tiling.tile_voxels(), sums);
    }

    // All row sums, complete where the whole window is marked: each pair of voxels is visited once,
    // in a copy of the whole volume.
    void sum_rows_at_once(const RowMap& near) {
        const Tiling& tiling = set_.tiling;
        const int64_t width = tiling.tile[2];
        const int64_t num_rows = tiling.tile_voxels() / width;
        const int64_t grid_size = tiling.num_voxels();
        Buffer<uint8_t> mask(grid_size);
        pool_.run(tiling.shape[0], [&](int64_t z, int) {
            for (int64_t row = z * tiling.shape[1]; row < (z + 1) * tiling.shape[1]; ++row)
                for (int64_t column = 0; column < tiling.count[2]; ++column) {
                    const int64_t begin = row * tiling.shape[2] + tiling.begin(2, column);
                    const int64_t end = row * tiling.shape[2] + tiling.end(2, column);
                    const LaneMask lanes = near.lanes(row, column);
                    for (int64_t i = begin; i < end; ++i)
                        mask[i] =
                            static_cast<uint8_t>(lanes >> (i - begin) & 1 & set_.is_inside(i));
                }
        });
        const Voxels voxels({tiling.shape[0], tiling.shape[1], tiling.shape[2]}, {1.0, 1.0, 1.0},
                            mask.get());
        std::vector<double> sigma;
        for (int a = 0; a < voxels.num_axes; ++a)
            sigma.push_back(at_once_->sigma[voxels.source_axis[a]]);
        const BilateralInput input(voxels, sigma, at_once_->theta_beta, at_once_->intensity, pool_);
        Buffer<float> ones(voxels.num_voxels), sums(voxels.num_voxels);
        std::fill_n(ones.get(), voxels.num_voxels, 1.0f);
        std::fill_n(sums.get(), voxels.num_voxels, 0.0f);
        Workspace workspace;
        const float unit = 1.0f;
        make_truncated_filter(input, pool_)
            ->accumulate(ones.get(), 1, nullptr, nullptr, &unit, sums.get(), workspace);
        for (const Run& run : voxels.runs) {
            const int64_t row = run.grid / tiling.shape[2];
            const int64_t z = row / tiling.shape[1];
            const int64_t y = row % tiling.shape[1];
            const int64_t first =
                (z / tiling.tile[0] * tiling.count[1] + y / tiling.tile[1]) * tiling.count[2];
            const int64_t place =
                (z % tiling.tile[0] * tiling.tile[1] + y % tiling.tile[1]) * width;
            const int64_t begin = run.grid - row * tiling.shape[2], end = begin + run.length;
            for (int64_t column = begin / width; column * width < end; ++column) {
                const int64_t item = near_[first + column], from = std::max(begin, column * width);
                if (item < 0) continue;
                std::copy(sums.get() + run.voxel + from - begin,
                          sums.get() + run.voxel + std::min(end, (column + 1) * width) - begin,
                          scale_.get() + item * num_rows * width + place + from - column * width);
            }
        }
    }

    const TileSet& set_;
    const std::unique_ptr<TileKernel> kernel_;
    ThreadPool& pool_;
    const Normalization normalization_;
    const DirectKernel* const at_once_;
    std::vector<TileScratch> scratch_;
    std::vector<int64_t> near_;  // (tile) where its voxels are in `scale_`, or -1
    // (tile near, row of the tile) the voxels whose factor is known
    std::vector<LaneMask> near_lanes_;
    Buffer<float> scale_;
};
}  // namespace

std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const LaneMask* open,
                                                    const DirectKernel& kernel,
                                                    Normalization normalization, bool has_room,
                                                    ThreadPool& pool) {
    if (kernel.intensity.empty())
        return std::make_unique<DirectTileFilter>(
            set, open, make_spatial_tile_kernel(set.tiling, kernel), normalization, nullptr, pool);
    return std::make_unique<DirectTileFilter>(set, open,
                                              make_bilateral_tile_kernel(set.tiling, kernel),
                                              normalization, has_room ? &kernel : nullptr, pool);
}
}  // namespace crf
