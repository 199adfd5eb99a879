"""Tests of e2e.wsi."""
