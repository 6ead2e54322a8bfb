// The bilateral kernel on a dense grid over position and intensity, for one or two modalities: the
// bilateral grid of Paris & Durand (2006) with cubic B-splines instead of box cells
// (docs/reference/math.md). Splatting and slicing are separable in space: a row of voxels is
// splatted into cells along x and intensity only; rows are added to planes, and these to the grid.
// A voxel costs 4 (or 16) short vectors.

#include "cpu/filter_moments.h"
#include "cpu/grid_bands.h"
#include "cpu/grid_voxels.h"

namespace crf {
namespace {
// 4 MiB of planes are splatted before they are added to the grid
constexpr int64_t kBatchFloats = int64_t{1} << 20;

class GridFilter final : public Filter {
   public:
    GridFilter(const KernelInput& input, const GridSize& size, ThreadPool& pool)
        : Filter({.keeps_image = true}),
          voxels_(*input.voxels),
          pool_(pool),
          size_(size),
          num_modalities_(static_cast<int>(input.intensity.size())),
          axis_(places(input, size)),
          rows_(input, size, axis_[last()]) {
        const int axes = voxels_.num_axes;
        num_cells_ = size.bins[0] * (num_modalities_ == 2 ? size.bins[1] : 1);
        for (int a = 0; a < axes; ++a) num_cells_ *= size.cells[a];
        num_planes_ = axes > 1 ? voxels_.box_shape[0] : 1;
        num_bands_ = axes > 2 ? size.cells[1] : 1;
        scratch_.resize(pool.num_threads());
    }

    void accumulate(const Filtering& wanted, Workspace& workspace) override {
        use_width(1, workspace);
        for (int c = 0; c < wanted.num_channels; ++c) {
            splat({wanted.values + c * voxels_.num_voxels, wanted.pre});
            blur();
            float* const to = wanted.sum + c * voxels_.num_voxels;
            slice([&](int64_t, int64_t row, const float* from, const Stretch& part, float*) {
                rows_.slice_row(row, from, part, receivers, wanted.post, wanted.weight_of(c), to);
            });
        }
    }

    void add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                     float* image, MomentSums& sums) override {
        if (image) return Filter::add_moments(pair, input, squared, image, sums);
        sums.add_together(
            pair, input, squared, [&](const float* const* columns, int num_columns, double* cross) {
                add_cross_moments(columns, num_columns, pair, cross, sums.workspace());
            });
    }

    std::string description() const override {
        return "grid (" + std::to_string(num_cells_) + " cells)";
    }

   private:
    // Filters the products of v with all columns side by side. The result is summed, never stored.
    void add_cross_moments(const float* const* columns, int num_columns, const FilteredPair& pair,
                           double* cross, Workspace& workspace) {
        use_width(kFeatureGroup, workspace);
        std::vector<vfloat> of_plane(num_planes_);
        for (int c = 0; c < pair.num_channels; ++c) {
            splat({pair.v + c * voxels_.num_voxels, nullptr, columns, num_columns});
            blur();
            const Sent own{pair.u + c * voxels_.num_voxels, nullptr, columns, num_columns};
            std::fill(of_plane.begin(), of_plane.end(), vfloat{});
            slice(
                [&](int64_t plane, int64_t row, const float* from, const Stretch&, float* memory) {
                    of_plane[plane] += rows_.row_moments(row, from, own, memory);
                });
            for (const vfloat& total : of_plane) {
                float lanes[kLanes];
                store(lanes, total);
                for (int i = 0; i < kSpan * num_columns; ++i)
                    cross[i % num_columns] += static_cast<double>(
                        lanes[i / num_columns * kFeatureGroup + i % num_columns]);
            }
        }
    }

    static std::array<std::vector<Place>, kMaxAxes> places(const KernelInput& input,
                                                           const GridSize& size) {
        const Voxels& voxels = *input.voxels;
        std::array<std::vector<Place>, kMaxAxes> axis;
        for (int a = 0; a < voxels.num_axes; ++a) {
            for (int64_t i = 0; i < voxels.box_shape[a]; ++i) {
                const double u = input.in_bandwidths(a, input.first[a] + i), cell = std::floor(u);
                axis[a].push_back({static_cast<int64_t>(cell) - size.first_cell[a],
                                   spline_weights(static_cast<float>(u - cell))});
            }
        }
        return axis;
    }

