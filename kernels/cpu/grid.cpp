// The bilateral kernel on a dense grid over position and intensity, for one or two modalities (Paris & Durand 2006's bilateral grid, with
// cubic B-splines in place of box cells; docs/reference/math.md).
//
// Voxels lie on a regular grid, so the spatial part of splatting and slicing is separable: a row of voxels is splatted into cells along
// x and intensity only, rows are then added into planes, planes into the grid. A voxel costs 4 (or 16) short vectors whatever the
// number of axes, and the spline makes the kernel several times more accurate than a lattice with linear cells.
#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/grid.h"
#include "cpu/grid_blur.h"
#include "cpu/grid_rows.h"
#include "cpu/simd.h"
#include "cpu/stretch.h"
#include "cpu/with_constant.h"

namespace crf {

namespace {

// The voxels of a row are splatted in so many stretches, one voxel of each in turn: neighboring voxels touch overlapping cells, and a load
// that partly overlaps a recent store would wait for it.
constexpr int64_t kStretches = 8;
constexpr int64_t kBatchFloats = int64_t{1} << 20;  // 4 MiB of planes are splatted before they are added to the grid

// Weights of the four cells around a point at fraction f of its cell.
inline vfloat4 spline_weights(float f) {
    const vfloat4 c0 = {1 / 6.0f, 4 / 6.0f, 1 / 6.0f, 0}, c1 = {-0.5f, 0, 0.5f, 0}, c2 = {0.5f, -1, 0.5f, 0},
                  c3 = {-1 / 6.0f, 0.5f, -0.5f, 1 / 6.0f};
    return c0 + f * (c1 + f * (c2 + f * c3));
}

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Writes zeros such that the array holds numbers in `wanted`, too. Stretches here are of floats, in whole vectors: those that hold numbers;
// the others are zeros that are not written.
void cover(float* array, Stretch& held, const Stretch& wanted) {
    if (held.is_empty()) held = {wanted.begin, wanted.begin};
    for (const Stretch& missing : {Stretch{wanted.begin, held.begin}, Stretch{held.end, wanted.end}})
        if (!missing.is_empty()) std::fill(array + missing.begin, array + missing.end, 0.0f);
    held = held.with(wanted);
}

// A voxel's place along an axis: the first of the four cells around it, and their weights.
struct Place {
    int64_t cell;
    vfloat4 weight;
};

// Up to kGroup rows, or planes, that touch the same four cells along an axis: what they add to is loaded and stored once.
struct RowGroup {
    static constexpr int kGroup = 4;
    int count = 0;
    int64_t cell = 0;
    float* row[kGroup];
    Stretch held[kGroup], all;
    vfloat4 weight[kGroup];

