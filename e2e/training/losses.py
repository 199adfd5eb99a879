"""The loss of an update, over all ranks: task, head and regularisers; and what heads remember of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from e2e.bags.bag import Bag
from e2e.engine.model import MILModel, pad_coords
from e2e.errors import UserError
from e2e.heads.base import BagLoss, Head, HeadOutput
from e2e.losses.base import Regulariser
from e2e.parallel import Strategy
from e2e.tasks.base import Task


def bag_losses(strategy: Strategy, bag: Bag, task: Task, progress: float = 0.0) -> Tensor:
    """Return the weighted loss of each of this rank's bags: task, head and regularisers together.

    The gradient of the sum over bags and ranks, divided by the number of bags on all ranks, is that of
    the update; a mean of the ranks' means would be wrong on ragged batches. For a task that compares the
    bags of an update (``loss_couples_bags``) each bag has an equal part. The head is also shown the outputs
    (:meth:`e2e.heads.base.Head.record_bags`).

    Parameters
    ----------
    strategy
        That of the training; its model is called on the bag.
    bag
        This rank's bags of the update.
    task
        Gives the loss of the logits.
    progress
        Fraction of the training that is done, 0 to 1, which regularisers are weighted by.

    Returns
    -------
    Tensor
        (B,).
    """
    outputs = strategy.module(bag, strategy.device, strategy)
    target, weight = bag.target.to(strategy.device), bag.weight.to(strategy.device)
    logits = torch.cat([output.logits for output in outputs])
    ends = list(accumulate(len(output.logits) for output in outputs))
    loss_of_bag = _no_loss_of_single_bags if task.loss_couples_bags else task.loss
    extra = [
        _extra_losses(
            strategy.model,
            output,
            target[start:stop],
            loss_of_bag,
            bag.coords[start:stop],
            bag.sides[start:stop],
            progress,
        )
        for output, start, stop in zip(outputs, [0, *ends], ends, strict=False)
    ]
    with torch.no_grad():
        head: Head = strategy.model.head  # pyright: ignore[reportAssignmentType]
        head.record_bags(outputs, target, partial(_gather_update, strategy, bag))
    if task.loss_couples_bags:
        return _parts_of_update_loss(strategy, bag, logits, task) + torch.cat(extra) * weight
    return (task.loss(logits, target) + torch.cat(extra)) * weight


def check_losses(model: MILModel, task: Task, target: Tensor, device: torch.device) -> None:
    """Check that the head's own loss and the regularisers work with the task's targets.

    It is computed on two patches of zeros, so that a mistake shows up before the first step.

    Parameters
    ----------
    model
        Its head is put into training mode.
    task
        Gives the loss of the logits.
    target
        The target of one bag, as the task makes it of a label.
    device
        That of the model.

    Raises
    ------
    UserError
        A loss does not accept the target.
    """
    loss_of_bag = _no_loss_of_single_bags if task.loss_couples_bags else task.loss
    coords = torch.tensor([[0, 0], [256, 0]], device=device)
    features = torch.zeros(1, 2, model.encoder.dim, device=device)
    with torch.no_grad(), torch.random.fork_rng([]):
        output = model.head.train()(features, features[..., 0] == 0, coords[None])
        _extra_losses(model, output, target[None].to(device), loss_of_bag, [coords], [256.0], 0.0)


def _parts_of_update_loss(strategy: Strategy, bag: Bag, logits: Tensor, task: Task) -> Tensor:
    """Return (B,) equal parts of this rank's 1/world_size of a loss that sees all bags of the update.

    Every rank gathers the logits of all, computes the same loss of them, and sends their gradient to
    its own rows (:meth:`Strategy.gather_rows`). A bag that several ranks have, each with its fraction
    of the weight, is merged before the loss; one of weight 0 does not count. Ranks exchange which bags
    they have, which the host waits for once per update.
    """
    bags_of_ranks = strategy.gather_objects((bag.seeds, bag.weight, bag.target))
    rows = strategy.gather_rows(logits.float(), [len(seeds) for seeds, _, _ in bags_of_ranks])
    row_seeds = [seed for seeds, _, _ in bags_of_ranks for seed in seeds]
    bag_seeds = list(dict.fromkeys(row_seeds))
    merge = torch.zeros(len(bag_seeds), len(row_seeds))
    weights = torch.cat([rank_weights for _, rank_weights, _ in bags_of_ranks])
    merge[[bag_seeds.index(seed) for seed in row_seeds], range(len(row_seeds))] = weights
    targets = torch.cat([rank_targets for _, _, rank_targets in bags_of_ranks])
    target = targets[[row_seeds.index(seed) for seed in bag_seeds]]
    losses = task.loss(merge.to(rows.device) @ rows, target.to(rows.device))
    return (losses.sum() / (strategy.world_size * len(bag))).expand(len(bag))


def _gather_update(strategy: Strategy, bag: Bag, rows: Sequence[Tensor]) -> list[Tensor]:
    """See :data:`e2e.heads.base.GatherBags`: each bag once, in the order of the seeds."""
    rows_of_ranks = strategy.gather_objects((bag.seeds, bag.weight, [part.cpu() for part in rows]))
    rows_of_bag = {
        seed: [part[number] for part in parts]
        for seeds, weights, parts in rows_of_ranks
        for number, seed in enumerate(seeds)
        if weights[number] > 0
    }
    columns = zip(*(rows_of_bag[seed] for seed in sorted(rows_of_bag)), strict=True)
    return [torch.stack(column).to(strategy.device) for column in columns]


def _no_loss_of_single_bags(logits: Tensor, target: Tensor) -> Tensor:
    raise UserError(
        "the head's own loss needs the task's loss of single bags, but this task's loss compares all bags "
        "of an update\n  Set head.aux_weight=0 where the head has it, or choose another head or task.loss."
    )


def _extra_losses(
    model: nn.Module,
    output: HeadOutput,
    target: Tensor,
    loss_of_bag: BagLoss,
    bag_coords: Sequence[Tensor | None],
    bag_sides: Sequence[float],
    progress: float,
) -> Tensor:
    """Return (B,) what head and regularisers add to the loss of the B bags of ``output``."""
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    zero = output.logits.new_zeros(len(output.logits), dtype=torch.float32)
    head_loss = head.aux_loss(output, target, loss_of_bag)
    extra = zero if head_loss is None else zero + head_loss
    regularisers: Iterable[Regulariser] = model.regularisers  # pyright: ignore[reportAssignmentType]
    coords = pad_coords(bag_coords, zero.device) if model.regularisers else None
    sides = torch.tensor(
        bag_sides or [math.nan] * len(zero), dtype=torch.float64, device=zero.device
    )
    for regulariser in regularisers:
        loss = regulariser(output, target, coords, sides)
        extra = extra + regulariser.weight.at(progress) * loss
    return extra
