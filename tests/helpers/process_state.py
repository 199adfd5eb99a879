"""What a test can leave changed in the process, and so pass on to the tests that run after it."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from e2e.images.threads import num_threads as decoder_threads
from e2e.registry import Registry

SEED = 0
"""Every test, and every file, starts from this seed."""

UNCHECKED_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",
}
"""Environment variables that pytest sets for each test, and scikit-learn and PyTorch's compiler when they are
imported."""

State = dict[str, Any]
"""Name of a setting of the process -> its value."""


def read_state() -> State:
    """The settings of the process that outlive a test.

    The random number generators are not among them, see :func:`fixed_seeds`.
    """
    state: State = {
        "warnings.filters": list(warnings.filters),
        # setuptools adds a folder of its own when it is imported.
        "sys.path": [p for p in sys.path if not p.endswith("setuptools/_vendor")],
        "working directory": os.getcwd(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_num_interop_threads()": torch.get_num_interop_threads(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_deterministic_debug_mode()": torch.get_deterministic_debug_mode(),
        "torch.backends.cudnn.enabled": torch.backends.cudnn.enabled,
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
        "torch.multiprocessing.get_sharing_strategy()": torch.multiprocessing.get_sharing_strategy(),
        "torch.distributed.is_initialized()": torch.distributed.is_initialized(),
        "decoder threads": decoder_threads(),
        "np.geterr()": np.geterr(),
        "PIL.Image.MAX_IMAGE_PIXELS": Image.MAX_IMAGE_PIXELS,
        "CPU affinity": os.sched_getaffinity(0),
        "limit of memory": resource.getrlimit(resource.RLIMIT_AS),
        "limit of open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "gc.isenabled()": gc.isenabled(),
        "locale": locale.setlocale(locale.LC_ALL),
        "socket.getdefaulttimeout()": socket.getdefaulttimeout(),
    }
    for name, value in read_tf32_settings().items():
        state[f"torch: {name}"] = value
    for name, value in os.environ.items():
        if name not in UNCHECKED_VARIABLES:
            state[f"os.environ[{name!r}]"] = value
    for registry, names in read_registries().items():
        state[f"registry of {registry}"] = names
    for name, logger in (("root", logging.root), *logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger):
            state[f"logger {name}"] = (logger.level, logger.disabled, logger.propagate)
    if (matplotlib := sys.modules.get("matplotlib")) is not None:
        # Not the backend: matplotlib chooses one when it is first needed.
        params = dict.items(matplotlib.rcParams)
        state["matplotlib.rcParams"] = {k: v for k, v in params if not k.startswith("backend")}
    return state


def read_tf32_settings() -> State:
    """PyTorch's settings of the precision of float32 products, by both interfaces.

    Where the two disagree, PyTorch does not let the older be read; its message stands for the value.
    """
    backends: Any = torch.backends
    state: State = {
        "float32_matmul_precision": _value_or_message(torch.get_float32_matmul_precision),
        "cuda.matmul.allow_tf32": _value_or_message(lambda: backends.cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": _value_or_message(lambda: backends.cudnn.allow_tf32),
        "fp32_precision": backends.fp32_precision,
        "cuda.matmul.fp32_precision": backends.cuda.matmul.fp32_precision,
        "cudnn.fp32_precision": backends.cudnn.fp32_precision,
        "cudnn.conv.fp32_precision": backends.cudnn.conv.fp32_precision,
        "cudnn.rnn.fp32_precision": backends.cudnn.rnn.fp32_precision,
        "mkldnn.fp32_precision": backends.mkldnn.fp32_precision,
        "mkldnn.matmul.fp32_precision": backends.mkldnn.matmul.fp32_precision,
        "mkldnn.conv.fp32_precision": backends.mkldnn.conv.fp32_precision,
    }
    return state


def _value_or_message(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError as error:
        return str(error).splitlines()[0]


def read_registries() -> dict[str, list[str]]:
    """Kind of plug-in -> the names registered, of every registry of the package."""
    return {registry.kind: registry.names() for registry in _registries(len(sys.modules))}


@lru_cache(maxsize=1)
def _registries(num_modules: int) -> list[Registry]:
    """All registries; searched for again when another module has been imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("e2e.")]
    return [value for m in modules for value in vars(m).values() if type(value) is Registry]


def find_changes(before: State, after: State) -> list[str]:
    """A line for each setting that has changed.

    A library that was first imported in between adds its loggers, registries and rcParams: these are
    no changes. A variable of the environment that was added is one.
    """
    changes = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "(not set)"), after.get(name, "(not set)")
        imported = name not in before and not name.startswith("os.environ")
        if old != new and not imported:
            changes.append(f"{name}: {_difference(old, new)}")
    return changes


def _difference(old: Any, new: Any) -> str:
    """The values; of two long lists or tables only what differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
        old, new = ({key: values.get(key) for key in keys} for values in (old, new))
    if isinstance(old, list) and isinstance(new, list):
        old, new = [v for v in old if v not in new], [v for v in new if v not in old]
        if not old and not new:
            return "in another order"
    return f"{old!r} before, {new!r} after"


@contextmanager
def fixed_seeds() -> Iterator[None]:
    """Start the global generators of Python, NumPy and PyTorch from :data:`SEED`; restore them afterwards.

    A test may draw from them and seed them as it likes: what it draws depends on no other test, and no
    other test sees it.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def shuffle_files(paths: list[str], seed: int) -> dict[str, int]:
    """Path -> its place in an order drawn from ``seed``, which depends on the set of paths alone."""
    order = sorted(set(paths))
    random.Random(seed).shuffle(order)
    return {path: place for place, path in enumerate(order)}
