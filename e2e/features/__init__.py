"""Frozen features of slides, in the formats of several tools; importing it registers the formats."""

from e2e.registry import import_siblings

import_siblings(__name__, __path__)
