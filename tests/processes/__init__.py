"""Tests of ranks, of killed processes and of the state of the process."""
