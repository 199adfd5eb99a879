"""End-to-end training of a patch encoder and a multiple-instance head from slide labels."""

import os

# PyTorch then puts large tensors of the CPU on huge pages, whose first touch costs a fifth. It looks
# once, when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
