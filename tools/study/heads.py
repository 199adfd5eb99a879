"""Heads on frozen features against end to end, and AEM against no AEM, paired over cases.

  python tools/study_heads.py --out heads --seeds 0 --epochs 6 encoder.weights=FILE
  python tools/study_heads.py --out aem --heads abmil --aem 0,0.1 --seeds 0,1,2,3,4 encoder.weights=FILE

Arms: each head of --heads with each aem.weight of --aem, in two kinds. `e2e` trains encoder and head
on all patches of a slide, the encoder cut as the configuration says; `frozen` trains the head alone on
features of the whole encoder with the same weights, from --features or made first by launch/extract.py.
All heads have the widths of the configuration's head section, as far as they have such an option.
A kind's learning rate is given; of several candidates each arm takes its best as tools/study.py does.
No training run sees a test slide.

Every run is one of the commands a user would type, with its output in OUT/runs/*.log. Run it again to
go on after a stop: finished runs are kept, and heads, weights and seeds may be added. OUT/study.json
and study.md are written after every run: test AUC with 95 % percentile intervals over cases, minutes
and peak resident memory of the training command, entropy of the attention over test slides (0 to 1).
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import yaml

from e2e.encoders.base import ENCODERS
from e2e.errors import UserError, exit_code
from e2e.files import write_atomically, write_json
from e2e.heads.base import HEADS
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import Array, auc
from e2e.registry import did_you_mean
from tools.study import ROOT, Arm, Study, choose, paired, plan

RATES = {"e2e": (3e-4,), "frozen": (1e-3,)}
"""Kind -> learning rates each of its arms chooses from."""
HEADS_ASKED = "mean,abmil,abmilx,clam_sb,dsmil,transmil"
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss, end="")
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Runs a command and prints its peak memory in KiB. Linux counts a child's from its parent's on, and
the study itself is as large as a small run, so a small process has to be the parent."""
Row = dict[str, Any]


@dataclass(frozen=True)
class HeadArm(Arm):
    """A head, and what becomes of the encoder before it."""

    kind: str = ""
    head: str = ""
    aem: float = 0.0
    more: list[str] = field(default_factory=list)  # settings

    def settings(self) -> list[str]:
        """What sets this arm apart on the command line."""
        return [*super().settings(), *self.more]