    // Sets the sizes for `width` channels side by side, and takes memory for the grid.
    void use_width(int width, Workspace& workspace) {
        width_ = width;
        cell_ = rows_.bins() * width;
        const int axes = voxels_.num_axes;
        level_[last()] = whole_vectors(size_.cells[last()] * cell_);
        for (int a = axes - 2; a >= 0; --a) level_[a] = size_.cells[a] * level_[a + 1];
        plane_size_ = axes > 1 ? level_[1] : level_[0];
        band_size_ = plane_size_ / num_bands_;
        batch_ =
            std::clamp<int64_t>(kBatchFloats / plane_size_, 8, num_planes_ < 8 ? 8 : num_planes_);
        filled_.resize(batch_ * num_bands_);
        int64_t inner = 0;  // size of the levels below a plane
        for (int a = 2; a < axes; ++a) inner += RowGroup::kGroup * level_[a];
        const int64_t of_row = rows_.num_floats(width);
        for (auto& s : scratch_) s.grow(plane_size_ + inner + of_row + kLanes);
        const int64_t in_batch = axes > 1 ? std::min(batch_, num_planes_) * plane_size_ : 0;
        grid_ = workspace.floats(level_[0] + in_batch);
        planes_ = grid_ + level_[0];
    }

    int last() const { return voxels_.num_axes - 1; }

    // Planes are splatted in parallel into a batch. The batch is then added to the grid, in
    // parallel over cells but in the order of the planes, so sums do not depend on the number of
    // threads. Empty parts are skipped.
    void splat(const Sent& sent) {
        if (voxels_.num_axes == 1) {
            std::fill_n(grid_, level_[0], 0.0f);
            rows_.splat_row(0, sent, grid_, scratch_[0].get());
            return;
        }
        occupied_.assign(size_.cells[0] * num_bands_, {});
        for (int64_t begin = 0; begin < num_planes_; begin += batch_) {
            const int64_t count = std::min(batch_, num_planes_ - begin);
            std::fill(filled_.begin(), filled_.end(), Stretch{});
            pool_.run(count, [&](int64_t p, int thread) {
                splat_below(1, begin + p, sent, planes_ + p * plane_size_,
                            filled_.data() + p * num_bands_, scratch_[thread].get() + plane_size_);
            });
            const std::vector<Stretch> before = occupied_;
            occupy(begin, count);
            for_pieces([&](int64_t band, const Stretch& piece, int) {
                float* const grid = grid_ + band * band_size_;
                float* const planes = planes_ + band * band_size_;
                for (int64_t cell = 0; cell < size_.cells[0]; ++cell) {
                    Stretch held = before[cell * num_bands_ + band].within(piece);
                    const Stretch wanted = occupied_[cell * num_bands_ + band].within(piece);
                    if (!wanted.is_empty()) cover(grid + cell * plane_size_, held, wanted);
                }
                RowGroup group;
                for (int64_t p = 0; p < count; ++p) {
                    const Stretch own = filled_[p * num_bands_ + band].within(piece);
                    if (own.is_empty()) continue;
                    const Place& place = axis_[0][begin + p];
                    if (!group.takes(place.cell))
                        add_group(group, grid + group.cell * plane_size_, plane_size_);
                    group.push(place.cell, planes + p * plane_size_, own, place.weight);
                }
                add_group(group, grid + group.cell * plane_size_, plane_size_);
            });
        }
    }

    // Extends the occupied stretches of the bands by the cells that a batch of planes reaches.
    void occupy(int64_t begin, int64_t count) {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t band = 0; band < num_bands_; ++band)
                for (int k = 0; k < kSpan; ++k) {
                    Stretch& reached =
                        occupied_[(axis_[0][begin + p].cell + k) * num_bands_ + band];
                    reached = reached.with(filled_[p * num_bands_ + band]);
                }
    }

    // Calls body(band, part of the band, thread) for pieces of the bands, in parallel.
    template <class Body>
    void for_pieces(Body&& body) {
        constexpr int64_t kPiece = 2048;
        const int64_t num_pieces = (band_size_ + kPiece - 1) / kPiece;
        pool_.run(num_bands_ * num_pieces, [&](int64_t item, int thread) {
            const int64_t first = item % num_pieces * kPiece;
            body(item / num_pieces, Stretch{first, std::min(first + kPiece, band_size_)}, thread);
        });
    }

