"""Synthetic slides whose label depends on one planted anomaly, for the demo and for tests."""
