// Blurring a lattice's rows along one direction by chains of lists: each row gains half of the rows before and after it.
//
// Of two successive lists, the vertices that have the other as neighbor correspond in their order (Lattice::Chains). So memory is read from
// list to list, without an index per vertex: lists are built faster than chains of vertices, and take a quarter of their memory. Where
// lists are short, chains of vertices are faster. With AVX-512 the rows that correspond are brought together in registers, else through a
// list's own numbers; both have the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/lattice_build.h"
#include "cpu/simd.h"

namespace crf {

// Rows of scratch that follow the last one of a list: whole vectors are stored.
constexpr int64_t kListPadding = kLanes;

// Rows of scratch for blur_lists.
#if defined(__AVX512F__)
constexpr int64_t kScratchLists = 6;
#else
constexpr int64_t kScratchLists = 4;
#endif
inline int64_t blur_scratch(const Lattice& lattice) { return kScratchLists * (lattice.longest_list + kListPadding); }

// Up to 25 bits from a vertex's on, the lowest first.
inline uint32_t bits_from(const uint8_t* bits, int64_t vertex) {
    uint32_t word;
    std::memcpy(&word, bits + (vertex >> 3), sizeof word);
    return word >> (vertex & 7);
}

#if defined(__AVX512F__)
// Whole vectors of rows of 1, 2, 4 or 16 floats.
template <class Row>
struct RowVectors {
    static constexpr int kRows = 64 / static_cast<int>(sizeof(Row));
    static constexpr bool kOfFloats = sizeof(Row) == 4 || sizeof(Row) == 64;  // lanes are floats, otherwise pairs of floats

    // A bit per lane from a bit per row.
    static uint32_t lanes(uint32_t rows) {
        if constexpr (sizeof(Row) == 64) {
            return rows * 0xffff;
        } else if constexpr (sizeof(Row) == 16) {
            return _pdep_u32(rows, 0x55) * 3;
        } else {
            return rows;
        }
    }
    static __m512 load(uint32_t mask, const Row* from) {
        if constexpr (kOfFloats) return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
        return _mm512_castpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
    }
    static void store(uint32_t mask, Row* to, __m512 v) {
        if (mask == (kOfFloats ? 0xffff : 0xff)) return store_all(to, v);  // faster than the masked one
        if constexpr (kOfFloats) {
            _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), v);
        } else {
            _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), _mm512_castps_pd(v));
        }
    }
    static void store_all(Row* to, __m512 v) { _mm512_storeu_ps(to, v); }
    static __m512 compress(uint32_t mask, __m512 v) {
        if constexpr (kOfFloats) return _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v);
        return _mm512_castpd_ps(_mm512_maskz_compress_pd(static_cast<__mmask8>(mask), _mm512_castps_pd(v)));
    }
    static __m512 expand(uint32_t mask, const Row* from) {
        const __m512 v = _mm512_loadu_ps(from);
        if constexpr (kOfFloats) return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), v);
        return _mm512_castpd_ps(_mm512_maskz_expand_pd(static_cast<__mmask8>(mask), _mm512_castps_pd(v)));
    }
};

// Copies the rows of vertices [first, end) that have a neighbor before them, one after another, and those that have one after them.
// Writes up to kListPadding rows more.
template <class Row>
void pick_rows(const Lattice::Chains& chains, int64_t first, int64_t end, const Row* rows, Row* with_before, Row* with_after) {
    using Vectors = RowVectors<Row>;
    for (int64_t v = first; v < end; v += Vectors::kRows) {
        const uint32_t present = (1u << std::min<int64_t>(Vectors::kRows, end - v)) - 1;
        const uint32_t has_before = bits_from(chains.before.get(), v) & present, has_after = bits_from(chains.after.get(), v) & present;
        const __m512 unblurred = Vectors::load(Vectors::lanes(present), rows + v);
        Vectors::store_all(with_before, Vectors::compress(Vectors::lanes(has_before), unblurred));
        Vectors::store_all(with_after, Vectors::compress(Vectors::lanes(has_after), unblurred));
        with_before += std::popcount(has_before);
        with_after += std::popcount(has_after);
    }
}

// Blurs the rows of vertices [first, end). before, after: the unblurred rows of their neighbors, one after another. kListPadding rows of
// each may be touched beyond the last.
template <class Row>
void blur_list(const Lattice::Chains& chains, int64_t first, int64_t end, const Row* before, const Row* after, Row* rows) {
    using Vectors = RowVectors<Row>;
    const __m512 half = _mm512_set1_ps(0.5f);
    for (int64_t v = first; v < end; v += Vectors::kRows) {
        const uint32_t present = (1u << std::min<int64_t>(Vectors::kRows, end - v)) - 1, lanes = Vectors::lanes(present);
        const uint32_t has_before = bits_from(chains.before.get(), v) & present, has_after = bits_from(chains.after.get(), v) & present;
        const __m512 both = Vectors::expand(Vectors::lanes(has_before), before) + Vectors::expand(Vectors::lanes(has_after), after);
        Vectors::store(lanes, rows + v, Vectors::load(lanes, rows + v) + both * half);
        before += std::popcount(has_before);
        after += std::popcount(has_after);
    }
}