class HeadStudy(Study):
    """The runs of a study of heads, with the memory each took."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        file = self.out / "memory.json"
        self.memory: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def step(self, script: str, arguments: list[str], name: str) -> None:
        """As there, and the command's peak resident memory."""
        log = self.out / "runs" / f"{name}.log"
        print(f"{time.strftime('%H:%M:%S')}  {script} {name}", flush=True)
        command = [sys.executable, str(ROOT / script), *arguments]
        started = time.monotonic()
        with log.open("a") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            measured = [sys.executable, "-I", "-S", "-c", MEASURE, *command]
            done = subprocess.run(measured, stdout=subprocess.PIPE, stderr=file, check=False)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        self.memory[name] = max(self.memory.get(name, 0.0), int(done.stdout or 0) / 1024)
        write_json(self.out / "times.json", self.seconds)
        write_json(self.out / "memory.json", self.memory)
        if done.returncode:
            raise UserError(
                f"{script} ended with exit code {done.returncode}; {log} says why\n"
                "  mend it, then run the study again: it goes on from here"
            )

    def features(self) -> list[Path]:
        """Folders of the features of the whole encoder, made if they are not there."""
        encoder, out, done = (
            self.settings.encoder,
            self.out / "features",
            self.out / "features.json",
        )
        if not done.is_file():
            known = ENCODERS.options(encoder.name)
            asked = ["--stores", *self.settings.data.stores, "--encoder", encoder.name]
            asked += ["--out", str(out)]
            if self.settings.bag.size:
                asked += ["--size", str(self.settings.bag.size)]
            for key, value in encoder.options.items():
                if key != "stage" and value != known[key][1]:
                    asked.append(f"encoder.{key}={json.dumps(value)}")
            self.step("launch/extract.py", asked, "features")
            write_json(done, sorted(map(str, out.glob("*/features_*/"))))
        return [Path(text) for text in json.loads(done.read_text())]

    def cost(self, name: str) -> Row:
        """Minutes and MiB of a command."""
        minutes, mib = self.seconds.get(name, 0.0) / 60, self.memory.get(name, 0.0)
        return {"minutes": round(minutes, 2), "mib": round(mib)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; lists are read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", default="lung_detection", help="as for launch/train.py")
    add("-c", "--config", action="append", help="YAML layers (default: configs/study.yaml)")
    add("--out", type=Path, required=True, help="folder of all runs and the tables")
    add("--features", type=Path, help="frozen features (default: made in OUT/features)")
    add("--heads", default=HEADS_ASKED, help="comma-separated")
    add("--aem", default="0", help="values of aem.weight, comma-separated")
    add("--kinds", default="frozen,e2e", help="frozen, e2e or both")
    add("--seeds", default="0", help="comma-separated; the first chooses among learning rates")
    add("--epochs", type=int, default=8, help="of e2e")
    add("--frozen-epochs", type=int, help="of frozen (default: --epochs)")
    add("--lr", action="append", default=[], metavar="KIND=LR[,LR]", help="a kind's candidates")
    add("--validations", type=int, default=4, help="of a run: every arm can pick an epoch as often")
    add("--draws", type=int, default=2000, help="resamples of the cases")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, for every arm")
    parser.set_defaults(model="e2e_r18_abmil")  # the arms name their heads
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or [str(ROOT / "configs" / "study.yaml")]
    try:
        args.seeds = [int(word) for word in args.seeds.split(",")]
        args.aem = [float(word) for word in args.aem.split(",")]
        given = dict(word.split("=") for word in args.lr)
        rates = {k: tuple(map(float, text.split(","))) for k, text in given.items()}
    except ValueError as error:
        raise UserError(f"--seeds, --aem or --lr cannot be read: {error}") from error
    args.kinds, args.heads = args.kinds.split(","), args.heads.split(",")
    if unknown := {*args.kinds, *rates} - RATES.keys():
        raise UserError(f"no kind {', '.join(sorted(unknown))}\n  there are: {', '.join(RATES)}")
    for head in args.heads:
        if head not in HEADS.names():
            raise UserError(f"no head '{head}'{did_you_mean(head, HEADS.names())}")
    args.rates = RATES | rates
    return args


def kinds(study: HeadStudy, args: argparse.Namespace) -> dict[str, HeadArm]:
    """What the arms of each kind have in common."""
    both = plan(
        study.prepare(),
        bag=1,  # of arms that are none of this study's
        bags=study.settings.optim.bags,
        epochs=args.epochs,
        frozen_epochs=args.frozen_epochs or args.epochs,
    )
    made = {"e2e": HeadArm(**asdict(both["all"]), kind="e2e")}
    if "frozen" in args.kinds:
        folders = [args.features.resolve()] if args.features else study.features()
        more = ["encoder.name=features", f"data.features=[{','.join(map(str, folders))}]"]
        made["frozen"] = HeadArm(**asdict(both["frozen_whole"]), kind="frozen", more=more)
    return {kind: made[kind] for kind in args.kinds}


def arms_of(
    kind: HeadArm, heads: Sequence[str], weights: Sequence[float], options: Mapping[str, Any]
) -> list[HeadArm]:
    """The arms of a kind; of ``options`` each head takes those it has."""
    made: list[HeadArm] = []
    for head in heads:
        known = HEADS.options(head)
        more = [f"head.{k}={json.dumps(v)}" for k, v in options.items() if k in known]
        more = [*kind.more, f"head.name={head}", *more]
        for weight in weights:
            name = f"{kind.kind}_{head}" + (f"_aem{weight:g}" if weight else "")
            extra = [f"aem.weight={weight:g}"] if weight else []
            made.append(replace(kind, name=name, head=head, aem=weight, more=more + extra))
    return made


def head_options(files: Sequence[str]) -> dict[str, Any]:
    """The head section of the configuration, later files winning."""
    found: dict[str, Any] = {}
    for file in files:
        found |= (yaml.safe_load(Path(file).read_text()) or {}).get("head") or {}
    return {key: value for key, value in found.items() if key != "name"}


class Judge:
    """Test slides, and what arms are worth on them: (seeds, slides) of each arm."""

    def __init__(self, slides: pd.DataFrame, last: str, draws: int) -> None:
        self.slides, self.last, self.draws = slides, last, draws
        self.positive = (slides["label"] == last).to_numpy()
        self.cases: list[str] = slides["case"].tolist()

    def scores(self, tables: Sequence[pd.DataFrame]) -> Array:
        """Probabilities of the positive class."""
        if any(not table["slide"].equals(self.slides["slide"]) for table in tables):
            raise UserError("the runs do not have the same test slides; use another --out")
        return np.stack([table[f"prob_{self.last}"] for table in tables])

    def auc(self, tables: Sequence[pd.DataFrame]) -> Row:
        """Each seed's AUC, and their mean with its confidence_interval."""
        scores, once = self.scores(tables), np.ones((1, len(self.slides)))
        means, _ = paired({"all": scores}, self.positive, self.cases, draws=self.draws)
        each = [float(auc(row, self.positive, once)[0]) for row in scores]
        return {"test_auc": each, "mean_test_auc": means["all"]}

    def auc_minus(self, ours: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame]) -> Row:
        """How much higher our AUC is, over the seeds both have."""
        pairs = list(zip(ours, base, strict=False))
        a, b = (self.scores(tables) for tables in zip(*pairs, strict=True))
        both = {"all": a, "base": b}
        return paired(both, self.positive, self.cases, draws=self.draws)[1]["base"]

    def entropy(self, tables: Sequence[pd.DataFrame]) -> Array | None:
        """(slides,) of the attention, meaned over seeds; None for a head without."""
        column = "attention_entropy"
        if any(column not in table or table[column].isna().any() for table in tables):
            return None
        return np.mean([table[column] for table in tables], axis=0)

    def entropy_minus(
        self, ours: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame]
    ) -> Row | None:
        """How much higher the entropy of our attention is, over the seeds both have."""
        pairs = list(zip(ours, base, strict=False))
        a, b = (self.entropy(tables) for tables in zip(*pairs, strict=True))
        if a is None or b is None:
            return None
        weights = case_weights(self.cases, self.draws, seed=0)
        return dict(confidence_interval(weights @ (a - b) / weights.sum(1)))


