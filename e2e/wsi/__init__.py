"""Whole-slide images: reading them, finding tissue, cutting them into patches."""