    // Splats the voxels at index `position` of the axes before `axis` into `to` (level_[axis]
    // floats). filled: set to the stretch written in each cell along the axis, or in the whole row
    // on the last axis.
    void splat_below(int axis, int64_t position, const Sent& sent, float* to, Stretch* filled,
                     float* scratch) {
        if (axis == last()) {
            filled[0] = of_cells(rows_.sent_by(position, sent));
            if (filled[0].is_empty()) return;
            std::fill(to + filled[0].begin, to + filled[0].end, 0.0f);
            rows_.splat_row(position, sent, to, scratch);
            return;
        }
        const int64_t size = level_[axis + 1];
        const int64_t num_parts = axis + 1 == last() ? 1 : size_.cells[axis + 1];
        const int64_t part = size / num_parts;
        std::vector<Stretch> parts(num_parts);
        RowGroup group;
        const auto add = [&] {
            for (int64_t cell = group.cell; group.count > 0 && cell < group.cell + kSpan; ++cell)
                cover(to + cell * size, filled[cell], group.all);
            add_group(group, to + group.cell * size, size);
        };
        for (int64_t i = 0; i < voxels_.box_shape[axis]; ++i) {
            const Place& place = axis_[axis][i];
            if (!group.takes(place.cell)) add();
            float* below = scratch + group.count * size;
            std::fill(parts.begin(), parts.end(), Stretch{});
            splat_below(axis + 1, position * voxels_.box_shape[axis] + i, sent, below, parts.data(),
                        scratch + RowGroup::kGroup * size);
            if (std::all_of(parts.begin(), parts.end(),
                            [](const Stretch& own) { return own.is_empty(); }))
                continue;
            for (int64_t cell = 0; num_parts > 1 && cell < num_parts; ++cell)
                cover(below + cell * part, parts[cell], {0, part});
            group.push(place.cell, below, num_parts > 1 ? Stretch{0, size} : parts[0],
                       place.weight);
        }
        add();
    }

    // The floats that hold some spatial cells of a row, in whole vectors.
    Stretch of_cells(const Stretch& cells) const {
        return {cells.begin * cell_ / kLanes * kLanes, whole_vectors(cells.end * cell_)};
    }

    // Number of rows below one index of the axes before `axis`.
    int64_t rows_under(int axis) const {
        int64_t rows = 1;
        for (int a = axis; a < last(); ++a) rows *= voxels_.box_shape[a];
        return rows;
    }

    // Calls receive(plane, row, cells, the part of the cells that is read, memory) for each row
    // that receives something. memory: room for the voxels of a row.
    template <class Receive>
    void slice(Receive&& receive) {
        if (voxels_.num_axes == 1)
            return receive(int64_t{0}, int64_t{0}, grid_, of_cells(rows_.read_by(0, receivers)),
                           scratch_[0].get());
        pool_.run(num_planes_, [&](int64_t p, int thread) {
            float* const plane = scratch_[thread].get();
            std::vector<Stretch> reads(rows_under(1));
            for (int64_t row = 0; row < rows_under(1); ++row)
                reads[row] = of_cells(rows_.read_by(p * rows_under(1) + row, receivers));
            if (!blend_bands(p, reads.data(), plane)) return;
            slice_below(1, 0, reads.data(), plane, plane + plane_size_,
                        [&](int64_t row, const float* from, float* memory) {
                            receive(p, p * rows_under(1) + row, from, reads[row], memory);
                        });
        });
    }

    // Blends the bands that a plane's voxels read; false if all are zero. reads: each row's part.
    bool blend_bands(int64_t p, const Stretch* reads, float* plane) const {
        const int64_t rows_below = rows_under(1), rows_aside = num_bands_ > 1 ? rows_under(2) : 1;
        std::vector<Stretch> is_read(num_bands_);
        for (int64_t row = 0; row < rows_below; ++row) {
            const int64_t band = num_bands_ > 1 ? axis_[1][row / rows_aside].cell : 0;
            for (int64_t k = 0; k < (num_bands_ > 1 ? kSpan : 1); ++k)
                is_read[band + k] = is_read[band + k].with(reads[row]);
        }
        bool any = false;
        for (int64_t band = 0; band < num_bands_; ++band) {
            if (is_read[band].is_empty()) continue;
            const Stretch wanted = of_band(is_read[band]);
            const int64_t first = axis_[0][p].cell * num_bands_ + band;
            Stretch held;
            for (int64_t k = 0; k < kSpan; ++k) held = held.with(wide_[first + k * num_bands_]);
            held = held.within(wanted);
            if (!held.is_empty()) {
                blend(plane + band * band_size_, grid_ + first * band_size_, plane_size_,
                      &axis_[0][p], 1, held, 0);
                any = true;
            }
            cover(plane + band * band_size_, held, wanted);
        }
        return any;
    }

