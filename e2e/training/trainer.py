"""The loop: updates, validation, the best epoch, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from e2e.bags.bag import Bag
from e2e.bags.loader import TrainingLoader
from e2e.bags.prefetch import WaitTime, prefetch
from e2e.engine.model import MILModel
from e2e.errors import UserError, format_list
from e2e.files import write_atomically
from e2e.log import MetricsLog, Screen
from e2e.parallel import Strategy
from e2e.tasks.base import Task
from e2e.training.checkpoint import (
    Tensors,
    add_prefix,
    check_weights,
    load_checkpoint,
    save_checkpoint,
    select_prefix,
)
from e2e.training.losses import bag_losses
from e2e.training.optim import MovingAverage, build_optimizer, learning_rate

LAST = "last.safetensors"
"""In a run's folder: where it stopped."""
MUCH_WAITING = 0.05
"""Share of the time spent waiting for pixels from which on the screen says so."""

Validate = Callable[[MILModel], dict[str, float | None]]
ScorePatches = Callable[[MILModel], dict[str, Tensor]]
"""Slide -> (N,) what each patch of a training slide is worth to the model."""


@dataclass
class Progress:
    """The counters of a run; with the weights, all that a stopped run needs to go on."""

    epoch: int = 0
    update: int = 0
    """Updates done in this epoch."""
    step: int = 0
    """Optimiser steps done in all."""
    loss_sum: float = 0.0
    """Of this epoch's good updates."""
    losses: int = 0
    """How many those are."""
    best: tuple[float, float] | None = None
    """The :meth:`e2e.tasks.base.Task.selection_key` of the best validation."""
    best_epoch: int | None = None
    stale: int = 0
    """Validations since the best one."""
    finished: bool = False
    bad_steps: int = 0
    """Steps that were skipped because loss or gradient was not finite."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the fields are the settings of the same names."""

    lr: float
    weight_decay: float
    epochs: int
    warmup_epochs: float
    clip: float | None
    ema: float
    validate_every: int
    patience: int | None
    min_epochs: int
    selected: str
    """Whose validation selects the epoch: ``model`` or ``ema``."""
    save_every: int
    encoder_lr: float | None = None
    layer_decay: float = 1.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    max_bad_steps: int = 10
    rescore: int = 1
    """Epochs between two scorings of the patches."""


@dataclass(frozen=True)
class _Step:
    """An update that is on its way; its figures are read when the next one is on its way too."""

    number: int
    """Steps done, this one among them."""
    epoch: int
    lr: float
    slides: tuple[str, ...]
    figures: Callable[[], list[float]]
    """Mean loss over all bags, patches on all ranks, gradient norm, whether it was good; then the
    loss of each own bag."""


