"""Label sets per tile.

The model's cost and memory follow the labels that are present near a voxel, not those that are
declared.
"""
