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

class GridVoxels {
   public:
    static constexpr int kColumns = kFeatureGroup;

    // places: the places of the voxels along the last axis.
    GridVoxels(const BilateralInput& input, const GridSize& size, const std::vector<Place>& places);

    // Number of intensity cells in one spatial cell.
    int64_t bins() const { return bins_; }

    // Size of `memory` in floats, for `width` channels side by side.
    int64_t num_floats(int width) const;

    // The spatial cells of a row touched by voxels that send something.
    Stretch sent_by(int64_t row, const Sent& sent) const;

    // The spatial cells of a row touched by receivers: (voxel) 1 or 0; nullptr: all voxels receive.
    Stretch read_by(int64_t row, const uint8_t* receivers) const;

    // Splats the values that the voxels of a row send into a row of cells.
    void splat_row(int64_t row, const Sent& sent, float* to, float* memory) const;

    // Slices the voxels of a row: adds the values, times weight and `post`, to their sums.
    // part: the floats of the row of cells that are read.
    void slice_row(int64_t row, const float* from, const Stretch& part, const uint8_t* receivers,
                   const float* post, float channel_weight, float* sum) const;

    // Products of the values that a row's voxels receive with their own, summed: (cell of the last
    // modality, column).
    vfloat row_moments(int64_t row, const float* from, const Sent& own, float* memory) const;

   private:
    // The spatial cells between a row's first and last voxel that count. counts(voxel, number of
    // voxels) decides.
    template <class Counts>
    Stretch touched(int64_t row, Counts&& counts) const;

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

    // Calls body(batch) for the voxels of a row.
    template <int M, class Body>
    void for_batches(int64_t row, Body&& body) const;

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
    RowVoxels row_voxels(int64_t row, const float* values, const float* pre, float* memory) const;

    // Calls body(n) for the voxels n that send something, in turn from each stretch (see
    // kStretches). Their order does not depend on which voxels send.
    template <class Body>
    static void for_stretches(const RowVoxels& voxels, Body&& body);

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
    RowProducts row_products(int64_t row, const Sent& sent, float* memory) const;

    // Calls body(product, first cell, weight) for every voxel of a row and each set of adjacent
    // cells. product: the voxel's products with the spline weights. Neighboring voxels are apart in
    // this order (see kStretches).
    template <int M, class Body>
    void for_cells(const RowProducts& voxels, Body&& body) const;

    template <int M>
    void splat_products(int64_t row, const Sent& sent, float* to, float* memory) const;

    template <int M>
    vfloat sum_moments(int64_t row, const float* from, const Sent& own, float* memory) const;

    // Whether any of `count` voxels receives.
    static bool any_receives(const uint8_t* receivers, int64_t voxel, int64_t count);

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
    std::vector<int32_t> first_run_;  // of each row of the box
};
}  // namespace crf
