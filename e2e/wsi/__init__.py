"""Whole slides: reading, tissue, grids."""