// Blurs the chains of lists of one piece of a direction in place.
template <class Row>
void blur_lists(const Lattice& lattice, const Lattice::Chains& chains, int64_t piece, Row* scratch, Row* rows) {
    const int64_t longest = lattice.longest_list + kListPadding, begin = chains.pieces[piece], end = chains.pieces[piece + 1];
    const auto with_before = [&](int64_t i) { return scratch + (i & 1) * longest; };
    const auto with_after = [&](int64_t i) { return scratch + (2 + (i & 3)) * longest; };
    const auto first_of = [&](int64_t i) { return &lattice.first_of_list[chains.entries[i] >> 1]; };
    // Two lists ahead: a load that overlaps two recent stores would wait for both.
    const auto pick = [&](int64_t i) {
        if (i < end) pick_rows(chains, first_of(i)[0], first_of(i)[1], rows, with_before(i), with_after(i));
    };
    pick(begin);
    pick(begin + 1);
    for (int64_t i = begin; i < end; ++i) {
        pick(i + 2);
        blur_list(chains, first_of(i)[0], first_of(i)[1], with_after(i - 1), with_before(i + 1), rows);
    }
}
#else
// For each set of eight, a bit each: which are in it, one after another.
struct SetsOfEight {
    alignas(32) int32_t members[256][8]{};

    constexpr SetsOfEight() {
        for (int set = 0; set < 256; ++set)
            for (int i = 0, count = 0; i < 8; ++i)
                if (set >> i & 1) members[set][count++] = i;
    }
};
inline constexpr SetsOfEight kSetsOfEight{};

// The vertices of [first, end) whose bits are set, as numbers from `first` on; returns how many. Up to eight more are written.
inline int64_t list_marked(const uint8_t* bits, int64_t first, int64_t end, uint32_t* marked) {
    typedef LanesOfSize<int32_t, 32> Eight;
    uint32_t* to = marked;
    for (int64_t v = first; v < end; v += 8) {
        const uint32_t present = (1u << std::min<int64_t>(8, end - v)) - 1, set = bits_from(bits, v) & present;
        store_lanes(to, load_lanes<Eight>(kSetsOfEight.members[set]) + splat<Eight>(static_cast<int32_t>(v - first)));
        to += std::popcount(set);
    }
    return to - marked;
}

// Blurs the chains of lists of one piece of a direction in place.
template <class Row>
void blur_lists(const Lattice& lattice, const Lattice::Chains& chains, int64_t piece, Row* scratch, Row* rows) {
    const int64_t longest = lattice.longest_list + kListPadding;
    // What the vertices of a list receive, and those of the next one; which of them are neighbors.
    Row *received = scratch, *next_received = scratch + longest;
    auto* const own = reinterpret_cast<uint32_t*>(scratch + 2 * longest);
    auto* const next = reinterpret_cast<uint32_t*>(scratch + 3 * longest);
    const auto first_of = [&](uint32_t entry) { return &lattice.first_of_list[entry >> 1]; };
    bool is_first = true;
    for (int64_t i = chains.pieces[piece]; i < chains.pieces[piece + 1]; ++i) {
        const uint32_t entry = chains.entries[i];
        const int64_t begin = first_of(entry)[0], count = first_of(entry)[1] - begin;
        Row* const at = rows + begin;
        if (is_first) std::fill_n(received, count, Row{});
        is_first = entry & 1;
        if (!is_first) {
            const int64_t next_begin = first_of(chains.entries[i + 1])[0], next_end = first_of(chains.entries[i + 1])[1];
            const Row* const after = rows + next_begin;
            const int64_t num_pairs = list_marked(chains.after.get(), begin, begin + count, own);
            list_marked(chains.before.get(), next_begin, next_end, next);
            std::fill_n(next_received, next_end - next_begin, Row{});
            for (int64_t k = 0; k < num_pairs; ++k) {
                received[own[k]] += after[next[k]];
                next_received[next[k]] = at[own[k]];
            }
        }
        // As floats, which are more at a time than those of a row.
        constexpr int64_t kFloats = sizeof(Row) / sizeof(float);
        float* const to = reinterpret_cast<float*>(at);
        const float* const from = reinterpret_cast<const float*>(received);
        for (int64_t f = 0; f < count * kFloats; ++f) to[f] += from[f] * 0.5f;
        std::swap(received, next_received);
    }
}
#endif

}  // namespace crf
