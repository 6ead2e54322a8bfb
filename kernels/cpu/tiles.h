// Label sets per tile (docs/reference/math.md): which labels are present where, and channels that
// hold a different label in each tile. Grids have three axes, the last fastest; shorter grids have
// leading axes of one voxel.
#pragma once

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace crf {
// IEEE half precision, as bits.
struct Half {
    uint16_t bits;
};

inline float to_single(Half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + 0x38000000u);
    } else {  // zero and subnormal numbers: a multiple of 2^-24
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float to_single(float x) { return x; }

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
    int64_t shape[3], tile[3], count[3];

    Tiling(const int64_t (&grid)[3], const int64_t (&extents)[3]) {
        for (int a = 0; a < 3; ++a) {
            shape[a] = grid[a];
            tile[a] = extents[a];
            count[a] = (grid[a] + extents[a] - 1) / extents[a];
        }
    }
    int64_t num_voxels() const { return shape[0] * shape[1] * shape[2]; }
    int64_t num_tiles() const { return count[0] * count[1] * count[2]; }
    int64_t tile_voxels() const { return tile[0] * tile[1] * tile[2]; }
    int64_t begin(int axis, int64_t number) const { return number * tile[axis]; }
    int64_t end(int axis, int64_t number) const {
        return std::min((number + 1) * tile[axis], shape[axis]);
    }
    // The coordinates of a tile among the tiles.
    void place(int64_t number, int64_t (&at)[3]) const {
        at[2] = number % count[2];
        at[1] = number / count[2] % count[1];
        at[0] = number / (count[2] * count[1]);
    }

    // Calls body(row) for the rows of a tile.
    template <class Body>
    void for_rows(int64_t number, Body&& body) const {
        int64_t at[3];
        place(number, at);
        const int64_t x = begin(2, at[2]), length = end(2, at[2]) - x;
        for (int64_t z = begin(0, at[0]); z < end(0, at[0]); ++z)
            for (int64_t y = begin(1, at[1]); y < end(1, at[1]); ++y) {
                const int64_t row = (z - begin(0, at[0])) * tile[1] + y - begin(1, at[1]);
                body(TileRow{z, y, x, length, row, row * tile[2],
                             (z * shape[1] + y) * shape[2] + x});
            }
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

// The channel of a label, which may be a box of a larger array: its rows and planes begin at these
// distances.
template <class T>
struct Channel {
    const T* values;
    int64_t row, plane;

    const T* at(int64_t z, int64_t y) const { return values + z * plane + y * row; }
};

// Adds planes [first_plane, first_plane + num_planes) of the channel of a label to the survey.
// tile_margin: (tile) raised to the largest (logit + bias) / temperature - log_sum of the voxels
// inside the mask: an upper bound of the logarithm of the label's largest probability in the tile,
// because log_sum only grows.
template <class T>
void survey_channel(const Tiling& tiling, const Channel<T>& channel, int64_t first_plane,
                    int64_t num_planes, int label, const Decoding& decoding, const uint8_t* mask,
                    const Survey& survey, float* tile_margin, ThreadPool& pool);

// The channel of a label, at `num_tiles` tiles: either the whole grid, or the tiles' voxels one
// tile after the other.
template <class T>
struct TileSource {
    Channel<T> channel;
    bool is_whole_grid;
    const int64_t* tiles;
    int64_t num_tiles;
};

// lowest_sum: (tile of the grid) the smallest log_sum of its voxels.
// margin: (num_tiles) largest (logit + bias) / temperature - log_sum of the voxels of a tile inside
// the mask; where it is not above the threshold, it may be an upper bound that is not either.
template <class T>
void tile_margins(const Tiling& tiling, const TileSource<T>& source, const Decoding& decoding,
                  const uint8_t* mask, const Survey& survey, const float* lowest_sum,
                  float threshold, float* margin, ThreadPool& pool);

// Writes the logits of the tiles at the places of their entries: out[entry[i]] has a number per
// voxel of a tile, 0 beyond the grid's end.
template <class T>
void fill_entries(const Tiling& tiling, const TileSource<T>& source, const Decoding& decoding,
                  const int64_t* entry, float* out, ThreadPool& pool);

// Copies tiles of a channel of the whole grid, in turn; places beyond the grid's end are zero. T:
// any type.
template <class T>
void gather_tiles(const Tiling& tiling, const T* values, const int64_t* tiles, int64_t num_tiles,
                  T* out, ThreadPool& pool);

// A label map as logits on tiles (docs/reference/math.md): a label takes part at the voxels that
// have it within reach.

// The logits of a label: at a voxel that has it, at others within reach of one, and
// elsewhere.
struct LabelLogits {
    float own, near, absent;
};

// near: (label, tile), for labels below num_labels, set to 1 for the tiles that reach a label:
// those with a voxel in the box of the label's voxels of some tile, widened by `reach`. It is set
// wherever a voxel has the label within reach, and in few other tiles.
template <class Label>
void mark_tiles_near_labels(const Tiling& tiling, const Label* label_map, const int64_t (&reach)[3],
                            int64_t num_labels, uint8_t* near, ThreadPool& pool);

// Writes the logits of a label in some tiles, one tile after the other at the places of their
// entries, as `fill_entries` does. A voxel is near a label if the label occurs up to `reach` voxels
// away along each axis.
template <class Label>
void fill_label_entries(const Tiling& tiling, const Label* label_map, int label,
                        const int64_t (&reach)[3], const LabelLogits& logits, const int64_t* tiles,
                        int64_t num_tiles, const int64_t* entry, float* out, ThreadPool& pool);
}  // namespace crf
