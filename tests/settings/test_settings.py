"""Settings: the layers and who wins, and one clear message for every mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2e.errors import UserError
from e2e.runs.parts import REGISTRIES, build_model, build_schedule, build_task
from e2e.settings.arguments import settings_from_args
from e2e.settings.cli import settings_help, train_parser
from e2e.settings.configs import config_folder
from e2e.settings.layers import (
    dump_settings,
    load_settings,
    saved_settings,
    split_model_name,
)
from e2e.settings.schema import SECTIONS, Settings


def load(*overrides: str, files=(), datasets="panda", model="e2e_r18_abmil") -> Settings:
    return load_settings(
        datasets=datasets,
        model=model,
        files=[str(file) for file in files],
        overrides=overrides,
        registries=REGISTRIES,
    )


def message(*overrides: str, **options) -> str:
    with pytest.raises(UserError) as error:
        load(*overrides, **options)
    return str(error.value)


@pytest.fixture
def layer(tmp_path):
    def write(text: str, name: str = "layer.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


# --- layers ---


def test_later_layers_win(layer):
    one = layer("optim: {lr: 0.5, epochs: 7}\nbag: {patches: 9}", "one.yaml")
    two = layer("optim: {lr: 0.25}", "two.yaml")
    assert load().optim.lr == 2e-4  # the default
    assert load(files=[one]).optim.lr == 0.5
    assert load(files=[one, two]).optim.lr == 0.25
    assert load(files=[two, one]).optim.lr == 0.5
    last = load("optim.lr=1e-3", files=[one, two])
    assert (last.optim.lr, last.optim.epochs, last.bag.patches) == (1e-3, 7, 9)
    assert load("optim.lr=1e-3", "optim.lr=1e-2").optim.lr == 1e-2


def test_the_datasets_layer_and_the_model_layer_are_read():
    settings = load(model="e2e_r18_abmilx")
    assert settings.names == {"datasets": "panda", "model": "e2e_r18_abmilx"}
    assert settings.task.name == "grading"
    assert settings.task.options["classes"] == list("012345")
    assert settings.data.columns.split == "fold"
    assert (settings.encoder.name, settings.head.name) == ("r18", "abmilx")
    assert settings.optim.epochs == 200


def test_layers_may_be_files_anywhere(layer):
    data = layer(
        "data: {labels: a.csv, stores: [b.lmdb]}\ntask: {name: classification, classes: [a, b]}"
    )
    model = layer("encoder: {name: r50}\nhead: {name: mean}", "m.yml")
    settings = load(datasets=str(data), model=str(model))
    assert (settings.data.labels, settings.encoder.name, settings.head.name) == (
        f"{data.parent}/a.csv",
        "r50",
        "mean",
    )


def test_a_dotted_key_reaches_any_depth():
    settings = load("data.columns.case=null", "data.cut.val=0.25", "data.stores=[a.lmdb,b.lmdb]")
    assert settings.data.columns.case is None
    assert settings.data.columns.slide == "slide"
    assert settings.data.cut.val == 0.25
    assert settings.data.stores == ["a.lmdb", "b.lmdb"]
    assert load("data.labels=folder with space/a=b.csv").data.labels == "folder with space/a=b.csv"


def test_naming_another_plugin_drops_the_options_of_the_one_before(layer):
    first = layer("head: {name: abmilx, ffn: true, heads: 8}")
    settings = load("head.name=abmil", "head.attn_dim=64", files=[first])
    assert settings.head.name == "abmil"
    assert settings.head.options["attn_dim"] == 64
    assert not {"ffn", "heads"} & settings.head.options.keys()


def test_options_given_before_any_name_hold_for_the_name_in_the_end(layer):
    only = layer("head: {embed_dim: 96}")
    data = layer(
        "data: {labels: a.csv}\ntask: {name: grading, classes: [a, b]}\nhead: {dropout: 0.5}",
        "d.yaml",
    )
    settings = load("head.name=mean", files=[only], datasets=str(data), model="e2e_r18_mean")
    assert settings.head.options["embed_dim"] == 96
    assert settings.head.options["dropout"] == 0.5


def test_a_plugins_options_have_the_constructors_defaults():
    for section in ("encoder", "head"):
        plugin = getattr(load(), section)
        options = REGISTRIES[section].options(plugin.name)
        assert plugin.options == {name: default for name, (_, default) in options.items()}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("e2e_r18_abmil", ("r18", "abmil")),
        ("e2e_r18_clam_sb", ("r18", "clam_sb")),
        ("e2e_vit_small_patch16_abmil", ("vit", "small_patch16_abmil")),
    ],
)
def test_a_models_name_is_cut_at_the_first_two_underscores(name, parts):
    assert split_model_name(name) == parts


@pytest.mark.parametrize("name", ["e2e_r18", "r18_abmil", "e2e__abmil", "e2e_r18_", "abmil", ""])
def test_other_names_are_no_models(name):
    with pytest.raises(UserError, match=r"unknown model '.*(?s:.*)or e2e_<encoder>_<head>"):
        split_model_name(name)


def test_a_wrong_part_of_a_models_name_is_told_as_such():
    assert "unknown head 'abmlx'; did you mean 'abmilx'?" in message(model="e2e_r18_abmlx")
    assert "unknown head 'clam_xl'" in message(model="e2e_r18_clam_xl")
    assert "unknown encoder 'r19'; did you mean 'r18'?" in message(model="e2e_r19_abmil")


# --- mistakes ---

WRONG = {
    "optim.lrr=1": ("unknown setting 'optim.lrr'; did you mean 'lr'?", "available: bags, balance"),
    "optm.lr=1": ("unknown section 'optm'; did you mean 'optim'?", "available: aem, augment, bag"),
    "data.columns.slid=x": ("unknown setting 'data.columns.slid'; did you mean 'slide'?",),
    "data.cut.vall=0.1": ("unknown setting 'data.cut.vall'; did you mean 'val'?",),
    "head.attn_dims=3": ("unknown setting 'head.attn_dims'; did you mean 'attn_dim'?",),
    "encoder.wieghts=x": ("unknown setting 'encoder.wieghts'; did you mean 'weights'?",),
    "names.model=x": ("unknown section 'names'",),
    "head.name=abml": ("unknown head 'abml'; did you mean 'abmil'?",),
    "optim.lr=abc": ("setting optim.lr must be a number, found 'abc'",),
    "optim.epochs=2.5": ("setting optim.epochs must be a whole number, found '2.5'",),
    "optim.epochs=true": ("setting optim.epochs must be a whole number, found 'true'",),
    "optim.epochs=": ("setting optim.epochs must be a whole number, found ''",),
    "bag.copies=1": ("setting bag.copies must be true or false, found '1'",),
    "augment.blur_sigma=[0.1,x]": ("setting augment", "'x'"),
    "optim.epochs=null": ("setting optim.epochs must have a value, found null",),
    "optim.lr.x=3": ("setting optim.lr must be a number, found ",),
    "bag.copies=maybe": ("setting bag.copies must be true or false, found 'maybe'",),
    "bag.crop=0.5": ("bag.crop is now augment.crop",),
    "run.wandb=true": ("run.wandb is now run.track=[wandb]",),
    "run.track=[tensorbord]": ("setting run.track must be some of", "'tensorbord'"),
    "data.scales=[[x.lmdb]]": ("setting bag.shares must be 2 numbers, for data.stores and each",),
    "data.slide_separator=''": (
        "setting data.slide_separator must be null, or a sign such as ';'",
    ),
    "augment.crop=wide": ("setting augment.crop must be a number", "'wide'"),
    "augment.name=stong": ("unknown augmentation 'stong'; did you mean 'strong'?",),
    "sampler.tpo=1": ("unknown setting 'sampler.tpo'",),
    "bag.patches=12.5": ("setting bag.patches must be a whole number", "12.5"),
    "head.attn_dim=wide": ("setting head.attn_dim must be a whole number", "'wide'"),
    "task.classes=a": ("setting task.classes must be a list, such as [a,b]",),
    "data.stores=x": ("setting data.stores must be a list, such as [a,b]",),
    "optim.lr=-1": ("setting optim.lr must be greater than 0 and finite, found -1.0",),
    "optim.encoder_lr=0": ("setting optim.encoder_lr must be greater than 0 or null", "found 0.0"),
    "optim.layer_decay=1.5": ("setting optim.layer_decay must be in (0, 1], found 1.5",),
    "optim.layer_decay=0": ("setting optim.layer_decay must be in (0, 1], found 0.0",),
    "engine.cuda_graphs=true": (
        "setting engine.cuda_graphs must be false, or set engine.compile=true, found True",
    ),
    "engine.cuda_graphs=true engine.compile=true engine.strategy=fsdp": (
        "setting engine.cuda_graphs must be false with engine.strategy=fsdp",
    ),
    "run.bootstrap=-1": ("setting run.bootstrap must be at least 0, found -1",),
    "run.heatmaps=-1": ("setting run.heatmaps must be at least 0 or null, found -1",),
    "run.save_every=-1": ("setting run.save_every must be at least 0, found -1",),
    "optim.bags=0": ("setting optim.bags must be at least 1, found 0",),
    "optim.ema=1": ("setting optim.ema must be in [0, 1), found 1.0",),
    "optim.clip=0": ("setting optim.clip must be greater than 0 or null, found 0.0",),
    "bag.patches=0": ("setting bag.patches must be greater than 0 or null, found 0",),
    "bag.shares=[3,1]": (
        "setting bag.shares must be empty without data.scales",
        "found [3.0, 1.0]",
    ),
    "bag.shares=[1,0]": ("setting bag.shares must be greater than 0 and finite",),
    "select.cache=big": ("setting select.cache must be a size such as 8GiB, found 'big'",),
    "data.cut.val=2": ("setting data.cut.val must be in [0, 1), found 2.0",),
    "data.splits.train=dev": ("setting data.splits must be train, val or test, found 'dev'",),
    "data.unmatched=skip": ("setting data.unmatched must be error or drop, found 'skip'",),
    "engine.chunk=0": ("setting engine.chunk must be at least 1, found 0",),
    "engine.batch_norm=foo": ("setting engine.batch_norm must be auto or frozen or chunk or sync",),
    "engine.precision=fp16": ("setting engine.precision must be auto or fp32 or tf32 or bf16",),
    "engine.keep_graphs=lots": (
        "engine.keep_graphs must be auto, none, all or a size such as 8GiB",
    ),
    "engine.keep=png": ("setting engine.keep must be jpeg or uint8 or float",),
    "engine.shard=yes": ("setting engine.shard must be auto or slide or bag",),
    "engine.strategy=fsdp1": ("setting engine.strategy must be auto or ddp or fsdp or deepspeed",),
    "engine.max_bad_steps=0": ("setting engine.max_bad_steps must be at least 1, found 0",),
    "select.weights=best": ("setting select.weights must be auto or model or ema",),
    "select.patience=0": ("setting select.patience must be greater than 0 or null, found 0",),
    "data.stores=[[a]]": ("setting data.stores must be a list of single values, found [['a']]",),
    "task.classes=[[a],b]": ("setting task.classes must be a list of single values",),
    "optim.weight_decay=inf": ("setting optim.weight_decay must be at least 0 and finite",),
    "optim.warmup_epochs=inf": ("setting optim.warmup_epochs must be at least 0 and finite",),
    "run.seed=9223372036854775808": ("setting run.seed must be a 63-bit integer",),
    "optim.lr": ("'optim.lr' is not a setting; write section.key=value",),
    "lr=3": ("'lr=3' is not a setting; write section.key=value",),
    "head=mean": ("'head=mean' is not a setting",),
}


@pytest.mark.parametrize("override", WRONG)
def test_a_mistake_is_one_message_with_its_dotted_path(override):
    text = message(*override.split(" "))
    for expected in WRONG[override]:
        assert expected in text
    assert len(text.splitlines()) <= 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("engine.batch_norm=frozen engine.cuda_graphs=true", "needs a CUDA device"),
        ("engine.batch_norm=chunk", "does not work with engine.batch_norm=chunk"),
    ],
)
def test_a_compiled_encoder_is_refused_where_it_would_be_wrong(overrides, expected):
    settings = load("engine.compile=true", *overrides.split(" "))
    with pytest.raises(UserError, match=expected):
        build_model(settings, build_task(settings.task), torch.device("cpu"), trained=True)


def test_a_word_where_keys_belong_is_told_as_such():
    assert "data.columns" in message("data.columns=x").removeprefix("data.columns=x")


@pytest.mark.parametrize("override", ["optim.lr=[1", "data.labels=[x", "data.labels=${nothing}"])
def test_what_yaml_or_omegaconf_cannot_read_is_a_message(override):
    with pytest.raises(UserError):
        load(override)


def test_keys_where_a_list_belongs_are_told_as_such(layer):
    text = message(files=[layer("task: {classes: {a: b}}")])
    assert "task" in text
    assert "classes" in text


@pytest.mark.parametrize("text", ["2024_01", "1e5", "0012", "yes", "1:30", "2026-11-22", ""])
def test_text_is_kept_as_typed(text, layer):
    assert load(f"run.out={text}").run.out == text
    assert load(files=[layer(f"run: {{out: '{text}'}}")]).run.out == text
    if text:
        assert load(files=[layer(f"run: {{out: {text}}}")]).run.out == text


@pytest.mark.parametrize(
    "text", ["#id", "a #2", "|", ">", "@x", "%x", "*", "&x", "!x", "a: b", "-", "a\tb"]
)
def test_signs_of_yaml_in_a_typed_word_are_part_of_it(text):
    assert load(f"data.columns.case={text}").data.columns.case == text
    assert load(f'data.columns.case="{text}"').data.columns.case == text
    assert load("data.columns.case=~").data.columns.case is None


def test_classes_are_the_words_of_the_table(layer):
    known = layer("task: {name: classification, classes: [no, yes, 01, 1.0]}")
    assert load(files=[known]).task.options["classes"] == ["no", "yes", "01", "1.0"]
    assert load("data.splits={0: train, 1: test}").data.splits["1"] == "test"


def test_numbers_and_flags_are_read_by_the_type_of_their_setting():
    settings = load(
        "optim.lr=1e-4", "optim.epochs=1_000", "optim.balance=true", "bag.patches=~",
        "augment.blur_sigma=[1,2.5]", "optim.ema=0",
    )  # fmt: skip
    assert (settings.optim.lr, settings.optim.epochs, settings.optim.ema) == (1e-4, 1000, 0.0)
    assert settings.optim.balance is True
    assert settings.bag.patches is None
    assert settings.augment.options["blur_sigma"] == (1.0, 2.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n", "section 'optim' must hold keys, found None"),
        ("head: mean", "section 'head' must hold keys, found 'mean'"),
        ("- a", "must hold sections, found a list"),
        ("a: [", "not readable YAML"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "not readable YAML"),
        ("optim: {learning_rate: 1}", "unknown setting 'optim.learning_rate'"),
        ("optim: {lr: ${run.nothing}}", "not readable YAML"),
    ],
)
def test_a_wrong_layer_is_named(layer, text, expected):
    path = layer(text)
    assert str(path) in message(files=[path])
    assert expected in message(files=[path])


def test_a_missing_layer_is_told_with_the_nearest_name():
    assert "unknown cohort 'pnda'; did you mean 'panda'?" in message(datasets="pnda")
    assert "no settings file nothing.yaml" in message(files=["nothing.yaml"])


def test_a_missing_option_or_plugin_is_named(layer):
    assert "task.classes is missing" in message(datasets=str(layer("task: {name: grading}")))
    assert "setting task.name is missing" in message(
        datasets=str(layer("data: {labels: a}", "b.yaml"))
    )


# --- saved with the run ---


def test_saved_settings_are_the_same_settings(tmp_path):
    settings = load(
        "optim.clip=null", "bag.patches=null", "head.dropout=0.125", "data.splits.dev=val"
    )
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert saved_settings(tmp_path, [], REGISTRIES) == settings
    changed = saved_settings(tmp_path, ["optim.lr=0.5"], REGISTRIES)
    assert changed == dataclasses.replace(
        settings, optim=dataclasses.replace(settings.optim, lr=0.5)
    )


words = st.text(st.characters(exclude_characters="$?", exclude_categories=["C"]), max_size=12)
odd_words = st.sampled_from(["1e-4", "007", "null", "true", "no", "~", "a: b", "# x", "- a", " x "])


@hypothesis.settings(max_examples=25)
@given(
    label=words | odd_words,
    classes=st.lists(words | odd_words, min_size=2, max_size=4),
    lr=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**63 - 1),
)
def test_whatever_the_settings_hold_is_read_back(tmp_path_factory, label, classes, lr, seed):
    settings = load()
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, labels=label, stores=classes),
        optim=dataclasses.replace(settings.optim, lr=lr),
        run=dataclasses.replace(settings.run, seed=seed),
        task=dataclasses.replace(
            settings.task, options=settings.task.options | {"classes": classes}
        ),
    )
    folder = tmp_path_factory.mktemp("run")
    (folder / "settings.yaml").write_text(dump_settings(settings))
    assert saved_settings(folder, [], REGISTRIES) == settings


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no settings"):
        saved_settings(tmp_path, [], REGISTRIES)


# --- the command line ---


def parse(*arguments: str):
    return train_parser().parse(arguments)


def test_the_command_line_names_layers_folder_and_overrides(layer):
    extra = layer("optim: {epochs: 3}")
    line = ["--datasets", "panda", "--model", "e2e_r18_abmilx", "-c", str(extra), "optim.lr=0.5"]
    settings, folder = settings_from_args(parse(*line), REGISTRIES)
    assert (settings.optim.epochs, settings.optim.lr) == (3, 0.5)
    assert folder == Path("runs/panda_e2e_r18_abmilx")
    _, folder = settings_from_args(parse(*line, "encoder.name=resnet50"), REGISTRIES)
    assert folder == Path("runs/panda_e2e_resnet50_abmilx")  # of the network that is trained
    _, folder = settings_from_args(parse(*line, "run.out=elsewhere"), REGISTRIES)
    assert folder == Path("elsewhere")


def test_a_stopped_run_goes_on_with_its_own_settings_alone(tmp_path):
    settings = load("optim.lr=0.5")
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert settings_from_args(parse("--resume", str(tmp_path)), REGISTRIES) == (settings, tmp_path)
    with pytest.raises(UserError, match="--resume continues with the settings of the run"):
        settings_from_args(parse("--resume", str(tmp_path), "optim.lr=1"), REGISTRIES)


def test_a_command_line_without_a_model_is_told_what_there_is():
    with pytest.raises(UserError, match=r"give --datasets and --model(?s:.*)panda"):
        settings_from_args(parse("--datasets", "panda"), REGISTRIES)


def test_the_help_lists_every_setting_with_its_meaning():
    lines = settings_help().splitlines()
    shown = {line.split("=")[0].strip() for line in lines if line.startswith("  ")}

    def paths(prefix: str, cls) -> set[str]:
        found = set()
        for item in dataclasses.fields(cls):
            nested = item.default_factory
            if dataclasses.is_dataclass(nested):
                found |= paths(f"{prefix}.{item.name}", nested)
            else:
                found.add(f"{prefix}.{item.name}")
                assert item.metadata["help"]
        return found

    assert shown == set().union(*(paths(section, cls) for section, cls in SECTIONS.items()))
    assert "  optim.clip=1.0  maximum norm of the gradients; null: no clipping" in lines


# --- what is shipped ---


@pytest.mark.parametrize(
    "path", sorted((config_folder() / "datasets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_cohort_builds(path):
    settings = load(datasets=path.stem)
    task = build_task(settings.task)
    assert task.num_outputs >= 2
    assert settings.data.labels
    assert settings.data.stores


@pytest.mark.parametrize(
    "path", sorted((config_folder() / "models").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_model_builds(path):
    settings = load(model=path.stem)
    options = settings.head.options
    head = REGISTRIES["head"].build(settings.head.name, 256, 6, **options)
    assert sum(p.numel() for p in head.parameters()) > 0
    assert settings.encoder.name in path.stem
    schedule = build_schedule(
        settings.optim, settings.select, save_every=0, max_bad_steps=3, rescore=1
    )
    assert schedule.epochs == settings.optim.epochs
    assert load("encoder.pretrained=false", model=path.stem).encoder.options["pretrained"] is False


@pytest.mark.parametrize("path", sorted(config_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_further_layer_fits(path):
    load(files=[path], model="e2e_r18_abmilx")


def test_a_fold_is_a_word_also_where_it_is_a_number_and_needs_its_file():
    data = load("data.split_file=splits.csv", "data.fold=0").data
    assert (data.split_file, data.fold) == ("splits.csv", "0")
    assert load("data.split_file=folds", "data.fold=fold_3").data.fold == "fold_3"
    assert (load().data.split_file, load().data.fold) == (None, None)
    with pytest.raises(UserError, match=r"data\.fold must be null where data.split_file"):
        load("data.fold=0")
