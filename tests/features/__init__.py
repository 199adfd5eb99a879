"""Tests of e2e.features."""
