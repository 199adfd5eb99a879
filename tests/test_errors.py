"""A user's mistake: one message, exit code 2; a crash: its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest

from e2e.errors import (
    DamagedDataError,
    Interrupted,
    UserError,
    describe_interrupt,
    exit_code,
    format_list,
    optional_import,
)
from tests.helpers.paths import ROOT


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_what_main_says(returned, code):
    assert exit_code(lambda: returned) == code


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_common_mistake_is_printed_by_rank_0_alone(monkeypatch, capsys, rank):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert exit_code(failing(UserError("no table at x\n  make one"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("" if rank == "1" else "error: no table at x\n  make one\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_damaged_data_is_printed_by_the_rank_that_met_it(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    assert exit_code(failing(DamagedDataError("slide 's' patch 3"))) == 2
    assert capsys.readouterr().err == "error: slide 's' patch 3\n"


def test_any_other_error_goes_on_its_way():
    with pytest.raises(ZeroDivisionError):
        exit_code(failing(ZeroDivisionError()))


def test_what_the_system_refuses_is_one_message(tmp_path, capsys):
    assert exit_code(lambda: len((tmp_path / ("x" * 300)).read_bytes())) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/xxx")
    assert said.endswith("File name too long\n  choose a shorter name\n")
    denied = PermissionError(errno.EACCES, "Permission denied", "labels.csv")
    assert exit_code(failing(denied)) == 2
    said = capsys.readouterr().err
    assert said == "error: labels.csv: Permission denied\n  check its permissions\n"


def test_an_error_of_the_program_with_files_goes_on_its_way(tmp_path):
    with pytest.raises(FileNotFoundError):
        exit_code(lambda: len((tmp_path / "missing").read_bytes()))


SCRIPT = """
    import sys
    from e2e.errors import UserError, exit_code
    def main():
        print("working")
        raise {error}
    if __name__ == "__main__":
        sys.exit(exit_code(main))
"""


@pytest.mark.parametrize(
    ("error", "code", "traceback"), [("UserError('wrong')", 2, False), ("OSError('x')", 1, True)]
)
def test_a_script_ends_as_promised(error, code, traceback):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT.format(error=error))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout == "working\n"
    assert ("Traceback" in done.stderr) == traceback
    assert traceback or done.stderr == "error: wrong\n"


def test_a_long_list_is_shown_in_part_and_counted():
    assert format_list(["a", 2]) == "  a\n  2"
    assert format_list(range(12), most=10).splitlines()[-2:] == ["  9", "  ... and 2 more"]
    assert format_list(range(10)).count("\n") == 9
    assert format_list([]) == ""


def test_ctrl_c_is_one_line_and_130(capsys):
    assert exit_code(failing(KeyboardInterrupt()), interrupted="stopped; go on") == 130
    assert capsys.readouterr().err == "\nstopped; go on\n"
    assert exit_code(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_what_was_interrupted_says_what_was_saved_on_rank_0_alone(monkeypatch, capsys):
    def work() -> int:
        with describe_interrupt(lambda: "epoch 3 is saved; continue with --resume"):
            raise KeyboardInterrupt

    assert exit_code(work, interrupted="another line") == 130
    assert capsys.readouterr().err == "\nepoch 3 is saved; continue with --resume\n"
    monkeypatch.setenv("RANK", "1")
    assert exit_code(work) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(Interrupted):
        work()


def test_a_missing_optional_package_names_the_extra(capsys):
    def work() -> int:
        with optional_import("search", use="e2e sweep"):
            import a_package_that_does_not_exist  # noqa: F401  # pyright: ignore
        return 0

    assert exit_code(work) == 2
    assert capsys.readouterr().err == (
        "error: e2e sweep needs the package 'a_package_that_does_not_exist', which is not installed\n"
        '  pip install "e2e-mil[search]"\n'
    )
