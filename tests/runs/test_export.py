"""An exported model predicts like its run, names nobody, and is read with care."""

from __future__ import annotations

import base64
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors import safe_open

import e2e
from e2e.errors import UserError
from tests.helpers.feature_cohort import write_slide
from tests.helpers.trained_run import project as project
from tests.helpers.trained_run import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(project) -> Path:
    assert run("export", project / "run", "--out", project / "model", "--license", "mit") == 0
    return project / "model"


@pytest.mark.parametrize("name", ["folder", "model.zip"])
def test_an_exported_model_predicts_the_same_to_the_bit(project, tmp_path, name):
    out = tmp_path / name
    assert run("export", project / "run", "--out", out) == 0
    words = ["predict", project / "new", "--workers", 0, "--out"]
    assert run(*words, tmp_path / "a", "--run", project / "run") == 0
    assert run(*words, tmp_path / "b", "--run", out) == 0
    of_run, of_model = (pd.read_csv(tmp_path / x / "predictions.csv") for x in "ab")
    pd.testing.assert_frame_equal(of_run, of_model)
    frame = e2e.load_run(out).predict(project / "new", device="cpu")
    assert frame["slide"].tolist() == of_run["slide"].tolist()


def test_it_holds_no_ids_no_paths_and_only_the_selected_weights(project, model):
    names = {path.name for path in model.iterdir()}
    assert names == {
        "settings.yaml", "task.json", "recipes.json", "best.safetensors", "metrics.json", "README.md",
    }  # fmt: skip
    ids = [word for k in range(9) for word in (f"s{k}", f"c{k}")]
    for path in model.iterdir():
        content = path.read_bytes()
        assert str(project).encode() not in content, path.name
        if path.suffix != ".safetensors":
            words = set(content.decode().replace('"', " ").replace(",", " ").split())
            assert not words & set(ids), path.name
    with safe_open(model / "best.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"ema"}  # noqa: SIM118


def test_the_card_says_what_the_model_is_and_how_good_it_is(project, model):
    text = (model / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "mit"
    assert "32 px at 4 um/px" in text
    assert "4 slides of 4 cases for training, 2 slides of 2 cases for validation" in text
    assert "trained from random weights" in text
    test = json.loads((project / "run" / "metrics.json").read_text())["test"]["ema"]
    value = test["accuracy"]["value"]
    assert "| accuracy |" in text
    assert f"{value:.3f} [" in text


def test_a_model_of_features_is_exported_with_their_encoder(tmp_path):
    rows = ["slide,case,split,label"]
    for k in range(8):
        bag = np.random.default_rng(k).normal(size=(3 + k, 6)).astype(np.float32)
        write_slide(tmp_path / "feats", f"s{k}", bag)
        rows.append(f"s{k},c{k},{['train', 'train', 'val', 'test'][k // 2]},{'ab'[k % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "cohort.yaml").write_text(
        "data: {labels: labels.csv, features: [feats]}\n"
        "task: {name: classification, classes: [a, b]}\n"
    )
    words = ["--datasets", tmp_path / "cohort.yaml", "--model", "abmil", "engine.device=cpu"]
    out = f"run.out={tmp_path}/run"
    assert run("train", *words, "optim.epochs=1", "run.bootstrap=0", out) == 0
    assert run("export", tmp_path / "run", "--out", tmp_path / "model") == 0
    assert "features of width 6" in (tmp_path / "model" / "README.md").read_text()
    before = e2e.load_run(tmp_path / "run").predict(tmp_path / "feats", device="cpu")
    after = e2e.load_run(tmp_path / "model").predict(tmp_path / "feats", device="cpu")
    pd.testing.assert_frame_equal(before, after)


def test_an_exported_model_is_evaluated_on_another_cohort(project, model, tmp_path, capsys):
    words = [f"data.labels={project}/data/labels.csv", f"data.stores=[{project}/data/s.lmdb]"]
    out = ["--out", tmp_path / "external", "engine.device=cpu", "run.heatmaps=0"]
    assert run("evaluate", model, "--external", *words, *out) == 0
    assert "an exported model does not name its training cases" in capsys.readouterr().out
    assert json.loads((tmp_path / "external" / "metrics.json").read_text())["test"]["slides"] == 9


def test_an_export_is_only_replaced_with_overwrite(project, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    words = ["export", project / "run", "--out", tmp_path / "model"]
    assert run(*words) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]
    assert run(*words, "--overwrite") == 0
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content"),
    [("../outside", b""), ("notes.txt", b""), ("task.json", b" " * (16 * 2**20 + 1))],
)
def test_an_archive_with_anything_else_is_refused(project, tmp_path, name, content):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(UserError, match="exported model"):
        e2e.load_run(tmp_path / "model.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_a_cut_archive_is_a_message(project, tmp_path, capsys):
    assert run("export", project / "run", "--out", tmp_path / "model.zip") == 0
    content = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "model.zip").write_bytes(content[: len(content) // 2])
    assert run("predict", project / "new", "--run", tmp_path / "model.zip") == 2
    assert "exported model" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload of small files needs."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[tuple[str, bytes]]] = []

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "lab/model", "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append((self.path, body))
        if "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._answer({"files": files})
        elif "commit" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/lab/model/commit/{'1' * 40}"
            self._answer({"commitUrl": url, "commitOid": "1" * 40})
        else:
            self._answer({"url": f"http://{self.headers['Host']}/lab/model"})

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_model_is_uploaded_to_a_private_repository(project, tmp_path, hub, capsys):
    out = tmp_path / "model"
    assert run("export", project / "run", "--out", out, "--hub", "lab/model") == 0
    created = next(json.loads(body) for path, body in hub.requests if path.endswith("repos/create"))
    assert (created["name"], created["visibility"]) == ("model", "private")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == hub.files
    assert "uploaded: " in capsys.readouterr().out


def test_a_failed_upload_is_a_message_and_the_model_stays(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "model"
    assert run("export", project / "run", "--out", out, "--hub", "lab/model") == 2
    assert "is complete, but could not be uploaded to lab/model" in capsys.readouterr().err
    assert (out / "best.safetensors").is_file()


def test_a_run_that_has_not_selected_an_epoch_is_not_exported(project, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    text = (project / "run" / "settings.yaml").read_text()
    (tmp_path / "run" / "settings.yaml").write_text(text)
    assert run("export", tmp_path / "run", "--out", tmp_path / "model") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
