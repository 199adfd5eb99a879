"""The training loop: updates, validation, the best epoch, early stopping, checkpoints."""

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
from e2e.log import MetricsLog, Screen, clock
from e2e.memory import to_host
from e2e.parallel import Strategy
from e2e.signals import deferred_signals, stop_requested
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
"""File in a run's folder: the state to resume from."""
NOTABLE_WAITING = 0.05
"""Fraction of the time spent waiting for pixels from which on the progress line shows it."""
TIMED_UPDATES = 10
"""Updates after which the time of an epoch is estimated."""
STOPPING = "stopping after the current update, which is then saved; a second Ctrl-C stops at once"
"""What the first signal prints."""

Validate = Callable[[MILModel], dict[str, float | None] | None]
"""Evaluates the model on the validation split: metric -> value, None where undefined; or None if predictions
are not finite."""
ScorePatches = Callable[[MILModel], dict[str, Tensor]]
"""Slide -> (N,) the model's score of each patch of a training slide."""


@dataclass
class Progress:
    """The counters of a run; with the weights, all that a stopped run needs to continue."""

    epoch: int = 0
    """Number of the current epoch, from 0."""
    update: int = 0
    """Updates done in this epoch."""
    step: int = 0
    """Optimiser steps done in all."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's good updates."""
    losses: int = 0
    """Number of this epoch's good updates."""
    best: tuple[float, float] | None = None
    """The :meth:`e2e.tasks.base.Task.selection_key` of the best validation."""
    best_epoch: int | None = None
    """Number of the best epoch, from 0."""
    stale: int = 0
    """Validations since the best one."""
    finished: bool = False
    """Whether training is over."""
    bad_steps: int = 0
    """Steps that were skipped because loss or gradient was not finite."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; most fields are the settings of the same names."""

    lr: float
    """Peak learning rate of the head."""
    weight_decay: float
    """Weight decay of matrices and kernels."""
    epochs: int
    """Most epochs."""
    warmup_epochs: float
    """Epochs of linear warm-up of the learning rate."""
    clip: float | None
    """Largest joint L2 norm of the gradients; None for no limit."""
    ema: float
    """Decay of the moving average of the weights; 0 for none."""
    validate_every: int
    """Epochs between two validations."""
    patience: int | None
    """Validations without improvement after which training stops; None for no early stopping."""
    min_epochs: int
    """Epochs before training may stop early."""
    selected_weights: str
    """Whose validation selects the epoch: ``model`` or ``ema``."""
    save_every: int
    """Steps between two checkpoints within an epoch; 0 for none."""
    encoder_lr: float | None = None
    """Peak learning rate of the encoder's last layer; None for ``lr``."""
    layer_decay: float = 1.0
    """Layer-wise learning-rate decay factor of the encoder."""
    optimizer: str = "adamw"
    """A key of :data:`e2e.training.optim.OPTIMIZERS`."""
    schedule: str = "cosine"
    """One of :data:`e2e.training.optim.SCHEDULES`."""
    max_bad_steps: int = 10
    """Skipped steps after which training fails."""
    rescore: int = 1
    """Epochs between two scorings of the patches."""


@dataclass(frozen=True)
class _Step:
    """An update that was started; its metrics are read once the next one has been started too."""

    number: int
    """Steps done, including this one."""
    epoch: int
    lr: float
    slides: tuple[str, ...]
    metrics: Callable[[], list[float]]
    """Mean loss over all bags, patches on all ranks, number of ranks that were told to stop, gradient
    norm, whether it was good; then the loss of each of this rank's bags."""