    bool takes(int64_t next) const { return count == 0 || (count < kGroup && next == cell); }
    void push(int64_t its_cell, float* from, const Stretch& its_stretch, vfloat4 its_weight) {
        cell = its_cell;
        row[count] = from;
        held[count] = its_stretch;
        all = all.with(its_stretch);
        weight[count++] = its_weight;
    }
};

template <int N>
void add_rows(const RowGroup& group, float* to, int64_t stride) {
    for (int64_t i = group.all.begin; i < group.all.end; i += kLanes) {
        vfloat total[kSpan];
        for (int j = 0; j < kSpan; ++j) total[j] = load(to + j * stride + i);
        for (int n = 0; n < N; ++n) {
            const vfloat from = load(group.row[n] + i);
            for (int j = 0; j < kSpan; ++j) total[j] += from * group.weight[n][j];
        }
        for (int j = 0; j < kSpan; ++j) store(to + j * stride + i, total[j]);
    }
}

// Adds the rows, times their weights, to the four rows that are `stride` apart, and empties the group. The four rows hold numbers wherever
// one of the group does.
void add_group(RowGroup& group, float* to, int64_t stride) {
    for (int n = 0; n < group.count; ++n) cover(group.row[n], group.held[n], group.all);
    if (group.count > 0) with_constant<1, 2, 3, RowGroup::kGroup>(group.count, [&](auto count) { add_rows<count()>(group, to, stride); });
    group = {};
}

// Each of N rows, or planes, becomes the weighted sum of the same four, which are loaded once; in a part of them.
template <int N>
void blend_rows(float* to, const float* from, int64_t stride, const Place* places, const Stretch& part, int64_t to_stride) {
    for (int64_t i = part.begin; i < part.end; i += kLanes) {
        const vfloat a = load(from + i), b = load(from + stride + i), c = load(from + 2 * stride + i), d = load(from + 3 * stride + i);
        for (int n = 0; n < N; ++n) {
            const vfloat4 weight = places[n].weight;
            store(to + n * to_stride + i, a * weight[0] + b * weight[1] + c * weight[2] + d * weight[3]);
        }
    }
}
inline void blend(float* to, const float* from, int64_t stride, const Place* places, int64_t num_places, const Stretch& part,
                  int64_t to_stride) {
    with_constant<1, 2, 3, RowGroup::kGroup>(static_cast<int>(num_places),
                                             [&](auto n) { blend_rows<n()>(to, from, stride, places, part, to_stride); });
}

// The smallest stretches around those that are up to `away` before or after each in a list; of a larger array, every `step`-th.
void widen(const Stretch* from, int64_t count, int64_t step, int64_t away, Stretch* to) {
    for (int64_t i = 0; i < count; ++i) {
        Stretch all;
        for (int64_t k = std::max<int64_t>(0, i - away); k <= std::min(count - 1, i + away); ++k) all = all.with(from[k * step]);
        to[i * step] = all;
    }
}

// The three-tap filter across rows that are `stride` apart, in the part of them that is given: from what they hold to what they hold
// afterwards, each with its neighbors. Every `step`-th of the stretches counts. The scratch holds the previous row, unfiltered.
void blur_across(float* rows, int64_t count, int64_t stride, const Stretch* held, const Stretch* wider, int64_t step, const Stretch& part,
                 float* scratch) {
    Stretch own = held[0].within(part), before;
    for (int64_t r = 0; r < count; ++r) {
        float *const row = rows + r * stride, *const next = row + stride;
        const bool is_last = r + 1 == count;
        Stretch after = is_last ? Stretch{} : held[(r + 1) * step].within(part);
        const Stretch all = wider[r * step].within(part);
        if (!all.is_empty()) {
            cover(row, own, all);
            cover(scratch, before, all);
            if (!is_last) cover(next, after, all);
            blur_row(row + all.begin, is_last ? nullptr : next + all.begin, all.end - all.begin, scratch + all.begin);
        }
        before = all;
        own = after;
    }
}

class GridFilter final : public Filter {
   public:
    GridFilter(const BilateralInput& input, const GridSize& size, ThreadPool& pool)
        : voxels_(*input.voxels), pool_(pool), size_(size), num_modalities_(static_cast<int>(input.intensity.size())) {
        const int axes = voxels_.num_axes;
        for (int a = 0; a < axes; ++a) {
            for (int64_t i = 0; i < voxels_.box_shape[a]; ++i) {
                const double u = (input.first[a] + i) * voxels_.spacing[a] / input.theta_alpha[a], cell = std::floor(u);
                axis_[a].push_back({static_cast<int64_t>(cell) - size.first_cell[a], spline_weights(static_cast<float>(u - cell))});
            }
        }
        for (const Place& place : axis_[axes - 1]) {
            x_cell_.push_back(static_cast<int32_t>(place.cell));
            x_weight_.push_back(place.weight);
        }
        x_cell_.resize(x_cell_.size() + kLanes);  // read in whole vectors
        for (int m = 0; m < num_modalities_; ++m) {
            intensity_[m] = input.intensity[m];
            zero_[m] = input.zero[m];
            scale_[m] = static_cast<float>(1.0 / input.theta_beta[m]);
        }
        bins_ = size.bins[0] * (num_modalities_ == 2 ? size.bins[1] : 1);
        num_cells_ = bins_;
        for (int a = 0; a < axes; ++a) num_cells_ *= size.cells[a];
        const int64_t row_length = voxels_.box_shape[axes - 1], row_cells = size.cells[axes - 1];
        is_narrow_ = kPlacesLanes && num_modalities_ == 1 && bins_ <= kLanes && row_length * row_cells <= NarrowRows::kMostWeights &&
                     num_cells_ / bins_ * kLanes <= voxels_.num_voxels;
        if (is_narrow_) {
            bins_ = size_.bins[0] = kLanes;  // more than are needed: cells that no voxel reaches change nothing
            narrow_.prepare(x_cell_, x_weight_, row_length, row_cells);
        }
        const int64_t num_rows = voxels_.box_size / voxels_.box_shape[axes - 1];
        first_run_.assign(num_rows + 1, 0);
        for (const Run& run : voxels_.runs) ++first_run_[run.box / voxels_.box_shape[axes - 1] + 1];
        for (int64_t r = 0; r < num_rows; ++r) first_run_[r + 1] += first_run_[r];

        num_planes_ = axes > 1 ? voxels_.box_shape[0] : 1;
        num_bands_ = axes > 2 ? size.cells[1] : 1;
        scratch_.resize(pool.num_threads());
        use_width(1);
    }

    void accumulate(const float* values, int num_channels, const float* pre, const float* post, const float* channel_weight, float* sum,
                    Workspace& workspace) override {
        use_width(1);
        grid_ = workspace.floats(level_[0] + batch_floats());
        planes_ = grid_ + level_[0];
        for (int c = 0; c < num_channels; ++c) {
            splat({values + c * voxels_.num_voxels, pre});
            blur();
            float* const to = sum + c * voxels_.num_voxels;
            slice([&](int64_t, int64_t row, const float* from, const Stretch& part, float*) {
                slice_row(row, from, part, post, channel_weight[c], to);
            });
        }
    }

