"""Predictions for slides, their metrics, and the figures, heatmaps and tables written from them."""
