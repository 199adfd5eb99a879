"""Bags: which patches of a slide are drawn, in which order slides come, and how rows are read."""
