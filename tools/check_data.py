"""Look a cohort over before a run: its table, stores or features, splits, and what a run needs.

  python tools/check_data.py --datasets panda                        table and store as the YAML names them
  python tools/check_data.py --datasets panda data.labels=panda.csv  no store yet: the table alone
  ... --model abmil data.features=[FOLDER]                           frozen features
  ... --site tcga                                                    by centre too: TCGA barcodes, or a column
                                                                     (data.columns.centre where it is set)

What stops a run stops this too, by the same code: it takes the cohort in as a run does, and makes the
model, but fetches no weights. Whatever a run would drop or refuse is listed in FILE of --problems.
Features are all read, for NaN and files that are damaged.

Exit codes: 0 a run would start; where no store is there yet: the table is in order; 2 it would be
refused, and the message says why.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np

from e2e.bags.spec import LabelledSlide
from e2e.cohort.cases import CaseStore
from e2e.cohort.features import check_values, describe_features
from e2e.cohort.folds import tcga_sites
from e2e.cohort.load import require_files
from e2e.cohort.splits import SPLITS
from e2e.cohort.table import join_words, read_table
from e2e.errors import UserError, exit_code, format_list
from e2e.log import Screen
from e2e.memory import free_memory
from e2e.parallel import pick_device
from e2e.runs.parts import (
    PROTOCOLS,
    REGISTRIES,
    build_task,
    check_training,
    fit_task,
    load_slides,
    make_parts,
    on_features,
    process_settings,
)
from e2e.settings.arguments import common_settings
from e2e.settings.schema import Data, Settings
from e2e.sizes import show_bytes
from e2e.slides import Slide
from e2e.store.open import expand_store_paths
from e2e.tasks.base import Task
from e2e.wsi.tiling import Tiling

TCGA = "tcga"
BYTES_A_PIXEL = 0.25
"""Of a stored patch: 16.0 and 17.8 kB for 256 px of two real H&E slides, JPEG quality 80, 0.5 um/px."""
MANY = 20
"""Different words of a column, or centres, beyond which they are not all shown."""
CHUNKS = 3
"""Whose pixels are held at once: one is computed, two are made ahead."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: that of launch/train.py, where it makes sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", required=True, help="a YAML of configs/datasets, or a path")
    parser.add_argument("--model", default="e2e_r18_abmilx", help="as for launch/train.py")
    parser.add_argument("-c", "--config", action="append", default=[], help="a further YAML layer")
    parser.add_argument("--site", metavar="COLUMN", help=f"of the centre; {TCGA}: from barcodes")
    parser.add_argument(
        "--problems", type=Path, default=Path("problems.csv"), metavar="FILE.csv", help="their list"
    )
    parser.add_argument(
        "--patches",
        type=int,
        default=1000,
        metavar="N",
        help="a slide, for estimates without a store",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def table_slides(data: Data, targets: Sequence[str], site: str | None) -> list[Slide]:
    """The slides of the label table, with the words of ``targets`` and ``site``; splits are left out."""
    columns = {
        "slide": data.columns.slide,
        "case": data.columns.case,
        "split": None,
        "centre": None if site == TCGA else site,
    }
    slides, problems = read_table(
        data.labels,
        columns=columns,
        targets=targets,
        split_names={},
        slide_suffix=data.slide_suffix,
        slide_separator=data.slide_separator,
    )
    if not slides:
        raise UserError(f"{data.labels} has no row that can be used\n{format_list(problems)}")
    return slides


def has_store(settings: Settings) -> bool:
    """Whether anything of the patch stores, or of the features, is there."""
    entries = settings.data.features if on_features(settings) else settings.data.stores
    return any(file.exists() for entry in entries for file in expand_store_paths(entry))


def load_as_a_run(
    settings: Settings, task: Task, problems: Path, slides: Iterable[Slide]
) -> list[LabelledSlide]:
    """The cohort as a run takes it in, and the task fitted to its training slides.

    Where no store is there, a file of features stands in that has every slide of the table, so that
    the rules for tables and splits are still those of a run.
    """
    data, stood_in = settings.data, not has_store(settings)
    with tempfile.TemporaryDirectory() as folder:
        if stood_in:
            with h5py.File(Path(folder) / "features.h5", "w") as file:
                for k, slide in enumerate(slides):
                    # As many rows as no other has, since no two are copies; none is written.
                    file.create_dataset(f"{slide.id}/feat", (1 + k, 1), np.float32)
            data = replace(data, features=[f"{folder}/features.h5"], scales=[])
        features = stood_in or on_features(settings)
        asked = replace(settings, data=data)
        items, left_out = load_slides(
            asked,
            task,
            features=features,
            problems_file=problems,
            protocol=PROTOCOLS[settings.run.protocol],
        )
    fit_task(settings, task, items)
    if left_out:
        Screen(True).say(f"NOTE {len(left_out)} left out (data.unmatched=drop): {problems}")
    return items


def check_model(settings: Settings, task: Task, items: list[LabelledSlide]) -> None:
    """UserError where a run on one process would be refused before its first step; no weights are fetched."""
    device, two_stage = pick_device(settings.engine.device), on_features(settings)
    parts = make_parts(
        settings,
        task,
        items,
        device,
        trained=True,
        problems=[],
        features=describe_features(items) if two_stage else None,
    )
    check_training(settings, parts, device, world_size=1)


def describe_table(data: Data, task: Task, slides: Sequence[Slide]) -> list[str]:
    """What each column is taken for, and the words in it, of slides or of cases as ``data.unit`` is."""
    columns = data.columns
    split = f"{data.split_file}, fold {data.fold}" if data.split_file else columns.split
    case = columns.case or "none, each row is a case"
    centre = f"; centre: {columns.centre}" if columns.centre else ""
    units = {slide.case if data.unit == "case" else slide.id: slide for slide in slides}
    lines = [
        f"{data.labels}: {len(slides):,} slides, {len({s.case for s in slides}):,} cases",
        f"  slide: {columns.slide}; case: {case}; split: {split or 'none, see data.cut'}{centre}",
    ]
    for column in task.columns:
        found = Counter(slide.target[column] for slide in units.values())
        words = {word: f"'{word}'" if word else "(blank)" for word in sorted(found)}
        shown = ", ".join(f"{told} {found[word]:,}" for word, told in words.items())
        if len(found) > MANY:
            shown = f"{len(found):,} different, such as {', '.join(list(found)[:3])}"
        lines.append(f"  {column}: {shown}")
    return lines


def slides_of(item: LabelledSlide) -> int:
    """Slides in a bag."""
    return len(item.store.parts) if isinstance(item.store, CaseStore) else 1


def describe_splits(items: Sequence[LabelledSlide], task: Task, *, patches: bool) -> list[str]:
    """A line for each split: slides, cases, patches, targets."""
    lines = []
    for split in SPLITS:
        own = [item for item in items if item.slide.split == split]
        cases = len({item.slide.case for item in own})
        count = sum(item.store.num_patches(item.slide.id) for item in own) if patches else 0
        lines.append(
            f"{split:5}  {sum(map(slides_of, own)):,} slides, {cases:,} cases"
            + (f", {count:,} patches" if patches else "")
            + (f": {task.describe([item.target for item in own])}" if own else "")
        )
    return lines


def describe_sites(
    items: Sequence[LabelledSlide], sites: Mapping[str, str], task: Task
) -> list[str]:
    """A line for each centre, the largest first: its cases in each split, and their targets."""
    own: dict[str, list[LabelledSlide]] = {}
    for item in items:
        own.setdefault(sites[item.slide.case], []).append(item)
    lines = []
    for site, found in sorted(own.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        cases = {split: {i.slide.case for i in found if i.slide.split == split} for split in SPLITS}
        counts = ", ".join(f"{split} {len(cases[split]):,}" for split in SPLITS)
        targets = task.describe([item.target for item in found])
        lines.append(f"  {site or '(no word)'}: cases {counts}; {targets}")
    torn = sum(len({item.slide.split for item in found}) > 1 for found in own.values())
    head = f"{len(own)} centres, {torn} of them in more than one split"
    rest = [f"  ... and {len(lines) - MANY} smaller ones"] if len(lines) > MANY else []
    return [head, *lines[:MANY], *rest]


def case_sites(slides: Sequence[Slide], site: str) -> dict[str, str]:
    """Case -> its centre, or its centres."""
    if site == TCGA:
        return tcga_sites({slide.case for slide in slides})
    found: dict[str, set[str]] = {}
    for slide in slides:
        found.setdefault(slide.case, set()).add(slide.centre)
    return {case: join_words(words) for case, words in found.items()}


def same_patients(items: Sequence[LabelledSlide]) -> list[str]:
    """Patients by TCGA barcode in more than one split, whatever the table calls their cases."""
    splits: dict[str, set[str]] = {}
    for item in items:
        if item.slide.id.startswith("TCGA-"):
            splits.setdefault(item.slide.id[:12], set()).add(item.slide.split)
    return [f"{who}: {', '.join(sorted(s))}" for who, s in sorted(splits.items()) if len(s) > 1]


def describe_mpp(items: Sequence[LabelledSlide]) -> str:
    """How fine the patches are, and of how many bags nobody knows."""
    known = [item.record.mpp for item in items]
    values = sorted({mpp for mpp in known if mpp is not None})
    ends = " to ".join(f"{mpp:.4g}" for mpp in values[:: max(1, len(values) - 1)])
    missing = known.count(None)
    told = f"um per pixel: {ends or 'unknown'}"
    return told + (f"; {missing:,} of {len(items):,} do not say" if missing and values else "")


def describe_needs(settings: Settings, items: Sequence[LabelledSlide]) -> list[str]:
    """Disk and memory, from the counts and the sizes of the files."""
    data, counts = settings.data, [item.store.num_patches(item.slide.id) for item in items]
    if on_features(settings):
        width = describe_features(items)["width"]
        return [
            f"memory: all features {show_bytes(4 * width * sum(counts))} ({sum(counts):,} x {width} x 4 "
            f"bytes), the largest bag {show_bytes(4 * width * max(counts))}; data.cache={data.cache}"
        ]
    files = {
        f for entries in (data.stores, *data.scales) for e in entries for f in expand_store_paths(e)
    }
    first = sum(f.stat().st_size for entry in data.stores for f in expand_store_paths(entry))
    disk, patch = sum(file.stat().st_size for file in files), first / sum(counts)
    bag = min(settings.bag.patches or max(counts), max(counts))
    update = settings.optim.bags * bag * patch
    return [
        f"disk: {show_bytes(disk)} (the files; {patch / 1000:.1f} kB a patch)",
        f"memory: an update {show_bytes(update)} of JPEGs ({settings.optim.bags} bags of at most {bag:,} "
        f"patches), the largest bag {show_bytes(max(counts) * patch)}",
        *describe_chunks(settings, items[0].record.patch_px),
        f"  reads are random: fastest where the whole store fits beside it; "
        f"{show_bytes(free_memory(pick_device('cpu')))} are free here",
    ]


def guess_needs(settings: Settings, slides: int, patches: int) -> list[str]:
    """The same without a store, for so many patches a slide."""
    packing = argparse.ArgumentParser()
    packing.add_argument("--patch-size", type=int, default=Tiling().patch_px)
    side = packing.parse_known_args(shlex.split(settings.data.pack))[0].patch_size
    patch = BYTES_A_PIXEL * side**2
    return [
        f"disk: about {show_bytes(slides * patches * patch)}, if a slide has {patches:,} patches (--patches)"
        f" of {side} px at {patch / 1000:.1f} kB ({BYTES_A_PIXEL} bytes a pixel)",
        *describe_chunks(settings, side),
    ]


def describe_chunks(settings: Settings, stored: int) -> list[str]:
    """The decoded pixels."""
    side, chunk = settings.bag.size or stored, settings.engine.chunk
    return [
        f"  pixels {show_bytes(CHUNKS * chunk * 3 * side**2)} ({CHUNKS} chunks of {chunk} patches, "
        f"3 x {side} x {side} bytes); what the network itself takes comes on top"
    ]


def report(args: argparse.Namespace, settings: Settings, task: Task, screen: Screen) -> None:
    """Read, check as a run does, print; without the next step."""
    site, real = args.site or settings.data.columns.centre, has_store(settings)
    slides = table_slides(settings.data, task.columns, site)
    for line in describe_table(settings.data, task, slides):
        screen.say(line)
    items = load_as_a_run(settings, task, args.problems, slides)
    if real and on_features(settings):
        check_values(items, screen)
    lines = describe_splits(items, task, patches=real)
    if site:
        lines += describe_sites(items, case_sites(slides, site), task)
    looked = "nor do two splits share a slide's patches" if real else "patches are not compared"
    lines.append(f"leakage: no case lies in two splits; {looked}")
    if torn := same_patients(items):
        lines.append(f"NOTE {len(torn)} TCGA patients lie in two splits\n{format_list(torn)}")
    if real:
        lines += [describe_mpp(items), *describe_needs(settings, items)]
    else:
        lines += guess_needs(settings, sum(map(slides_of, items)), args.patches)
    for line in lines:
        screen.say(line)
    if real:
        with process_settings(settings):
            check_model(settings, task, items)


def main(argv: Sequence[str] | None = None) -> int:
    """Look the cohort over, and say what to do next."""
    args, screen = parse(argv), Screen(is_leader=True)
    settings, command = common_settings(args, REGISTRIES)
    data, task = settings.data, build_task(settings.task)
    alone = Path(data.labels).is_file() and not has_store(settings)
    try:
        two_stage = on_features(settings)
        require_files(data, settings.names["datasets"], task.columns, features=two_stage)
        missing = ""
    except UserError as error:
        if not alone:
            raise
        missing = str(error)
    report(args, settings, task, screen)
    if alone:
        screen.say(f"the table is in order; next: {missing}")
    else:
        screen.say(f"next: torchrun launch/train.py {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
