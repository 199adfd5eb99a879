"""Tests of e2e.cohort."""
