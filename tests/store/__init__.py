"""Tests of e2e.store."""