class Trainer:
    """One training run of one model.

    Parameters
    ----------
    model
        On the strategy's device.
    task
        Gives the loss and the key that selects the best epoch.
    loader
        The updates of each epoch.
    strategy
        Not set up yet; the trainer does it.
    schedule
        How long and how fast to train.
    validate
        Evaluates the model as it is on the validation split.
    score_patches
        For a sampler that draws by scores; None for others.
    folder
        Where best.safetensors and last.safetensors are written.
    log
        Gets the metrics of each step and validation.
    screen
        Gets progress and messages.
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
        self._is_timed = False
        self._is_stopping = False

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
        """Train to the last epoch, or until validation has not improved for long enough.

        Returns
        -------
        Progress
            The final counters.

        Raises
        ------
        UserError
            Training diverged.
        KeyboardInterrupt
            A signal came; the update under way was finished, and last.safetensors written, before.
        """
        with deferred_signals(STOPPING):
            return self._fit()

    def _fit(self) -> Progress:
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
            if self._should_score(epoch + 1) and not self.progress.finished:
                self._update_patch_scores()
                bags = self._bags()  # those that were started used the scores before
            self._save("last")
        return self.progress

    def resume(self) -> None:
        """Load last.safetensors; a run that was stopped before its first one starts from the beginning.

        Raises
        ------
        UserError
            The checkpoint does not fit the model, or patch scores are missing.
        """
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
        self._load_patch_scores()

    def _bags(self) -> Iterator[tuple[Bag, int]]:
        """All updates to come; an epoch's first bag is prepared while the epoch before it ends."""
        ranks = {"rank": self.strategy.rank, "world_size": self.strategy.world_size}
        start, first = self.progress.epoch, self.progress.update
        epochs = (
            self.loader.epoch(epoch, first=first if epoch == start else 0, **ranks)
            for epoch in range(start, self.schedule.epochs)
        )
        return prefetch(chain.from_iterable(epochs), self.strategy.device, self._waiting)

    def _train_epoch(self, bags: Iterator[tuple[Bag, int]]) -> None:
        self.model.train()
        num_updates = self.loader.updates()
        self._started, self._patches, self._waiting.seconds = time.monotonic(), 0, 0.0
        self._updates = 0
        previous: _Step | None = None
        for bag, num_bags in islice(bags, num_updates - self.progress.update):
            step = self._update(bag, num_bags, num_updates)
            self._report_step(previous)
            previous = step
            if self._is_stopping:
                break
            progress, every = self.progress, self.schedule.save_every
            if every and progress.step % every == 0 and progress.update < num_updates:
                self._report_step(previous)
                previous = None
                self._save("last")
        self._report_step(previous)
        self.screen.pause()
        if self._is_stopping:  # on every rank, after the same update
            self._save("last")
            raise KeyboardInterrupt

    def _update(self, bag: Bag, num_bags: int, num_updates: int) -> _Step:
        """Start one optimiser step on ``num_bags`` bags over all ranks, in an epoch of ``num_updates``."""
        strategy, progress = self.strategy, self.progress
        lr = self._set_learning_rate(num_updates)
        losses = bag_losses(
            strategy, bag, self.task, progress.step / (self.schedule.epochs * num_updates)
        )
        loss = losses.sum() / num_bags
        strategy.backward(loss)
        norm, good = strategy.step()
        self.model.after_step(strategy, good)
        if self.average is not None:
            self.average.update(strategy.shards(), progress.step, good)
        num_patches = sum(chunk.stop - chunk.start for chunk in bag.chunks if chunk.counts)
        numbers = loss.new_tensor([num_patches, stop_requested()], dtype=torch.float64)
        sums = torch.cat([loss.detach().double().view(1), numbers])
        strategy.all_reduce_sum(sums)
        progress.update += 1
        progress.step += 1
        metrics = torch.cat([sums, norm.view(1), good.view(1), losses.detach()])
        return _Step(
            number=progress.step,
            epoch=progress.epoch,
            lr=lr,
            slides=bag.slides,
            metrics=to_host(metrics),
        )

    def _report_step(self, step: _Step | None) -> None:
        """Read the metrics of a step, show and log them, and report a bad one."""
        if step is None:
            return
        loss, num_patches, num_stopping, norm, good, *losses = step.metrics()
        self._is_stopping = num_stopping > 0
        self._patches += num_patches
        seconds = max(1e-9, time.monotonic() - self._started)
        rate, waiting = self._patches / seconds, self._waiting.seconds / seconds
        self._updates += 1
        if self._updates == TIMED_UPDATES and not self._is_timed:
            self._is_timed = True
            epoch = clock(seconds / TIMED_UPDATES * self.loader.updates())
            self.screen.say(f"an epoch of {self.loader.updates():,} updates takes about {epoch}")
        if good:
            self.progress.loss_sum += loss
            self.progress.losses += 1
        else:
            self._report_bad_step(step, losses, norm)
        self.screen.step(
            step.number,
            self.schedule.epochs * self.loader.updates(),
            f"epoch {step.epoch + 1}/{self.schedule.epochs}  loss {loss:.4f}  lr {step.lr:.2e}  "
            f"{rate:,.0f} patches/s"
            + (f"  waiting {waiting:.0%}" if waiting > NOTABLE_WAITING else ""),
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

    def _report_bad_step(self, step: _Step, losses: list[float], norm: float) -> None:
        """Name the slides; every rank comes here for the same step. UserError after too many."""
        bad_slides = [s for s, v in zip(step.slides, losses, strict=True) if not math.isfinite(v)]
        bad_slides = list(chain.from_iterable(self.strategy.gather_objects(bad_slides)))
        slides = list(chain.from_iterable(self.strategy.gather_objects(step.slides)))
        cause = "loss not finite" if bad_slides else f"gradient norm {norm}, every loss finite"
        names = format_list(sorted(set(bad_slides or slides)))
        message = f"step {step.number} skipped: {cause}\n{names}"
        self.progress.bad_steps += 1
        if self.progress.bad_steps < self.schedule.max_bad_steps:
            self.screen.say(message)
            return
        raise UserError(
            f"training diverged: {self.progress.bad_steps} skipped steps (engine.max_bad_steps), the last:\n"
            f"{message}\n  Lower optim.lr, set optim.clip, or check these slides; then train from the start."
        )

    def _set_learning_rate(self, num_updates: int) -> float:
        lr = learning_rate(
            self.progress.step,
            peak=self.schedule.lr,
            warmup=round(self.schedule.warmup_epochs * num_updates),
            steps=self.schedule.epochs * num_updates,
            schedule=self.schedule.schedule,
        )
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def _validate(self) -> None:
        """Evaluate weights and their average on the validation split; save the best epoch."""
        self._check_finite()
        metrics = {}
        for name, shards in self._weight_sets().items():
            with self.strategy.full_parameters(shards):
                values = self.validate(self.model)
            if values is None:
                raise self._diverged("predictions")
            metrics[name] = values
        progress, best = self.progress, self.progress.best
        selection_key = self.task.selection_key(metrics[self.schedule.selected_weights])
        # While the metric is undefined nothing selects an epoch, so the last one is kept.
        if best is None or best[0] == -math.inf or selection_key > best:
            progress.best, progress.best_epoch, progress.stale = selection_key, progress.epoch, 0
            self._save("best")
        else:
            progress.stale += 1
        loss = progress.loss_sum / progress.losses if progress.losses else None  # all were bad
        monitor, mark = self.task.monitor, "" if progress.stale else "  best so far"
        shown = "  ".join(f"{k} {_format_metric(v[monitor])}" for k, v in metrics.items())
        epoch = f"epoch {progress.epoch + 1:3d}  loss {_format_metric(loss, 4)}"
        self.screen.say(f"{epoch}  val {monitor}: {shown}{mark}")
        if self.strategy.is_leader:
            self.log.write(step=progress.step, epoch=progress.epoch, train_loss=loss, val=metrics)

    def _should_score(self, epoch: int) -> bool:
        return self.score_patches is not None and epoch % self.schedule.rescore == 0

    def _update_patch_scores(self) -> None:
        """Score the patches by the selected weights, store the scores and draw by them from here on."""
        assert self.score_patches is not None
        shards = self._weight_sets()[self.schedule.selected_weights]
        with self.strategy.full_parameters(shards):
            scores = self.score_patches(self.model)
        bad_slides = [slide for slide, s in sorted(scores.items()) if not s.isfinite().all()]
        if bad_slides:
            raise UserError(
                f"patches cannot be drawn by scores that are not finite\n{format_list(bad_slides)}"
            )
        if self.strategy.is_leader:
            write_atomically(self._scores_path(self.progress.epoch), safetensors.torch.save(scores))
            # The one before it stays: a run that is stopped before its checkpoint still needs it.
            self._scores_path(self.progress.epoch - 2 * self.schedule.rescore).unlink(
                missing_ok=True
            )
        self._draw_by(scores)

    def _load_patch_scores(self) -> None:
        """Load the scores that the stopped run drew by."""
        scored_epoch = self.progress.epoch // self.schedule.rescore * self.schedule.rescore
        if self.score_patches is None or not scored_epoch or self.progress.finished:
            return
        path = self._scores_path(scored_epoch)
        if not path.is_file():
            raise UserError(
                f"cannot resume without {path}, which holds the scores that patches were drawn by\n"
                "  Train from the start."
            )
        self._draw_by(safetensors.torch.load_file(path))

    def _scores_path(self, epoch: int) -> Path:
        return self.folder / f"patch_scores_{epoch}.safetensors"

    def _draw_by(self, scores: Tensors) -> None:
        spec = replace(self.loader.spec, scores={k: v.numpy() for k, v in scores.items()})
        self.loader = replace(self.loader, spec=spec)

    def _check_finite(self) -> None:
        """UserError, on all ranks, if the last step made weights that are not finite."""
        values = [v for v in self.strategy.shards().values() if v.is_floating_point()]
        num_bad = torch.stack([~value.isfinite().all() for value in values]).sum().double()
        self.strategy.all_reduce_sum(num_bad)
        if num_bad:
            raise self._diverged("weights")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"training diverged: {what} are not finite after epoch {self.progress.epoch + 1}\n"
            "  Lower optim.lr or set optim.clip; then train from the start."
        )

    def _weight_sets(self) -> dict[str, Tensors | None]:
        """What is evaluated and saved: the model's own weights (None), and their average."""
        average = {} if self.average is None else {"ema": self.average.state}
        return {"model": None, **average}

    def _should_stop(self, epochs_done: int) -> bool:
        patience = self.schedule.patience
        if patience is None or epochs_done < self.schedule.min_epochs:
            return False
        return self.progress.stale >= patience

    def _save(self, name: str) -> None:
        """Write a checkpoint; every rank contributes its shards, the leader writes."""
        tensors: Tensors = {}
        for kind, shards in self._weight_sets().items():
            shards = self.strategy.shards() if shards is None else shards
            tensors |= add_prefix(kind, self.strategy.full_tensors(shards))
        if name == "last":
            tensors |= add_prefix("optimizer", self.strategy.optimizer_tensors())
        if self.strategy.is_leader:
            save_checkpoint(self.folder / f"{name}.safetensors", tensors, asdict(self.progress))


def _format_metric(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
