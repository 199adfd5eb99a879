"""Tests of e2e.settings."""