    // Slices the voxels at index `position` of the plane's axes before `axis`.
    template <class Receive>
    void slice_below(int axis, int64_t position, const Stretch* reads, const float* from,
                     float* scratch, const Receive& receive) const {
        if (axis == last() ||
            axis == kMaxAxes - 1) {  // the second test only silences a warning of gcc
            const Stretch& part = reads[position];
            if (!part.is_empty() && !is_zero(from + part.begin, part.end - part.begin))
                receive(position, from, scratch);
            return;
        }
        const int64_t rows_below = rows_under(axis + 1);
        const int64_t size = level_[axis + 1];
        const int64_t length = voxels_.box_shape[axis];
        const Place* const places = axis_[axis].data();
        for (int64_t i = 0, end = 0; i < length; i = end) {
            Stretch part;
            std::array<bool, RowGroup::kGroup> receives{};
            for (end = i;
                 end < length && end < i + RowGroup::kGroup && places[end].cell == places[i].cell;
                 ++end)
                for (int64_t row = (position * length + end) * rows_below;
                     row < (position * length + end + 1) * rows_below; ++row) {
                    part = part.with(reads[row]);
                    receives[end - i] |= !reads[row].is_empty();
                }
            if (part.is_empty()) continue;
            if (axis + 1 < last()) part = {0, size};
            blend(scratch, from + places[i].cell * size, size, places + i, end - i, part, size);
            for (int64_t n = 0; n < end - i; ++n)
                if (receives[n])
                    slice_below(axis + 1, position * length + i + n, reads, scratch + n * size,
                                scratch + RowGroup::kGroup * size, receive);
        }
    }

    // The part of a band that holds numbers if its rows hold `row`: all unless the band is one row.
    Stretch of_band(const Stretch& row) const {
        return level_[last()] == band_size_ ? row : Stretch{0, band_size_};
    }

    // Filters the grid in place along every axis, inner axes first. Skips cells that stay zero.
    void blur() {
        if (voxels_.num_axes == 1)
            return blur_inside(grid_, level_[0], {0, level_[0]}, scratch_[0].get());
        std::vector<Stretch> wider(occupied_.size());  // within planes
        wide_.resize(occupied_.size());
        pool_.run(size_.cells[0], [&](int64_t p, int thread) {
            float *const plane = grid_ + p * plane_size_, *const scratch = scratch_[thread].get();
            Stretch* const occupied = occupied_.data() + p * num_bands_;
            for (int64_t band = 0; band < num_bands_; ++band) {
                if (occupied[band].is_empty()) continue;
                const Stretch cells = with_neighbors(occupied[band]);
                cover(plane + band * band_size_, occupied[band], cells);
                blur_inside(plane + band * band_size_, band_size_, cells, scratch);
            }
            widen(occupied, num_bands_, 1, num_bands_ > 1, wider.data() + p * num_bands_);
            if (num_bands_ > 1)
                blur_across(plane, num_bands_, band_size_, occupied, wider.data() + p * num_bands_,
                            1, {0, band_size_}, scratch);
        });
        std::vector<Stretch> read(occupied_.size());  // four cells are read together
        for (int64_t band = 0; band < num_bands_; ++band) {
            widen(wider.data() + band, size_.cells[0], num_bands_, 1, wide_.data() + band);
            widen(wide_.data() + band, size_.cells[0], num_bands_, kSpan - 1, read.data() + band);
        }
        for_pieces([&](int64_t band, const Stretch& piece, int thread) {
            float* const grid = grid_ + band * band_size_;
            blur_across(grid, size_.cells[0], plane_size_, wider.data() + band, wide_.data() + band,
                        num_bands_, piece, scratch_[thread].get());
            for (int64_t cell = 0; cell < size_.cells[0]; ++cell) {
                Stretch held = wide_[cell * num_bands_ + band].within(piece);
                const Stretch wanted = read[cell * num_bands_ + band].within(piece);
                if (!wanted.is_empty()) cover(grid + cell * plane_size_, held, wanted);
            }
        });
    }

    // The cells of a band that hold numbers, and one more cell on either side along the last axis.
    Stretch with_neighbors(const Stretch& cells) const {
        const int64_t begin = cells.begin / cell_ - 1, end = (cells.end + cell_ - 1) / cell_ + 1;
        return of_band({std::max<int64_t>(0, begin * cell_) / kLanes * kLanes,
                        std::min(whole_vectors(end * cell_), level_[last()])});
    }

