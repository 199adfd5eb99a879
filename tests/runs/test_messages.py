"""The message of each command to each common mistake that needs no data: what is wrong, then what to do."""

from __future__ import annotations

import pytest

from e2e import cli
from e2e.errors import exit_code

NOT_A_RUN = "is not a run folder: it has no settings.yaml\n  give the folder that e2e train wrote"
TRAIN = "train --datasets panda --model abmil"
E2E_TRAIN = "train --datasets panda --model e2e_r18_abmil"
PACK = "pack --slides empty --out s.lmdb"

MESSAGES = [
    ("trian", "unknown command 'trian'; did you mean 'train'?"),
    ("train --modle x", "unknown option '--modle'; did you mean '--model'?"),
    ("train", "give --datasets and --model, such as --datasets panda --model e2e_r18_abmilx"),
    ("train --gpus 0", "--gpus: must be a whole number of at least 1, not '0'"),
    ("train --help head.abmily", "unknown head 'abmily'; did you mean 'abmil'?"),
    ("train --help heads", "--help heads: no such topic; did you mean 'head'?"),
    ("train --datasets pnda --model abmil", "unknown cohort 'pnda'; did you mean 'panda'?"),
    ("train --datasets x --model abmil", "or give the path of a YAML file"),
    ("train --datasets panda --model abmill", "unknown model 'abmill'; did you mean 'abmil'?"),
    ("train --datasets panda --model x", "e2e_<encoder>_<head>, such as e2e_r18_abmil"),
    ("train --datasets panda --model e2e_r19_abmil", "unknown encoder 'r19'; did you mean 'r18'?"),
    ("train --datasets panda --model e2e_r18_abml", "unknown head 'abml'; did you mean 'abmil'?"),
    (f"{TRAIN} optim.lrr=1", "optim.lrr=1: unknown setting 'optim.lrr'; did you mean 'lr'?"),
    (f"{TRAIN} optin.lr=1", "unknown section 'optin'; did you mean 'optim'?"),
    (f"{TRAIN} optim.lr=fast", "setting optim.lr must be a number, found 'fast'"),
    (f"{TRAIN} optim.epochs=1.5", "setting optim.epochs must be a whole number, found '1.5'"),
    (f"{TRAIN} optim.lr=-1", "setting optim.lr must be greater than 0 and finite, found -1.0"),
    (f"{TRAIN} optim.lr", "'optim.lr' is not a setting; write section.key=value, such as"),
    (f"{TRAIN} engine.device=tpu", "engine.device=tpu: unknown device\n  Use auto, cpu, cuda or"),
    (f"{TRAIN} head.width=3", "unknown setting 'head.width'\n  available: act, attn_dim"),
    (f"{TRAIN} bag.flip=none", "bag.flip is now augment.flip (turns, mirrors or none)"),
    (f"{TRAIN} -c nowhere.yaml", "no settings file"),
    (f"{TRAIN} -c bad.yaml", "bad.yaml, line 2: not readable YAML: expected ',' or ']'"),
    (E2E_TRAIN, "cohort 'panda': 2 of 2 data files not found\n  label table not found: "),
    (E2E_TRAIN, "  make the store: e2e pack --slides SLIDES --out "),
    (E2E_TRAIN, "  to try the system without slides of your own: e2e demo"),
    ("train --resume empty", NOT_A_RUN),
    ("evaluate nowhere", NOT_A_RUN),
    ("predict a.svs --run empty --out p", NOT_A_RUN),
    ("compare nowhere empty", NOT_A_RUN),
    ("compare a", "e2e compare: the following arguments are required: RUN\n  see: e2e compare --help"),
    ("compare a b c", "unexpected argument 'c'"),
    ("export empty --out m.zip", NOT_A_RUN),
    ("check --datasets pnda", "unknown cohort 'pnda'; did you mean 'panda'?"),
    ("check --datasets panda", "cohort 'panda': 2 of 2 data files not found"),
    ("pack --out s.lmdb", "nothing to pack\n  give --slides DIR, --coords DIR --slides DIR, or"),
    ("pack --slides nowhere --out s.lmdb", "no slide, folder or matching file at "),
    (PACK, "no slide in empty or the folders below it\n  looked for: .svs .tif"),
    (f"{PACK} --mpp 0", "mpp must be micrometres per pixel, more than 0, not 0"),
    (f"{PACK} --patch-size 0", "patch size must be 16 to 8192 pixels, not 0"),
    (f"{PACK} --quality 300", "--quality 300: must be 1 to 100"),
    (f"{PACK} --mpp 1 --mag 20", "--mpp, --mag and --scale contradict each other\n  give one of"),
    (f"{PACK} --workers -1", "--workers -1: must be 0 (everything in this process) or more"),
    (f"{PACK} --patches empty", "--patches cannot be combined with --slides or --coords\n  omit"),
    ("pack --patches empty --out s --tissue 0.5", "--tissue cannot be used with --patches\n  omit"),
    ("inspect nowhere.lmdb", "no patch store at nowhere.lmdb\n  make it with e2e pack"),
    ("inspect file.txt", "file.txt is not a patch store"),
    ("convert nowhere.lmdb --out x.lmdb", "no LMDB at nowhere.lmdb"),
    ("splits --labels x.csv --out y.csv", "the following arguments are required: --case, --label"),
    ("extract --stores s.lmdb --encoder r18 --out f", "no patch store at s.lmdb\n  make it with"),
    ("extract --stores s --encoder r19 --out f", "unknown encoder 'r19'; did you mean 'r18'?"),
    ("extract --stores s --encoder r18 --out f --dtype f", "--dtype: invalid choice: 'f'"),
    ("crossval --datasets panda --model abmil --folds 5 --out c", "no label table at "),
    ("sweep --datasets panda --model abmil --space no.yaml --out s --trials 2", "no file at no.yaml"),
    ("demo --slides 1,2", "--slides 1,2: use three counts, train,val,test, for example 64,16,48"),
    ("demo --out file.txt", "cannot create the folder file.txt: File exists\n  choose another"),
]  # fmt: skip
"""The words of a command, and what its message contains. The working folder holds what the fixture makes."""


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    return tmp_path


@pytest.mark.parametrize(("words", "text"), MESSAGES)
def test_a_mistake_is_one_message_that_says_what_to_do(working_folder, capsys, words, text):
    before = sorted(working_folder.rglob("*"))
    assert exit_code(lambda: cli.run(words.split())) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert text in captured.err
    assert all(line.startswith("  ") for line in captured.err.splitlines()[1:])
    assert sorted(working_folder.rglob("*")) == before


def test_every_command_has_a_mistake_in_the_table():
    assert {words.split()[0] for words, _ in MESSAGES} >= set(cli.VERBS)
