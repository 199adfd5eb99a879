"""Losses and metrics of small trainings, which must not change when the code is rearranged."""