class Trainer:
    """One training run of one model.

    Args:
        model: on the strategy's device.
        validate: metrics of the model as it is, on the validation split.
        score_patches: for a sampler that draws by scores; None for others.
        folder: where best.safetensors and last.safetensors are written.
    """

    def __init__(
        self,
        model: MILModel,
        *,
        task: Task,
        loader: TrainingLoader,
        strategy: Strategy,
        schedule: Schedule,
        validate: Validate,
        score_patches: ScorePatches | None = None,
        folder: Path,
        log: MetricsLog,
        screen: Screen,
    ) -> None:
        self.model = model
        self.task = task
        self.loader = loader
        self.strategy = strategy
        self.schedule = schedule
        self.validate = validate
        self.score_patches = score_patches
        self.folder = folder
        self.log = log
        self.screen = screen
        self.progress = Progress()
        strategy.setup(model, self._make_optimizer, clip=schedule.clip)
        self.average = MovingAverage(strategy.shards(), schedule.ema) if schedule.ema else None
        self._waiting = WaitTime()

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(
            model,
            lr=self.schedule.lr,
            weight_decay=self.schedule.weight_decay,
            encoder_lr=self.schedule.encoder_lr,
            layer_decay=self.schedule.layer_decay,
            name=self.schedule.optimizer,
        )

    def fit(self) -> Progress:
        """Train to the last epoch, or until validation has not improved for long enough."""
        bags = self._bags()
        while not self.progress.finished:
            self._train_epoch(bags)
            epoch = self.progress.epoch
            last = epoch + 1 == self.schedule.epochs
            if (epoch + 1) % self.schedule.validate_every == 0 or last:
                self._validate()
            self.progress = replace(
                self.progress,
                epoch=epoch + 1,
                update=0,
                loss_sum=0.0,
                losses=0,
                finished=last or self._should_stop(epoch + 1),
            )
            if self._wants_scores(epoch + 1) and not self.progress.finished:
                self._score()
                bags = self._bags()  # those that were begun go by the scores before
            self._save("last")
        return self.progress

    def resume(self) -> None:
        """Go on from last.safetensors; a run stopped before its first one starts again."""
        path = self.folder / LAST
        if path.exists():
            tensors, state = load_checkpoint(path)
            self.progress = Progress(**state)
            if self.progress.best is not None:
                self.progress.best = (self.progress.best[0], self.progress.best[1])
            weights = select_prefix("model", tensors)
            check_weights(self.strategy.shapes, weights, path)
            self.strategy.load(weights)
            self.strategy.load_optimizer(select_prefix("optimizer", tensors))
            if self.average is not None:
                self.average.state = self.strategy.shard(select_prefix("ema", tensors))
        if self.strategy.is_leader:
            self.log.forget_after(self.progress.step)
        self._load_scores()

    def _bags(self) -> Iterator[tuple[Bag, int]]:
        """All updates to come; an epoch's first bag is made while the one before ends."""
        where = {"rank": self.strategy.rank, "world_size": self.strategy.world_size}
        start, first = self.progress.epoch, self.progress.update
        epochs = (
            self.loader.epoch(epoch, first=first if epoch == start else 0, **where)
            for epoch in range(start, self.schedule.epochs)
        )
        return prefetch(chain.from_iterable(epochs), self.strategy.device, self._waiting)

    def _train_epoch(self, bags: Iterator[tuple[Bag, int]]) -> None:
        self.model.train()
        total = self.loader.updates()
        self._started, self._patches, self._waiting.seconds = time.monotonic(), 0, 0.0
        before: _Step | None = None
        for bag, count in islice(bags, total - self.progress.update):
            step = self._update(bag, count, total)
            self._read(before)
            before = step
            progress, every = self.progress, self.schedule.save_every
            if every and progress.step % every == 0 and progress.update < total:
                self._read(before)
                before = None
                self._save("last")
        self._read(before)
        self.screen.pause()

    def _update(self, bag: Bag, count: int, total: int) -> _Step:
        """Start one optimiser step on ``count`` slides over all ranks, ``total`` steps an epoch."""
        strategy, progress = self.strategy, self.progress
        lr = self._set_learning_rate(total)
        losses = bag_losses(
            strategy, bag, self.task, progress.step / (self.schedule.epochs * total)
        )
        loss = losses.sum() / count
        strategy.backward(loss)
        norm, good = strategy.step()
        self.model.batch_norm.commit(strategy.all_reduce_sum, good)
        for module in (self.model.head, *self.model.regularisers):
            module.after_step(good)  # pyright: ignore[reportCallIssue]
        if self.average is not None:
            self.average.update(strategy.shards(), progress.step, good)
        rows = sum(chunk.stop - chunk.start for chunk in bag.chunks if chunk.counts)
        told = torch.stack([loss.detach().double(), loss.new_tensor(rows, dtype=torch.float64)])
        strategy.all_reduce_sum(told)
        progress.update += 1
        progress.step += 1
        figures = torch.cat([told, norm.view(1), good.view(1), losses.detach()])
        return _Step(
            progress.step,
            progress.epoch,
            lr,
            bag.slides,
            to_host(figures),
        )

    def _read(self, step: _Step | None) -> None:
        """Take in the figures of a step, tell them, and look after a bad one."""
        if step is None:
            return
        loss, rows, norm, good, *losses = step.figures()
        self._patches += rows
        seconds = max(1e-9, time.monotonic() - self._started)
        rate, waiting = self._patches / seconds, self._waiting.seconds / seconds
        if good:
            self.progress.loss_sum += loss
            self.progress.losses += 1
        else:
            self._count_bad(step, losses, norm)
        total = self.schedule.epochs * self.loader.updates()
        self.screen.step(
            step.number,
            total,
            f"epoch {step.epoch + 1}/{self.schedule.epochs}  loss {loss:.4f}  lr {step.lr:.2e}  "
            f"{rate:,.0f} patches/s"
            + (f"  waiting {waiting:.0%}" if waiting > MUCH_WAITING else ""),
        )
        if self.strategy.is_leader:
            self.log.write(
                step=step.number,
                epoch=step.epoch,
                loss=loss if math.isfinite(loss) else None,
                grad_norm=norm if math.isfinite(norm) else None,
                lr=step.lr,
                skipped=not good,
                patches_per_s=round(rate, 1),
                waiting=round(waiting, 4),
            )

    def _count_bad(self, step: _Step, losses: list[float], norm: float) -> None:
        """Every rank comes here for the same step: say which slides, stop when it is too much."""
        guilty = [s for s, v in zip(step.slides, losses, strict=True) if not math.isfinite(v)]
        found = [s for per_rank in self.strategy.gather_objects(guilty) for s in per_rank]
        every = [s for per_rank in self.strategy.gather_objects(step.slides) for s in per_rank]
        whose = "loss not finite" if found else f"gradient norm {norm}, every loss finite"
        said = f"step {step.number} skipped: {whose}\n{format_list(sorted(set(found or every)))}"
        self.progress.bad_steps += 1
        if self.progress.bad_steps < self.schedule.max_bad_steps:
            self.screen.say(said)
            return
        raise UserError(
            f"training diverged: {self.progress.bad_steps} bad steps (engine.max_bad_steps), the last:\n"
            f"{said}\n  lower optim.lr, set optim.clip, or look at these slides; then start anew"
        )

    def _set_learning_rate(self, updates: int) -> float:
        lr = learning_rate(
            self.progress.step,
            peak=self.schedule.lr,
            warmup=round(self.schedule.warmup_epochs * updates),
            steps=self.schedule.epochs * updates,
            schedule=self.schedule.schedule,
        )
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def _validate(self) -> None:
        """Judge weights and their average on the validation split; keep the best epoch."""
        self._check_finite()
        found = {}
        for name, shards in self._weights().items():
            with self.strategy.full_parameters(shards):
                found[name] = self.validate(self.model)
        progress = self.progress
        selected = self.task.selection_key(found[self.schedule.selected])
        if progress.best is None or selected > progress.best:
            progress.best, progress.best_epoch, progress.stale = selected, progress.epoch, 0
            self._save("best")
        else:
            progress.stale += 1
        loss = progress.loss_sum / progress.losses if progress.losses else None  # all were bad
        shown = "  ".join(f"{k} {_text(v[self.task.monitor])}" for k, v in found.items())
        mark = "  *" if progress.stale == 0 else ""
        self.screen.say(
            f"epoch {progress.epoch + 1:3d}  loss {_text(loss, 4)}  val {self.task.monitor}: {shown}{mark}"
        )
        if self.strategy.is_leader:
            self.log.write(step=progress.step, epoch=progress.epoch, train_loss=loss, val=found)

    def _wants_scores(self, epoch: int) -> bool:
        return self.score_patches is not None and epoch % self.schedule.rescore == 0

    def _score(self) -> None:
        """What the patches are worth from here on, by the selected weights; stored."""
        assert self.score_patches is not None
        with self.strategy.full_parameters(self._weights()[self.schedule.selected]):
            found = self.score_patches(self.model)
        wrong = [slide for slide, scores in sorted(found.items()) if not scores.isfinite().all()]
        if wrong:
            raise UserError(
                f"patches cannot be drawn by scores that are not finite\n{format_list(wrong)}"
            )
        if self.strategy.is_leader:
            write_atomically(self._scores_file(self.progress.epoch), safetensors.torch.save(found))
            # The one before stays: a run that is stopped before its checkpoint still needs it.
            self._scores_file(self.progress.epoch - 2 * self.schedule.rescore).unlink(
                missing_ok=True
            )
        self._use(found)

    def _load_scores(self) -> None:
        """Those that the stopped run drew by."""
        scored = self.progress.epoch // self.schedule.rescore * self.schedule.rescore
        if self.score_patches is None or not scored or self.progress.finished:
            return
        file = self._scores_file(scored)
        if not file.is_file():
            raise UserError(
                f"cannot go on without {file}, by which patches were drawn\n  start anew"
            )
        self._use(safetensors.torch.load_file(file))

    def _scores_file(self, epoch: int) -> Path:
        return self.folder / f"patch_scores_{epoch}.safetensors"

    def _use(self, scores: Tensors) -> None:
        spec = replace(self.loader.spec, scores={k: v.numpy() for k, v in scores.items()})
        self.loader = replace(self.loader, spec=spec)

    def _check_finite(self) -> None:
        """UserError, on all ranks, when the last step made weights that are not finite."""
        values = [v for v in self.strategy.shards().values() if v.is_floating_point()]
        bad = torch.stack([~value.isfinite().all() for value in values]).sum().double()
        self.strategy.all_reduce_sum(bad)
        if bad:
            raise UserError(
                f"training diverged: weights are not finite after epoch {self.progress.epoch + 1}\n"
                "  lower optim.lr or set optim.clip, and start anew"
            )

    def _weights(self) -> dict[str, Tensors | None]:
        """What is evaluated and saved: the model's own weights (None), and their average."""
        average = {} if self.average is None else {"ema": self.average.state}
        return {"model": None, **average}

    def _should_stop(self, epochs_done: int) -> bool:
        patience = self.schedule.patience
        if patience is None or epochs_done < self.schedule.min_epochs:
            return False
        return self.progress.stale >= patience

    def _save(self, name: str) -> None:
        """Every rank gives its pieces; the one that leads writes them."""
        tensors: Tensors = {}
        for kind, shards in self._weights().items():
            whole = self.strategy.full_tensors(self.strategy.shards() if shards is None else shards)
            tensors |= add_prefix(kind, whole)
        if name == "last":
            tensors |= add_prefix("optimizer", self.strategy.optimizer_tensors())
        if self.strategy.is_leader:
            save_checkpoint(self.folder / f"{name}.safetensors", tensors, asdict(self.progress))


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying to the host; the function that is returned waits for it."""
    if values.device.type != "cuda":
        return values.tolist
    copied, done = values.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read


def _text(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
