"""What needs no second process: the single strategy, devices, precision, DeepSpeed's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from e2e.errors import LostRankError, UserError
from e2e.parallel import (
    Strategy,
    autocast_dtype,
    build_strategy,
    float32_precision,
    pick_device,
)
from e2e.parallel.base import make_parameters_contiguous
from e2e.parallel.ddp import DistributedStrategy
from e2e.parallel.deepspeed import complete_config, read_config
from tests.helpers.paths import ROOT
from tests.helpers.process_state import read_tf32_settings

CPU = torch.device("cpu")
CONFIGS = ROOT / "configs" / "deepspeed"


def test_one_process_needs_no_process_group():
    strategy = Strategy(CPU)
    value = torch.ones(2)
    strategy.all_reduce_sum(value)
    assert strategy.is_leader
    assert strategy.gather_objects("x") == ["x"]
    assert value.tolist() == [1, 1]
    assert strategy.gather_rows(value, [2]) is value
    strategy.check_agreement({"settings": "abc"})
    assert not torch.distributed.is_initialized()


def test_without_an_optimiser_the_model_is_only_placed():
    strategy, model = Strategy(CPU), nn.Linear(2, 1)
    strategy.setup(model, None, clip=None)
    with strategy.full_parameters() as plain:
        assert plain is model
    assert not hasattr(strategy, "optimizer")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_leaves_weights_and_state_alone(fused, bad):
    torch.manual_seed(0)
    strategy, model = Strategy(CPU), nn.Linear(3, 1)
    strategy.setup(model, lambda m: AdamW(m.parameters(), lr=0.1, fused=fused), clip=1.0)

    def step(extra: float) -> bool:
        strategy.backward(model(torch.ones(1, 3)).square().sum() + extra)
        return bool(strategy.step()[1])

    assert step(0.0)
    before = strategy.full_tensors(strategy.shards()) | strategy.optimizer_tensors()
    assert not step(bad)
    after = strategy.full_tensors(strategy.shards()) | strategy.optimizer_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["weight.step"] == 1
    assert step(0.0)
    assert strategy.optimizer_tensors()["weight.step"] == 2


def test_the_host_does_not_wait_for_a_fused_step():
    strategy, model = Strategy(CPU), nn.Linear(3, 1)
    strategy.setup(model, lambda m: AdamW(m.parameters(), lr=0.1, fused=True), clip=1.0)
    read = torch.Tensor.__bool__
    try:
        torch.Tensor.__bool__ = lambda self: pytest.fail("a tensor was read")  # pyright: ignore
        strategy.backward(model(torch.ones(1, 3)).sum())
        _, good = strategy.step()
    finally:
        torch.Tensor.__bool__ = read
    assert good


def test_gradients_are_clipped_jointly_and_the_norm_is_that_before():
    strategy, model = Strategy(CPU), nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    strategy.setup(model, lambda m: SGD(m.parameters(), lr=1.0), clip=1.0)
    strategy.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    norm, _ = strategy.step()
    assert norm.item() == pytest.approx(5.0)
    assert model.weight.tolist()[0] == pytest.approx([-0.6, -0.8], rel=1e-5)
    assert model.weight.grad is None


def test_other_weights_are_there_inside_and_gone_after():
    strategy, model = Strategy(CPU), nn.Linear(2, 1)
    strategy.setup(model, lambda m: SGD(m.parameters(), lr=1.0), clip=None)
    saved = strategy.full_tensors(strategy.shards())
    other = {name: torch.full_like(value, 7.0) for name, value in saved.items()}
    with strategy.full_parameters(other) as plain:
        assert plain(torch.ones(1, 2)).item() == 21.0
    with pytest.raises(RuntimeError), strategy.full_parameters(other) as plain:
        plain(torch.ones(1, 3))
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_weights_in_channels_last_are_laid_out_plainly_even_of_a_1x1_convolution():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Conv2d(3, 5, 1)).to(
        memory_format=torch.channels_last
    )
    values = [parameter.detach().clone() for parameter in model.parameters()]
    make_parameters_contiguous(model)
    assert [p.stride() for p in model.parameters()] == [(36, 9, 3, 1), (1,), (3, 1, 1, 1), (1,)]
    assert all(map(torch.equal, model.parameters(), values))


def test_precision_is_what_was_asked_for():
    cpu = pick_device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("tf32", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_cuda_device_is_one_message_with_what_to_do():
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError) as error:
            pick_device(name)
        assert str(error.value) == (
            f"engine.device={name}: PyTorch sees no CUDA device (torch.cuda.is_available() is False).\n"
            "  Use engine.device=cpu, or check the driver and CUDA_VISIBLE_DEVICES."
        )


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match=r"engine.device=tpu: unknown device\n  Use auto, cpu"):
        pick_device("tpu")


@pytest.mark.parametrize(
    "message", ["Connection closed by peer [127.0.0.1]:403", "Timed out waiting 5000ms for recv"]
)
def test_a_backend_that_lost_a_rank_is_told_from_other_errors(message):
    with (
        pytest.raises(LostRankError, match=r"rank 0 lost contact .*: " + message[:10]),
        lost(message),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="cannot restore the shape"),
        lost("cannot restore the shape"),
    ):
        pass


def lost(message: str) -> AbstractContextManager[None]:
    """``detect_lost_ranks()`` around an error of these words, without a process group."""

    @contextmanager
    def around() -> Iterator[None]:
        with DistributedStrategy.detect_lost_ranks(Strategy(CPU)):  # pyright: ignore[reportArgumentType]
            yield
            raise RuntimeError(f"[/pytorch/gloo/pair.cc:561] {message}. Check the logs")

    return around()


# DeepSpeed's JSON


def test_deepspeed_without_a_file_is_refused_before_any_process_group():
    with pytest.raises(UserError, match=r"zero2\.json"):
        build_strategy(CPU, "deepspeed")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_json_that_comes_along_takes_our_clipping_and_accumulation(stage):
    path = CONFIGS / f"zero{stage}.json"
    completed = complete_config(read_config(path), path, clip=0.5, world_size=4)
    assert completed["zero_optimization"]["stage"] == stage
    assert completed["gradient_clipping"] == 0.5
    assert completed["gradient_accumulation_steps"] == 1
    assert completed["train_batch_size"] == 4 * completed["train_micro_batch_size_per_gpu"]


def test_no_clipping_is_written_down_because_deepspeed_clips_when_told_nothing():
    path = CONFIGS / "zero2.json"
    assert complete_config(read_config(path), path, clip=None, world_size=1)[
        "gradient_clipping"
    ] == (0.0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("gradient_clipping", 1.0, "optim.clip"),
        ("gradient_accumulation_steps", 4, "optim.bags"),
        ("train_batch_size", 32, "optim.bags"),
        ("train_micro_batch_size_per_gpu", 8, "optim.bags"),
        ("optimizer", {"type": "AdamW"}, "optim."),
        ("scheduler", {"type": "WarmupLR"}, "optim.lr"),
        ("fp16", {"enabled": True}, "engine.precision"),
        ("bf16", {"enabled": True}, "engine.precision"),
        ("amp", {"enabled": True}, "engine.precision"),
    ],
)
def test_a_json_that_contradicts_the_settings_is_refused_by_key(tmp_path, key, value, words):
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(UserError) as error:
        complete_config(read_config(path), path, clip=0.5, world_size=2)
    message = str(error.value)
    for part in (str(path), key, repr(value), words):
        assert part in message


def test_a_json_that_agrees_or_leaves_it_to_us_is_taken(tmp_path):
    path = tmp_path / "ours.json"
    config = {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "fp16": {"enabled": False},
        "comms_logger": {"enabled": False},
    }
    path.write_text(json.dumps(config))
    completed = complete_config(read_config(path), path, clip=0.5, world_size=2)
    assert completed["zero_optimization"]["overlap_comm"] is True
    assert completed["comms_logger"] == {"enabled": False}
    assert completed["train_batch_size"] == 2
    assert "fp16" not in completed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read DeepSpeed's configuration .*: No such file"),
        ("{", "is not valid JSON"),
        ("[]", "stage must be"),
        ('{"zero_optimization": {"stage": 4}}', "found 4"),
        ("{}", "found None"),
        ('{"zero_optimization": 2}', "stage must be"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, words):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_config(path)


def test_float32_products_are_rounded_unless_fp32_is_asked_for():
    kinds = []
    for precision in ("auto", "fp32", "tf32"):
        with float32_precision(precision):
            kinds.append(torch.backends.cuda.matmul.fp32_precision)
            assert torch.backends.cudnn.conv.fp32_precision == kinds[-1]
    assert kinds == ["tf32", "ieee", "tf32"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32"])
def test_both_interfaces_to_tf32_agree_inside_and_are_restored(precision):
    before = read_tf32_settings()
    with float32_precision(precision):
        inside = read_tf32_settings()
        torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    allowed = precision != "fp32"
    assert inside["cuda.matmul.allow_tf32"] is inside["cudnn.allow_tf32"] is allowed
    assert inside["float32_matmul_precision"] == ("high" if allowed else "highest")
    for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn"):
        assert inside[f"{name}.fp32_precision"] == ("tf32" if allowed else "ieee")
    assert read_tf32_settings() == before


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_precision_that_the_caller_set_is_restored(precision):
    before = read_tf32_settings()
    with float32_precision("auto"):  # puts back what this test changes
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = False
        callers = read_tf32_settings()
        with float32_precision(precision):
            assert not [v for v in read_tf32_settings().values() if "checking" in str(v)]
        assert read_tf32_settings() == callers
        with pytest.raises(UserError), float32_precision(precision):
            raise UserError("a run that fails")
        assert read_tf32_settings() == callers
    assert read_tf32_settings() == before


def test_a_caller_of_the_newer_interface_alone_does_not_stop_a_run():
    with float32_precision("fp32"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with float32_precision("auto"):
            assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
