#include "cpu/lattice_build.h"

#include <limits>
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

}  // namespace

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
