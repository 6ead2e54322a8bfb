// Splats the voxels of a row into a row of cells of the bilateral grid, and slices them from it.
#pragma once

#include "cpu/filter.h"
#include "cpu/grid_bands.h"
#include "cpu/grid_rows.h"

namespace crf {
// The values that voxels send, times `pre` unless it is nullptr; or, with columns, the products of
// the values with up to GridVoxels::kColumns columns, side by side in every cell.
struct Sent {
    const float* values;
    const float* pre;
    const float* const* columns = nullptr;
    int num_columns = 0;
};

// A row is cut into so many stretches, and their voxels are splatted in turn: the cells of
// neighboring voxels overlap, and a load that partly overlaps a recent store would wait for it.
constexpr int64_t kStretches = 8;

class GridVoxels {
   public:
    static constexpr int kColumns = kFeatureGroup;

    // places: the places of the voxels along the last axis.
    GridVoxels(const KernelInput& input, const GridSize& size, const std::vector<Place>& places)
        : voxels_(*input.voxels),
          num_modalities_(static_cast<int>(input.intensity.size())),
          row_length_(places.size()) {
        for (const Place& place : places) {
            x_cell_.push_back(static_cast<int32_t>(place.cell));
            x_weight_.push_back(place.weight);
        }
        x_cell_.resize(x_cell_.size() + kLanes);  // read in whole vectors
        x_weight_.resize(x_weight_.size() + kLanes);
        for (int m = 0; m < num_modalities_; ++m) {
            intensity_[m] = input.intensity[m];
            zero_[m] = input.zero[m];
            scale_[m] = static_cast<float>(1.0 / input.theta_beta[m]);
            first_bin_[m] = size.first_bin[m];
            lowest_[m] = static_cast<float>(size.first_bin[m]);
            highest_[m] = std::nextafter(
                static_cast<float>(size.first_bin[m] + size.bins[m] - kSpan + 1), lowest_[m]);
        }
        inner_bins_ = num_modalities_ == 2 ? size.bins[1] : 1;
        bins_ = size.bins[0] * inner_bins_;
        int64_t num_places = 1;
        for (int a = 0; a < voxels_.num_axes; ++a) num_places *= size.cells[a];
        const int64_t row_cells = size.cells[voxels_.num_axes - 1];
        is_narrow_ = kPlacesLanes && num_modalities_ == 1 && bins_ <= kLanes &&
                     row_length_ * row_cells <= NarrowRows::kMostWeights &&
                     num_places * kLanes <= voxels_.num_voxels;
        if (is_narrow_) {
            bins_ = kLanes;  // more cells than needed: cells that no voxel reaches change nothing
            narrow_.prepare(x_cell_, x_weight_, row_length_, row_cells);
        }
        first_run_ = voxels_.first_runs(voxels_.box_size / row_length_,
                                        [&](const Run& run) { return run.box / row_length_; });
    }

    // Number of intensity cells in one spatial cell.
    int64_t bins() const { return bins_; }

    // Size of `memory` in floats, for `width` channels side by side.
    int64_t num_floats(int width) const {
        return (width == 1 ? RowVoxels::kFloats : RowProducts::kFloats) * (row_length_ + kLanes);
    }

    // The spatial cells of a row touched by voxels that send something.
    Stretch sent_by(int64_t row, const Sent& sent) const {
        return touched(row, [&](int64_t voxel, int64_t count) {
            return !is_zero(sent.values + voxel, count);
        });
    }

    // The spatial cells of a row touched by receivers: (voxel) 1 or 0; nullptr: all voxels receive.
    Stretch read_by(int64_t row, const uint8_t* receivers) const {
        return touched(row, [&](int64_t voxel, int64_t count) {
            return any_receives(receivers, voxel, count);
        });
    }