    bool has_cross_moments() const override { return true; }

    // The products of v with all columns are filtered side by side. What a voxel receives is needed in this sum alone, and never stored.
    void cross_moments(const float* const* columns, int num_columns, const float* u, const float* v, int num_channels, double* cross,
                       Workspace& workspace) override {
        use_width(kColumns);
        grid_ = workspace.floats(level_[0] + batch_floats());
        planes_ = grid_ + level_[0];
        std::vector<vfloat> of_plane(num_planes_);
        for (int c = 0; c < num_channels; ++c) {
            splat({v + c * voxels_.num_voxels, nullptr, columns, num_columns});
            blur();
            const Sent own{u + c * voxels_.num_voxels, nullptr, columns, num_columns};
            std::fill(of_plane.begin(), of_plane.end(), vfloat{});
            slice([&](int64_t plane, int64_t row, const float* from, const Stretch&, float* memory) {
                of_plane[plane] += num_modalities_ == 1 ? row_moments<1>(row, from, own, memory) : row_moments<2>(row, from, own, memory);
            });
            for (const vfloat& total : of_plane) {
                float lanes[kLanes];
                store(lanes, total);
                for (int i = 0; i < kSpan * num_columns; ++i)
                    cross[i % num_columns] += static_cast<double>(lanes[i / num_columns * kColumns + i % num_columns]);
            }
        }
    }

    bool keeps_image() const override { return true; }

    std::string description() const override { return "grid (" + std::to_string(num_cells_) + " cells)"; }

   private:
    // What the voxels send, over `pre` if that is given; or the products with up to kColumns columns, side by side in every cell.
    struct Sent {
        const float* values;
        const float* pre;
        const float* const* columns = nullptr;
        int num_columns = 0;
    };
    static constexpr int kColumns = kMostColumns;

    // Sets the sizes for so many channels side by side.
    void use_width(int width) {
        if (width == width_) return;
        width_ = width;
        const int axes = voxels_.num_axes;
        level_[last()] = whole_vectors(size_.cells[last()] * bins_ * width);
        for (int a = axes - 2; a >= 0; --a) level_[a] = size_.cells[a] * level_[a + 1];
        plane_size_ = axes > 1 ? level_[1] : level_[0];
        band_size_ = plane_size_ / num_bands_;
        batch_ = std::clamp<int64_t>(kBatchFloats / plane_size_, 8, num_planes_ < 8 ? 8 : num_planes_);
        filled_.resize(batch_ * num_bands_);
        int64_t inner = 0;  // size of the levels below a plane
        for (int a = 2; a < axes; ++a) inner += RowGroup::kGroup * level_[a];
        const int64_t of_row = (width == 1 ? RowVoxels::kFloats : RowProducts::kFloats) * (voxels_.box_shape[last()] + kLanes);
        for (auto& s : scratch_)
            if (s.size < plane_size_ + inner + of_row + kLanes) s = Buffer<float>(plane_size_ + inner + of_row + kLanes);
    }

    int64_t batch_floats() const { return voxels_.num_axes > 1 ? std::min(batch_, num_planes_) * plane_size_ : 0; }
    int last() const { return voxels_.num_axes - 1; }

    // Planes are splatted in parallel into a separate batch, then the batch is added to the grid, in parallel over cells and in the
    // order of the planes: the same sums for any number of threads. Parts of bands that nothing is sent to are neither written nor read.
    void splat(const Sent& sent) {
        if (voxels_.num_axes == 1) {
            std::fill_n(grid_, level_[0], 0.0f);
            splat_row(0, sent, grid_, scratch_[0].get());
            return;
        }
        occupied_.assign(size_.cells[0] * num_bands_, {});
        for (int64_t begin = 0; begin < num_planes_; begin += batch_) {
            const int64_t count = std::min(batch_, num_planes_ - begin);
            std::fill(filled_.begin(), filled_.end(), Stretch{});
            pool_.run(count, [&](int64_t p, int thread) {
                splat_below(1, begin + p, sent, planes_ + p * plane_size_, filled_.data() + p * num_bands_,
                            scratch_[thread].get() + plane_size_);
            });
            const std::vector<Stretch> before = occupied_;
            occupy(begin, count);
            for_pieces([&](int64_t band, const Stretch& piece, int) {
                float *const grid = grid_ + band * band_size_, *const planes = planes_ + band * band_size_;
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
                    if (!group.takes(place.cell)) add_group(group, grid + group.cell * plane_size_, plane_size_);
                    group.push(place.cell, planes + p * plane_size_, own, place.weight);
                }
                add_group(group, grid + group.cell * plane_size_, plane_size_);
            });
        }
    }

