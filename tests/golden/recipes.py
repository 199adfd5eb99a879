"""Golden runs: small trainings whose losses must not change when the code is rearranged.

Each recipe is a command line of ``launch/train.py`` on small stores that are written on the fly. Its loss
and gradient norm of every update and its final metrics are kept in ``tests/golden/<recipe>.json``, with
the platform they were computed on and a digest of the data; ``tests/golden/test_golden.py`` compares.

Only a change that is meant to change numbers may rewrite the files, and its commit says why::

    OMP_NUM_THREADS=1 python -m tests.golden.recipes --write               # all recipes
    OMP_NUM_THREADS=1 python -m tests.golden.recipes --write mris two_ranks

Floating-point sums depend on the CPU and on PyTorch's kernels. The comparison is exact on the platform of
the file and loose elsewhere. For an exact comparison on another machine, write the files there from the
commit before the change, apply the change, and run the test.

The recipes use command lines and files alone, none of the package's modules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import PIL
import timm
import torch
from PIL import features as pillow_features
from safetensors.torch import save_file

from tests.helpers.paths import ROOT
from tests.helpers.stores import patches, pixels_of, record, write_store

GOLDEN = ROOT / "tests" / "golden"
DIGITS = 12
"""Significant digits of the numbers in the files."""
CPU_INFO = Path("/proc/cpuinfo")

NUM_SLIDES, NUM_TRAIN, NUM_VAL = 32, 16, 8
"""Slides in all, of training and of validation; the others are the test split."""
FEATURE_DIM = 12
NUM_PATCHES = {f"s{k:02d}": 3 + 5 * k % 7 for k in range(NUM_SLIDES)}
NUM_COARSE_PATCHES = {slide: 2 + count // 3 for slide, count in NUM_PATCHES.items()}
NUM_FEATURES = {f"s{k:02d}": 2 + 11 * k % 17 for k in range(NUM_SLIDES)}

COMMON = (
    "data.decoder=pillow", "data.workers=1", "engine.device=cpu", "engine.precision=fp32",
    "run.seed=3", "run.bootstrap=20", "run.heatmaps=0", "select.patience=null",
)  # fmt: skip
CLASSIFICATION = ("task.name=classification", "task.classes=[a,b]")
STORES = ("data.labels={data}/labels.csv", "data.stores=[{data}/fine.lmdb]", "bag.size=null")
R18_ABMILX = (
    "--datasets", "{data}/empty.yaml", "--model", "e2e_r18_abmilx", *COMMON, *STORES, *CLASSIFICATION,
    "encoder.pretrained=false", "head.embed_dim=32", "head.heads=2", "bag.patches=6",
    "engine.batch_norm=chunk", "engine.chunk=8", "optim.bags=4", "optim.epochs=3", "optim.lr=1e-4",
    "optim.ema=0.9", "optim.warmup_epochs=0.5",
)  # fmt: skip

RECIPES: dict[str, tuple[str, ...]] = {
    # ABMILX end to end from random weights: BatchNorm by chunk, everything encoded twice.
    "r18_abmilx": (*R18_ABMILX, "engine.keep_graphs=none"),
    # Weights from a file: frozen BatchNorm, layer-wise rates, some chunks encoded once.
    "pretrained_frozen_bn": (
        "--datasets", "{data}/empty.yaml", "--model", "e2e_resnet10t_abmil", *COMMON, *STORES,
        *CLASSIFICATION, "encoder.weights={data}/resnet10t.safetensors", "head.embed_dim=16",
        "bag.patches=6", "engine.batch_norm=auto", "engine.chunk=8", "engine.keep_graphs=8MiB",
        "augment.crop=0.5", "optim.bags=4", "optim.epochs=3", "optim.lr=1e-4",
        "optim.encoder_lr=2e-5", "optim.layer_decay=0.8",
    ),
    # Two-stage: the bags of an update padded to one batch, all their patches, AEM.
    "two_stage_abmil": (
        "--datasets", "{data}/empty.yaml", "--model", "abmil", *COMMON, *CLASSIFICATION,
        "data.labels={data}/labels.csv", "data.features=[{data}/features]", "head.embed_dim=8",
        "aem.weight=0.1", "optim.bags=4", "optim.epochs=4", "optim.lr=1e-2",
    ),
    # Cox over the whole update; a bag holds the two slides of a case.
    "cox": (
        "--datasets", "{data}/empty.yaml", "--model", "e2e_resnet10t_abmil", *COMMON, *STORES,
        "data.labels={data}/survival.csv", "data.unit=case", "task.name=survival", "task.loss=cox",
        "task.event=1", "encoder.pretrained=false", "head.embed_dim=16", "bag.patches=8",
        "engine.batch_norm=chunk", "engine.chunk=16", "engine.keep_graphs=all",
        "optim.bags=4", "optim.epochs=5", "optim.lr=3e-5",
    ),
    # Both constraints of AttriMIL: ranking with its banks, and spatial; SGD on balanced slides.
    "attrimil": (
        "--datasets", "{data}/empty.yaml", "--model", "e2e_resnet10t_attrimil", *COMMON, *STORES,
        *CLASSIFICATION, "encoder.pretrained=false", "head.rank_weight=5.0", "head.bank_size=2",
        "spatial.weight=1.0", "bag.patches=null", "engine.batch_norm=chunk", "engine.chunk=16",
        "optim.name=sgd", "optim.schedule=constant", "optim.balance=true", "optim.bags=4",
        "optim.epochs=3", "optim.lr=1e-4", "optim.ema=0",
    ),
    # Two magnifications in a bag, filled with copies, as the ABMILX project's recipes have it.
    "mris": (
        "--datasets", "{data}/empty.yaml", "--model", "e2e_resnet10t_abmilx", *COMMON, *STORES,
        *CLASSIFICATION, "data.scales=[[{data}/coarse.lmdb]]", "bag.patches=8", "bag.shares=[3,1]",
        "bag.copies=true", "bag.shared_crops=2", "augment.name=strong", "encoder.pretrained=false",
        "head.embed_dim=32", "head.heads=2", "engine.batch_norm=sync", "engine.chunk=64",
        "optim.name=adam", "optim.bags=4", "optim.epochs=3", "optim.lr=3e-5",
    ),
    # The first recipe on two ranks, bags of more than five patches over both of them.
    "two_ranks": (*R18_ABMILX, "engine.keep_graphs=8MiB", "engine.shard_over=5"),
}  # fmt: skip
RANKS = {"two_ranks": 2}

Result = dict[str, Any]


def write_data(folder: Path) -> str:
    """Write stores, features, weights and label tables that all recipes use; return their digest.

    The digest is of decoded pixels, so that another JPEG encoder or decoder changes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name, counts in (("fine", NUM_PATCHES), ("coarse", NUM_COARSE_PATCHES)):
        write_store(folder / f"{name}.lmdb", counts)
        for slide, count in counts.items():
            digest.update(pixels_of(patches(slide, count)).tobytes())
            digest.update(np.asarray(record(slide, count).coords, dtype=np.int64).tobytes())
    for k, (slide, count) in enumerate(NUM_FEATURES.items()):
        digest.update(_write_features(folder / "features" / f"{slide}.h5", k, count))
    digest.update(_write_weights(folder / "resnet10t.safetensors"))
    for name, table in (("labels", _labels()), ("survival", _survival())):
        table.to_csv(folder / f"{name}.csv", index=False)
        digest.update((folder / f"{name}.csv").read_bytes())
    (folder / "empty.yaml").write_text("{}\n")  # every setting is on the command line
    return digest.hexdigest()


