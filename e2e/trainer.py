"""The loop: updates, validation, the best epoch, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from e2e.bag import Bag
from e2e.checkpoint import (
    Tensors,
    check_weights,
    load_checkpoint,
    part,
    prefixed,
    save_checkpoint,
)
from e2e.data.loader import TrainingLoader
from e2e.data.stream import Waiting, ahead
from e2e.errors import UserError, listing
from e2e.files import write_atomically
from e2e.heads.base import BagLoss, Head, HeadOutput
from e2e.log import MetricsLog, Screen
from e2e.losses.base import Regulariser
from e2e.model import MILModel, pad_coords
from e2e.optim import WeightAverage, build_optimizer, learning_rate
from e2e.parallel import Strategy
from e2e.tasks.base import Task

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
    """The :meth:`e2e.tasks.base.Task.merit` of the best validation."""
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
    judged: str
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
        self.average = WeightAverage(strategy.shards(), schedule.ema) if schedule.ema else None
        self._waiting = Waiting()

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
            weights = part("model", tensors)
            check_weights(self.strategy.shapes, weights, path)
            self.strategy.load(weights)
            self.strategy.load_optimizer(part("optimizer", tensors))
            if self.average is not None:
                self.average.state = self.strategy.scatter(part("ema", tensors))
        if self.strategy.leads:
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
        return ahead(chain.from_iterable(epochs), self.strategy.device, self._waiting)

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
        self.model.batch_norm.commit(strategy.sum, good)
        for module in (self.model.head, *self.model.regularisers):
            module.after_step(good)  # pyright: ignore[reportCallIssue]
        if self.average is not None:
            self.average.update(strategy.shards(), progress.step, good)
        rows = sum(chunk.stop - chunk.start for chunk in bag.chunks if chunk.counts)
        told = torch.stack([loss.detach().double(), loss.new_tensor(rows, dtype=torch.float64)])
        strategy.sum(told)
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
        if self.strategy.leads:
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
        found = [s for part in self.strategy.gather(guilty) for s in part]
        every = [s for part in self.strategy.gather(step.slides) for s in part]
        whose = "loss not finite" if found else f"gradient norm {norm}, every loss finite"
        said = f"step {step.number} skipped: {whose}\n{listing(sorted(set(found or every)))}"
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
            with self.strategy.whole_parameters(shards):
                found[name] = self.validate(self.model)
        progress = self.progress
        judged = self.task.merit(found[self.schedule.judged])
        if progress.best is None or judged > progress.best:
            progress.best, progress.best_epoch, progress.stale = judged, progress.epoch, 0
            self._save("best")
        else:
            progress.stale += 1
        loss = progress.loss_sum / progress.losses if progress.losses else None  # all were bad
        shown = "  ".join(f"{k} {_text(v[self.task.monitor])}" for k, v in found.items())
        mark = "  *" if progress.stale == 0 else ""
        self.screen.say(
            f"epoch {progress.epoch + 1:3d}  loss {_text(loss, 4)}  val {self.task.monitor}: {shown}{mark}"
        )
        if self.strategy.leads:
            self.log.write(step=progress.step, epoch=progress.epoch, train_loss=loss, val=found)

    def _wants_scores(self, epoch: int) -> bool:
        return self.score_patches is not None and epoch % self.schedule.rescore == 0

    def _score(self) -> None:
        """What the patches are worth from here on, by the weights that are judged; stored."""
        assert self.score_patches is not None
        with self.strategy.whole_parameters(self._weights()[self.schedule.judged]):
            found = self.score_patches(self.model)
        wrong = [slide for slide, scores in sorted(found.items()) if not scores.isfinite().all()]
        if wrong:
            raise UserError(
                f"patches cannot be drawn by scores that are not finite\n{listing(wrong)}"
            )
        if self.strategy.leads:
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
        view = replace(self.loader.view, scores={k: v.numpy() for k, v in scores.items()})
        self.loader = replace(self.loader, view=view)

    def _check_finite(self) -> None:
        """UserError, on all ranks, when the last step made weights that are not finite."""
        values = [v for v in self.strategy.shards().values() if v.is_floating_point()]
        bad = torch.stack([~value.isfinite().all() for value in values]).sum().double()
        self.strategy.sum(bad)
        if bad:
            raise UserError(
                f"training diverged: weights are not finite after epoch {self.progress.epoch + 1}\n"
                "  lower optim.lr or set optim.clip, and start anew"
            )

    def _weights(self) -> dict[str, Tensors | None]:
        """What is judged and saved: the model's own weights (None), and their average."""
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
            whole = self.strategy.whole(self.strategy.shards() if shards is None else shards)
            tensors |= prefixed(kind, whole)
        if name == "last":
            tensors |= prefixed("optimizer", self.strategy.optimizer_tensors())
        if self.strategy.leads:
            save_checkpoint(self.folder / f"{name}.safetensors", tensors, asdict(self.progress))


