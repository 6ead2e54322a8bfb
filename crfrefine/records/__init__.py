"""Records of runs in their output folder, and the states of the cases by them."""
