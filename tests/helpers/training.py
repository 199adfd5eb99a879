"""A trainer over two updates an epoch, whose validation returns scores set in advance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from e2e.bags.bag import Bag
from e2e.engine.model import MILModel
from e2e.log import MetricsLog, Screen
from e2e.parallel import Strategy
from e2e.tasks.base import TASKS
from e2e.training.trainer import Schedule, Trainer
from tests.helpers.models import make_bag, make_model


class TwoUpdates:
    """A loader of two updates an epoch over one bag."""

    def __init__(self, poisoned: set[tuple[int, int]], one_update: bool) -> None:
        self.one_update = one_update
        self.poisoned = poisoned  # (epoch, update)

    def updates(self) -> int:
        return 2

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        for update in range(first, 2):
            bag = make_bag((5, 3))
            if self.one_update and update:
                return
            if (epoch, update) in self.poisoned:
                bag.pixels.pixels[5:].fill_(float("nan"))  # the second slide
            yield bag, 2


def trainer(
    folder: Path,
    scores: list[dict[str, tuple[float, float]]],
    log: MetricsLog | None = None,
    screen: Screen | None = None,
    one_update: bool = False,
    head: nn.Module | None = None,
    **schedule,
) -> Trainer:
    """Trains a small model; validation gives the given (auc, log_loss) of model and ema in turn."""
    answers = (pair for epoch in scores for pair in epoch.values())

    def validate(model: MILModel) -> dict[str, float | None]:
        auc, loss = next(answers)
        return {"auc": auc, "log_loss": loss}

    settings = {
        "lr": 1e-3, "weight_decay": 0.0, "epochs": len(scores), "warmup_epochs": 0, "clip": 1.0,
        "ema": 0.9, "validate_every": 1, "patience": None, "min_epochs": 0, "selected_weights": "ema",
        "save_every": 0,
    }  # fmt: skip
    model = make_model(4, batch_norm="chunk")
    model.head = head or model.head
    return Trainer(
        model,
        task=TASKS.build("classification", classes=["a", "b"]),
        loader=TwoUpdates(schedule.pop("poisoned", set()), one_update),  # type: ignore[arg-type]
        strategy=Strategy(torch.device("cpu")),
        schedule=Schedule(**(settings | schedule)),
        validate=validate,
        folder=folder,
        log=log or MetricsLog(None),
        screen=screen or Screen(is_leader=False),
    )


def both(*scores: tuple[float, float]) -> list[dict[str, tuple[float, float]]]:
    return [{"model": (0.0, 9.0), "ema": score} for score in scores]
