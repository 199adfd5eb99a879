"""Runs from settings to results: the only package that reads Settings."""
