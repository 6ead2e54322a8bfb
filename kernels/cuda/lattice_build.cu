// Builds the permutohedral lattice: the simplex of every voxel, a hash table of vertices, their
// numbers, their neighbors, and the lists that splatting reads. Compiled without fused
// multiply-adds: keys and weights are those of cpu/lattice_build.cpp, bit for bit. CRF_FEATURES:
// dimensions D of the lattice. CRF_WIDE_KEYS: 1 if a vertex needs up to 128 bits instead of 64.
// CRF_THREADS: per block of the kernels that read the whole table.
#include "cuda/launch.h"
#include "lattice_math.h"

namespace crf {
constexpr int kFeatures = CRF_FEATURES;
constexpr uint64 kEmpty = ~0ull;
// a table that is at most half full has chains of a few dozen; longer chains mean that it is full
constexpr int kMostProbes = 512;
constexpr int kProbesBetween = 32;  // between two looks at whether another chain was too long
constexpr int kRun = 16;            // neighboring slots of the table that one thread reads

// Keys are stored as low words and, if they are wide, high ones. A slot of the table holds the key,
// or a corner that has a wide key.
#if CRF_WIDE_KEYS
using Key = unsigned __int128;
CRF_D uint64 hash_of(Key key) {
    return (static_cast<uint64>(key) ^ static_cast<uint64>(key >> 64) * 0xC2B2AE3D27D4EB4Full) *
           0x9E3779B97F4A7C15ull;
}
CRF_D Key key_of(uint64 low, uint64 high) { return static_cast<Key>(high) << 64 | low; }
CRF_D Key key_from(const uint64* low, const uint64* high, int64 i) {
    return key_of(low[i], high[i]);
}
CRF_D void store_key(Key key, uint64* low, uint64* high, int64 i) {
    low[i] = static_cast<uint64>(key);
    high[i] = static_cast<uint64>(key >> 64);
}
CRF_D uint64 owner_for(Key, int64 corner) { return static_cast<uint64>(corner); }
CRF_D Key key_in(uint64 owner, const uint64* low, const uint64* high) {
    return key_from(low, high, static_cast<int64>(owner));
}
#else
using Key = uint64;
CRF_D uint64 hash_of(Key key) { return key * 0x9E3779B97F4A7C15ull; }
CRF_D Key key_of(uint64 low, uint64) { return low; }
CRF_D Key key_from(const uint64* low, const uint64*, int64 i) { return low[i]; }
CRF_D void store_key(Key key, uint64* low, uint64*, int64 i) { low[i] = key; }
CRF_D uint64 owner_for(Key key, int64) { return key; }
CRF_D Key key_in(uint64 owner, const uint64*, const uint64*) { return owner; }
#endif

// One unit of q_i in a packed key; q_0 has no field.
CRF_D Key unit_of(const int* shift, int i) { return i == 0 ? Key(0) : Key(1) << shift[i]; }

// The voxel that thread n looks at, one of each run of `run_length` voxels, as if by chance: a
// fixed stride would meet neighboring rows at the same places.
CRF_D int64 sampled_voxel(int64 n, int64 run_length) {
    if (run_length == 1) return n;
    const uint64 number = static_cast<uint64>(n) * 0x9E3779B97F4A7C15ull;
    return n * run_length + static_cast<int64>((number >> 40) % static_cast<uint64>(run_length));
}

// One thread per voxel, or per run of `run_length` voxels for a sample: the packed keys of its
// D + 1 vertices, that of remainder 0 first, and its weights there in 1 / 65535. features:
// (feature, all_voxels); the lattice's first `num_padding` features are zero and not stored. scale:
// (D). shift: (D + 1) of the key's fields. bias_*: offsets that shift the fields' smallest values
// to zero.
CRF_KERNEL(find_simplices, const float* features, int64 all_voxels, int64 run_length,
           int64 num_voxels, int num_padding, const float* scale, const int* shift, uint64 bias_low,
           uint64 bias_high, uint64* key_low, uint64* key_high, uint16* corner_weight) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    float scaled[kFeatures], elevated[kFeatures + 1], weight[kFeatures + 1];
    int quotient[kFeatures + 1], sorted[kFeatures + 1], wrapped;
    const int64 place = sampled_voxel(n, run_length);
    CRF_UNROLL
    for (int i = 0; i < kFeatures; ++i)
        scaled[i] =
            i < num_padding ? 0.0f : features[(i - num_padding) * all_voxels + place] * scale[i];
    elevate<kFeatures>(scaled, elevated);
    enclosing_simplex<kFeatures>(elevated, quotient, sorted, wrapped);
    barycentric_weights<kFeatures>(sorted, weight);
    int rest = 65535;
    CRF_UNROLL
    for (int k = 1; k <= kFeatures; ++k) {
        const int rounded = truncate_to_int(weight[k] * 65535.0f + 0.5f);
        rest -= rounded;
        corner_weight[k * num_voxels + n] = static_cast<uint16>(rounded);
    }
    corner_weight[n] = static_cast<uint16>(rest > 0 ? rest : 0);

