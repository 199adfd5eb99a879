"""Every regulariser of this package, registered by import of its modules."""

from e2e.registry import import_siblings

import_siblings(__name__, __path__)