    // Notes what the planes of a batch reach in the bands of the grid.
    void occupy(int64_t begin, int64_t count) {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t band = 0; band < num_bands_; ++band)
                for (int k = 0; k < kSpan; ++k) {
                    Stretch& reached = occupied_[(axis_[0][begin + p].cell + k) * num_bands_ + band];
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

    // Everything below index `position` of the axes before `axis`, into `to` (level_[axis] floats). filled: becomes what is written of each
    // cell along the axis, and for the last axis of all.
    void splat_below(int axis, int64_t position, const Sent& sent, float* to, Stretch* filled, float* scratch) {
        if (axis == last()) {
            filled[0] = touched(position, [&](int64_t voxel, int64_t count) { return !is_zero(sent.values + voxel, count); });
            if (filled[0].is_empty()) return;
            std::fill(to + filled[0].begin, to + filled[0].end, 0.0f);
            splat_row(position, sent, to, scratch);
            return;
        }
        const int64_t size = level_[axis + 1], num_parts = axis + 1 == last() ? 1 : size_.cells[axis + 1], part = size / num_parts;
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
            splat_below(axis + 1, position * voxels_.box_shape[axis] + i, sent, below, parts.data(), scratch + RowGroup::kGroup * size);
            if (std::all_of(parts.begin(), parts.end(), [](const Stretch& own) { return own.is_empty(); })) continue;
            for (int64_t cell = 0; num_parts > 1 && cell < num_parts; ++cell) cover(below + cell * part, parts[cell], {0, part});
            group.push(place.cell, below, num_parts > 1 ? Stretch{0, size} : parts[0], place.weight);
        }
        add();
    }

    // The floats of a row of cells between the first and the last of its voxels that count: counts(voxel, number of voxels).
    template <class Counts>
    Stretch touched(int64_t row, Counts&& counts) const {
        int64_t first = -1, end = -1;
        for (int32_t r = first_run_[row]; r < first_run_[row + 1]; ++r) {
            const Run& run = voxels_.runs[r];
            if (!counts(run.voxel, run.length)) continue;
            const int64_t x = run.box - row * voxels_.box_shape[last()];
            for (int64_t done = 0; done < run.length; done += kLanes) {
                const int64_t count = std::min<int64_t>(kLanes, run.length - done);
                if (!counts(run.voxel + done, count)) continue;
                if (first < 0) first = x + done;
                end = x + done + count;
            }
        }
        if (first < 0) return {};
        const int64_t cell = bins_ * width_;
        return {x_cell_[first] * cell / kLanes * kLanes, whole_vectors((x_cell_[end - 1] + kSpan) * cell)};
    }

    // Number of rows below one index of the axes before `axis`.
    int64_t rows_under(int axis) const {
        int64_t rows = 1;
        for (int a = axis; a < last(); ++a) rows *= voxels_.box_shape[a];
        return rows;
    }

    // Sixteen voxels of a row, or fewer at the end of a run.
    struct Batch {
        int64_t voxel, x;  // of the first
        int count;
        vint bin;              // first intensity cell of a voxel, of all modalities
        vfloat last_fraction;  // of the last modality
        int32_t cell[kLanes];  // first cell that a voxel touches, relative to the row's first cell
        float fraction[2][kLanes];
    };

    // Calls body(batch) for the voxels of a row.
    template <int M, class Body>
    void for_batches(int64_t row, Body&& body) const {
        const int32_t* x_cell = x_cell_.data();
        for (int32_t r = first_run_[row]; r < first_run_[row + 1]; ++r) {
            const Run& run = voxels_.runs[r];
            Batch batch;
            batch.x = run.box - row * voxels_.box_shape[last()];
            batch.voxel = run.voxel;
            for (int32_t done = 0; done < run.length; done += kLanes, batch.voxel += kLanes, batch.x += kLanes) {
                batch.count = std::min<int32_t>(kLanes, run.length - done);
                vint bin{};
                for (int m = 0; m < M; ++m) {
                    const vfloat u = (load_some(intensity_[m] + run.grid + done, batch.count) - zero_[m]) * scale_[m];
                    const vint whole = floor_to_int(u);
                    bin = bin * static_cast<int32_t>(size_.bins[m]) + (whole - size_.first_bin[m]);
                    batch.last_fraction = u - to_float(whole);
                    store(batch.fraction[m], batch.last_fraction);
                }
                batch.bin = bin;
                vint first_cell;
                std::memcpy(&first_cell, x_cell + batch.x, sizeof first_cell);
                first_cell = first_cell * static_cast<int32_t>(bins_) + bin;
                std::memcpy(batch.cell, &first_cell, sizeof first_cell);
                body(batch);
            }
        }
    }

    // The voxels of a row: the first cell that each touches, fractions of cells, place along x, and value.
    struct RowVoxels {
        static constexpr int64_t kFloats = 5;  // per voxel

        RowVoxels(float* memory, int64_t row_length) {
            const int64_t stride = row_length + kLanes;
            value = memory;
            for (int m = 0; m < 2; ++m) fraction[m] = memory + (1 + m) * stride;
            cell = reinterpret_cast<int32_t*>(memory + 3 * stride);
            x = reinterpret_cast<int32_t*>(memory + 4 * stride);
        }

