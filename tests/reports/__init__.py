"""Tests of e2e.reports."""
