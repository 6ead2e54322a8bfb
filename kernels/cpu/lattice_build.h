// The permutohedral lattice of one image: its vertices, the voxels' links to them, and the neighbors of each vertex.
//
// It is built in five passes, functions from struct to struct, each in parallel and each with the same result for any number of threads:
//   1. lattice_tiles: the simplex of every voxel, and each tile's own list of vertices;
//   2. lattice_blocks: the tiles' vertices sorted into blocks of space;
//   3. lattice_vertices: duplicates merged and vertices numbered, block by block;
//   4. lattice_neighbors: the neighbors along each direction, as chains;
//   5. lattice_slots: the place of each tile's share of a vertex.
#pragma once

#include <utility>

#include "cpu/filter.h"
#include "cpu/lattice_geometry.h"

namespace crf {

struct Lattice {
    // Most voxels of a tile, a brick of the box. A tile is splatted into one small buffer, whose vertices are numbered in 16 bits.
    static constexpr int64_t tile_voxels(int num_features) { return num_features < 16 ? 4096 : 2048; }

    // Consecutive compact voxels of a tile.
    struct Piece {
        int64_t voxel;
        int32_t length;
    };
    struct Tile {
        int64_t first_piece, num_pieces;
        int64_t first_entry;  // its first voxel in `local` and `weight`, in units of D + 1
        int64_t num_voxels;
        int64_t first_vertex;  // its first entry of `slot`
        int64_t num_vertices;
    };

    int num_features = 0;  // D of the lattice: at least that of the image
    int64_t num_vertices = 0;
    int64_t num_slots = 0;
    int64_t largest_tile = 0;  // vertices of the largest tile
    std::vector<Piece> pieces;
    std::vector<Tile> tiles;
    // For each voxel, in tile order: its D + 1 vertices as numbers within the tile, and their barycentric weights in 1 / 65535.
    Buffer<uint16_t> local, weight;
    // For each tile's vertices: the slot of the tile's share of it. The first tile's is the vertex's own number; further tiles' are
    // consecutive and not below num_vertices. They are added to the first before blurring, and get copies of it before slicing.
    Buffer<uint32_t> slot;
    // A vertex of several tiles, and the slots of all but the first.
    struct Shared {
        uint32_t vertex, first_slot, num_slots;
    };
    std::vector<Shared> shared;
    // Along one direction the vertices form chains of neighbors, and so do lists of vertices, by which these are numbered (vertex_order.h):
    // a step takes a list's vertices to those of one other list and keeps their order. Chains are either of vertices or of lists. The
    // latter take less memory: two bits per vertex tell which ones have neighbors, and the i-th vertex of a list that has one after it
    // is followed by the i-th vertex of the next list that has one before it.
    struct Chains {
        // Chain after chain, each entry a number times two, plus one at the end of its chain; what has no neighbor on either side is left
        // out.
        Buffer<uint32_t> entries;
        std::vector<int64_t> pieces;  // possible cuts for parallel work: beginnings of chains, and the end
        // Of chains of lists: a bit per vertex, whether it has a neighbor on that side; padded for reading whole words.
        Buffer<uint8_t> after, before;
    };
    std::vector<Chains> directions;  // D + 1 of them
    // Of chains of lists; otherwise empty: the first vertex of each list, and the end; and the most vertices of one.
    Buffer<uint32_t> first_of_list;
    int64_t longest_list = 0;
    bool has_lists() const { return first_of_list.size > 0; }
    // The first directions whose pieces are independent of one another: a piece of one has the vertices of the same piece of another, so
    // that a piece can be blurred along all of them while it is in the cache.
    int num_local = 0;

    // With [1 2 1] / 4 along each direction the lattice conserves mass; this gives its kernel the mass of exp(-d^2 / 2), for one vertex in
    // a volume of (D + 1)^(D - 1/2), if the blur is [1 2 1] / 2 and the weights of splatting and slicing are in 1 / 65535.
    double amplitude() const;
};

// Throws CapacityError if the features span more cells than a 128-bit key can number.
// lists_if_fine: whether chains are to be of lists where there are many vertices.
Lattice build_lattice(const BilateralInput& input, ThreadPool& pool, bool lists_if_fine);

// What the passes found, for tests: a tile's voxels and vertices, and of its voxels' corners the vertices' numbers and the weights; then
// all vertices, and for each direction the pairs of a vertex and the one after it. Vertices are coordinates.
struct LatticePasses {
    using Coordinates = std::vector<int64_t>;
    int num_features = 0;
    std::vector<std::vector<int64_t>> tile_voxels;
    std::vector<std::vector<Coordinates>> tile_vertices;
    std::vector<uint16_t> local, weight;
    std::vector<Coordinates> vertices;
    std::vector<std::vector<std::pair<int64_t, int64_t>>> links;
};
LatticePasses lattice_passes(const BilateralInput& input, ThreadPool& pool);

// Whether the features fit into the keys of a lattice.
bool fits_lattice(const BilateralInput& input);

// Vertices per voxel, estimated from a few tiles; a lattice's cost depends on it. Infinite if no lattice can be built.
double estimate_vertices_per_voxel(const BilateralInput& input);

}  // namespace crf