    Key key = key_of(bias_low, bias_high);
    CRF_UNROLL
    for (int i = 1; i <= kFeatures; ++i)
        key += unit_of(shift, i) * static_cast<Key>(static_cast<int64>(quotient[i]));
    Key unit[kFeatures + 1];  // of the coordinate at each rank
    CRF_UNROLL
    for (int p = 0; p <= kFeatures; ++p) {
        unit[p] = unit_of(shift, coordinate_index<kFeatures>(sorted[p]));
        if (p < wrapped) key -= unit[p];
        if (p >= kFeatures + 1 + wrapped) key += unit[p];
    }
    // From the vertex of remainder k to that of k + 1: one more in every coordinate, except that of
    // the k-th smallest residual.
    CRF_UNROLL
    for (int k = 0; k <= kFeatures; ++k) {
        store_key(key, key_low, key_high, k * num_voxels + n);
        key += Key(1) - unit[kFeatures - k];
    }
}

// One thread per corner (a voxel's vertex): the slot of its key in the table; a missing key is
// inserted. `overflow` is set if the table is too full: the slots are invalid then, and a larger
// table is needed.
CRF_KERNEL(insert_vertices, const uint64* key_low, const uint64* key_high, int64 num_corners,
           uint64* table, int table_bits, uint32* corner_slot, uint64* overflow) {
    const int64 i = thread_number();
    if (i >= num_corners) return;
    const Key key = key_from(key_low, key_high, i);
    const uint64 mask = (1ull << table_bits) - 1;
    uint64 slot = hash_of(key) >> (64 - table_bits);
    for (int probe = 0; probe < kMostProbes; ++probe) {
        // Another thread has found the table too full: all slots are void, so this chain need not
        // be followed to its end.
        if (probe % kProbesBetween == kProbesBetween - 1 && read_shared(overflow) != 0) return;
        uint64 owner = read_shared(table + slot);
        if (owner == kEmpty) owner = compare_and_swap(table + slot, kEmpty, owner_for(key, i));
        if (owner == kEmpty || key_in(owner, key_low, key_high) == key) {
            corner_slot[i] = static_cast<uint32>(slot);
            return;
        }
        slot = (slot + 1) & mask;
    }
    compare_and_swap(overflow, 0, 1);
}

