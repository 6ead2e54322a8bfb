#include "cpu/lattice_build.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/features.h"
#include "cpu/lattice_neighbors.h"
#include "cpu/lattice_slots.h"

namespace crf {

namespace {

// Number of tiles for the estimate of the number of vertices.
constexpr int64_t kSampledTiles = 8;

// Whether chains of lists are worth their bits: with many vertices, and with fewer where several intensities make lists long.
bool are_lists_worth_it(int num_features, int64_t num_vertices, int64_t num_voxels) {
    constexpr int kManyFeatures = 7;
    return num_vertices > (num_features >= kManyFeatures ? num_voxels / 4 : num_voxels);
}

template <class Key>
Lattice build(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space, ThreadPool& pool,
              bool lists_if_fine) {
    Lattice lattice;
    lattice.num_features = geometry.num_features;
    LatticeTiles<Key> tiles = embed_tiles(input, geometry, space, pool);
    const BlockLayout layout = lay_out_blocks(space.layout(), *input.voxels);
    const VertexOrder<Key> order(space.layout(), input.voxels->num_axes);
    BlockRecords<Key> records = sort_by_block(tiles, layout, pool);
    // The tiles' own lists, before those of the vertices are allocated.
    BlockCache::release_idle(input.voxels->num_voxels * (geometry.num_features + 1) * static_cast<int64_t>(sizeof(float)));
    LatticeVertices<Key> vertices = number_vertices(records, order, pool);
    const bool of_lists = lists_if_fine && are_lists_worth_it(geometry.num_features, vertices.num_vertices, input.voxels->num_voxels);
    LatticeNeighbors neighbors = find_neighbors(vertices, order, layout, space, of_lists, pool);
    vertices.keys = Buffer<Key>();
    LatticeSlots slots = assign_slots(records, vertices, pool);

    lattice.first_of_list = std::move(neighbors.first_of_list);
    lattice.longest_list = neighbors.longest_list;
    lattice.directions = std::move(neighbors.directions);
    lattice.num_local = neighbors.num_local;
    lattice.num_vertices = vertices.num_vertices;
    lattice.pieces = std::move(tiles.pieces);
    lattice.tiles = std::move(tiles.tiles);
    lattice.local = std::move(tiles.local);
    lattice.weight = std::move(tiles.weight);
    lattice.largest_tile = tiles.largest_tile;
    lattice.slot = std::move(slots.slot);
    lattice.shared = std::move(slots.shared);
    lattice.num_slots = slots.num_slots;
    return lattice;
}

template <class Key>
std::vector<LatticePasses::Coordinates> coordinates(const KeySpace<Key>& space, const Key* keys, int64_t count) {
    std::vector<LatticePasses::Coordinates> decoded(count, LatticePasses::Coordinates(space.num_features() + 1));
    for (int64_t i = 0; i < count; ++i) space.decode(keys[i], decoded[i].data());
    return decoded;
}

// Pairs of a vertex and the one after it, from chains of lists.
std::vector<std::pair<int64_t, int64_t>> linked_vertices(const LatticeNeighbors& neighbors, const Lattice::Chains& chains) {
    const auto marked = [&](const Buffer<uint8_t>& bits, uint32_t list) {
        std::vector<int64_t> vertices;
        for (int64_t v = neighbors.first_of_list[list]; v < neighbors.first_of_list[list + 1]; ++v)
            if (bits[v / 8] >> v % 8 & 1) vertices.push_back(v);
        return vertices;
    };
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t i = 0; i < chains.entries.size; ++i) {
        const bool is_last = chains.entries[i] & 1;
        const std::vector<int64_t> from = marked(chains.after, chains.entries[i] >> 1);
        const std::vector<int64_t> to = is_last ? std::vector<int64_t>() : marked(chains.before, chains.entries[i + 1] >> 1);
        if (from.size() != to.size()) throw std::logic_error("successive lists do not match");
        for (size_t k = 0; k < from.size(); ++k) pairs.emplace_back(from[k], to[k]);
    }
    return pairs;
}

template <class Key>
LatticePasses run_passes(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space, ThreadPool& pool) {
    LatticePasses found;
    found.num_features = geometry.num_features;
    LatticeTiles<Key> tiles = embed_tiles(input, geometry, space, pool);
    for (size_t t = 0; t < tiles.tiles.size(); ++t) {
        std::vector<int64_t>& voxels = found.tile_voxels.emplace_back();
        for (int64_t p = tiles.tiles[t].first_piece; p < tiles.tiles[t].first_piece + tiles.tiles[t].num_pieces; ++p)
            for (int32_t i = 0; i < tiles.pieces[p].length; ++i) voxels.push_back(tiles.pieces[p].voxel + i);
        found.tile_vertices.push_back(coordinates(space, tiles.keys[t].data(), static_cast<int64_t>(tiles.keys[t].size())));
    }
    found.local.assign(tiles.local.get(), tiles.local.get() + tiles.local.size);
    found.weight.assign(tiles.weight.get(), tiles.weight.get() + tiles.weight.size);
    const BlockLayout layout = lay_out_blocks(space.layout(), *input.voxels);
    const VertexOrder<Key> order(space.layout(), input.voxels->num_axes);
    BlockRecords<Key> records = sort_by_block(tiles, layout, pool);
    const LatticeVertices<Key> vertices = number_vertices(records, order, pool);
    found.vertices = coordinates(space, vertices.keys.get(), vertices.num_vertices);
    const LatticeNeighbors neighbors = find_neighbors(vertices, order, layout, space, true, pool);
    for (const Lattice::Chains& direction : neighbors.directions) found.links.push_back(linked_vertices(neighbors, direction));
    return found;
}

}  // namespace

LatticePasses lattice_passes(const BilateralInput& input, ThreadPool& pool) {
    return with_key_space(input, [&](const auto& geometry, const auto& space) { return run_passes(input, geometry, space, pool); });
}

Lattice build_lattice(const BilateralInput& input, ThreadPool& pool, bool lists_if_fine) {
    return with_key_space(input,
                          [&](const auto& geometry, const auto& space) { return build(input, geometry, space, pool, lists_if_fine); });
}

bool fits_lattice(const BilateralInput& input) {
    try {
        return with_key_space(input, [](const auto&, const auto&) { return true; });
    } catch (const CapacityError&) {
        return false;
    }
}

double estimate_vertices_per_voxel(const BilateralInput& input) {
    if (!fits_lattice(input)) return std::numeric_limits<double>::infinity();
    return with_key_space(
        input, [&](const auto& geometry, const auto& space) { return sample_vertices_per_voxel(input, geometry, space, kSampledTiles); });
}

}  // namespace crf
