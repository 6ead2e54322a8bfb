"""Label sets per tile.

The model's cost and memory follow the labels that are present near a voxel, not those that are
declared. docs/reference/math.md, section 10, says why that is allowed. Its words, in the code:

- A *tile* is 8 × 8 × 16 voxels, a *layer* all tiles of the same planes, a *slab* some layers whose
  mean field is run by itself, with a *halo* of planes on both sides (`grid`, `slabs`).
- A label is *present* in a tile where its probability is not negligible, and *may matter* where
  messages could raise it to that (`survey`). Its *domain*, where it takes part, is the tiles where
  it may matter within as many *rings* of one where it is present as messages reach.
- An *active* tile has several labels, each of them an *entry*: a row of the arrays (entries, voxels
  of a tile). A tile with one label is *settled*, and so is a voxel of an active tile where all
  labels but one stay below `Thresholds.may_matter`. Other voxels are *open*.

A `ChannelSource` has the network's logits (`channels`; `streaming` keeps parts of files,
`coarse` interpolates those of a coarser grid). `planning` surveys them, makes a `TileProblem`, and
compares its work with that of all labels everywhere; `slabs.solve` runs it, by `running.run_tiles`
for a slab or the whole.
"""