        int64_t count = 0;
        float *value, *fraction[2];
        int32_t *cell, *x;
    };

    // memory: room for RowVoxels.
    template <int M>
    RowVoxels row_voxels(int64_t row, const float* values, const float* pre, float* memory) const {
        RowVoxels voxels(memory, voxels_.box_shape[last()]);
        const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for_batches<M>(row, [&](const Batch& batch) {
            vfloat value = load_some(values + batch.voxel, batch.count);
            if (pre) value *= load_some(pre + batch.voxel, batch.count);
            store(voxels.value + voxels.count, value);
            for (int m = 0; m < M; ++m) std::memcpy(voxels.fraction[m] + voxels.count, batch.fraction[m], sizeof batch.fraction[m]);
            std::memcpy(voxels.cell + voxels.count, batch.cell, sizeof batch.cell);
            const vint x = lane + static_cast<int32_t>(batch.x);
            std::memcpy(voxels.x + voxels.count, &x, sizeof x);
            voxels.count += batch.count;
        });
        return voxels;
    }

    // body(n) for the voxels n that send something, in the order of kStretches, which must not depend on which these are.
    template <class Body>
    static void for_stretches(const RowVoxels& voxels, Body&& body) {
        const int64_t length = (voxels.count + kStretches - 1) / kStretches;
        for (int64_t i = 0; i < length; ++i)
            for (int64_t n = i; n < voxels.count; n += length)
                if (voxels.value[n] != 0.0f) body(n);
    }

    // The voxels of a row with products: what each adds to the cells along the last modality, side by side, (voxel, cell, column); the
    // fraction along the first of two modalities, the first cell that it touches, and its place along x.
    struct RowProducts {
        static constexpr int64_t kFloats = kLanes + 3;  // per voxel

        RowProducts(float* memory, int64_t row_length) {
            const int64_t stride = row_length + kLanes;
            product = memory;
            fraction = memory + kLanes * stride;
            cell = reinterpret_cast<int32_t*>(memory + (kLanes + 1) * stride);
            x = reinterpret_cast<int32_t*>(memory + (kLanes + 2) * stride);
        }

        int64_t count = 0;
        float *product, *fraction;
        int32_t *cell, *x;
    };
    static_assert(kSpan * kColumns == kLanes);

    template <int M>
    RowProducts row_products(int64_t row, const Sent& sent, float* memory) const {
        RowProducts voxels(memory, voxels_.box_shape[last()]);
        for_batches<M>(row, [&](const Batch& batch) {
            vfloat channel[kColumns]{};
            const vfloat value = load_some(sent.values + batch.voxel, batch.count);
            for (int f = 0; f < sent.num_columns; ++f) channel[f] = value * load_some(sent.columns[f] + batch.voxel, batch.count);
            float rows[kColumns * kLanes];
            interleave<kColumns>(channel, rows);
            for (int i = 0; i < batch.count; ++i) {
                const vfloat4 own = load4(rows + i * kColumns), weight = spline_weights(batch.fraction[M - 1][i]);
                float* const product = voxels.product + (voxels.count + i) * kLanes;
                for (int k = 0; k < kSpan; ++k) store4(product + k * kColumns, own * weight[k]);
                voxels.fraction[voxels.count + i] = batch.fraction[0][i];
                voxels.cell[voxels.count + i] = batch.cell[i] * kColumns;
                voxels.x[voxels.count + i] = static_cast<int32_t>(batch.x) + i;
            }
            voxels.count += batch.count;
        });
        return voxels;
    }

    // body(product, cell, weight) for every voxel of a row and each set of cells that lie side by side, in an order in which neighboring
    // voxels are apart: what the voxel adds to the cells or has of them, the first of them, and their weight.
    template <int M, class Body>
    void for_cells(const RowProducts& voxels, Body&& body) const {
        const int64_t bins = bins_ * kColumns, inner_bins = size_.bins[1] * kColumns;
        const int64_t length = (voxels.count + kStretches - 1) / kStretches;
        for (int64_t i = 0; i < length; ++i)
            for (int64_t n = i; n < voxels.count; n += length) {
                const vfloat product = load(voxels.product + n * kLanes);
                const vfloat4 across = x_weight_[voxels.x[n]];
                for (int j = 0; j < kSpan; ++j) {
                    const int64_t cell = voxels.cell[n] + j * bins;
                    if constexpr (M == 1) {
                        body(product, cell, across[j]);
                    } else {
                        const vfloat4 outer = spline_weights(voxels.fraction[n]);
                        for (int k = 0; k < kSpan; ++k) body(product, cell + k * inner_bins, across[j] * outer[k]);
                    }
                }
            }
    }