    // Splats the values that the voxels of a row send into a row of cells.
    void splat_row(int64_t row, const Sent& sent, float* to, float* memory) const {
        if (sent.columns)
            return num_modalities_ == 1 ? splat_products<1>(row, sent, to, memory)
                                        : splat_products<2>(row, sent, to, memory);
        const float *const values = sent.values, *const pre = sent.pre;
        if (is_narrow_) {
            NarrowRows::Window window;
            for_batches<1>(row, [&](const Batch& batch) {
                vfloat value = load_some(values + batch.voxel, batch.count);
                if (pre) value *= load_some(pre + batch.voxel, batch.count);
                if (!is_zero_vector(value))
                    narrow_.splat(window, batch.x, batch.count, value, batch.bin, batch.fraction[0],
                                  to);
            });
            return narrow_.finish(window, to);
        }
        const int64_t bins = bins_, inner_bins = inner_bins_;
        const vfloat4* x_weight = x_weight_.data();
        if (num_modalities_ == 1) {
            const RowVoxels voxels = row_voxels<1>(row, values, pre, memory);
            for_stretches(voxels, [&](int64_t n) {
                float* cell = to + voxels.cell[n];
                const vfloat4 across = x_weight[voxels.x[n]] * voxels.value[n];
                const vfloat4 weight = spline_weights(voxels.fraction[0][n]);
                for (int j = 0; j < kSpan; ++j, cell += bins)
                    store_lanes(cell, load4(cell) + weight * across[j]);
            });
        } else {
            const RowVoxels voxels = row_voxels<2>(row, values, pre, memory);
            for_stretches(voxels, [&](int64_t n) {
                const vfloat4 across = x_weight[voxels.x[n]] * voxels.value[n];
                const vfloat4 outer = spline_weights(voxels.fraction[0][n]);
                const vfloat4 inner = spline_weights(voxels.fraction[1][n]);
                for (int j = 0; j < kSpan; ++j) {
                    float* cell = to + voxels.cell[n] + j * bins;
                    const vfloat4 scaled = inner * across[j];
                    for (int k = 0; k < kSpan; ++k, cell += inner_bins)
                        store_lanes(cell, load4(cell) + scaled * outer[k]);
                }
            });
        }
    }

    // Slices the voxels of a row: adds the values, times weight and `post`, to their sums.
    // part: the floats of the row of cells that are read.
    void slice_row(int64_t row, const float* from, const Stretch& part, const uint8_t* receivers,
                   const float* post, float channel_weight, float* sum) const {
        const int64_t bins = bins_, inner_bins = inner_bins_;
        const vfloat4* x_weight = x_weight_.data();
        // The stretch of cells that are not zero, in whole vectors.
        int64_t begin = part.begin, end = part.end;
        while (begin < end && is_zero_vector(load(from + begin))) begin += kLanes;
        while (begin < end && is_zero_vector(load(from + end - kLanes))) end -= kLanes;
        auto receives = [&](const Batch& batch) {
            if (!any_receives(receivers, batch.voxel, batch.count)) return false;
            return (x_cell_[batch.x + batch.count - 1] + kSpan) * bins > begin &&
                   x_cell_[batch.x] * bins < end;
        };
        auto receive = [&](const Batch& batch, const vfloat& total) {
            vfloat factor = splat_lanes(channel_weight);
            if (post) factor *= load_some(post + batch.voxel, batch.count);
            store_some(sum + batch.voxel,
                       load_some(sum + batch.voxel, batch.count) + factor * total, batch.count);
        };
        if (kLooksUpLanes && is_narrow_) {
            return for_batches<1>(row, [&](const Batch& batch) {
                if (receives(batch))
                    receive(batch, narrow_.slice(from, batch.x, batch.count, batch.bin,
                                                 batch.fraction[0]));
            });
        }
        // blended(i): values that a register of voxels from number i on receives from four cells.
        const auto slice = [&](const Batch& batch, auto&& blended) {
            if (!receives(batch)) return;
            alignas(vfloat) float total[4 * kLanes];
            for (int i = 0; i < batch.count; i += kQuads) store_lanes(total + 4 * i, blended(i));
            vfloat part[4];
            deinterleave<4>(total, part);
            receive(batch, (part[0] + part[1]) + (part[2] + part[3]));
        };
        if (num_modalities_ == 1) {
            for_batches<1>(row, [&](const Batch& batch) {
                slice(batch, [&](int i) {
                    const vquads blended = blend_quads(
                        load_quads(x_weight + batch.x + i),
                        [&](int j) { return load_quads(from + j * bins, batch.cell + i); });
                    return blended * spline_weights(spread_quads(batch.fraction[0] + i));
                });
            });
        } else {
            for_batches<2>(row, [&](const Batch& batch) {
                slice(batch, [&](int i) {
                    const vquads outer = spline_weights(spread_quads(batch.fraction[0] + i));
                    const vquads blended =
                        blend_quads(load_quads(x_weight + batch.x + i), [&](int j) {
                            return blend_quads(outer, [&](int k) {
                                return load_quads(from + j * bins + k * inner_bins, batch.cell + i);
                            });
                        });
                    return blended * spline_weights(spread_quads(batch.fraction[1] + i));
                });
            });
        }
    }

