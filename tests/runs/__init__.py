"""Tests of e2e.runs and of the commands in launch/."""
