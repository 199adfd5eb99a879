"""Metrics of classification, regression and survival, bootstrap confidence intervals, and figures."""
