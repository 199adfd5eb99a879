"""Heads on frozen features against end to end, and AEM against no AEM, paired over cases.

  python tools/study/heads.py --out heads --seeds 0 --epochs 6 encoder.weights=FILE
  python tools/study/heads.py --out aem --heads abmil --aem 0,0.1 --seeds 0,1,2,3,4 encoder.weights=FILE

Arms: each head of --heads with each aem.weight of --aem, in two kinds. `e2e` trains encoder and head
on all patches of a slide, the encoder cut as the configuration says; `frozen` trains the head alone on
features of the whole encoder with the same weights, from --features or made first by `e2e extract`.
The head section of the configuration sets the options that a head has.
A kind has one learning rate, or candidates from which each arm selects as in tools/study/arms.py.
No training run gets a test slide.

Every run is one of the project's commands, with its output in OUT/runs/*.log. Run the same command again
to continue after a stop: finished runs are kept, and heads, weights and seeds may be added. OUT/study.json
and study.md are written after every run: test AUC with 95 % percentile intervals over cases, minutes
and peak resident memory of the training command, entropy of the attention over test slides (0 to 1).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
from tools.study.base import ROOT, Arm, Study, compare_auc, plan_arms, select_rate

RATES = {"e2e": (3e-4,), "frozen": (1e-3,)}
"""Kind -> candidate learning rates of its arms."""
DEFAULT_HEADS = "mean,abmil,abmilx,clam_sb,dsmil,transmil"
Row = dict[str, Any]


@dataclass(frozen=True)
class HeadArm(Arm):
    """A head with a frozen or a trained encoder."""

    kind: str = ""
    head: str = ""
    aem: float = 0.0
    more: list[str] = field(default_factory=list)
    """Further settings."""

    def settings(self) -> list[str]:
        """Return the settings of this arm, as on the command line."""
        return [*super().settings(), *self.more]


class HeadStudy(Study):
    """The runs of a study of heads, and the frozen features they share."""

    def features(self) -> list[Path]:
        """Return the folders of the whole encoder's features, which are extracted first if missing."""
        encoder, out, done = (
            self.settings.encoder,
            self.out / "features",
            self.out / "features.json",
        )
        if not done.is_file():
            defaults = ENCODERS.options(encoder.name)
            arguments = ["--stores", *self.settings.data.stores, "--encoder", encoder.name]
            arguments += ["--out", str(out)]
            if self.settings.bag.size:
                arguments += ["--size", str(self.settings.bag.size)]
            for key, value in encoder.options.items():
                if key != "stage" and value != defaults[key][1]:
                    arguments.append(f"encoder.{key}={json.dumps(value)}")
            self.run("extract", arguments, "features")
            write_json(done, sorted(map(str, out.glob("*/features_*/"))))
        return [Path(text) for text in json.loads(done.read_text())]

    def cost(self, name: str) -> Row:
        """Return minutes and peak MiB of a command."""
        minutes, mib = self.seconds.get(name, 0.0) / 60, self.memory.get(name, 0.0)
        return {"minutes": round(minutes, 2), "mib": round(mib)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and its lists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", default="lung_detection", help="as for launch/train.py")
    add("-c", "--config", action="append", help="YAML layers (default: configs/study.yaml)")
    add("--out", type=Path, required=True, help="folder of all runs and the tables")
    add("--features", type=Path, help="frozen features (default: extracted to OUT/features)")
    add("--heads", default=DEFAULT_HEADS, help="comma-separated")
    add("--aem", default="0", help="values of aem.weight, comma-separated")
    add("--kinds", default="frozen,e2e", help="frozen, e2e or both")
    add("--seeds", default="0", help="comma-separated; the first selects learning rates")
    add("--epochs", type=int, default=8, help="epochs of e2e")
    add("--frozen-epochs", type=int, help="epochs of frozen (default: --epochs)")
    add("--lr", action="append", default=[], metavar="KIND=LR[,LR]", help="candidates of a kind")
    add("--validations", type=int, default=4, help="validations of a run, equal for all arms")
    add("--draws", type=int, default=2000, help="resamples of the cases")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, for every arm")
    parser.set_defaults(model="e2e_r18_abmil")  # the arms name their heads
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or [str(ROOT / "configs" / "study.yaml")]
    try:
        args.seeds = [int(word) for word in args.seeds.split(",")]
        args.aem = [float(word) for word in args.aem.split(",")]
        candidates = dict(word.split("=") for word in args.lr)
        rates = {k: tuple(map(float, text.split(","))) for k, text in candidates.items()}
    except ValueError as error:
        raise UserError(f"--seeds, --aem or --lr cannot be read: {error}") from error
    args.kinds, args.heads = args.kinds.split(","), args.heads.split(",")
    if unknown := {*args.kinds, *rates} - RATES.keys():
        raise UserError(f"no kind {', '.join(sorted(unknown))}\n  choose from: {', '.join(RATES)}")
    for head in args.heads:
        if head not in HEADS.names():
            raise UserError(f"no head '{head}'{did_you_mean(head, HEADS.names())}")
    args.rates = RATES | rates
    return args


def kinds(study: HeadStudy, args: argparse.Namespace) -> dict[str, HeadArm]:
    """Return what the arms of each kind have in common."""
    arms = plan_arms(
        study.prepare(),
        bag=1,  # of arms that this study does not have
        bags=study.settings.optim.bags,
        epochs=args.epochs,
        frozen_epochs=args.frozen_epochs or args.epochs,
    )
    common = {"e2e": HeadArm(**asdict(arms["all"]), kind="e2e")}
    if "frozen" in args.kinds:
        folders = [args.features.resolve()] if args.features else study.features()
        more = ["encoder.name=features", f"data.features=[{','.join(map(str, folders))}]"]
        common["frozen"] = HeadArm(**asdict(arms["frozen_whole"]), kind="frozen", more=more)
    return {kind: common[kind] for kind in args.kinds}


def arms_of(
    kind: HeadArm, heads: Sequence[str], weights: Sequence[float], options: Mapping[str, Any]
) -> list[HeadArm]:
    """Return the arms of a kind; each head gets those of ``options`` that it has."""
    arms: list[HeadArm] = []
    for head in heads:
        head_options = HEADS.options(head)
        more = [f"head.{k}={json.dumps(v)}" for k, v in options.items() if k in head_options]
        more = [*kind.more, f"head.name={head}", *more]
        for weight in weights:
            name = f"{kind.kind}_{head}" + (f"_aem{weight:g}" if weight else "")
            extra = [f"aem.weight={weight:g}"] if weight else []
            arms.append(replace(kind, name=name, head=head, aem=weight, more=more + extra))
    return arms


def head_options(files: Sequence[str]) -> dict[str, Any]:
    """Return the options of the configuration's head section; later files override earlier ones."""
    options: dict[str, Any] = {}
    for file in files:
        options |= (yaml.safe_load(Path(file).read_text()) or {}).get("head") or {}
    return {key: value for key, value in options.items() if key != "name"}


class Evaluation:
    """Metrics of arms on the test slides.

    Parameters
    ----------
    slides
        Predictions of any run, for labels and cases.
    last
        Name of the positive class.
    draws
        Resamples of the cases.
    """

    def __init__(self, slides: pd.DataFrame, last: str, draws: int) -> None:
        self.slides, self.last, self.draws = slides, last, draws
        self.positive = (slides["label"] == last).to_numpy()
        self.cases: list[str] = slides["case"].tolist()

    def scores(self, tables: Sequence[pd.DataFrame]) -> Array:
        """Return (seeds, slides) probabilities of the positive class."""
        if any(not table["slide"].equals(self.slides["slide"]) for table in tables):
            raise UserError("the runs do not have the same test slides\n  use another --out")
        return np.stack([table[f"prob_{self.last}"] for table in tables])

    def auc(self, tables: Sequence[pd.DataFrame]) -> Row:
        """Return the AUC of each seed, and their mean with its confidence interval."""
        scores, unweighted = self.scores(tables), np.ones((1, len(self.slides)))
        means, _ = compare_auc({"all": scores}, self.positive, self.cases, draws=self.draws)
        each = [float(auc(row, self.positive, unweighted)[0]) for row in scores]
        return {"test_auc": each, "mean_test_auc": means["all"]}

    def auc_minus(self, tables: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame]) -> Row:
        """Return the AUC of ``tables`` minus that of ``base``, over the seeds of both."""
        pairs = list(zip(tables, base, strict=False))
        a, b = (self.scores(of_arm) for of_arm in zip(*pairs, strict=True))
        both = {"all": a, "base": b}
        return compare_auc(both, self.positive, self.cases, draws=self.draws)[1]["base"]

    def entropy(self, tables: Sequence[pd.DataFrame]) -> Array | None:
        """Return (slides,) attention entropies, the mean over seeds; None for a head without attention."""
        column = "attention_entropy"
        if any(column not in table or table[column].isna().any() for table in tables):
            return None
        return np.mean([table[column] for table in tables], axis=0)

    def entropy_minus(
        self, tables: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame]
    ) -> Row | None:
        """Return the attention entropy of ``tables`` minus that of ``base``, over the seeds of both."""
        pairs = list(zip(tables, base, strict=False))
        a, b = (self.entropy(of_arm) for of_arm in zip(*pairs, strict=True))
        if a is None or b is None:
            return None
        weights = case_weights(self.cases, self.draws, seed=0)
        return dict(confidence_interval(weights @ (a - b) / weights.sum(1)))