// How many keys of each block are the first ones of runs of equal keys, and of runs of one and of
// two keys. keys: sorted. counts: (3, block).
CRF_BLOCK_KERNEL(count_runs, const uint64* keys, int64 num_keys, int64 num_blocks, uint64* counts) {
    CRF_SHARED(int, runs, CRF_THREADS);
    CRF_SHARED(int, of_one, CRF_THREADS);
    CRF_SHARED(int, of_two, CRF_THREADS);
    CRF_PHASE(thread) {
        const int64 first = (block_number() * CRF_THREADS + thread) * kRun;
        int all = 0, one = 0, two = 0;
        for (int64 i = first; i < first + kRun && i < num_keys; ++i) {
            if (i > 0 && keys[i - 1] == keys[i]) continue;
            const bool has_second = i + 1 < num_keys && keys[i + 1] == keys[i];
            const bool has_third = i + 2 < num_keys && keys[i + 2] == keys[i];
            ++all;
            if (!has_second) ++one;
            if (has_second && !has_third) ++two;
        }
        runs[thread] = all;
        of_one[thread] = one;
        of_two[thread] = two;
    }
    for (int half = CRF_THREADS / 2; half > 0; half /= 2) {
        CRF_PHASE(thread) {
            if (thread >= half) continue;
            const int all = runs[thread] + runs[thread + half];
            const int one = of_one[thread] + of_one[thread + half];
            const int two = of_two[thread] + of_two[thread + half];
            runs[thread] = all;
            of_one[thread] = one;
            of_two[thread] = two;
        }
    }
    CRF_PHASE(thread) {
        if (thread > 0) continue;
        const int all = runs[0], one = of_one[0], two = of_two[0];
        counts[block_number()] = static_cast<uint64>(all);
        counts[num_blocks + block_number()] = static_cast<uint64>(one);
        counts[2 * num_blocks + block_number()] = static_cast<uint64>(two);
    }
}

// The used slots among those of a thread: `first`, ...
CRF_D int count_used(const uint64* table, int64 num_slots, int64 first) {
    int count = 0;
    for (int64 slot = first; slot < first + kRun && slot < num_slots; ++slot)
        if (table[slot] != kEmpty) ++count;
    return count;
}

// The used slots of each block. counts: (block).
CRF_BLOCK_KERNEL(count_vertices, const uint64* table, int64 num_slots, uint64* counts) {
    CRF_SHARED(int, found, CRF_THREADS);
    CRF_PHASE(thread) {
        const int64 first = (block_number() * CRF_THREADS + thread) * kRun;
        const int count = count_used(table, num_slots, first);
        found[thread] = count;
    }
    for (int half = CRF_THREADS / 2; half > 0; half /= 2) {
        CRF_PHASE(thread) {
            if (thread >= half) continue;
            const int own = found[thread], other = found[thread + half];
            found[thread] = own + other;
        }
    }
    CRF_PHASE(thread) {
        if (thread > 0) continue;
        const int total = found[0];
        counts[block_number()] = static_cast<uint64>(total);
    }
}

// The slots and the keys of all vertices, in the order of their slots. ends: (block) sums of
// `counts` up to each block's.
CRF_BLOCK_KERNEL(list_vertices, const uint64* table, int64 num_slots, const uint64* ends,
                 const uint64* key_low, const uint64* key_high, uint32* used_slot, uint64* used_low,
                 uint64* used_high) {
    CRF_SHARED(int, found, CRF_THREADS);
    CRF_PER_THREAD(int, before);
    CRF_PHASE(thread) {
        const int64 first = (block_number() * CRF_THREADS + thread) * kRun;
        const int count = count_used(table, num_slots, first);
        found[thread] = count;
    }
    // Sums up to each thread's count.
    for (int step = 1; step < CRF_THREADS; step *= 2) {
        CRF_PHASE(thread) { before[thread] = thread >= step ? found[thread - step] : 0; }
        CRF_PHASE(thread) {
            const int own = found[thread];
            found[thread] = own + before[thread];
        }
    }
    CRF_PHASE(thread) {
        const int64 block = block_number();
        const int64 first = (block * CRF_THREADS + thread) * kRun;
        int64 vertex = (block > 0 ? static_cast<int64>(ends[block - 1]) : 0) +
                       (thread > 0 ? found[thread - 1] : 0);
        for (int64 slot = first; slot < first + kRun && slot < num_slots; ++slot) {
            const uint64 owner = table[slot];
            if (owner == kEmpty) continue;
            used_slot[vertex] = static_cast<uint32>(slot);
            store_key(key_in(owner, key_low, key_high), used_low, used_high, vertex);
            ++vertex;
        }
    }
}

