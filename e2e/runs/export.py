"""Export a trained run as a model for others: weights, settings and a model card, without its data."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from e2e.engine.model import MILModel
from e2e.errors import UserError, describe_interrupt
from e2e.files import read_json, write_atomically
from e2e.reports.card import ModelFacts, count_slides, write_card
from e2e.reports.evaluate import main_metrics
from e2e.runs.folder import BEST, COHORT, FEATURES, TASK, load_task, open_run
from e2e.runs.parts import REGISTRIES, build_model, on_features, selected_weights
from e2e.runs.recipes import RECIPES, packing_recipe, recorded_patches
from e2e.settings.cli import export_parser
from e2e.settings.layers import dump_settings, saved_settings
from e2e.settings.schema import Data, Engine, Plugin, Run, Settings
from e2e.tasks.base import Task
from e2e.training.checkpoint import add_prefix, check_weights, load_checkpoint, select_prefix


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e export`` and return its exit code."""
    args = export_parser().parse(argv)
    with describe_interrupt(lambda: "interrupted; the same command with --overwrite exports again"):
        with open_run(args.run) as folder:
            export(folder, args.out, licence=args.license, overwrite=args.overwrite)
        print(f"exported: {args.out}")
        if args.hub:
            print(f"uploaded: {upload(args.out, args.hub)}")
    return 0


def export(folder: Path, out: Path, *, licence: str = "", overwrite: bool = False) -> None:
    """Export the selected weights of a run.

    The files are those of a run folder that a prediction needs: settings.yaml without paths, task.json,
    recipes.json or features.json, best.safetensors, metrics.json, and README.md, the model card. They hold
    no ids of slides or cases.

    Parameters
    ----------
    folder : Path
        The run folder.
    out : Path
        A folder, or a file that ends in ``.zip``.
    licence : str
        SPDX identifier of the licence for the card, such as ``cc-by-nc-4.0``.
    overwrite : bool
        Whether to replace an earlier export.

    Raises
    ------
    UserError
        The run has not selected an epoch, its weights do not fit its settings, or ``out`` exists.
    """
    _check_is_free(out, overwrite=overwrite)
    files = _exported_files(folder, licence)
    if out.suffix == ".zip":
        write_atomically(out, _as_zip(files))
        return
    for name, content in files.items():
        write_atomically(out / name, content)


def upload(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hugging Face hub, in a private repository.

    Parameters
    ----------
    folder : Path
        The exported folder.
    repository : str
        ``user/name``; created if it does not exist.

    Returns
    -------
    str
        The address of the repository.

    Raises
    ------
    UserError
        The folder is a file, there is no login, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi  # takes a second

    if not folder.is_dir():
        raise UserError(
            f"{folder} cannot be uploaded: --hub needs a folder\n  set --out to a folder"
        )
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # whatever the client's HTTP library raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{folder} is complete, but could not be uploaded to {repository}: {reason}\n"
            f"  log in with `hf auth login`; then: hf upload {repository} {folder}"
        ) from error
    return str(url)


def _check_is_free(out: Path, *, overwrite: bool) -> None:
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not overwrite:
        raise UserError(f"{out} exists\n  choose another --out, or replace it with --overwrite")


def _exported_files(folder: Path, licence: str) -> dict[str, bytes]:
    """Return file name -> content of the export."""
    settings = saved_settings(folder, [], REGISTRIES)
    tensors, state = load_checkpoint(folder / BEST)
    kind = selected_weights(settings.optim, settings.select)
    weights = select_prefix(kind, tensors)
    task = load_task(settings.task.name, settings.task.options, folder).for_weights(kind)
    features = _read_json(folder / FEATURES)
    model = build_model(
        settings, task, torch.device("cpu"), trained=True, width=features.get("width")
    )
    check_weights({k: v.shape for k, v in model.state_dict().items()}, weights, folder / BEST)
    metrics = _read_json(folder / "metrics.json")
    facts = _card_facts(settings, folder, task, model, metrics, features, licence)
    # They hold the names of centres, and of rows of the label table.
    metrics.pop("left_out", None)
    for split in ("val", "test"):
        metrics.get(split, {}).pop("centres", None)
    files = {
        "settings.yaml": dump_settings(_without_places(settings)).encode(),
        TASK: (folder / TASK).read_bytes(),
        BEST: save(add_prefix(kind, weights), {"state": json.dumps(_public_state(state))}),
        "README.md": write_card(facts).encode(),
    }
    if metrics:
        files["metrics.json"] = (json.dumps(metrics, indent=2) + "\n").encode()
    name, content = (FEATURES, features) if features else (RECIPES, _recipes(folder, settings.data))
    return files | {name: (json.dumps(content, indent=2) + "\n").encode()}


