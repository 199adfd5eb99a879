"""All heads of this package; importing it registers them."""

from e2e.registry import import_siblings

import_siblings(__name__, __path__)
