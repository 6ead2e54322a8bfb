// Label sets per tile (docs/reference/math.md): which labels are present where, and channels that
// hold a different label in each tile. Grids have three axes, the last fastest; shorter grids have
// leading axes of one voxel.
#pragma once

#include "cpu/simd.h"
#include "cpu/voxels.h"

namespace crf {
// IEEE half precision, as bits.
struct Half {
    uint16_t bits;
};

inline float to_single(Half h) {
    // 2^112 is the difference between the biases of the exponents.
    const float magnitude = std::bit_cast<float>((h.bits & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0;  // infinity or NaN
    const uint32_t sign = (h.bits & 0x8000u) << 16;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | sign);
}

inline vfloat load_some(const Half* from, int64_t count) {
    Half some[kLanes]{};
    if (count < kLanes) {
        for (int64_t i = 0; i < count; ++i) some[i] = from[i];
        from = some;
    }
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_cvtph_ps(
        static_cast<__mmask16>(0xffff), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    float values[kLanes];
    _mm256_storeu_ps(values,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    _mm256_storeu_ps(values + 8,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8))));
    return load(values);
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = to_single(from[i]);
    return load(values);
#endif
}

// The part of a tile's row inside the grid.
struct TileRow {
    int64_t z, y, x, length;  // its first voxel, and the number of its voxels
    int64_t number, place;  // among the tile's rows, and of its first voxel among the tile's voxels
    int64_t grid;           // index of its first voxel
};

// A grid cut into tiles; those at its end may be smaller.
struct Tiling {
    Extents shape, tile, count;

    Tiling(const Extents& grid, const Extents& of_tile) : shape(grid), tile(of_tile) {
        for (int a = 0; a < 3; ++a) count[a] = divided_up(shape[a], tile[a]);
    }
    int64_t num_voxels() const { return shape[0] * shape[1] * shape[2]; }
    int64_t num_tiles() const { return count[0] * count[1] * count[2]; }
    int64_t tile_rows() const { return tile[0] * tile[1]; }
    int64_t tile_voxels() const { return tile_rows() * tile[2]; }
    // The voxels of a tile, [begin, end) along each axis.
    Extents begin(int64_t number) const {
        return {number / (count[2] * count[1]) * tile[0], number / count[2] % count[1] * tile[1],
                number % count[2] * tile[2]};
    }
    Extents end(int64_t number) const {
        Extents voxels = begin(number);
        for (int a = 0; a < 3; ++a) voxels[a] = std::min(voxels[a] + tile[a], shape[a]);
        return voxels;
    }

    // Calls body(row) for the rows of a tile.
    template <class Body>
    void for_rows(int64_t number, Body&& body) const {
        const Extents first = begin(number), last = end(number);
        for (int64_t z = first[0]; z < last[0]; ++z)
            for (int64_t y = first[1]; y < last[1]; ++y) {
                const int64_t row = (z - first[0]) * tile[1] + y - first[1], x = first[2];
                body(TileRow{z, y, x, last[2] - x, row, row * tile[2],
                             (z * shape[1] + y) * shape[2] + x});
            }
    }

    // Calls body(number) for the tiles that have a voxel of the box [first, last), which may end
    // outside the grid.
    template <class Body>
    void for_tiles(const Extents& first, const Extents& last, Body&& body) const {
        Extents low, high;
        for (int a = 0; a < 3; ++a) {
            low[a] = std::max<int64_t>(0, first[a]) / tile[a];
            high[a] = divided_up(std::min(shape[a], last[a]), tile[a]);
        }
        for (int64_t z = low[0]; z < high[0]; ++z)
            for (int64_t y = low[1]; y < high[1]; ++y)
                for (int64_t x = low[2]; x < high[2]; ++x) body((z * count[1] + y) * count[2] + x);
    }
};

// How stored numbers become logits.
struct Decoding {
    // the logarithm is taken of probabilities, which are clipped from below
    bool is_probability = false;

