"""Tests of e2e.engine."""
