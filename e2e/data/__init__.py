"""From slides and tables to bags: stores, cohorts, splits, sampling, decoding."""
