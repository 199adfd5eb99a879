"""Patch stores: JPEG patches of slides in LMDB, made and read."""
