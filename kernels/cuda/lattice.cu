// Filtering on the permutohedral lattice: splat, blur and slice. Sums are gathered in a fixed
// order: the same bits on every run. CRF_WIDTH: channels that are filtered together. CRF_THREADS:
// per block of `splat`.
#include "cuda/filter_ends.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

constexpr int kOwnEntries = 32;  // of a list, that one of the vertex's own threads adds up
constexpr int kTogether = 64;    // entries that are summed separately: limits rounding

// The entries of all lists: the voxel and its 16-bit weight. sent: (voxel) factors of the values,
// or nullptr for ones.
struct Entries {
    const Channels* values;
    const Real* sent;
    const uint32* voxel;
    const uint16* weight;

    // The weighted sum of every `step`-th entry.
    CRF_D Channels sum(int64 first, int64 end, int64 step) const {
        Channels total = zero_row<CRF_WIDTH>();
        while (first < end) {
            const int64 stop = first + kTogether * step < end ? first + kTogether * step : end;
            Channels partial = zero_row<CRF_WIDTH>();
            CRF_UNROLL_BY_4
            for (int64 entry = first; entry < stop; entry += step) {
                const uint32 n = voxel[entry];
                const Real factor = static_cast<Real>(weight[entry]);
                add_scaled(partial, values[n], sent ? factor * sent[n] : factor);
            }
            add_scaled(total, partial, Real(1.0));
            first += kTogether * step;
        }
        return total;
    }
};

// A power of two of a block's threads, `lanes`, share a vertex: the weighted sum of the values in
// the vertex's list, in units of the 16-bit weights. All threads of the block share the rest of a
// long list. entry_*: (entry) of all lists. begin: (vertex + 1) where each list begins.
CRF_BLOCK_KERNEL(splat, const Channels* values, const Real* sent, const uint32* entry_voxel,
                 const uint16* entry_weight, const int64* begin, int64 num_vertices, int lanes,
                 Channels* rows) {
    CRF_SHARED(Channels, part, CRF_THREADS);
    CRF_SHARED(Channels, rest, CRF_THREADS);
    const Entries entries{values, sent, entry_voxel, entry_weight};
    const int64 first_vertex = block_number() * (CRF_THREADS / lanes);
    const int64 own_entries = static_cast<int64>(kOwnEntries) * lanes;
    CRF_PHASE(thread) {
        const int64 vertex = first_vertex + thread / lanes;
        Channels total = zero_row<CRF_WIDTH>();
        if (vertex < num_vertices) {
            const int64 first = begin[vertex], end = begin[vertex + 1];
            const int64 stop = first + own_entries < end ? first + own_entries : end;
            total = entries.sum(first + thread % lanes, stop, lanes);
        }
        part[thread] = total;
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
        CRF_PHASE(thread) {
            if (thread % lanes >= half) continue;
            Channels total = part[thread];
            const Channels other = part[thread + half];
            add_scaled(total, other, Real(1.0));
            part[thread] = total;
        }
    }
    for (int own = 0; own < CRF_THREADS / lanes; ++own) {
        const int64 vertex = first_vertex + own;
        if (vertex >= num_vertices) break;
        const int64 first = begin[vertex] + own_entries, end = begin[vertex + 1];
        if (first >= end) continue;
        CRF_PHASE(thread) {
            const Channels total = entries.sum(first + thread, end, CRF_THREADS);
            rest[thread] = total;
        }
        for (int half = CRF_THREADS / 2; half > 0; half /= 2) {
            CRF_PHASE(thread) {
                if (thread >= half) continue;
                Channels total = rest[thread];
                const Channels other = rest[thread + half];
                add_scaled(total, other, Real(1.0));
                rest[thread] = total;
            }
        }
        CRF_PHASE(thread) {
            if (thread > 0) continue;
            Channels total = part[own * lanes];
            const Channels other = rest[0];
            add_scaled(total, other, Real(1.0));
            part[own * lanes] = total;
        }
    }
    CRF_PHASE(thread) {
        const int64 vertex = first_vertex + thread / lanes;
        if (thread % lanes > 0 || vertex >= num_vertices) continue;
        const Channels total = part[thread];
        rows[vertex] = total;
    }
}

// The neighbors of all vertices, (direction, vertex), -1 = absent, and the directions of a launch.
struct Neighbors {
    const int* before;
    const int* after;
    int64 num_vertices;
    int first, step;  // the directions are first, first + step, ...
};

// A vertex's row after [1 2 1] / 2 along the first `Count` directions of a launch; each row has the
// bits that it has if every direction has its own launch.
template <int Count>
CRF_D Channels blurred(const Channels* from, const Neighbors& neighbors, int64 vertex) {
    if constexpr (Count == 0) {
        return from[vertex];
    } else {
        const int64 direction = neighbors.first + (Count - 1) * neighbors.step;
        const int64 place = direction * neighbors.num_vertices + vertex;
        const int down = neighbors.before[place], up = neighbors.after[place];
        Channels total = blurred<Count - 1>(from, neighbors, vertex);
        if (down >= 0) add_scaled(total, blurred<Count - 1>(from, neighbors, down), Real(0.5));
        if (up >= 0) add_scaled(total, blurred<Count - 1>(from, neighbors, up), Real(0.5));
        return total;
    }
}

// One thread per vertex: its row after one, two or three directions; the missing factors are in
// `amplitude` of slice_values.
template <int Count>
CRF_D void blur_rows(const Channels* from, const Neighbors& neighbors, Channels* to) {
    const int64 vertex = thread_number();
    if (vertex < neighbors.num_vertices) to[vertex] = blurred<Count>(from, neighbors, vertex);
}

CRF_KERNEL(blur_1, const Channels* rows, const int* before, const int* after, int64 num_vertices,
           int first, int step, Channels* next_rows) {
    blur_rows<1>(rows, {before, after, num_vertices, first, step}, next_rows);
}

CRF_KERNEL(blur_2, const Channels* rows, const int* before, const int* after, int64 num_vertices,
           int first, int step, Channels* next_rows) {
    blur_rows<2>(rows, {before, after, num_vertices, first, step}, next_rows);
}

CRF_KERNEL(blur_3, const Channels* rows, const int* before, const int* after, int64 num_vertices,
           int first, int step, Channels* next_rows) {
    blur_rows<3>(rows, {before, after, num_vertices, first, step}, next_rows);
}

// One thread per voxel: sum += channel_weight * amplitude * received * (values of its vertices,
// interpolated); see put_weighted. corner_vertex, corner_weight: (corner, voxel), weights in 1 /
// 65535. received: (voxel) or nullptr. channel_weight: (CRF_WIDTH).
CRF_KERNEL(slice_values, int64 num_voxels, const Channels* vertex_rows, const uint32* corner_vertex,
           const uint16* corner_weight, int num_corners, Real amplitude, const Real* received,
           const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Slice<CRF_WIDTH> slice{vertex_rows, corner_vertex, corner_weight, num_corners,
                                 num_voxels};
    const Channels total = slice.at(n);
    put_weighted(sum, n, total, received ? amplitude * received[n] : amplitude, channel_weight,
                 adds);
}
}  // namespace crf
