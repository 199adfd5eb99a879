"""From a label table to labelled slides: tables, splits, folds and their checks."""