def _write_features(path: Path, seed: int, count: int) -> bytes:
    values = np.random.default_rng(seed).normal(size=(count, FEATURE_DIM)).astype(np.float32)
    row = np.arange(count)
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = values
        file["coords"] = np.stack([row % 4, row // 4], axis=1).astype(np.int32) * 256
    return values.tobytes()


def _write_weights(path: Path) -> bytes:
    """Weights as if pretrained: running statistics of BatchNorm differ from 0 and 1."""
    shapes = timm.create_model("resnet10t").state_dict()
    random = np.random.default_rng(11)
    weights = {}
    for name, value in shapes.items():
        noise = random.normal(size=tuple(value.shape)).astype(np.float32)
        if not value.is_floating_point():
            continue
        if value.ndim > 1:  # He's initialisation
            noise *= np.float32(np.sqrt(2 / value[0].numel()))
        elif name.endswith(("running_var", "weight")):
            noise = 1 + np.float32(0.1) * np.tanh(noise)
        else:
            noise *= np.float32(0.1)
        weights[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    save_file(weights, path)
    return path.read_bytes()


def _split_of(k: int) -> str:
    return "train" if k < NUM_TRAIN else "val" if k < NUM_TRAIN + NUM_VAL else "test"


def _labels() -> pd.DataFrame:
    rows = [
        {"case": f"c{k:02d}", "slide": slide, "split": _split_of(k), "label": "ab"[k // 2 % 2]}
        for k, slide in enumerate(NUM_PATCHES)
    ]
    return pd.DataFrame(rows)


def _survival() -> pd.DataFrame:
    """Two slides a case; some times are tied, a quarter of the cases is censored."""
    rows = [
        {
            "case": f"c{k // 2:02d}",
            "slide": slide,
            "split": _split_of(k),
            "time": 1 + 5 * (k // 2) % 7 // 2,
            "event": int(k // 2 % 4 != 3),
        }
        for k, slide in enumerate(NUM_PATCHES)
    ]
    return pd.DataFrame(rows)


def platform_facts() -> dict[str, str]:
    """What the last digits of a training depend on besides the code and the data."""
    info = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
    fields: dict[str, str] = {}
    for line in info.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    vector_units = (
        f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))
    )
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": " ".join(
            fields.get(k, "") for k in ("model name", "cpu family", "model", "cache size")
        ),
        "vector_units": " ".join(sorted(vector_units)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": str(torch.backends.mkldnn.is_available()),
        "mkl": str(torch.backends.mkl.is_available()),
    }


def imaging_facts() -> dict[str, str]:
    """What the bytes and pixels of JPEG patches depend on."""
    codec = "libjpeg_turbo" if pillow_features.check_feature("libjpeg_turbo") else "jpg"
    return {"pillow": PIL.__version__, "jpeg": f"{codec} {pillow_features.version(codec)}"}


def run_recipes(names: Sequence[str], data: Path, out: Path) -> dict[str, Result]:
    """Train ``names`` on one thread each; return losses and metrics, or an error, by recipe.

    Recipes of one rank share a process, because starting one takes longer than most of them train.
    After a failure the others go on in a new process.
    """
    lines = {
        name: [w.format(data=data) for w in (*RECIPES[name], f"run.out={out / name}")]
        for name in names
    }
    errors: dict[str, str] = {}
    pending = [name for name in names if name not in RANKS]
    while pending:
        words = json.dumps([lines[name] for name in pending])
        error = _start(["-m", "tests.golden.recipes", "--train", words])
        pending = [name for name in pending if not (out / name / "metrics.json").is_file()]
        if pending:
            errors[pending.pop(0)] = error
    for name in names:
        if name in RANKS:
            ranks = ("--standalone", f"--nproc-per-node={RANKS[name]}")
            error = _start(["-m", "torch.distributed.run", *ranks, "launch/train.py", *lines[name]])
            if error:
                errors[name] = error
    return {
        name: {"error": errors[name]} if name in errors else read_result(out / name)
        for name in names
    }


def _start(words: Sequence[str]) -> str:
    """Run Python on ``words``; return what it printed if it failed, else an empty string."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}" if done.returncode else ""


def train_all(lines: Sequence[Sequence[str]]) -> None:
    """Run ``launch/train.py`` in this process once for each command line."""
    for words in lines:
        sys.argv = ["launch/train.py", *words]
        try:
            runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def read_result(run: Path) -> Result:
    """Loss and gradient norm of each update, and value and interval of each metric, of a run folder."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [entry for entry in entries if "grad_norm" in entry]
    report = json.loads((run / "metrics.json").read_text())
    metrics = {
        f"{split}/{weights}/{metric}/{key}": _rounded(value)
        for split in ("val", "test")
        for weights in ("model", "ema")
        for metric, values in report[split].get(weights, {}).items()
        for key, value in values.items()
    }
    return {
        "steps": [entry["step"] for entry in updates],
        "loss": [_rounded(entry["loss"]) for entry in updates],
        "grad_norm": [_rounded(entry["grad_norm"]) for entry in updates],
        "metrics": metrics,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def write_golden(folder: Path, results: Mapping[str, Result], digest: str) -> None:
    """Write ``<folder>/<recipe>.json`` of each result."""
    facts = {"platform": platform_facts(), "imaging": imaging_facts(), "data": digest}
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        text = json.dumps({**facts, **result}, indent=1)
        (folder / f"{name}.json").write_text(text + "\n")


def main() -> None:
    """Write golden files, or print what they would hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)}; none: all"
    )
    parser.add_argument("--write", action="store_true", help="write the golden files")
    parser.add_argument("--out", type=Path, default=GOLDEN, help="folder to write them to")
    parser.add_argument("--train", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train_all(json.loads(args.train))
        return
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "runs"
        digest = write_data(data)
        results = run_recipes(args.recipes or list(RECIPES), data, out)
    for name, result in results.items():
        if "error" in result:
            sys.exit(f"recipe {name} failed:\n{result['error']}")
    if args.write:
        write_golden(args.out, results, digest)
    else:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
