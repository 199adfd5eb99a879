"""The loop: which epoch is kept, when it stops, what a bad step does."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import Head, HeadOutput
from e2e.log import MetricsLog, Screen
from e2e.signals import handle_signals
from e2e.training.checkpoint import load_checkpoint, select_prefix
from e2e.training.losses import bag_losses
from e2e.training.trainer import Trainer
from tests.helpers.models import make_bag
from tests.helpers.training import TwoUpdates, both, trainer


def test_the_best_validation_is_kept_and_the_tie_break_decides_among_equals(tmp_path):
    progress = trainer(tmp_path, both((0.7, 0.6), (1.0, 0.5), (1.0, 0.3), (0.9, 0.1))).fit()
    assert progress.best_epoch == 2
    tensors, state = load_checkpoint(tmp_path / "best.safetensors")
    assert state["epoch"] == 2
    last, _ = load_checkpoint(tmp_path / "last.safetensors")
    moved = (
        select_prefix("ema", tensors)["head.classify.weight"]
        - select_prefix("ema", last)["head.classify.weight"]
    )
    assert moved.abs().sum() > 0


def test_the_last_epoch_is_kept_while_the_metric_is_undefined(tmp_path):
    progress = trainer(tmp_path, both((None, 0.5), (None, 0.4), (None, 0.6))).fit()
    assert progress.best_epoch == 2
    progress = trainer(tmp_path / "b", both((None, 0.5), (0.2, 0.4), (None, 0.6))).fit()
    assert progress.best_epoch == 1


def test_predictions_that_are_not_finite_are_divergence(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.6, 1.0)))
    answers = iter([{"auc": 0.5, "log_loss": 1.0}] * 2 + [None])
    run.validate = lambda model: next(answers)
    message = "training diverged: predictions are not finite after epoch 2\n  Lower optim.lr"
    with pytest.raises(UserError, match=message):
        run.fit()


def test_the_selected_weights_decide_which_epoch_is_best(tmp_path):
    scores = [{"model": (0.9, 1.0), "ema": (0.1, 1.0)}, {"model": (0.2, 1.0), "ema": (0.8, 1.0)}]
    assert trainer(tmp_path, scores, selected_weights="ema").fit().best_epoch == 1
    assert trainer(tmp_path, scores, selected_weights="model").fit().best_epoch == 0


def test_training_stops_when_validation_no_longer_improves(tmp_path):
    falling = both(*[(1.0 - k / 10, 1.0) for k in range(9)])
    assert trainer(tmp_path, falling, patience=2).fit().epoch == 3
    assert trainer(tmp_path, falling, patience=2, min_epochs=6).fit().epoch == 6
    assert trainer(tmp_path, falling, patience=None).fit().epoch == 9


def test_the_next_epochs_first_bag_is_started_before_validation(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.6, 1.0)))
    made, epoch, validate = [], run.loader.epoch, run.validate

    def bags(number: int, **where):
        for update, found in enumerate(epoch(number, **where)):
            made.append(f"bag {number}.{update}")
            yield found

    def judge(model: MILModel):
        made.append("validation")
        return validate(model)

    run.loader.epoch, run.validate = bags, judge  # type: ignore[method-assign]
    run.fit()
    assert (
        made
        == ["bag 0.0", "bag 0.1", "bag 1.0", *["validation"] * 2, "bag 1.1"] + ["validation"] * 2
    )


@pytest.fixture
def signals_handled():
    """As inside a command, in a process whose Ctrl-C is not ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with handle_signals():
        yield
    signal.signal(signal.SIGINT, before)


SCORES = both((0.5, 1.0), (0.6, 1.0), (0.7, 1.0))


@pytest.mark.parametrize("moment", ["bag 0.0", "bag 0.1", "bag 1.0", "bag 1.1", "validation 2"])
def test_a_signal_ends_training_after_a_whole_update_and_resuming_changes_nothing(
    tmp_path, signals_handled, moment
):
    complete = trainer(tmp_path / "complete", SCORES)
    complete.fit()
    run = trainer(tmp_path / "run", SCORES)
    epoch, validate, validations = run.loader.epoch, run.validate, []

    def bags(number: int, **where):
        for update, bag in enumerate(epoch(number, **where)):
            if moment == f"bag {number}.{update}":
                signal.raise_signal(signal.SIGTERM)
            yield bag

    def validate_and_signal(model: MILModel):
        validations.append(model)
        if moment == f"validation {len(validations)}":
            signal.raise_signal(signal.SIGTERM)
        return validate(model)

    run.loader.epoch, run.validate = bags, validate_and_signal  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    _, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert 0 < state["step"] < 6
    resumed = trainer(tmp_path / "run", SCORES[state["epoch"] :], epochs=len(SCORES))
    resumed.resume()
    assert resumed.progress.step == state["step"]
    assert resumed.fit().step == complete.progress.step
    for name, value in complete.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_validation_is_made_on_schedule_and_after_the_last_epoch(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.6, 1.0)), epochs=5, validate_every=4)
    assert run.fit().best_epoch == 4


