"""Patch stores: reading, writing and packing the JPEG patches of slides."""