    // Products of the values that a row's voxels receive with their own, summed: (cell of the last
    // modality, column).
    vfloat row_moments(int64_t row, const float* from, const Sent& own, float* memory) const {
        return num_modalities_ == 1 ? sum_moments<1>(row, from, own, memory)
                                    : sum_moments<2>(row, from, own, memory);
    }

   private:
    // The spatial cells between a row's first and last voxel that count. counts(voxel, number of
    // voxels) decides.
    template <class Counts>
    Stretch touched(int64_t row, Counts&& counts) const {
        int64_t first = -1, end = -1;
        for (int64_t r = first_run_[row]; r < first_run_[row + 1]; ++r) {
            const Run& run = voxels_.runs[r];
            if (!counts(run.voxel, run.length)) continue;
            const int64_t x = run.box - row * row_length_;
            for (int64_t done = 0; done < run.length; done += kLanes) {
                const int64_t count = std::min<int64_t>(kLanes, run.length - done);
                if (!counts(run.voxel + done, count)) continue;
                if (first < 0) first = x + done;
                end = x + done + count;
            }
        }
        if (first < 0) return {};
        return {x_cell_[first], x_cell_[end - 1] + kSpan};
    }

    // Sixteen voxels of a row, or fewer at the end of a run.
    struct Batch {
        int64_t voxel, x;  // the first voxel, and its place along x
        int count;
        // Arrays: gcc copies structures of registers piece by piece, and whole registers read from
        // such copies wait for them.
        alignas(vfloat) int32_t bin[kLanes];  // first intensity cell of a voxel, of all modalities
        alignas(vfloat) int32_t
            cell[kLanes];  // first cell that a voxel touches, relative to the row's first cell
        alignas(vfloat) float fraction[2][kLanes];
    };

    // Calls body(batch) for the voxels of a row. Inlined, so that what the body reads stays in
    // registers.
    template <int M, class Body>
    [[gnu::always_inline]] void for_batches(int64_t row, Body&& body) const {
        const int32_t* x_cell = x_cell_.data();
        for (int64_t r = first_run_[row]; r < first_run_[row + 1]; ++r) {
            const Run& run = voxels_.runs[r];
            Batch batch;
            batch.x = run.box - row * row_length_;
            batch.voxel = run.voxel;
            for (int32_t done = 0; done < run.length;
                 done += kLanes, batch.voxel += kLanes, batch.x += kLanes) {
                batch.count = std::min<int32_t>(kLanes, run.length - done);
                vint bin{};
                for (int m = 0; m < M; ++m) {
                    // The image is read anew at each filtering: a value that was changed since the
                    // grid was built, or has become NaN, must not reach beyond its cells.
                    const vfloat in_bandwidths =
                        (load_some(intensity_[m] + run.grid + done, batch.count) - zero_[m]) *
                        scale_[m];
                    const vfloat u = vmin(vmax(in_bandwidths, splat_lanes(lowest_[m])),
                                          splat_lanes(highest_[m]));
                    const vint whole = floor_to_int(u);
                    bin = bin * static_cast<int32_t>(inner_bins_) + (whole - first_bin_[m]);
                    store(batch.fraction[m], u - to_float(whole));
                }
                store_lanes(batch.bin, bin);
                vint cell = load_lanes<vint>(x_cell + batch.x) * static_cast<int32_t>(bins_) + bin;
                if (batch.count < kLanes)
                    // no lane leaves the row
                    cell = select(first_lanes(batch.count), cell, vint{});
                store_lanes(batch.cell, cell);
                body(batch);
            }
        }
    }

    // The voxels of a row: the first cell that each touches, fractions of cells, place along x, and
    // value.
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
        RowVoxels voxels(memory, row_length_);
        const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for_batches<M>(row, [&](const Batch& batch) {
            vfloat value = load_some(values + batch.voxel, batch.count);
            if (pre) value *= load_some(pre + batch.voxel, batch.count);
            store(voxels.value + voxels.count, value);
            for (int m = 0; m < M; ++m)
                store(voxels.fraction[m] + voxels.count, load(batch.fraction[m]));
            store_lanes(voxels.cell + voxels.count, load_lanes<vint>(batch.cell));
            store_lanes(voxels.x + voxels.count, lane + static_cast<int32_t>(batch.x));
            voxels.count += batch.count;
        });
        return voxels;
    }

