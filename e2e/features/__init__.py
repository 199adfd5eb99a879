"""Frozen features of slides, in the formats of several tools."""
