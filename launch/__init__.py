"""Scripts for a checkout: the commands of ``e2e`` under ``torchrun`` and SLURM."""
