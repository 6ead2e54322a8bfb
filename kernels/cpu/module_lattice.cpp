#include "cpu/module_lattice.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "cpu/lattice_neighbors.h"
#include "cpu/lattice_slots.h"
#include "cpu/module_arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {

namespace {

template <class T>
std::vector<T> to_list(const Buffer<T>& values) {
    return std::vector<T>(values.get(), values.get() + values.size);
}

template <class Key>
std::vector<std::vector<int64_t>> coordinates(const KeySpace<Key>& space, const Key* keys, int64_t count) {
    std::vector<std::vector<int64_t>> decoded(count, std::vector<int64_t>(space.num_features() + 1));
    for (int64_t i = 0; i < count; ++i) space.decode(keys[i], decoded[i].data());
    return decoded;
}

template <class Key>
nb::dict describe(const LatticeTiles<Key>& tiles, const KeySpace<Key>& space) {
    nb::list voxels, vertices;
    for (size_t t = 0; t < tiles.tiles.size(); ++t) {
        nb::list of_tile;
        for (int64_t p = 0; p < tiles.tiles[t].num_pieces; ++p) {
            const Lattice::Piece& piece = tiles.pieces[tiles.tiles[t].first_piece + p];
            for (int32_t i = 0; i < piece.length; ++i) of_tile.append(piece.voxel + i);
        }
        voxels.append(of_tile);
        vertices.append(coordinates(space, tiles.keys[t].data(), static_cast<int64_t>(tiles.keys[t].size())));
    }
    nb::dict result;
    result["voxels"] = voxels;
    result["vertices"] = vertices;
    result["local"] = to_list(tiles.local);
    result["weight"] = to_list(tiles.weight);
    return result;
}

// Pairs of a vertex and the one after it, from chains of lists.
std::vector<std::pair<int64_t, int64_t>> decode(const LatticeNeighbors& neighbors, const Lattice::Chains& chains) {
    const auto marked = [&](const Buffer<uint8_t>& bits, uint32_t list) {
        std::vector<int64_t> vertices;
        for (int64_t v = neighbors.first_of_list[list]; v < neighbors.first_of_list[list + 1]; ++v)
            if (bits[v / 8] >> v % 8 & 1) vertices.push_back(v);
        return vertices;
    };
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t i = 0; i < chains.entries.size; ++i) {
        const std::vector<int64_t> from = marked(chains.after, chains.entries[i] >> 1);
        if (chains.entries[i] & 1) {
            if (!from.empty()) throw std::logic_error("the last list of a chain has vertices with one after them");
            continue;
        }
        const std::vector<int64_t> to = marked(chains.before, chains.entries[i + 1] >> 1);
        if (from.size() != to.size()) throw std::logic_error("successive lists do not match");
        for (size_t k = 0; k < from.size(); ++k) pairs.emplace_back(from[k], to[k]);
    }
    return pairs;
}

template <class Key>
nb::dict run_passes(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space, ThreadPool& pool) {
    nb::dict result;
    result["num_features"] = geometry.num_features;
    result["key_bits"] = key_bits(space.layout());
    LatticeTiles<Key> tiles = embed_tiles(input, geometry, space, pool);
    result["tiles"] = describe(tiles, space);

    const BlockLayout layout = lay_out_blocks(space.layout(), *input.voxels);
    const VertexOrder<Key> order(space.layout(), input.voxels->num_axes);
    BlockRecords<Key> records = sort_by_block(tiles, layout, pool);
    nb::dict blocks;
    blocks["begin"] = records.block_begin;
    blocks["record"] = to_list(records.record);
    blocks["vertices"] = coordinates(space, records.keys.get(), records.keys.size);
    result["blocks"] = blocks;

    LatticeVertices<Key> numbered = number_vertices(records, order, pool);
    nb::dict vertices;
    std::vector<uint32_t> first_vertex;
    for (const auto& block : numbered.blocks) first_vertex.push_back(block.first_vertex);
    vertices["first_vertex"] = first_vertex;
    vertices["coordinates"] = coordinates(space, numbered.keys.get(), numbered.num_vertices);
    vertices["number"] = to_list(numbered.number);
    result["vertices"] = vertices;

    nb::list chains, links;
    for (const Lattice::Chains& direction : find_neighbors(numbered, order, layout, space, false, pool).directions)
        chains.append(to_list(direction.entries));
    const LatticeNeighbors listed = find_neighbors(numbered, order, layout, space, true, pool);
    for (const Lattice::Chains& direction : listed.directions) links.append(decode(listed, direction));
    result["chains"] = chains;
    result["links"] = links;

    const LatticeSlots assigned = assign_slots(records, numbered, pool);
    nb::dict slots;
    slots["slot"] = to_list(assigned.slot);
    slots["num_slots"] = assigned.num_slots;
    nb::list shared;
    for (const Lattice::Shared& s : assigned.shared) shared.append(nb::make_tuple(s.vertex, s.first_slot, s.num_slots));
    slots["shared"] = shared;
    result["slots"] = slots;
    return result;
}

nb::dict lattice_passes(const FloatArray& image, const std::optional<MaskArray>& mask, const std::vector<double>& spacing,
                        const std::vector<double>& theta_alpha, const std::vector<double>& theta_beta, int threads) {
    const std::vector<int64_t> grid = checked_grid(image, mask, spacing);
    require_bandwidths({{theta_alpha, theta_beta}}, {}, size_of(image));
    ThreadPool pool(threads);
    const Voxels voxels(grid, spacing, mask_data(mask));
    const BilateralInput input(voxels, on_box_axes(voxels, theta_alpha), theta_beta,
                               channel_pointers(image.data(), image.shape(0), voxels.grid_size), pool);
    return with_key_space(input, [&](const auto& geometry, const auto& space) { return run_passes(input, geometry, space, pool); });
}

}  // namespace

void define_lattice_passes(nb::module_& m) {
    m.def("_lattice_passes", &lattice_passes, "image"_a, "mask"_a.none(), "spacing"_a, "theta_alpha"_a, "theta_beta"_a, "threads"_a);
}

}  // namespace crf
