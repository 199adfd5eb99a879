"""Tests of e2e.parallel that need no second process."""