// One thread per vertex: order[v] is its place among those listed; its slot gets its number.
CRF_KERNEL(number_slots, const int64* order, const uint32* used_slot, const uint64* used_low,
           const uint64* used_high, int64 num_vertices, uint32* slot_vertex, uint64* vertex_low,
           uint64* vertex_high) {
    const int64 v = thread_number();
    if (v >= num_vertices) return;
    const int64 place = order[v];
    slot_vertex[used_slot[place]] = static_cast<uint32>(v);
    store_key(key_from(used_low, used_high, place), vertex_low, vertex_high, v);
}

// One thread per corner in the order of their vertices: its voxel and weight, and at each vertex's
// first one, the start of its list.
CRF_KERNEL(list_entries, const int64* order, const uint32* corner_vertex, int64 num_corners,
           int64 num_voxels, const uint16* corner_weight, uint32* entry_voxel, uint16* entry_weight,
           int64* vertex_begin) {
    const int64 i = thread_number();
    if (i >= num_corners) return;
    const int64 corner = order[i];
    const uint32 vertex = corner_vertex[corner];
    entry_voxel[i] = static_cast<uint32>(corner % num_voxels);
    entry_weight[i] = corner_weight[corner];
    if (i == 0 || corner_vertex[order[i - 1]] != vertex) vertex_begin[vertex] = i;
    if (i + 1 == num_corners) vertex_begin[vertex + 1] = num_corners;
}

// The numbers of the vertices, by their keys.
struct VertexTable {
    const uint64* key_low;
    const uint64* key_high;
    const uint64* slots;
    int bits;
    const uint32* vertex;  // (slot)

    // The vertex with a key; -1 without one.
    CRF_D int find(Key key) const {
        const uint64 mask = (1ull << bits) - 1;
        uint64 slot = hash_of(key) >> (64 - bits);
        for (int probe = 0; probe < kMostProbes; ++probe) {
            const uint64 owner = slots[slot];
            if (owner == kEmpty) break;
            if (key_in(owner, key_low, key_high) == key) return static_cast<int>(vertex[slot]);
            slot = (slot + 1) & mask;
        }
        return -1;
    }
};

// One thread per corner, of which there are at least as many as vertices: the corner's vertex; and
// the vertex's neighbor one step up along every direction, and that neighbor's one step down; -1 =
// absent. vertex_*: (vertex) sorted keys. after, before: (direction, vertex), `before` filled with
// -1. remainder_bits: width of the lowest field.
CRF_KERNEL(link_vertices, const uint64* vertex_low, const uint64* vertex_high, int64 num_vertices,
           const uint64* key_low, const uint64* key_high, const uint64* table, int table_bits,
           const uint32* slot_vertex, const int* shift, int remainder_bits, int* after, int* before,
           const uint32* corner_slot, int64 num_corners, uint32* corner_vertex) {
    const int64 v = thread_number();
    if (v < num_corners) corner_vertex[v] = slot_vertex[corner_slot[v]];
    if (v >= num_vertices) return;
    const VertexTable vertices{key_low, key_high, table, table_bits, slot_vertex};
    const Key own = key_from(vertex_low, vertex_high, v);
    const bool wraps = (static_cast<uint64>(own) & ((1ull << remainder_bits) - 1)) >=
                       static_cast<uint64>(kFeatures);
    Key all_units = 0;
    for (int i = 1; i <= kFeatures; ++i) all_units += unit_of(shift, i);
    // Along a direction every coordinate grows by 1, except the direction's own, which falls by D.
    const Key step = wraps ? all_units - static_cast<Key>(kFeatures) : Key(1);
    for (int j = 0; j <= kFeatures; ++j) {
        const int found = vertices.find(own + step - unit_of(shift, j));
        after[j * num_vertices + v] = found;
        if (found >= 0) before[j * num_vertices + found] = static_cast<int>(v);
    }
}
}  // namespace crf