    template <int M>
    void splat_products(int64_t row, const Sent& sent, float* to, float* memory) const {
        for_cells<M>(row_products<M>(row, sent, memory),
                     [&](vfloat product, int64_t cell, float weight) { store(to + cell, load(to + cell) + product * weight); });
    }

    // The products of what the voxels of a row receive with their own, summed over the row: (cell of the last modality, column).
    template <int M>
    vfloat row_moments(int64_t row, const float* from, const Sent& own, float* memory) const {
        vfloat total{};
        for_cells<M>(row_products<M>(row, own, memory),
                     [&](vfloat product, int64_t cell, float weight) { total += load(from + cell) * product * weight; });
        return total;
    }

    // memory: room for RowVoxels.
    void splat_row(int64_t row, const Sent& sent, float* to, float* memory) const {
        if (sent.columns) return num_modalities_ == 1 ? splat_products<1>(row, sent, to, memory) : splat_products<2>(row, sent, to, memory);
        const float *const values = sent.values, *const pre = sent.pre;
        if (is_narrow_) {
            NarrowRows::Window window;
            for_batches<1>(row, [&](const Batch& batch) {
                vfloat value = load_some(values + batch.voxel, batch.count);
                if (pre) value *= load_some(pre + batch.voxel, batch.count);
                if (!is_zero_vector(value)) narrow_.splat(window, batch.x, batch.count, value, batch.bin, batch.last_fraction, to);
            });
            return narrow_.finish(window, to);
        }
        const int64_t bins = bins_, inner_bins = size_.bins[1];
        const vfloat4* x_weight = x_weight_.data();
        if (num_modalities_ == 1) {
            const RowVoxels voxels = row_voxels<1>(row, values, pre, memory);
            for_stretches(voxels, [&](int64_t n) {
                float* cell = to + voxels.cell[n];
                const vfloat4 across = x_weight[voxels.x[n]] * voxels.value[n], weight = spline_weights(voxels.fraction[0][n]);
                for (int j = 0; j < kSpan; ++j, cell += bins) store4(cell, load4(cell) + weight * across[j]);
            });
        } else {
            const RowVoxels voxels = row_voxels<2>(row, values, pre, memory);
            for_stretches(voxels, [&](int64_t n) {
                const vfloat4 across = x_weight[voxels.x[n]] * voxels.value[n];
                const vfloat4 outer = spline_weights(voxels.fraction[0][n]), inner = spline_weights(voxels.fraction[1][n]);
                for (int j = 0; j < kSpan; ++j) {
                    float* cell = to + voxels.cell[n] + j * bins;
                    const vfloat4 scaled = inner * across[j];
                    for (int k = 0; k < kSpan; ++k, cell += inner_bins) store4(cell, load4(cell) + scaled * outer[k]);
                }
            });
        }
    }

    // part: what the voxels that receive read of the cells.
    void slice_row(int64_t row, const float* from, const Stretch& part, const float* post, float channel_weight, float* sum) const {
        const int64_t bins = bins_, inner_bins = size_.bins[1];
        const vfloat4* x_weight = x_weight_.data();
        // The stretch of cells that are not zero, in whole vectors.
        int64_t begin = part.begin, end = part.end;
        while (begin < end && is_zero_vector(load(from + begin))) begin += kLanes;
        while (begin < end && is_zero_vector(load(from + end - kLanes))) end -= kLanes;
        auto receives = [&](const Batch& batch) {
            if (!any_receives(batch.voxel, batch.count)) return false;
            return (x_cell_[batch.x + batch.count - 1] + kSpan) * bins > begin && x_cell_[batch.x] * bins < end;
        };
        auto receive = [&](const Batch& batch, const vfloat4* total) {
            for (int i = 0; i < batch.count; ++i) {
                const int64_t voxel = batch.voxel + i;
                sum[voxel] += channel_weight * (post ? post[voxel] : 1.0f) * ((total[i][0] + total[i][1]) + (total[i][2] + total[i][3]));
            }
        };
        if (kLooksUpLanes && is_narrow_) {
            return for_batches<1>(row, [&](const Batch& batch) {
                if (!receives(batch)) return;
                vfloat total = narrow_.slice(from, batch.x, batch.count, batch.bin, batch.last_fraction) * channel_weight;
                if (post) total *= load_some(post + batch.voxel, batch.count);
                store_some(sum + batch.voxel, load_some(sum + batch.voxel, batch.count) + total, batch.count);
            });
        }
        vfloat4 total[kLanes];
        if (num_modalities_ == 1) {
            for_batches<1>(row, [&](const Batch& batch) {
                if (!receives(batch)) return;
                for (int i = 0; i < batch.count; ++i) {
                    const float* cell = from + batch.cell[i];
                    const vfloat4 across = x_weight[batch.x + i];
                    vfloat4 blended = load4(cell) * across[0];
                    for (int j = 1; j < kSpan; ++j) blended += load4(cell + j * bins) * across[j];
                    total[i] = blended * spline_weights(batch.fraction[0][i]);
                }
                receive(batch, total);
            });
        } else {
            for_batches<2>(row, [&](const Batch& batch) {
                if (!receives(batch)) return;
                for (int i = 0; i < batch.count; ++i) {
                    const vfloat4 across = x_weight[batch.x + i], outer = spline_weights(batch.fraction[0][i]);
                    vfloat4 blended{};
                    for (int j = 0; j < kSpan; ++j) {
                        const float* cell = from + batch.cell[i] + j * bins;
                        vfloat4 part{};
                        for (int k = 0; k < kSpan; ++k, cell += inner_bins) part += load4(cell) * outer[k];
                        blended += part * across[j];
                    }
                    total[i] = blended * spline_weights(batch.fraction[1][i]);
                }
                receive(batch, total);
            });
        }
    }