    vfloat operator()(vfloat stored) const {
        constexpr float kSmallestProbability = numerics::MIN_PROBABILITY;
        return is_probability ? log_positive(vmin(vmax(stored, splat_lanes(kSmallestProbability)),
                                                  splat_lanes(1.0f)))
                              : stored;
    }
};

// Knowledge of each voxel after some channels. All of it covers the grid.
struct Survey {
    float* log_sum;  // log of the sum over the channels so far of exp((logit + bias) / temperature)
    float* best;     // the largest logit so far
    uint16_t* label;     // its label, the lowest of equal ones
    uint8_t* is_equal;   // 1 where all channels so far have exactly the same logit, else 0
    float* best_biased;  // the largest logit + bias so far; nullptr: no label has a bias
    float inverse_temperature;
    float bias;  // of the label that is looked at
};

// The channel of a label, at `num_tiles` tiles: planes of the grid, which may be a box of a larger
// array; or the tiles' voxels, one tile after the other. T: float or Half.
template <class T>
struct TileChannel {
    const Tiling& tiling;
    const T* values;
    int64_t row, plane;  // the distances of rows and planes from one another
    bool is_of_grid;
    const int64_t* tiles;
    int64_t num_tiles;
    Decoding decoding;
    const uint8_t* mask;  // (*grid) nonzero = inside; nullptr: everywhere

    // Adds planes [first_plane, first_plane + num_planes) of a label, which are all of the channel,
    // to the survey. tile_margin: (tile) raised to the largest (logit + bias) / temperature -
    // log_sum of the voxels inside the mask: an upper bound of the logarithm of the label's largest
    // probability in the tile, because log_sum only grows.
    void survey(int64_t first_plane, int64_t num_planes, int label, const Survey& survey,
                float* tile_margin, ThreadPool& pool) const;

    // lowest_sum: (tile of the grid) the smallest log_sum of its voxels.
    // margin: (num_tiles) largest (logit + bias) / temperature - log_sum of the voxels of a tile
    // inside the mask; where it is not above the threshold, it may be an upper bound that is not
    // either.
    void margins(const Survey& survey, const float* lowest_sum, float threshold, float* margin,
                 ThreadPool& pool) const;

    // Writes the logits of the tiles at the places of their entries: out[entry[i]] has a number per
    // voxel of a tile, 0 beyond the grid's end.
    void fill_entries(const int64_t* entry, float* out, ThreadPool& pool) const;

    // Copies the tiles of a channel of the grid, in turn; places beyond the grid's end are zero.
    void gather(T* out, ThreadPool& pool) const;

   private:
    // Where the row of a tile lies.
    const T* at(int64_t item, const TileRow& own) const {
        return is_of_grid ? values + own.z * plane + own.y * row + own.x
                          : values + item * tiling.tile_voxels() + own.place;
    }
};

// A label map as logits on tiles (docs/reference/math.md): a label takes part at the voxels that
// have it within reach.

// The logits of a label: at a voxel that has it, at others within reach of one, and
// elsewhere.
struct LabelLogits {
    float own, near, absent;
};

// A label map on the grid. Label: uint8_t or uint16_t.
template <class Label>
struct TileLabels {
    const Tiling& tiling;
    const Label* labels;
    Extents reach;

    // near: (label, tile), for labels below num_labels, set to 1 for the tiles that reach a label:
    // those with a voxel in the box of the label's voxels of some tile, widened by `reach`. It is
    // set wherever a voxel has the label within reach, and in few other tiles.
    void mark_near(int64_t num_labels, uint8_t* near, ThreadPool& pool) const;

    // Writes the logits of a label in some tiles, one tile after the other at the places of their
    // entries, as `fill_entries` does. A voxel is near a label if the label occurs up to `reach`
    // voxels away along each axis.
    void fill_entries(int label, const LabelLogits& logits, const int64_t* tiles, int64_t num_tiles,
                      const int64_t* entry, float* out, ThreadPool& pool) const;
};
}  // namespace crf
