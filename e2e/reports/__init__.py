"""Predictions of whole slides, their metrics, heatmaps and tables."""