    // Whether any of some voxels needs what it receives.
    bool any_receives(int64_t voxel, int64_t count) const { return !receivers || std::memchr(receivers + voxel, 1, count) != nullptr; }
    // What the voxels of a row that receive read of its cells.
    Stretch read_by(int64_t row) const {
        return touched(row, [&](int64_t voxel, int64_t count) { return any_receives(voxel, count); });
    }

    // receive(plane, row, cells, part of them that is read, memory): for each row that has something to receive; memory: room for the
    // voxels of a row.
    template <class Receive>
    void slice(Receive&& receive) {
        if (voxels_.num_axes == 1) return receive(int64_t{0}, int64_t{0}, grid_, read_by(0), scratch_[0].get());
        pool_.run(num_planes_, [&](int64_t p, int thread) {
            float* const plane = scratch_[thread].get();
            std::vector<Stretch> reads(rows_under(1));
            for (int64_t row = 0; row < rows_under(1); ++row) reads[row] = read_by(p * rows_under(1) + row);
            if (!blend_bands(p, reads.data(), plane)) return;
            slice_below(1, 0, reads.data(), plane, plane + plane_size_, [&](int64_t row, const float* from, float* memory) {
                receive(p, p * rows_under(1) + row, from, reads[row], memory);
            });
        });
    }

    // The bands that the voxels of a plane read; false: all of them are zero. reads: what each row of the plane reads.
    bool blend_bands(int64_t p, const Stretch* reads, float* plane) const {
        const int64_t rows_below = rows_under(1), rows_aside = num_bands_ > 1 ? rows_under(2) : 1;
        std::vector<Stretch> is_read(num_bands_);
        for (int64_t row = 0; row < rows_below; ++row) {
            const int64_t band = num_bands_ > 1 ? axis_[1][row / rows_aside].cell : 0;
            for (int64_t k = 0; k < (num_bands_ > 1 ? kSpan : 1); ++k) is_read[band + k] = is_read[band + k].with(reads[row]);
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
                blend(plane + band * band_size_, grid_ + first * band_size_, plane_size_, &axis_[0][p], 1, held, 0);
                any = true;
            }
            cover(plane + band * band_size_, held, wanted);
        }
        return any;
    }

    // position: of what lies below the axis, among the same in its plane.
    template <class Receive>
    void slice_below(int axis, int64_t position, const Stretch* reads, const float* from, float* scratch, const Receive& receive) const {
        if (axis == last() || axis == kMaxAxes - 1) {  // gcc follows the recursion, and warns of axes that do not exist without the latter
            const Stretch& part = reads[position];
            if (!part.is_empty() && !is_zero(from + part.begin, part.end - part.begin)) receive(position, from, scratch);
            return;
        }
        const int64_t rows_below = rows_under(axis + 1), size = level_[axis + 1], length = voxels_.box_shape[axis];
        const Place* const places = axis_[axis].data();
        for (int64_t i = 0, end = 0; i < length; i = end) {
            Stretch part;
            std::array<bool, RowGroup::kGroup> receives{};
            for (end = i; end < length && end < i + RowGroup::kGroup && places[end].cell == places[i].cell; ++end)
                for (int64_t row = (position * length + end) * rows_below; row < (position * length + end + 1) * rows_below; ++row) {
                    part = part.with(reads[row]);
                    receives[end - i] |= !reads[row].is_empty();
                }
            if (part.is_empty()) continue;
            if (axis + 1 < last()) part = {0, size};
            blend(scratch, from + places[i].cell * size, size, places + i, end - i, part, size);
            for (int64_t n = 0; n < end - i; ++n)
                if (receives[n])
                    slice_below(axis + 1, position * length + i + n, reads, scratch + n * size, scratch + RowGroup::kGroup * size, receive);
        }
    }

    // What is held of a band if so much is held of its rows: all, unless the band is one row.
    Stretch of_band(const Stretch& row) const { return level_[last()] == band_size_ ? row : Stretch{0, band_size_}; }

