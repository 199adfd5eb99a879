"""launch/slurm.sh, with stand-ins for SLURM's commands and for Python, which print what they get."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ASKED = ["--datasets", "panda", "--model", "e2e_r18_abmil", "optim.lr=1e-4"]


@pytest.fixture
def call(tmp_path):
    """``call(KEY=value)`` -> the command that the script starts, cut into words."""
    for name, body in {
        "srun": 'printf "%s\\n" "RESUME=$RESUME" "$@"',
        "scontrol": 'echo "node7"; echo "node8"',
        "python": 'printf "%s\\n" "$@"',
    }.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)

    def run(**environment: str) -> list[str]:
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "python",
            "RUN": str(tmp_path / "a run"),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            **environment,
        }
        command = ["bash", str(ROOT / "launch" / "slurm.sh"), *ASKED]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def begun(tmp_path: Path) -> None:
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "settings.yaml").touch()


def test_every_node_starts_torchrun_and_meets_the_others_on_the_first(call):
    words = call(SLURM_RESTART_COUNT="1", PROCESSES="4", RESTARTS="5")
    at = words.index("launch/torchrun.py")
    assert words[: at + 1] == [
        "RESUME=no", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "python", "launch/torchrun.py",
    ]  # fmt: skip
    assert words[at + 1 :] == [
        "--nnodes", "2", "--nproc-per-node", "4", "--max-restarts", "5",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:29500", "--rdzv-id", "12.1",
        "--no-python", "bash", "launch/slurm.sh", *ASKED,
    ]  # fmt: skip


def test_torchrun_knows_these_options(call):
    from torch.distributed.run import parse_args

    words = call()
    args = parse_args(words[words.index("launch/torchrun.py") + 1 :])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "gpu", 3)
    assert args.rdzv_endpoint == "node7:29500"
    assert args.training_script == "bash"
    assert args.training_script_args == ["launch/slurm.sh", *ASKED]


def test_a_job_queued_again_goes_on_from_its_run(call, tmp_path):
    begun(tmp_path)
    assert call()[0] == "RESUME=yes"


def test_a_first_start_is_a_new_run_even_if_another_rank_has_begun_to_write(call, tmp_path):
    process = {"TORCHELASTIC_RUN_ID": "12.0", "TORCHELASTIC_RESTART_COUNT": "0", "RESUME": "no"}
    begun(tmp_path)
    assert call(**process) == ["launch/train.py", *ASKED, f"run.out={tmp_path / 'a run'}"]


@pytest.mark.parametrize(("restarts", "resume"), [("1", "no"), ("0", "yes")])
def test_processes_that_start_again_go_on_from_the_last_checkpoint(
    call, tmp_path, restarts, resume
):
    begun(tmp_path)
    process = {
        "TORCHELASTIC_RUN_ID": "12.0",
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "RESUME": resume,
    }
    assert call(**process) == ["launch/train.py", "--resume", str(tmp_path / "a run")]


def test_processes_that_failed_before_the_run_began_start_it(call, tmp_path):
    process = {"TORCHELASTIC_RUN_ID": "12.0", "TORCHELASTIC_RESTART_COUNT": "2", "RESUME": "no"}
    assert call(**process)[-1] == f"run.out={tmp_path / 'a run'}"