def _public_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in ("best_epoch", "best")}


def _recipes(folder: Path, data: Data) -> dict[str, Any]:
    """Return the content of recipes.json, also for a run of an earlier version."""
    return _read_json(folder / RECIPES) or {
        "recipes": [packing_recipe(folder, data)],
        "patches": [],
    }


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _without_places(settings: Settings) -> Settings:
    """The settings without paths, and without what belongs to the machine that trained."""
    data, engine, run = settings.data, settings.engine, settings.run
    return replace(
        settings,
        data=replace(
            Data(), columns=data.columns, unit=data.unit, bgr=data.bgr, source=data.source
        ),
        engine=replace(
            Engine(), chunk=engine.chunk, batch_norm=engine.batch_norm, precision=engine.precision
        ),
        run=replace(Run(), seed=run.seed, protocol=run.protocol),
        **{
            name: _without_folders(getattr(settings, name))
            for name in ("encoder", "head", "task", "sampler", "augment")
        },
        names={key: Path(name).stem for key, name in settings.names.items()},
    )


def _without_folders(plugin: Plugin) -> Plugin:
    """The plug-in with the names alone of the files in its options."""
    options = {
        key: Path(value).name if isinstance(value, str) and "/" in value else value
        for key, value in plugin.options.items()
    }
    return Plugin(plugin.name, options)


def _card_facts(
    settings: Settings,
    folder: Path,
    task: Task,
    model: MILModel,
    metrics: Mapping[str, Any],
    features: Mapping[str, Any],
    licence: str,
) -> ModelFacts:
    names = {key: Path(name).stem for key, name in settings.names.items()}
    cohort = folder / COHORT
    return ModelFacts(
        name=names.get("model", settings.head.name),
        task=settings.task.name,
        outputs=task.prediction_columns,
        encoder=settings.encoder.name,
        head=settings.head.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        origin=_origin(settings, model),
        inputs=_describe_features(features)
        if on_features(settings)
        else _describe_patches(folder, settings.bag.size),
        cohort=names.get("datasets", ""),
        source=settings.data.source,
        slides=count_slides(cohort) if cohort.is_file() else {},
        report=metrics,
        metrics=main_metrics(task),
        licence=licence,
    )


def _origin(settings: Settings, model: MILModel) -> str:
    """What the weights of the encoder started from."""
    options = settings.encoder.options
    if on_features(settings):
        return "the head alone; the licence of the encoder of its features holds for its use"
    if options.get("weights"):
        return f"the encoder started from the file {Path(options['weights']).name}"
    if options.get("pretrained"):
        licence = model.encoder.licence or "unknown: look at their model card"
        return f"the encoder started from published weights of {settings.encoder.name} (licence: {licence})"
    return "trained from random weights"


def _describe_features(features: Mapping[str, Any]) -> str:
    encoder = features.get("encoder") or "an encoder that the files do not name"
    return f"features of width {features['width']} from {encoder}"


def _describe_patches(folder: Path, size: int | None) -> str:
    kinds = recorded_patches(folder)
    shown = ", ".join(map(str, kinds)) or "a size that the run did not record"
    return f"slides, cut into patches of {shown}" + (f", resized to {size} px" if size else "")


def _as_zip(files: Mapping[str, bytes]) -> bytes:
    """Return an archive of the files, not compressed: weights hardly shrink."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, value in files.items():
            archive.writestr(
                zipfile.ZipInfo(name), value
            )  # without times: the same run, the same bytes
    return content.getvalue()