def report(
    study: HeadStudy,
    arms: Sequence[HeadArm],
    chosen: Mapping[str, Any],
    done: Mapping[str, list[pd.DataFrame]],
    seeds: Sequence[int],
    draws: int,
) -> None:
    """What is known after the runs in ``done``: written to study.json and study.md, and printed."""
    slides, by = next(iter(done.values()))[0], {(a.kind, a.head, a.aem): a.name for a in arms}
    judge = Judge(slides, study.task.output_names[-1], draws)
    rows: list[Row] = []
    for arm in arms:
        if not (tables := done.get(arm.name)):
            continue
        ran = seeds[: len(tables)]
        costs = [study.cost(study.folder(arm, chosen[arm.name]["lr"], s).name) for s in ran]
        row = asdict(arm) | chosen[arm.name] | {"seeds": list(ran)} | judge.auc(tables)
        row |= {key: [cost[key] for cost in costs] for key in ("minutes", "mib")}
        entropy = judge.entropy(tables)
        row["attention_entropy"] = None if entropy is None else float(entropy.mean())
        if arm.kind == "e2e" and (base := done.get(by.get(("frozen", arm.head, arm.aem), ""))):
            row["minus_frozen"] = judge.auc_minus(tables, base)
        if arm.aem and (base := done.get(by.get((arm.kind, arm.head, 0.0), ""))):
            row["minus_plain"] = judge.auc_minus(tables, base)
            row["entropy_minus_plain"] = judge.entropy_minus(tables, base)
        rows.append(row)
    count = {"slides": len(slides), "cases": slides["case"].nunique(), "draws": draws}
    extraction = study.cost("features") if "features" in study.memory else None
    result = {"test": count, "extraction": extraction, "arms": rows}
    write_json(study.out / "study.json", result)
    write_atomically(study.out / "study.md", as_text(result).encode())
    print(f"\n{as_text(result)}", flush=True)


