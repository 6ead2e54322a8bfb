#include "cpu/lattice_build.h"

#include "cpu/filter.h"
#include "cpu/lattice_neighbors.h"
#include "cpu/lattice_vertices.h"

namespace crf {

namespace {

// Number of tiles for the estimate of the number of vertices.
constexpr int64_t kSampledTiles = 8;

template <class Key>
Lattice build(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space, ThreadPool& pool) {
    Lattice lattice;
    lattice.num_features = geometry.num_features;
    LatticeTiles<Key> tiles = embed_tiles(input, geometry, space, pool);
    const BlockLayout layout = lay_out_blocks(space.layout(), *input.voxels);
    const VertexOrder<Key> order(space.layout(), input.voxels->num_axes);
    BlockRecords<Key> records = sort_by_block(tiles, layout, pool);
    // The tiles' own lists, before those of the vertices are allocated.
    BlockCache::release_idle(input.voxels->num_voxels * (geometry.num_features + 1) * static_cast<int64_t>(sizeof(float)));
    LatticeVertices<Key> vertices = number_vertices(records, order, pool);
    find_neighbors(vertices, order, layout, space, pool, lattice);
    vertices.keys = Buffer<Key>();
    assign_slots(records, vertices, pool, lattice);

    lattice.num_vertices = vertices.num_vertices;
    lattice.pieces = std::move(tiles.pieces);
    lattice.tiles = std::move(tiles.tiles);
    lattice.local = std::move(tiles.local);
    lattice.weight = std::move(tiles.weight);
    lattice.largest_tile = tiles.largest_tile;
    return lattice;
}

}  // namespace

Lattice build_lattice(const BilateralInput& input, ThreadPool& pool) {
    return with_key_space(input, [&](const auto& geometry, const auto& space) { return build(input, geometry, space, pool); });
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