    // Calls body(n) for the voxels n that send something, in turn from each stretch (see
    // kStretches). Their order does not depend on which voxels send.
    template <class Body>
    static void for_stretches(const RowVoxels& voxels, Body&& body) {
        const int64_t length = divided_up(voxels.count, kStretches);
        for (int64_t i = 0; i < length; ++i)
            for (int64_t n = i; n < voxels.count; n += length)
                if (voxels.value[n] != 0.0f) body(n);
    }

    // The voxels of a row with products: (voxel, cell, column) the numbers that each voxel adds to
    // the cells along the last modality; its fraction along the first of two modalities, its first
    // cell, and its place along x.
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
        RowProducts voxels(memory, row_length_);
        for_batches<M>(row, [&](const Batch& batch) {
            vfloat channel[kColumns]{};
            const vfloat value = load_some(sent.values + batch.voxel, batch.count);
            for (int f = 0; f < sent.num_columns; ++f)
                channel[f] = value * load_some(sent.columns[f] + batch.voxel, batch.count);
            float rows[kColumns * kLanes];
            interleave<kColumns>(channel, rows);
            for (int i = 0; i < batch.count; ++i) {
                const vfloat4 own = load4(rows + i * kColumns);
                const vfloat4 weight = spline_weights(batch.fraction[M - 1][i]);
                float* const product = voxels.product + (voxels.count + i) * kLanes;
                for (int k = 0; k < kSpan; ++k)
                    store_lanes(product + k * kColumns, own * weight[k]);
                voxels.fraction[voxels.count + i] = batch.fraction[0][i];
                voxels.cell[voxels.count + i] = batch.cell[i] * kColumns;
                voxels.x[voxels.count + i] = static_cast<int32_t>(batch.x) + i;
            }
            voxels.count += batch.count;
        });
        return voxels;
    }

    // Calls body(product, first cell, weight) for every voxel of a row and each set of adjacent
    // cells. product: the voxel's products with the spline weights. Neighboring voxels are apart in
    // this order (see kStretches).
    template <int M, class Body>
    void for_cells(const RowProducts& voxels, Body&& body) const {
        const int64_t bins = bins_ * kColumns, inner_bins = inner_bins_ * kColumns;
        const int64_t length = divided_up(voxels.count, kStretches);
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
                        for (int k = 0; k < kSpan; ++k)
                            body(product, cell + k * inner_bins, across[j] * outer[k]);
                    }
                }
            }
    }

    template <int M>
    void splat_products(int64_t row, const Sent& sent, float* to, float* memory) const {
        for_cells<M>(row_products<M>(row, sent, memory),
                     [&](vfloat product, int64_t cell, float weight) {
                         store(to + cell, load(to + cell) + product * weight);
                     });
    }

    template <int M>
    vfloat sum_moments(int64_t row, const float* from, const Sent& own, float* memory) const {
        vfloat total{};
        for_cells<M>(row_products<M>(row, own, memory),
                     [&](vfloat product, int64_t cell, float weight) {
                         total += load(from + cell) * product * weight;
                     });
        return total;
    }

    // Whether any of `count` voxels receives.
    static bool any_receives(const uint8_t* receivers, int64_t voxel, int64_t count) {
        return !receivers || std::memchr(receivers + voxel, 1, count) != nullptr;
    }

    const Voxels& voxels_;
    const int num_modalities_;
    const int64_t row_length_;
    // (voxel along the last axis) the first of its four cells, and their weights
    std::vector<int32_t> x_cell_;
    std::vector<vfloat4> x_weight_;
    NarrowRows narrow_;
    bool is_narrow_ = false;  // one modality whose intensity cells fit into a vector
    const float* intensity_[2]{};
    float zero_[2]{}, scale_[2]{};
    int32_t first_bin_[2]{};
    float lowest_[2]{}, highest_[2]{};  // in bandwidths, of the places whose four cells exist
    // Intensity cells of one spatial cell, and those along the second modality.
    int64_t bins_ = 0, inner_bins_ = 0;
    std::vector<int64_t> first_run_;  // of each row of the box
};
}  // namespace crf
