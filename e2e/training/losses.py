"""The loss of an update: task, head and regularisers, over all ranks."""

from __future__ import annotations

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
    """(B,) weighted loss of each of this rank's bags: task, head and regularisers together.

    Of a task that compares the bags of an update (``loss_couples_bags``) each bag has an equal part.

    The gradient of the sum over bags and ranks, over the number of bags on all ranks, is the
    update's: a mean of ranks' means would be wrong on ragged batches. ``progress`` is the share of
    the training that is done, by which regularisers are weighted.
    """
    outputs = strategy.module(bag, strategy.device, strategy)
    target, weight = bag.target.to(strategy.device), bag.weight.to(strategy.device)
    logits = torch.cat([output.logits for output in outputs])
    ends = list(accumulate(len(output.logits) for output in outputs))
    single = _no_single_bags if task.loss_couples_bags else task.loss
    extra = [
        _extra(strategy.model, output, target[start:stop], single, bag.coords[start:stop], progress)
        for output, start, stop in zip(outputs, [0, *ends], ends, strict=False)
    ]
    with torch.no_grad():
        head: Head = strategy.model.head  # pyright: ignore[reportAssignmentType]
        head.record_bags(outputs, target, partial(_rows_of_update, strategy, bag))
    if task.loss_couples_bags:
        return _part_of_update(strategy, bag, logits, task) + torch.cat(extra) * weight
    return (task.loss(logits, target) + torch.cat(extra)) * weight


def check_losses(model: MILModel, task: Task, target: Tensor, device: torch.device) -> None:
    """UserError where the head's own loss, or a regulariser, cannot take what the task makes of a label.

    On two patches of zeros and before any step, so that nobody waits for the first to be told.
    """
    single = _no_single_bags if task.loss_couples_bags else task.loss
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
    told = strategy.gather_objects((bag.seeds, bag.weight, bag.target))
    rows = strategy.gather_rows(logits.float(), [len(seeds) for seeds, _, _ in told])
    keys = [seed for seeds, _, _ in told for seed in seeds]
    bags = list(dict.fromkeys(keys))
    merge = torch.zeros(len(bags), len(keys))
    merge[[bags.index(key) for key in keys], range(len(keys))] = torch.cat([w for _, w, _ in told])
    target = torch.cat([t for _, _, t in told])[[keys.index(key) for key in bags]]
    losses = task.loss(merge.to(rows.device) @ rows, target.to(rows.device))
    return (losses.sum() / (strategy.world_size * len(bag))).expand(len(bag))


def _rows_of_update(strategy: Strategy, bag: Bag, rows: Sequence[Tensor]) -> list[Tensor]:
    """See :data:`e2e.heads.base.GatherBags`: each bag once, in the order of the seeds."""
    told = strategy.gather_objects((bag.seeds, bag.weight, [part.cpu() for part in rows]))
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
