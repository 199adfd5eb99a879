"""From slides to bags: which patches are drawn, in which order, and how their rows are read."""