def report(
    study: HeadStudy,
    arms: Sequence[HeadArm],
    selected: Mapping[str, Any],
    done: Mapping[str, list[pd.DataFrame]],
    seeds: Sequence[int],
    draws: int,
) -> None:
    """Write the results of the runs in ``done`` to study.json and study.md, and print them."""
    slides, by = next(iter(done.values()))[0], {(a.kind, a.head, a.aem): a.name for a in arms}
    evaluation = Evaluation(slides, study.task.output_names[-1], draws)
    rows: list[Row] = []
    for arm in arms:
        if not (tables := done.get(arm.name)):
            continue
        ran = seeds[: len(tables)]
        costs = [study.cost(study.folder(arm, selected[arm.name]["lr"], s).name) for s in ran]
        row = asdict(arm) | selected[arm.name] | {"seeds": list(ran)} | evaluation.auc(tables)
        row |= {key: [cost[key] for cost in costs] for key in ("minutes", "mib")}
        entropy = evaluation.entropy(tables)
        row["attention_entropy"] = None if entropy is None else float(entropy.mean())
        if arm.kind == "e2e" and (base := done.get(by.get(("frozen", arm.head, arm.aem), ""))):
            row["minus_frozen"] = evaluation.auc_minus(tables, base)
        if arm.aem and (base := done.get(by.get((arm.kind, arm.head, 0.0), ""))):
            row["minus_plain"] = evaluation.auc_minus(tables, base)
            row["entropy_minus_plain"] = evaluation.entropy_minus(tables, base)
        rows.append(row)
    count = {"slides": len(slides), "cases": slides["case"].nunique(), "draws": draws}
    extraction = study.cost("features") if "features" in study.memory else None
    result = {"test": count, "extraction": extraction, "arms": rows}
    write_json(study.out / "study.json", result)
    write_atomically(study.out / "study.md", as_text(result).encode())
    print(f"\n{as_text(result)}", flush=True)


