"""How volumes are shown: upright, cropped, windowed, and the preview of a case."""
