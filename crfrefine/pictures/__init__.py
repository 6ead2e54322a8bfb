"""Display of volumes (upright, cropped, windowed), and the preview picture of a case."""
