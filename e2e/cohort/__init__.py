"""Cohorts: label tables, splits, and their match with patches or features."""
