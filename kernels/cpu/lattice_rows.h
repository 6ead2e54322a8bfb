// Code of lattice filtering shared between precisions: the blur of one direction, the kernel's amplitude, the description.
#pragma once

#include <string>

#include "cpu/lattice_build.h"

namespace crf {

// Blurs the chains of one piece in place: each row gains half of the rows before and after it. Walking along a chain, every row is
// read and written once; the unblurred values of the last two are kept. Row: a number, or a vector of them.
template <class Row>
void blur_chains(const Lattice::Chains& chains, int64_t piece, Row* rows) {
    const uint32_t* entry = chains.entries.get() + chains.pieces[piece];
    const uint32_t* const end = chains.entries.get() + chains.pieces[piece + 1];
    if (entry == end) return;
    constexpr static float kInside[] = {1.0f, 0.0f};  // 0 at the end of a chain, where no neighbor follows
    // Few instructions per entry, so that many rows are on their way from memory at once: an entry, which is twice a row's number, is
    // scaled by the load itself.
    const auto row_of = [rows](uint32_t number) {
        return reinterpret_cast<Row*>(reinterpret_cast<char*>(rows) + static_cast<size_t>(number & ~1u) * (sizeof(Row) / 2));
    };
    Row* at = row_of(*entry);
    Row before{}, own = *at;
    for (; entry + 1 < end; ++entry) {
        Row* const after = row_of(entry[1]);
        const Row next = *after;
        const float inside = kInside[*entry & 1];
        *at = own + (before + next * inside) * 0.5f;
        before = own * inside;
        own = next;
        at = after;
    }
    *at = own + before * 0.5f;
}

// For display: the lattice's size.
std::string describe(const Lattice& lattice, int64_t num_voxels);

}  // namespace crf
