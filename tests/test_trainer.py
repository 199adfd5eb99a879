"""The loop: which epoch is kept, when it stops, what a bad step does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from e2e.bag import Bag
from e2e.checkpoint import load_checkpoint, part
from e2e.errors import UserError
from e2e.log import MetricsLog, Screen
from e2e.parallel import Strategy
from e2e.tasks.base import TASKS
from e2e.trainer import Schedule, Trainer
from tests.test_model import make_bag, make_model


class TwoUpdates:
    """A loader of two updates an epoch over one bag."""

    def __init__(self, poison_epoch: int | None = None) -> None:
        self.poison_epoch = poison_epoch

    def updates(self) -> int:
        return 2

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        for _ in range(first, 2):
            bag = make_bag((5, 3))
            if epoch == self.poison_epoch:
                bag.pixels.pixels.fill_(float("nan"))
            yield bag, 2


def trainer(folder: Path, scores: list[dict[str, tuple[float, float]]], **schedule) -> Trainer:
    """Trains a small model; validation gives the given (auc, log_loss) of model and ema in turn."""
    answers = (pair for epoch in scores for pair in epoch.values())

    def validate() -> dict[str, float | None]:
        auc, loss = next(answers)
        return {"auc": auc, "log_loss": loss}

    settings = {
        "lr": 1e-3, "weight_decay": 0.0, "epochs": len(scores), "warmup_epochs": 0, "clip": 1.0,
        "ema": 0.9, "validate_every": 1, "patience": None, "min_epochs": 0, "judged": "ema",
        "save_every": 0,
    }  # fmt: skip
    return Trainer(
        make_model(4, batch_norm="chunk"),
        task=TASKS.build("classification", classes=["a", "b"]),
        loader=TwoUpdates(schedule.pop("poison_epoch", None)),  # type: ignore[arg-type]
        strategy=Strategy(torch.device("cpu")),
        schedule=Schedule(**(settings | schedule)),
        validate=validate,
        folder=folder,
        log=MetricsLog(None),
        screen=Screen(leads=False),
    )


def both(*scores: tuple[float, float]) -> list[dict[str, tuple[float, float]]]:
    return [{"model": (0.0, 9.0), "ema": score} for score in scores]


def test_the_best_validation_is_kept_and_the_tie_break_decides_among_equals(tmp_path):
    progress = trainer(tmp_path, both((0.7, 0.6), (1.0, 0.5), (1.0, 0.3), (0.9, 0.1))).fit()
    assert progress.best_epoch == 2
    tensors, state = load_checkpoint(tmp_path / "best.safetensors")
    assert state["epoch"] == 2
    last, _ = load_checkpoint(tmp_path / "last.safetensors")
    moved = part("ema", tensors)["head.classify.weight"] - part("ema", last)["head.classify.weight"]
    assert moved.abs().sum() > 0


def test_the_weights_that_are_judged_decide(tmp_path):
    scores = [{"model": (0.9, 1.0), "ema": (0.1, 1.0)}, {"model": (0.2, 1.0), "ema": (0.8, 1.0)}]
    assert trainer(tmp_path, scores, judged="ema").fit().best_epoch == 1
    assert trainer(tmp_path, scores, judged="model").fit().best_epoch == 0


def test_training_stops_when_validation_no_longer_improves(tmp_path):
    falling = both(*[(1.0 - k / 10, 1.0) for k in range(9)])
    assert trainer(tmp_path, falling, patience=2).fit().epoch == 3
    assert trainer(tmp_path, falling, patience=2, min_epochs=6).fit().epoch == 6
    assert trainer(tmp_path, falling, patience=None).fit().epoch == 9


def test_validation_is_made_on_schedule_and_after_the_last_epoch(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.6, 1.0)), epochs=5, validate_every=4)
    assert run.fit().best_epoch == 4


def test_an_undefined_metric_is_worse_than_any_other(tmp_path):
    nothing = {"model": (0.0, 1.0), "ema": (None, 1.0)}
    run = trainer(tmp_path, [nothing, *both((0.1, 1.0)), nothing])  # type: ignore[list-item]
    assert run.fit().best_epoch == 1


def test_a_step_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.5, 1.0)), poison_epoch=1)
    with pytest.raises(UserError, match=r"diverged at step 2: loss nan.*\n.*lower optim.lr"):
        run.fit()
    tensors, state = load_checkpoint(tmp_path / "last.safetensors")
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in tensors.values())
    model = part("model", tensors)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, model[name]), name


def test_the_learning_rate_reaches_zero_at_the_last_step(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.5, 1.0)))
    run.fit()
    assert all(group["lr"] == 0 for group in run.optimizer.param_groups)


def test_resuming_restores_optimiser_average_and_counters(tmp_path):
    whole = trainer(tmp_path / "a", both(*[(0.5, 1.0)] * 4))
    (tmp_path / "a").mkdir()
    whole.fit()
    (tmp_path / "b").mkdir()
    broken = trainer(tmp_path / "b", both(*[(0.5, 1.0)] * 4), poison_epoch=2)
    with pytest.raises(UserError):
        broken.fit()
    again = trainer(tmp_path / "b", both(*[(0.5, 1.0)] * 4))
    again.resume()
    assert (again.progress.epoch, again.progress.step) == (2, 4)
    again.fit()
    assert again.average is not None
    assert whole.average is not None
    for name, value in whole.average.state.items():
        assert torch.equal(value, again.average.state[name]), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_every_group_follows_the_schedule_at_its_own_share(tmp_path):
    runs = both((0.5, 0.5))
    training = trainer(tmp_path, runs, lr=1e-2, encoder_lr=1e-3, warmup_epochs=1)
    training.fit()  # two steps of warm-up: half the peak, then the peak
    encoder = {id(p) for p in training.model.encoder.parameters()}
    rates = {
        id(p) in encoder: g["lr"] for g in training.optimizer.param_groups for p in g["params"]
    }
    assert rates == {True: pytest.approx(1e-3), False: pytest.approx(1e-2)}
    assert training._set_learning_rate(2) == pytest.approx(1e-2)
    training.progress.step = 0
    training._set_learning_rate(2)
    rates = {
        id(p) in encoder: g["lr"] for g in training.optimizer.param_groups for p in g["params"]
    }
    assert rates == {True: pytest.approx(5e-4), False: pytest.approx(5e-3)}