def test_an_undefined_metric_is_worse_than_any_other(tmp_path):
    nothing = {"model": (0.0, 1.0), "ema": (None, 1.0)}
    run = trainer(tmp_path, [nothing, *both((0.1, 1.0)), nothing])  # type: ignore[list-item]
    assert run.fit().best_epoch == 1


def test_a_bad_step_is_skipped_and_counted_and_its_slide_is_named(tmp_path, capsys):
    run = trainer(tmp_path, both((0.5, 1.0)), poisoned={(0, 1)}, screen=Screen(is_leader=True))
    progress = run.fit()
    assert (progress.step, progress.bad_steps) == (2, 1)
    alone = trainer(tmp_path, both((0.5, 1.0)), one_update=True)
    alone.fit()
    for name, value in alone.model.state_dict().items():  # BatchNorm statistics too
        assert torch.equal(run.model.state_dict()[name], value), name
    for name, value in alone.average.state.items():
        assert torch.equal(run.average.state[name], value), name
    said = capsys.readouterr().out
    assert "step 2 skipped: loss not finite\n  s1\n" in said


def test_too_many_bad_steps_stop_the_run_and_spare_the_checkpoint(tmp_path):
    poisoned = {(1, 0), (1, 1)}
    run = trainer(tmp_path, both((0.5, 1.0), (0.5, 1.0)), poisoned=poisoned, max_bad_steps=2)
    with pytest.raises(
        UserError, match=r"2 skipped steps .*\n.*step 4 skipped.*\n  s1\n.*Lower optim.lr"
    ):
        run.fit()
    tensors, state = load_checkpoint(tmp_path / "last.safetensors")
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in tensors.values())
    model = select_prefix("model", tensors)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, model[name]), name


def test_the_log_says_which_steps_were_skipped_in_numbers_that_are_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    trainer(tmp_path, both((0.5, 1.0)), poisoned={(0, 0)}, log=log).fit()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line, parse_constant=refuse) for line in lines][:2]
    assert [(step["step"], step["skipped"]) for step in steps] == [(1, True), (2, False)]
    assert steps[0]["loss"] is None
    assert steps[1]["loss"] > 0


def test_an_epoch_whose_steps_were_all_skipped_has_no_loss_rather_than_0(tmp_path, capsys):
    log, screen = MetricsLog(tmp_path / "metrics.jsonl"), Screen(is_leader=True)
    poisoned = {(0, 0), (0, 1)}
    trainer(tmp_path, both((0.5, 1.0)), poisoned=poisoned, log=log, screen=screen).fit()
    assert "epoch   1  loss undefined  val auc" in capsys.readouterr().out
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] is None


def test_the_learning_rate_reaches_zero_at_the_last_step(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0), (0.5, 1.0)))
    run.fit()
    assert all(group["lr"] == 0 for group in run.strategy.optimizer.param_groups)


def test_resuming_restores_optimiser_average_and_counters(tmp_path):
    whole = trainer(tmp_path / "a", both(*[(0.5, 1.0)] * 4))
    (tmp_path / "a").mkdir()
    whole.fit()
    (tmp_path / "b").mkdir()
    broken = trainer(tmp_path / "b", both(*[(0.5, 1.0)] * 4), poisoned={(2, 0)}, max_bad_steps=1)
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


class Taught(Head):
    """Learns to agree with its own moving average, the teacher."""

    teachers = MappingProxyType({"teacher": "student"})
    teacher_decay = 0.5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.student = nn.Linear(6, 2).double()
        self.teacher = nn.Linear(6, 2).double().requires_grad_(False)

    def forward(self, features, mask, coords=None) -> HeadOutput:
        with torch.no_grad():
            target = self.teacher(features.mean(1))
        return HeadOutput(self.student(features.mean(1)), aux={"target": target})

    def aux_loss(self, output, target, loss) -> torch.Tensor:
        return (output.logits - output.aux["target"]).square().mean()


def test_a_teacher_is_trained_along_saved_with_the_run_and_resumed(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    scores = both(*[(0.5, 1.0)] * 4)
    run = trainer(folders[0], scores, head=Taught())
    start = run.model.head.teacher.weight.clone()
    run.fit()
    broken = trainer(folders[1], scores, head=Taught(), poisoned={(2, 0)}, max_bad_steps=1)
    with pytest.raises(UserError):
        broken.fit()
    weights = select_prefix("model", load_checkpoint(folders[1] / "last.safetensors")[0])
    assert (weights["head.teacher.weight"] - start).norm() > 1e-4
    resumed = trainer(folders[1], scores, head=Taught())
    resumed.resume()
    assert torch.equal(resumed.model.head.teacher.weight, weights["head.teacher.weight"])
    resumed.fit()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_every_group_follows_the_schedule_at_its_own_share(tmp_path):
    runs = both((0.5, 0.5))
    training = trainer(tmp_path, runs, lr=1e-2, encoder_lr=1e-3, warmup_epochs=1)
    training.fit()  # two steps of warm-up: half the peak, then the peak
    encoder = {id(p) for p in training.model.encoder.parameters()}
    rates = {
        id(p) in encoder: g["lr"]
        for g in training.strategy.optimizer.param_groups
        for p in g["params"]
    }
    assert rates == {True: pytest.approx(1e-3), False: pytest.approx(1e-2)}
    assert training._set_learning_rate(2) == pytest.approx(1e-2)
    training.progress.step = 0
    training._set_learning_rate(2)
    rates = {
        id(p) in encoder: g["lr"]
        for g in training.strategy.optimizer.param_groups
        for p in g["params"]
    }
    assert rates == {True: pytest.approx(5e-4), False: pytest.approx(5e-3)}


def test_weights_that_a_last_step_blew_up_end_the_run_before_validation(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0)))
    run._train_epoch(run._bags())
    with torch.no_grad():
        run.model.encoder.net[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="weights are not finite after epoch 1"):
        run._validate()
    assert not (tmp_path / "best.safetensors").exists()