def span(found: Mapping[str, float | None] | None) -> str:
    """A value with its confidence_interval; empty where there is none."""
    if found is None or found["value"] is None:
        return ""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def as_text(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, and the learning rates."""
    head = "{slides} test slides of {cases} cases; 95 % intervals over {draws} resamples of cases"
    lines = [head.format(**result["test"])]
    if result["extraction"]:
        lines.append("features, once: {minutes:.1f} min, {mib} MiB".format(**result["extraction"]))
    arms: list[Row] = result["arms"]
    by = {(a["kind"], a["head"]): a for a in arms if not a["aem"]}
    lines += ["", *head_table(by)]
    if any(a["aem"] for a in arms):
        lines += ["", *aem_table(arms)]
    lines += ["", "Learning rates, by validation AUC (log loss) of the first seed:"]
    for arm in arms:
        tried = arm["validation"].items()
        words = [f"{lr}: {v['auc']:.3f} ({v['log_loss']:.3f})" for lr, v in tried]
        lines.append(f"  {arm['name']}: {arm['lr']:g} of {'; '.join(words)}")
    return "\n".join(lines) + "\n"


def head_table(by: Mapping[tuple[str, str], Row]) -> list[str]:
    """A row a head, without AEM."""
    lines = [
        "| head | seeds | test AUC, frozen | test AUC, end to end | end to end - frozen "
        "| min a run, frozen | end to end | MiB, frozen | end to end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(head for _, head in by):
        pair = [by.get((kind, name)) for kind in ("frozen", "e2e")]
        ran = " / ".join(str(len(arm["seeds"])) if arm else "-" for arm in pair)
        cells = [span(arm and arm["mean_test_auc"]) for arm in pair]
        cells.append(span(pair[1] and pair[1].get("minus_frozen")))
        cells += [f"{np.mean(arm['minutes']):.1f}" if arm else "" for arm in pair]
        cells += [f"{max(arm['mib']):,}" if arm else "" for arm in pair]
        lines.append(f"| {name} | {ran} | {' | '.join(cells)} |")
    return lines


def aem_table(arms: Sequence[Row]) -> list[str]:
    """A row an arm, next to the same without AEM."""
    lines = [
        "| kind | head | aem.weight | test AUC a seed | mean | minus weight 0 "
        "| attention entropy | minus weight 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        each = ", ".join(f"{value:.3f}" for value in arm["test_auc"])
        entropy = arm["attention_entropy"]
        cells = [arm["kind"], arm["head"], f"{arm['aem']:g}", each, span(arm["mean_test_auc"])]
        cells += [span(arm.get("minus_plain")), "" if entropy is None else f"{entropy:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {span(arm.get('entropy_minus_plain'))} |")
    return lines


def main() -> None:
    """Seed by seed, arm by arm: train, judge, report."""
    args = parse()
    study = HeadStudy(args)
    common = kinds(study, args)
    study.keep_to(common)
    options = head_options(args.config)
    groups = [arms_of(kind, args.heads, args.aem, options) for kind in common.values()]
    arms = [arm for pair in zip(*groups, strict=True) for arm in pair]
    chosen: dict[str, Any] = {}
    done: dict[str, list[pd.DataFrame]] = {}
    for seed in args.seeds:
        for arm in arms:
            if arm.name not in chosen:
                chosen[arm.name] = choose(study, arm, args.rates[arm.kind], seed)
            study.train(arm, chosen[arm.name]["lr"], seed)
            table = study.test(arm, chosen[arm.name]["lr"], seed)
            done.setdefault(arm.name, []).append(table)
            report(study, arms, chosen, done, args.seeds, args.draws)


if __name__ == "__main__":
    sys.exit(exit_code(main))
