"""Encoder and head as one module, with exact gradients in the memory of one chunk."""
