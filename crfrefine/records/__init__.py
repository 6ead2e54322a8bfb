"""What runs leave in their output folder, and what it tells of the cases."""
