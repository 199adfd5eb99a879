"""Tests of e2e.encoders."""