def test_the_loss_is_the_sum_over_bags_over_their_number_on_all_ranks(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0)))
    run.model.train()
    losses = bag_losses(run.strategy, make_bag((5, 3)), run.task)
    assert losses.shape == (2,)
    step = run._update(make_bag((5, 3)), 4, num_updates=2)
    assert step.metrics()[0] == pytest.approx(float(losses.detach().sum()) / 4)
    assert step.metrics()[1] == 8  # patches


class Nosy(Head):
    """A head with a loss of its own, which notes whether each step was good."""

    def __init__(self) -> None:
        super().__init__()
        self.classify, self.good_steps = nn.Linear(6, 2).double(), []

    def forward(self, features, mask, coords=None) -> HeadOutput:
        return HeadOutput(self.classify(features.mean(1)))

    def aux_loss(self, output, target, loss) -> torch.Tensor:
        return output.logits.new_ones(()) * 100

    def after_step(self, good) -> None:
        self.good_steps.append(bool(good))


def test_a_heads_own_loss_is_weighed_as_its_bag_and_it_hears_of_bad_steps(tmp_path):
    run = trainer(tmp_path, both((0.5, 1.0)), poisoned={(0, 1)}, head=Nosy())
    run.model.train()
    losses = bag_losses(run.strategy, make_bag((5, 3), weight=[1.0, 0.0]), run.task)
    assert losses[0] > 100
    assert losses[1] == 0
    run.fit()
    assert run.model.head.good_steps == [True, False]


def scored_run(folder: Path, epochs: int, **schedule) -> tuple[Trainer, list[dict]]:
    """A run whose loader draws by scores; the epoch's first draw notes which ones it went by."""
    run = trainer(folder, both(*[(0.5, 1.0)] * epochs), rescore=2, **schedule)
    drawn: list[dict] = []

    @dataclass(frozen=True)
    class Loader:
        spec: BagSpec

        def updates(self) -> int:
            return 2

        def epoch(self, epoch: int, **where):
            drawn.append(dict(self.spec.scores))
            yield from TwoUpdates(set(), one_update=False).epoch(epoch, **where)

    run.loader = Loader(BagSpec(PixelRowReader(None)))  # type: ignore[arg-type,assignment]
    run.score_patches = lambda model: {"s": model.head.classify.weight.detach().sum().view(1)}
    return run, drawn


def test_patches_are_scored_on_schedule_and_a_stopped_run_goes_on_by_the_stored_scores(tmp_path):
    run, drawn = scored_run(tmp_path, 5)
    run.fit()
    assert drawn[:2] == [{}, {}]
    assert sorted(path.name for path in tmp_path.glob("patch_scores_*")) == [
        "patch_scores_2.safetensors",
        "patch_scores_4.safetensors",
    ]
    last = load_file(tmp_path / "patch_scores_4.safetensors")["s"]
    assert drawn[-1]["s"].tolist() == last.tolist()
    again, _ = scored_run(tmp_path, 5)
    (tmp_path / "patch_scores_4.safetensors").unlink()
    again.resume()  # it is finished: nothing more is drawn
    assert again.progress.finished
    other, _ = scored_run(tmp_path, 5)
    other.progress.epoch = 4
    with pytest.raises(UserError, match=r"cannot resume without .*patch_scores_4"):
        other._load_patch_scores()
    other.progress.epoch = 3
    other._load_patch_scores()
    assert list(other.loader.spec.scores) == ["s"]


def test_scores_that_are_not_finite_stop_the_run_with_the_slides_name(tmp_path):
    run, _ = scored_run(tmp_path, 5)
    run.score_patches = lambda model: {"good": torch.ones(2), "bad": torch.tensor([1.0, torch.nan])}
    with pytest.raises(UserError, match="not finite\n  bad"):
        run.fit()


def test_patches_are_scored_by_the_selected_weights(tmp_path):
    found = {}
    for selected in ("model", "ema"):
        run, _ = scored_run(tmp_path / selected, 3, selected_weights=selected)
        run.fit()
        found[selected] = float(load_file(tmp_path / selected / "patch_scores_2.safetensors")["s"])
    assert found["model"] != found["ema"]
