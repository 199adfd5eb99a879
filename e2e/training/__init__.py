"""The training loop, its losses, optimiser and checkpoints."""
