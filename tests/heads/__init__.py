"""Tests of single heads; what all heads promise is in tests/contracts."""
