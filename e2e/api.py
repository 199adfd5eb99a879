"""The public API: what ``import e2e`` offers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e2e.bags.spec import LabelledSlide
from e2e.cohort.splits import HONEST
from e2e.cohort.table import Problem
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel
from e2e.features.reader import open_features as open_features
from e2e.heads.base import HEADS, Head
from e2e.runs.parts import REGISTRIES, batch_norm_policy, build_head, build_task, load_slides
from e2e.runs.trained import TrainedRun
from e2e.settings.layers import load_model_plugins, load_settings
from e2e.settings.schema import Plugin
from e2e.store.open import open_store as open_store
from e2e.tasks.base import Task


def create_model(
    name: str,
    num_outputs: int,
    *,
    pretrained: bool | None = None,
    encoder: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    chunk: int = 256,
    batch_norm: str = "auto",
    train_encoder: bool = True,
    autocast: torch.dtype | None = None,
) -> MILModel:
    """Return encoder and head as one module on the CPU, which takes patches or bags.

    Parameters
    ----------
    name : str
        ``e2e_<encoder>_<head>``, a head alone (for features), or a file of ``configs/models``.
    num_outputs : int
        Number of outputs of the head, such as the number of classes.
    pretrained : bool, optional
        Whether the encoder starts from pretrained weights; by default as the encoder has it.
    encoder, head : mapping, optional
        Options of the encoder and of the head; ``e2e train --help head.abmilx`` lists them.
    chunk : int
        Number of patches encoded at once. It bounds the memory, and does not change the gradients.
    batch_norm : {"auto", "frozen", "chunk", "sync"}
        ``auto``: frozen with pretrained weights, otherwise ``chunk``.
    train_encoder : bool
        Whether the encoder gets gradients.
    autocast : torch.dtype, optional
        Lower precision for the matrix products, such as ``torch.bfloat16``.

    Raises
    ------
    UserError
        There is no such model, or an option is wrong.

    Examples
    --------
    >>> import e2e, torch
    >>> model = e2e.create_model("e2e_r18_abmilx", num_outputs=6, pretrained=False).eval()
    >>> model(torch.rand(5, 3, 64, 64)).logits.shape
    torch.Size([1, 6])
    """
    weights = {} if pretrained is None else {"pretrained": pretrained}
    options = {"encoder": {**(encoder or {}), **weights}, "head": head or {}}
    plugins = load_model_plugins(name, options, REGISTRIES)
    network = ENCODERS.build(plugins["encoder"].name, **plugins["encoder"].options)
    model = MILModel(
        network,
        build_head(plugins["head"], network.dim, num_outputs),
        chunk=chunk,
        batch_norm=batch_norm_policy(batch_norm, network, plugins["encoder"].options),
        train_encoder=train_encoder,
        autocast=autocast,
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def create_head(name: str, in_dim: int, num_outputs: int, **options: Any) -> Head:
    """Return a multiple-instance head.

    Parameters
    ----------
    name : str
        A name of :func:`list_heads`.
    in_dim : int
        Width of the features.
    num_outputs : int
        Number of outputs, such as the number of classes.
    **options
        Options of the head; ``e2e train --help head.abmilx`` lists them.

    Returns
    -------
    Head
        Takes features (B, N, in_dim) and returns a :class:`e2e.heads.base.HeadOutput`.

    Raises
    ------
    UserError
        There is no such head, or an option is wrong.

    Examples
    --------
    >>> import e2e, torch
    >>> head = e2e.create_head("abmilx", in_dim=1024, num_outputs=2, heads=4).eval()
    >>> output = head(torch.randn(1, 500, 1024))
    >>> output.logits.shape, output.attention().shape
    (torch.Size([1, 2]), torch.Size([1, 4, 500]))
    """
    return build_head(Plugin(name, options), in_dim, num_outputs)


def create_task(name: str, **options: Any) -> Task:
    """Return a task: what the outputs mean, their loss and their metrics.

    Parameters
    ----------
    name : str
        ``classification``, ``grading``, ``multilabel``, ``regression``, ``survival`` or another of
        ``e2e train --help task``.
    **options
        Options of the task; ``e2e train --help task.classification`` lists them.

    Raises
    ------
    UserError
        There is no such task, or an option is wrong.

    Examples
    --------
    >>> import e2e
    >>> e2e.create_task("classification", classes=["normal", "tumor"]).num_outputs
    2
    """
    return build_task(Plugin(name, options))


@dataclass(frozen=True)
class Cohort:
    """A list of labelled slides, matched with their patches or features.

    Parameters
    ----------
    name : str
        The name or file it was loaded from.
    slides : list of LabelledSlide
        The slides, or the cases where ``data.unit`` is ``case``.
    task : Task
        What the labels mean. It is not fitted: ``task.fit`` does so on the targets of training slides.
    problems : list of Problem
        Rows and slides that were left out, with the reason.
    """

    name: str
    slides: list[LabelledSlide]
    task: Task
    problems: list[Problem]

    def __len__(self) -> int:
        """Return the number of slides."""
        return len(self.slides)

    def of_split(self, split: str) -> list[LabelledSlide]:
        """Return the slides of ``train``, ``val`` or ``test``."""
        return [item for item in self.slides if item.slide.split == split]


def load_cohort(name: str | Path, *overrides: str, seed: int = 0) -> Cohort:
    """Load a cohort: label table, splits, and the stores or features of its slides, all checked.

    Parameters
    ----------
    name : str or Path
        A cohort of ``configs/datasets``, or a YAML file with the sections ``data`` and ``task``.
    *overrides : str
        Settings, such as ``"data.labels=labels.csv"``.
    seed : int
        Random seed of splits that are made here (``data.cut``).

    Returns
    -------
    Cohort
        Slides with their patches; with their features where the file names no stores but features.

    Raises
    ------
    UserError
        Data are missing, a row cannot be used, or a case is in several splits.

    Examples
    --------
    >>> import e2e
    >>> cohort = e2e.load_cohort("mine.yaml")
    >>> len(cohort), len(cohort.of_split("train")), cohort.task.output_names
    (16, 9, ('bright', 'dark'))
    """
    settings = load_settings(
        datasets=str(name),
        model="mean",  # any model: only the cohort's sections are used
        files=[],
        overrides=[*overrides, f"run.seed={seed}"],
        registries=REGISTRIES,
    )
    task = build_task(settings.task)
    slides, problems = load_slides(
        settings,
        task,
        features=bool(settings.data.features) and not settings.data.stores,
        problems_file=None,
        protocol=HONEST,
    )
    return Cohort(str(name), slides, task, problems)


def load_run(folder: str | Path) -> TrainedRun:
    """Load a trained run from its folder.

    Parameters
    ----------
    folder : str or Path
        A run folder, as ``e2e train`` writes it; or a folder or .zip of ``e2e export``.

    Returns
    -------
    TrainedRun
        Its settings, its task, and ``predict`` for further slides.

    Raises
    ------
    UserError
        The folder is no run folder, or the run has not finished.

    Examples
    --------
    >>> import e2e
    >>> run = e2e.load_run("runs/mine")
    >>> table = run.predict(e2e.open_store("data/mine.lmdb"))
    >>> list(table.columns)
    ['slide', 'predicted', 'prob_bright', 'prob_dark', 'attention_entropy']
    """
    return TrainedRun(Path(folder))


def list_heads(pattern: str = "*") -> list[str]:
    """Return the names of the heads that match a pattern, sorted.

    Parameters
    ----------
    pattern : str
        With ``*`` and ``?`` as in file names.

    Examples
    --------
    >>> import e2e
    >>> e2e.list_heads("abmil*")
    ['abmil', 'abmilx']
    """
    return fnmatch.filter(HEADS.names(), pattern)


def list_encoders(pattern: str = "*") -> list[str]:
    """Return the names of the encoders that match a pattern, sorted; those of timm are among them.

    Parameters
    ----------
    pattern : str
        With ``*`` and ``?`` as in file names.

    Examples
    --------
    >>> import e2e
    >>> e2e.list_encoders("r18"), "vit_small_patch16_224" in e2e.list_encoders("vit*")
    (['r18'], True)
    """
    names = {*ENCODERS.names(), *ENCODERS.library_names()}
    return sorted(fnmatch.filter(names, pattern))
