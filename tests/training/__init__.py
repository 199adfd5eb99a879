"""Tests of e2e.training."""
