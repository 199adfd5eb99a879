"""Tests of single tasks; what all tasks promise is in tests/contracts."""
