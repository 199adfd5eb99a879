"""Which PyTorch kernels run, and how large their results are."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import e2e.heads  # noqa: F401


class Watch(TorchDispatchMode):
    """The kernels that run, and the elements of the largest tensor any of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage().nbytes() // value.element_size()
                self.largest = max(self.largest, value.numel(), storage)
        self.kernels.add(func.__name__)
        return result
