"""Checkpoints: the same to the bit, the old one kept, and misfits named."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from e2e.errors import DamagedDataError, UserError
from e2e.parallel import Strategy
from e2e.training.checkpoint import (
    add_prefix,
    check_weights,
    load_checkpoint,
    save_checkpoint,
    select_prefix,
)
from e2e.training.optim import build_optimizer
from tests.helpers.paths import ROOT


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def set_up(model: nn.Module) -> Strategy:
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(model, partial(build_optimizer, lr=0.01, weight_decay=0.1), clip=None)
    return strategy


def train(strategy: Strategy, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        strategy.backward(
            strategy.module(torch.randn(5, 3, 4, 4, generator=generator)).square().mean()
        )
        strategy.step()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one
    )


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "turned": torch.randn(4, 6).T,
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.zeros(0, 3),
    }
    state = {"epoch": 3, "score": 0.1 + 0.2, "best": None, "names": ["ä", "b"], "done": True}
    save_checkpoint(tmp_path / "x.safetensors", tensors, state)
    loaded, loaded_state = load_checkpoint(tmp_path / "x.safetensors")
    assert loaded_state == state
    assert torch.equal(loaded.pop("odd").isnan(), tensors.pop("odd").isnan())
    assert same(loaded, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_to_the_bit(tmp_path, order):
    one, path = set_up(net().to(memory_format=order)), tmp_path / "x.safetensors"
    train(one, range(3))
    tensors = add_prefix("model", one.full_tensors(one.shards()))
    tensors |= add_prefix("optimizer", one.optimizer_tensors())
    save_checkpoint(path, tensors, {})
    train(one, range(3, 6))

    resumed = set_up(net(seed=1).to(memory_format=order))
    loaded, _ = load_checkpoint(path)
    resumed.load(select_prefix("model", loaded))
    resumed.load_optimizer(select_prefix("optimizer", loaded))
    train(resumed, range(3, 6))
    assert same(resumed.model.state_dict(), one.model.state_dict())
    assert same(resumed.optimizer_tensors(), one.optimizer_tensors())


def test_without_the_optimisers_state_training_goes_on_otherwise():
    one, other = set_up(net()), set_up(net(seed=1))
    train(one, range(3))
    other.load(one.full_tensors(one.shards()))
    train(one, range(3, 4))
    train(other, range(3, 4))
    assert not same(other.model.state_dict(), one.model.state_dict())


def test_parts_are_told_apart_by_their_names():
    tensors = add_prefix("model", {"a.b": torch.ones(1)}) | add_prefix(
        "model_b", {"c": torch.ones(2)}
    )
    assert list(select_prefix("model", tensors)) == ["a.b"]
    assert select_prefix("ema", tensors) == {}


FILL = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from e2e.training.checkpoint import save_checkpoint
    from e2e.errors import UserError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save_checkpoint(Path(sys.argv[1]), {"a": torch.zeros(100_000)}, {"epoch": 2})
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, before):
    path = tmp_path / "last.safetensors"
    if before:
        save_checkpoint(path, {"a": torch.ones(10)}, {"epoch": 1})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FILL), str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"cannot write {path}: File too large" in done.stdout
    assert "free disk space" in done.stdout
    assert ("the previous file is unchanged" in done.stdout) == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"] * before
    if before:
        loaded, state = load_checkpoint(path)
        assert state == {"epoch": 1}
        assert bool((loaded["a"] == 1).all())


@pytest.mark.parametrize("cut", [0, 5, 40, 200, -1])
def test_a_checkpoint_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.ones(100)}, {"epoch": 1})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedDataError, match=r"x.safetensors is not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("place", [0.5, 0.9, 0.999])
def test_a_changed_bit_is_noticed(tmp_path, place):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model.w": torch.randn(400, 3), "ema.w": torch.randn(400)}, {"step": 3})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="its content does not match its checksum"):
        load_checkpoint(path)


def test_equal_checkpoints_are_equal_files(tmp_path):
    tensors = {"model.w": torch.ones(4), "ema.w": torch.zeros(2)}
    for k in range(8):
        save_checkpoint(tmp_path / str(k), tensors, {"step": 3, "best": [0.1, -2.5]})
    assert len({(tmp_path / str(k)).read_bytes() for k in range(8)}) == 1


def test_a_changed_counter_is_noticed_and_files_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model.w": torch.ones(3)}, {"best_epoch": 3})
    content = path.read_bytes()
    path.write_bytes(content.replace(b'best_epoch\\": 3', b'best_epoch\\": 4'))
    assert path.read_bytes() != content
    with pytest.raises(DamagedDataError, match="checksum"):
        load_checkpoint(path)
    path.write_bytes(save({"model.w": torch.ones(3)}, {"state": "{}"}))
    assert load_checkpoint(path)[0]["model.w"].tolist() == [1, 1, 1]


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    pickled = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1)}, pickled)
    with pytest.raises(DamagedDataError, match="is not a checkpoint of this program"):
        load_checkpoint(pickled)
    foreign = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, foreign)
    with pytest.raises(DamagedDataError, match="is not a checkpoint of this program"):
        load_checkpoint(foreign)
    save_file({"a": torch.ones(1)}, foreign, {"state": "{"})
    with pytest.raises(DamagedDataError, match="is not a checkpoint of this program"):
        load_checkpoint(foreign)


def test_a_checkpoint_is_plain_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"epoch": 1})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])["epoch"] == 1
    assert header["a"]["shape"] == [2]


def test_weights_that_do_not_fit_are_named(tmp_path):
    weights = dict(net().state_dict())
    weights["0.bias"] = torch.zeros(5)
    weights["9.extra"] = torch.zeros(1)
    del weights["3.weight"]
    model = net(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        check_weights(set_up(model).shapes, weights, tmp_path / "x.safetensors")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'x.safetensors'} does not fit the model",
        "  0.bias: (5,) in the file, (4,) in the model",
        "  missing: 3.weight",
        "  unknown: 9.extra",
    ]
    assert same(dict(model.state_dict()), before)
