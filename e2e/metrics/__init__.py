"""Metrics, their bootstrap intervals, and figures."""
