"""Commands. Each parses, builds and calls; the work is done in e2e/."""
