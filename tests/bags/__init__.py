"""Tests of e2e.bags."""
