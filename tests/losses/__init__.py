"""Tests of e2e.losses."""
