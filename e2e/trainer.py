"""The loop: updates, validation, the best epoch, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e2e.bag import Bag
from e2e.checkpoint import (
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    part,
    prefixed,
    save_checkpoint,
)
from e2e.data.loader import TrainingLoader
from e2e.errors import UserError
from e2e.evaluate import with_weights
from e2e.log import MetricsLog, Screen
from e2e.model import MILModel
from e2e.optim import WeightAverage, build_optimizer, clip_gradients, learning_rate
from e2e.parallel import Strategy
from e2e.tasks.base import Task

Validate = Callable[[], dict[str, float | None]]


@dataclass
class Progress:
    """The counters of a run; with the weights, all that a stopped run needs to go on."""

    epoch: int = 0
    update: int = 0
    """Updates done in this epoch."""
    step: int = 0
    """Optimiser steps done in all."""
    loss_sum: float = 0.0
    """Of this epoch's updates."""
    best: tuple[float, float] | None = None
    """(metric, minus the tie-break) of the best validation."""
    best_epoch: int | None = None
    stale: int = 0
    """Validations since the best one."""
    finished: bool = False


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
    judged: str
    """Whose validation selects the epoch: ``model`` or ``ema``."""
    save_every: int
    encoder_lr: float | None = None
    layer_decay: float = 1.0