    // Filters `part` of each row of `size` consecutive floats: a band, or a grid of one axis.
    void blur_inside(float* cells, int64_t size, const Stretch& part, float* scratch) const {
        const int64_t row_size = level_[last()];
        // Cells completely inside the part; the part's other numbers are zero.
        const int64_t first = (part.begin + cell_ - 1) / cell_;
        const int64_t x_cells = std::min(part.end / cell_, size_.cells[last()]) - first;
        for (float* row = cells + first * cell_; row < cells + size; row += row_size) {
            if (num_modalities_ == 2) {
                for (int64_t x = 0; x < x_cells; ++x) {
                    float* const bins = row + x * cell_;
                    blur_contiguous(bins, size_.bins[0], size_.bins[1] * width_, width_, scratch);
                    blur_strided(bins, size_.bins[0], size_.bins[1] * width_, scratch);
                }
            } else {
                blur_contiguous(row, x_cells, cell_, width_, scratch);
            }
            blur_strided(row, x_cells, cell_, scratch);
        }
        for (int a = last() - 1; a >= 2; --a)
            for (float* slab = cells; slab < cells + size; slab += level_[a])
                blur_strided(slab, size_.cells[a], level_[a + 1], scratch);
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    const GridSize size_;
    const int num_modalities_;
    const std::array<std::vector<Place>, kMaxAxes> axis_;  // of each voxel coordinate
    const GridVoxels rows_;
    int width_ = 0;     // channels side by side in every cell
    int64_t cell_ = 0;  // floats of one spatial cell
    int64_t num_cells_ = 0;
    // sizes in floats of one row, plane, ...: level_[a] covers axes a .. last and all intensities
    int64_t level_[kMaxAxes]{};
    int64_t num_planes_ = 0, plane_size_ = 0, batch_ = 0;
    // bands: the cells of a plane at one cell along the second axis, unless that is the last
    int64_t num_bands_ = 1, band_size_ = 0;
    float *grid_ = nullptr, *planes_ = nullptr;  // in the workspace: also a batch of planes
    std::vector<Stretch> filled_;  // (plane of the batch, band) cells that voxels send to
    std::vector<Stretch> occupied_,
        wide_;  // (cell along the first axis, band) nonzero cells before and after the blur
    std::vector<Buffer<float>> scratch_;
};
}  // namespace

namespace {
// A grid with far more cells than voxels is a mistake: at most this many cells, or this many per
// voxel, and 8 GB.
constexpr double kGenerousGrid = 1e7, kGenerousGridAVoxel = 200, kLargestGrid = 2e9;
}  // namespace

GridSize grid_size(const KernelInput& input) {
    const Voxels& voxels = *input.voxels;
    GridSize size;
    double cells = 1;
    for (int a = 0; a < voxels.num_axes; ++a) {
        const double begin = std::floor(input.in_bandwidths(a, input.first[a]));
        const double extent =
            input.in_bandwidths(a, input.first[a] + voxels.box_shape[a] - 1) - begin;
        size.first_cell[a] = static_cast<int64_t>(begin);
        size.cells[a] = static_cast<int64_t>(extent) + kSpan;
        cells *= extent + kSpan;
    }
    for (size_t m = 0; m < input.intensity.size() && m < 2; ++m) {
        // In single precision, like the voxels' cells: no voxel's cell is before the first cell.
        const float begin = std::floor((input.lowest[m] - input.zero[m]) *
                                       static_cast<float>(1.0 / input.theta_beta[m]));
        const double extent =
            (static_cast<double>(input.highest[m]) - input.zero[m]) / input.theta_beta[m] -
            static_cast<double>(begin);
        size.first_bin[m] = static_cast<int32_t>(begin);
        // One more than the span: rounding in single precision may put the highest intensity into
        // the next cell.
        size.bins[m] = static_cast<int64_t>(extent) + kSpan + 1;
        cells *= extent + kSpan + 1;
    }
    size.num_cells = cells;
    return size;
}

bool fits_grid(const KernelInput& input, const GridSize& size) {
    const double most = std::max(
        kGenerousGrid, kGenerousGridAVoxel * static_cast<double>(input.voxels->num_voxels));
    return !input.intensity.empty() && input.intensity.size() <= 2 &&
           size.num_cells <= std::min(kLargestGrid, most);
}

std::unique_ptr<Filter> make_grid_filter(const KernelInput& input, const GridSize& size,
                                         ThreadPool& pool) {
    if (input.intensity.empty() || input.intensity.size() > 2)
        throw InputError("the grid filter takes one or two modalities, not " +
                         std::to_string(input.intensity.size()) +
                         "; use filter = \"lattice\" or \"auto\"");
    if (!fits_grid(input, size))
        throw CapacityError(
            "the bilateral grid would have too many cells for these bandwidths; use filter = "
            "\"auto\"");
    return std::make_unique<GridFilter>(input, size, pool);
}
}  // namespace crf