def bag_losses(strategy: Strategy, bag: Bag, task: Task, progress: float = 0.0) -> Tensor:
    """(B,) weighted loss of each of this rank's bags: task, head and regularisers together.

    Of a task that compares the bags of an update (``whole_update``) each bag has an equal part.

    The gradient of the sum over bags and ranks, over the number of bags on all ranks, is the
    update's: a mean of ranks' means would be wrong on ragged batches. ``progress`` is the share of
    the training that is done, by which regularisers are weighted.
    """
    outputs = strategy.module(bag, strategy.device, strategy)
    target, weight = bag.target.to(strategy.device), bag.weight.to(strategy.device)
    logits = torch.cat([output.logits for output in outputs])
    ends = list(accumulate(len(output.logits) for output in outputs))
    single = _no_single_bags if task.whole_update else task.loss
    extra = [
        _extra(strategy.model, output, target[start:stop], single, bag.coords[start:stop], progress)
        for output, start, stop in zip(outputs, [0, *ends], ends, strict=False)
    ]
    with torch.no_grad():
        head: Head = strategy.model.head  # pyright: ignore[reportAssignmentType]
        head.remember(outputs, target, partial(_rows_of_update, strategy, bag))
    if task.whole_update:
        return _part_of_update(strategy, bag, logits, task) + torch.cat(extra) * weight
    return (task.loss(logits, target) + torch.cat(extra)) * weight


def check_losses(model: MILModel, task: Task, target: Tensor, device: torch.device) -> None:
    """UserError where the head's own loss, or a regulariser, cannot take what the task makes of a label.

    On two patches of zeros and before any step, so that nobody waits for the first to be told.
    """
    single = _no_single_bags if task.whole_update else task.loss
    places = torch.tensor([[0, 0], [256, 0]], device=device)
    features = torch.zeros(1, 2, model.encoder.dim, device=device)
    with torch.no_grad(), torch.random.fork_rng([]):
        output = model.head.train()(features, features[..., 0] == 0, places[None])
        _extra(model, output, target[None].to(device), single, [places], 0.0)


def _part_of_update(strategy: Strategy, bag: Bag, logits: Tensor, task: Task) -> Tensor:
    """(B,) equal parts of this rank's 1/world_size of a loss that sees all bags of the update.

    Every rank gathers the logits of all, has the same loss of them, and sends to its own rows their
    gradient of it (:meth:`Strategy.gather_rows`). A bag that several ranks have, each with its share
    of the weight, is one again before the loss; one of weight 0 is none. The ranks tell each other
    which bags they have: the host waits for that once an update.
    """
    told = strategy.gather((bag.seeds, bag.weight, bag.target))
    rows = strategy.gather_rows(logits.float(), [len(seeds) for seeds, _, _ in told])
    keys = [seed for seeds, _, _ in told for seed in seeds]
    bags = list(dict.fromkeys(keys))
    merge = torch.zeros(len(bags), len(keys))
    merge[[bags.index(key) for key in keys], range(len(keys))] = torch.cat([w for _, w, _ in told])
    target = torch.cat([t for _, _, t in told])[[keys.index(key) for key in bags]]
    losses = task.loss(merge.to(rows.device) @ rows, target.to(rows.device))
    return (losses.sum() / (strategy.world_size * len(bag))).expand(len(bag))


def _rows_of_update(strategy: Strategy, bag: Bag, rows: Sequence[Tensor]) -> list[Tensor]:
    """See :data:`e2e.heads.base.OfUpdate`: each bag once, in the order of the seeds."""
    told = strategy.gather((bag.seeds, bag.weight, [part.cpu() for part in rows]))
    found = {
        seed: [part[number] for part in parts]
        for seeds, weights, parts in told
        for number, seed in enumerate(seeds)
        if weights[number] > 0
    }
    ordered = zip(*(found[seed] for seed in sorted(found)), strict=True)
    return [torch.stack(part).to(strategy.device) for part in ordered]


def _no_single_bags(logits: Tensor, target: Tensor) -> Tensor:
    raise UserError(
        "the head's own loss takes the task's loss of single bags, and this task's compares all bags "
        "of an update\n  give that part of the head the weight 0 where it has one "
        "(head.aux_weight), or choose another head or task.loss"
    )


def _extra(
    model: nn.Module,
    output: HeadOutput,
    target: Tensor,
    loss: BagLoss,
    places: Sequence[Tensor | None],
    progress: float,
) -> Tensor:
    """(B,) what head and regularisers add to the loss of the B bags of ``output``."""
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    zero = output.logits.new_zeros(len(output.logits), dtype=torch.float32)
    own = head.aux_loss(output, target, loss)
    added = zero if own is None else zero + own
    regularisers: Iterable[Regulariser] = model.regularisers  # pyright: ignore[reportAssignmentType]
    coords = pad_coords(places, zero.device) if model.regularisers else None
    for regulariser in regularisers:
        added = added + regulariser.weight.at(progress) * regulariser(output, target, coords)
    return added


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