class Trainer:
    """One training run of one model.

    Args:
        model: on the strategy's device.
        validate: metrics of the model as it is, on the validation split.
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
        self.folder = folder
        self.log = log
        self.screen = screen
        self.progress = Progress()
        self.wrapped = strategy.wrap(model)
        self.optimizer = build_optimizer(
            model,
            lr=schedule.lr,
            weight_decay=schedule.weight_decay,
            encoder_lr=schedule.encoder_lr,
            layer_decay=schedule.layer_decay,
        )
        self.average = WeightAverage(model, schedule.ema) if schedule.ema else None
        self._started, self._patches = time.monotonic(), 0

    def fit(self) -> Progress:
        """Train to the last epoch, or until validation has not improved for long enough."""
        while not self.progress.finished:
            self._train_epoch()
            epoch = self.progress.epoch
            last = epoch + 1 == self.schedule.epochs
            if (epoch + 1) % self.schedule.validate_every == 0 or last:
                self._validate()
            self.progress = replace(
                self.progress,
                epoch=epoch + 1,
                update=0,
                loss_sum=0.0,
                finished=last or self._should_stop(epoch + 1),
            )
            self._save("last")
        return self.progress

    def resume(self) -> None:
        """Go on from last.safetensors; a run stopped before its first one starts again."""
        path = self.folder / "last.safetensors"
        if path.exists():
            tensors, state = load_checkpoint(path)
            self.progress = Progress(**state)
            if self.progress.best is not None:
                self.progress.best = (self.progress.best[0], self.progress.best[1])
            load_weights(self.model, part("model", tensors), path)
            load_optimizer(self.optimizer, self.model, part("optimizer", tensors))
            if self.average is not None:
                device = self.strategy.device
                self.average.state = {k: v.to(device) for k, v in part("ema", tensors).items()}
        if self.strategy.leads:
            self.log.forget_after(self.progress.step)

    def _train_epoch(self) -> None:
        self.model.train()
        loader, strategy = self.loader, self.strategy
        total = loader.updates()
        self._started, self._patches = time.monotonic(), 0
        bags = loader.epoch(
            self.progress.epoch,
            rank=strategy.rank,
            world_size=strategy.world_size,
            first=self.progress.update,
        )
        for bag, count in bags:
            lr = self._set_learning_rate(total)
            loss, norm = self._update(bag, count)
            progress = self.progress
            progress.update += 1
            progress.step += 1
            progress.loss_sum += loss
            self._tell(bag, loss, norm, lr, total)
            every = self.schedule.save_every
            if every and progress.step % every == 0 and progress.update < total:
                self._save("last")
        self.screen.pause()

    def _update(self, bag: Bag, count: int) -> tuple[float, float]:
        """One optimiser step on ``count`` slides over all ranks; returns (mean loss, grad norm)."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(self.wrapped, self.model, bag, self.task, self.strategy.device) / count
        self.strategy.backward(loss)
        norm = clip_gradients(self.model.parameters(), self.schedule.clip)
        mean = loss.detach().clone()
        self.strategy.sum(mean)
        if not torch.isfinite(norm) or not torch.isfinite(mean):
            raise UserError(
                f"training diverged at step {self.progress.step}: loss {mean.item():.4g}, gradient "
                f"norm {norm.item():.4g}\n  lower optim.lr, or set optim.clip, and start anew"
            )
        self.optimizer.step()
        self.model.statistics.commit(self.strategy.sum)
        self.model.head.after_step()
        if self.average is not None:
            self.average.update(self.model, self.progress.step)
        return mean.item(), norm.item()

    def _set_learning_rate(self, updates: int) -> float:
        lr = learning_rate(
            self.progress.step,
            peak=self.schedule.lr,
            warmup=round(self.schedule.warmup_epochs * updates),
            steps=self.schedule.epochs * updates,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def _tell(self, bag: Bag, loss: float, norm: float, lr: float, total: int) -> None:
        progress = self.progress
        self._patches += bag.num_patches * self.strategy.world_size
        rate = self._patches / max(1e-9, time.monotonic() - self._started)
        epochs = self.schedule.epochs
        self.screen.step(
            progress.step,
            epochs * total,
            f"epoch {progress.epoch + 1}/{epochs}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} patches/s",
        )
        if self.strategy.leads:
            self.log.write(
                step=progress.step,
                epoch=progress.epoch,
                loss=loss,
                grad_norm=norm,
                lr=lr,
                patches_per_s=round(rate, 1),
            )

    def _validate(self) -> None:
        """Judge weights and their average on the validation split; keep the best epoch."""
        found = {"model": self.validate()}
        if self.average is not None:
            with with_weights(self.model, self.average.state):
                found["ema"] = self.validate()
        progress = self.progress
        judged = self._judge(found[self.schedule.judged])
        if progress.best is None or judged > progress.best:
            progress.best, progress.best_epoch, progress.stale = judged, progress.epoch, 0
            self._save("best")
        else:
            progress.stale += 1
        loss = progress.loss_sum / max(1, progress.update)
        shown = "  ".join(f"{k} {_text(v[self.task.monitor])}" for k, v in found.items())
        mark = "  *" if progress.stale == 0 else ""
        self.screen.say(
            f"epoch {progress.epoch + 1:3d}  loss {loss:.4f}  val {self.task.monitor}: {shown}{mark}"
        )
        if self.strategy.leads:
            self.log.write(step=progress.step, epoch=progress.epoch, train_loss=loss, val=found)

    def _judge(self, found: Mapping[str, float | None]) -> tuple[float, float]:
        """What epochs are compared by: the monitored metric, and among equals the tie-break."""
        value, tie = found[self.task.monitor], found[self.task.tie_break]
        return (-math.inf if value is None else value, math.inf if tie is None else -tie)

    def _should_stop(self, epochs_done: int) -> bool:
        patience = self.schedule.patience
        if patience is None or epochs_done < self.schedule.min_epochs:
            return False
        return self.progress.stale >= patience

    def _save(self, name: str) -> None:
        if not self.strategy.leads:
            return
        tensors = prefixed("model", self.model.state_dict())
        if self.average is not None:
            tensors |= prefixed("ema", self.average.state)
        state: dict[str, Any] = asdict(self.progress)
        if name == "last":
            tensors |= prefixed("optimizer", optimizer_tensors(self.optimizer, self.model))
        save_checkpoint(self.folder / f"{name}.safetensors", tensors, state)


def batch_loss(
    wrapped: nn.Module, model: MILModel, bag: Bag, task: Task, device: torch.device
) -> Tensor:
    """Sum over this rank's bags of task loss and the head's own loss, float32."""
    outputs = wrapped(bag, device)
    target, weight = bag.target.to(device), bag.weight.to(device)
    losses = task.loss(torch.cat([output.logits for output in outputs]), target)
    extra = [
        model.head.aux_loss(output, target[number : number + 1])
        for number, output in enumerate(outputs)
    ]
    parts = [weight[k] * e for k, e in enumerate(extra) if e is not None]
    return (losses * weight).sum() + sum(parts, losses.new_zeros(()))


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