    // The three-tap filter along every axis of the grid, in place: first all inner axes of each plane, while it is in the cache. What stays
    // zero is left out.
    void blur() {
        if (voxels_.num_axes == 1) return blur_inside(grid_, level_[0], {0, level_[0]}, scratch_[0].get());
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
                blur_across(plane, num_bands_, band_size_, occupied, wider.data() + p * num_bands_, 1, {0, band_size_}, scratch);
        });
        std::vector<Stretch> read(occupied_.size());  // four cells are read together
        for (int64_t band = 0; band < num_bands_; ++band) {
            widen(wider.data() + band, size_.cells[0], num_bands_, 1, wide_.data() + band);
            widen(wide_.data() + band, size_.cells[0], num_bands_, kSpan - 1, read.data() + band);
        }
        for_pieces([&](int64_t band, const Stretch& piece, int thread) {
            float* const grid = grid_ + band * band_size_;
            blur_across(grid, size_.cells[0], plane_size_, wider.data() + band, wide_.data() + band, num_bands_, piece,
                        scratch_[thread].get());
            for (int64_t cell = 0; cell < size_.cells[0]; ++cell) {
                Stretch held = wide_[cell * num_bands_ + band].within(piece);
                const Stretch wanted = read[cell * num_bands_ + band].within(piece);
                if (!wanted.is_empty()) cover(grid + cell * plane_size_, held, wanted);
            }
        });
    }

    // The cells of a band that hold numbers, and one more along the last axis on both sides.
    Stretch with_neighbors(const Stretch& cells) const {
        const int64_t cell = bins_ * width_, begin = cells.begin / cell - 1, end = (cells.end + cell - 1) / cell + 1;
        return of_band({std::max<int64_t>(0, begin * cell) / kLanes * kLanes, std::min(whole_vectors(end * cell), level_[last()])});
    }

    // The same along the axes within `size` consecutive cells of the grid: those of a band, or a grid of one axis; of each row a part.
    void blur_inside(float* cells, int64_t size, const Stretch& part, float* scratch) const {
        const int64_t row_size = level_[last()], cell = bins_ * width_;
        // Cells of which all is held; what is held of others is zero.
        const int64_t first = (part.begin + cell - 1) / cell, x_cells = std::min(part.end / cell, size_.cells[last()]) - first;
        for (float* row = cells + first * cell; row < cells + size; row += row_size) {
            if (num_modalities_ == 2) {
                for (int64_t x = 0; x < x_cells; ++x) {
                    float* const bins = row + x * bins_ * width_;
                    blur_contiguous(bins, size_.bins[0], size_.bins[1] * width_, width_, scratch);
                    blur_strided(bins, size_.bins[0], size_.bins[1] * width_, scratch);
                }
            } else {
                blur_contiguous(row, x_cells, bins_ * width_, width_, scratch);
            }
            blur_strided(row, x_cells, bins_ * width_, scratch);
        }
        for (int a = last() - 1; a >= 2; --a)
            for (float* slab = cells; slab < cells + size; slab += level_[a]) blur_strided(slab, size_.cells[a], level_[a + 1], scratch);
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    GridSize size_;
    int num_modalities_;
    std::vector<Place> axis_[kMaxAxes];  // cell of each voxel coordinate
    std::vector<int32_t> x_cell_;        // the same for the last axis, stored separately
    std::vector<vfloat4> x_weight_;
    NarrowRows narrow_;
    bool is_narrow_ = false;  // one modality whose intensity cells fit into a vector
    const float* intensity_[2]{};
    float zero_[2]{}, scale_[2]{};
    int64_t bins_ = 0;  // intensity cells of one spatial cell
    int width_ = 0;     // channels side by side in every cell
    int64_t num_cells_ = 0;
    int64_t level_[kMaxAxes]{};  // sizes in floats of one row, plane, ...: level_[a] covers axes a .. last and all intensities
    int64_t num_planes_ = 0, plane_size_ = 0, batch_ = 0;
    int64_t num_bands_ = 1, band_size_ = 0;      // bands: the cells of a plane at one cell along the second axis, unless that is the last
    std::vector<int32_t> first_run_;             // of each row of the box
    float *grid_ = nullptr, *planes_ = nullptr;  // in the workspace: the grid, and a batch of planes
    std::vector<Stretch> filled_;                // (plane of the batch, band) what voxels send to
    std::vector<Stretch> occupied_, wide_;       // (cell along the first axis, band) the same; and what is not zero after the blur
    std::vector<Buffer<float>> scratch_;
};

}  // namespace

std::unique_ptr<Filter> make_grid_filter(const BilateralInput& input, const GridSize& size, ThreadPool& pool) {
    if (input.intensity.empty() || input.intensity.size() > 2)
        throw InputError("the grid filter takes one or two modalities, not " + std::to_string(input.intensity.size()) +
                         "; use filter = \"lattice\" or \"auto\"");
    if (!fits_grid(input, size))
        throw CapacityError("the bilateral grid would have too many cells for these bandwidths; use filter = \"auto\"");
    return std::make_unique<GridFilter>(input, size, pool);
}

}  // namespace crf
