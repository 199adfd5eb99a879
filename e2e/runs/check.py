"""Check a cohort before a run: its table, stores or features, splits, and the memory it needs."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from e2e.bags.spec import LabelledSlide
from e2e.cohort.describe import (
    case_sites,
    describe_mpp,
    describe_sites,
    describe_splits,
    describe_table,
    find_tcga_patients_in_two_splits,
    num_slides,
)
from e2e.cohort.features import check_values, describe_features
from e2e.cohort.folds import TCGA
from e2e.cohort.readers import require_files
from e2e.cohort.table import read_table, summarise_problems
from e2e.engine.peak_memory import CHUNKS_OF_PIXELS
from e2e.errors import UserError, format_list
from e2e.log import Screen
from e2e.memory import free_memory
from e2e.parallel import pick_device
from e2e.runs.cohort import cohort_spec, id_rules
from e2e.runs.parts import (
    PROTOCOLS,
    REGISTRIES,
    build_task,
    check_training,
    fit_task,
    load_slides,
    make_parts,
    on_features,
)
from e2e.runs.session import process_settings
from e2e.runs.summary import describe_memory
from e2e.settings.arguments import common_settings
from e2e.settings.data_cli import check_parser
from e2e.settings.schema import Data, Settings
from e2e.sizes import show_bytes
from e2e.slides import Slide
from e2e.store.open import expand_store_paths
from e2e.tasks.base import Task
from e2e.wsi.tiling import Tiling

BYTES_PER_PIXEL = 0.25
"""Of a stored patch: 16.0 and 17.8 kB for 256 px of two real H&E slides, JPEG quality 80, 0.5 um/px."""


def read_slides(data: Data, targets: Sequence[str], site: str | None) -> list[Slide]:
    """Read all slides of the label table, without their splits.

    Parameters
    ----------
    data
        The settings of the cohort.
    targets
        Columns to read.
    site
        Column of the centre; None or ``tcga`` if there is none.

    Returns
    -------
    list of Slide
        The slides, with empty splits.

    Raises
    ------
    UserError
        The table cannot be read, or has no row that can be used.
    """
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
        rules=id_rules(data),
    )
    if not slides:
        raise UserError(
            f"{data.labels} has no row that can be used\n"
            f"{format_list(summarise_problems(problems))}\n  correct the table"
        )
    return slides


def has_data(settings: Settings) -> bool:
    """Return whether any patch store, or any features, of the cohort exist."""
    entries = settings.data.features if on_features(settings) else settings.data.stores
    return any(file.exists() for entry in entries for file in expand_store_paths(entry))


def load_like_a_run(
    settings: Settings, task: Task, problems_file: Path, slides: Iterable[Slide]
) -> list[LabelledSlide]:
    """Load the cohort as a run does, and fit the task to its training slides.

    Without a store, an empty file of features takes its place that has every slide of the table, so
    that the rules for tables and splits are still those of a run.

    Parameters
    ----------
    settings
        The settings of the run.
    task
        The task, which is fitted here.
    problems_file
        Where unusable rows and slides are listed.
    slides
        All slides of the label table.

    Returns
    -------
    list of LabelledSlide
        The slides that a run would use.

    Raises
    ------
    UserError
        A run would be refused.
    """
    data, is_placeholder = settings.data, not has_data(settings)
    with tempfile.TemporaryDirectory() as folder:
        if is_placeholder:
            with h5py.File(Path(folder) / "features.h5", "w") as file:
                for k, slide in enumerate(slides):
                    # A different number of rows for each, since no two are copies; none is written. Not
                    # zeros: these are what a file has that was not written to its end.
                    file.create_dataset(f"{slide.id}/feat", (1 + k, 1), np.float32, fillvalue=1)
            data = replace(data, features=[f"{folder}/features.h5"], scales=[])
        items, _ = load_slides(
            replace(settings, data=data),
            task,
            features=is_placeholder or on_features(settings),
            problems_file=problems_file,
            protocol=PROTOCOLS[settings.run.protocol],
        )
    fit_task(settings, task, items)
    return items


def check_model(settings: Settings, task: Task, items: list[LabelledSlide]) -> list[str]:
    """Build the model, without pretrained weights, and check that training could start.

    Parameters
    ----------
    settings
        The settings of the run.
    task
        The fitted task.
    items
        The slides of the cohort.

    Returns
    -------
    list of str
        The peak memory of training in one process; see :func:`e2e.runs.summary.describe_memory`.

    Raises
    ------
    UserError
        A run on one process would be refused before its first update.
    """
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
    return describe_memory(settings, parts, device, world_size=1)


def describe_needs(settings: Settings, items: Sequence[LabelledSlide]) -> list[str]:
    """Describe the disk space and memory of a run, from the patch counts and the sizes of the files.

    Parameters
    ----------
    settings
        The settings of the run.
    items
        The slides of the cohort.

    Returns
    -------
    list of str
        The lines to print.
    """
    data, counts = settings.data, [item.reader.num_patches(item.slide.id) for item in items]
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
        f"disk: {show_bytes(disk)} (size of the files; {patch / 1000:.1f} kB per patch)",
        f"memory: an update {show_bytes(update)} of JPEGs ({settings.optim.bags} bags of at most {bag:,} "
        f"patches), the largest bag {show_bytes(max(counts) * patch)}",
        "  reads are random, so they are fastest if the whole store fits into free memory: "
        f"{show_bytes(free_memory(pick_device('cpu')))} on this machine",
    ]


def estimate_needs(settings: Settings, slides: int, patches: int) -> list[str]:
    """Estimate the disk space and memory of a run whose store does not exist yet.

    Parameters
    ----------
    settings
        The settings of the run; the patch size is that of ``data.pack``.
    slides
        Number of slides.
    patches
        Patches per slide.

    Returns
    -------
    list of str
        The lines to print.
    """
    packing = argparse.ArgumentParser()
    packing.add_argument("--patch-size", type=int, default=Tiling().patch_px)
    side = packing.parse_known_args(shlex.split(settings.data.pack))[0].patch_size
    patch = BYTES_PER_PIXEL * side**2
    shown, chunk = settings.bag.size or side, settings.engine.chunk
    return [
        f"disk: about {show_bytes(slides * patches * patch)}, if a slide has {patches:,} patches (--patches)"
        f" of {side} px at {patch / 1000:.1f} kB ({BYTES_PER_PIXEL} bytes per pixel)",
        f"memory: pixels {show_bytes(CHUNKS_OF_PIXELS * chunk * 3 * shown**2)} ({CHUNKS_OF_PIXELS} chunks of "
        f"{chunk} patches, 3 x {shown} x {shown} bytes), in addition to the network",
    ]


def report(args: argparse.Namespace, settings: Settings, task: Task, screen: Screen) -> None:
    """Load the cohort, print what it holds, and check the model.

    Parameters
    ----------
    args
        The command line.
    settings
        The settings of the run.
    task
        The task, which is fitted here.
    screen
        Where the report is printed.

    Raises
    ------
    UserError
        A run would be refused.
    """
    site, with_data = args.site or settings.data.columns.centre, has_data(settings)
    slides = read_slides(settings.data, task.columns, site)
    for line in describe_table(cohort_spec(settings.data), task, slides):
        screen.say(line)
    items = load_like_a_run(settings, task, args.problems, slides)
    # With "drop" all features were read when the cohort was loaded.
    if with_data and on_features(settings) and settings.data.unmatched != "drop":
        check_values(items, screen)
    lines = describe_splits(items, task, count_patches=with_data)
    if site:
        lines += describe_sites(items, case_sites(slides, site), task)
    compared = (
        "no slide's patches are in two splits" if with_data else "patches have not been compared"
    )
    lines.append(f"leakage: no case is in two splits; {compared}")
    if patients := find_tcga_patients_in_two_splits(items):
        lines.append(
            f"warning: {len(patients)} TCGA patients are in two splits\n{format_list(patients)}"
        )
    if with_data:
        lines += [describe_mpp(items), *describe_needs(settings, items)]
    else:
        lines += estimate_needs(settings, sum(map(num_slides, items)), args.patches)
    for line in lines:
        screen.say(line)
    if with_data:
        with process_settings(settings):
            for line in check_model(settings, task, items):
                screen.say(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the cohort, and print the next command.

    Parameters
    ----------
    argv
        The arguments; None for those of the process.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UserError
        A run would be refused.
    """
    args, screen = check_parser().parse(argv), Screen(is_leader=True)
    settings, command = common_settings(args, REGISTRIES)
    data, task = settings.data, build_task(settings.task)
    table_alone = Path(data.labels).is_file() and not has_data(settings)
    try:
        spec = cohort_spec(data, name=settings.names["datasets"])
        require_files(spec, task.columns, features=on_features(settings))
        missing = ""
    except UserError as error:
        if not table_alone:
            raise
        missing = str(error)
    report(args, settings, task, screen)
    if table_alone:
        screen.say(f"the label table is in order; next: {missing}")
    else:
        screen.say(f"next: e2e train {shlex.join(command)}")
    return 0