def span(interval: Mapping[str, float | None] | None) -> str:
    """Return a value with its confidence interval; empty for None."""
    if interval is None or interval["value"] is None:
        return ""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def as_text(result: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, and the learning rates."""
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
    """Return the rows of the heads, without AEM."""
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
    """Return the rows of the arms, each with its difference to the same arm without AEM."""
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
    """Train, evaluate and report, seed by seed and arm by arm."""
    args = parse()
    study = HeadStudy(args)
    common = kinds(study, args)
    study.write_plan(common)
    options = head_options(args.config)
    groups = [arms_of(kind, args.heads, args.aem, options) for kind in common.values()]
    arms = [arm for pair in zip(*groups, strict=True) for arm in pair]
    selected: dict[str, Any] = {}
    done: dict[str, list[pd.DataFrame]] = {}
    for seed in args.seeds:
        for arm in arms:
            if arm.name not in selected:
                selected[arm.name] = select_rate(study, arm, args.rates[arm.kind], seed)
            study.train(arm, selected[arm.name]["lr"], seed)
            table = study.test(arm, selected[arm.name]["lr"], seed)
            done.setdefault(arm.name, []).append(table)
            report(study, arms, selected, done, args.seeds, args.draws)


if __name__ == "__main__":
    sys.exit(exit_code(main))
