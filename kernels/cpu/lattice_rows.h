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
    Row before{}, own = rows[*entry >> 1];
    for (; entry + 1 < end; ++entry) {
        const Row next = rows[entry[1] >> 1];
        const float inside = 1.0f - static_cast<float>(*entry & 1);  // 0 at the end of a chain, where no neighbor follows
        rows[*entry >> 1] = own + (before + next * inside) * 0.5f;
        before = own * inside;
        own = next;
    }
    rows[*entry >> 1] = own + before * 0.5f;
}

// For display: the lattice's size.
std::string describe(const Lattice& lattice, int64_t num_voxels);

}  // namespace crf
