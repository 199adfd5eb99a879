"""Tests of e2e.metrics."""
