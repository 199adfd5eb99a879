"""Packing on a Dask cluster: a real scheduler, real workers, and workers that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

import pytest

from e2e.errors import UserError
from e2e.store.cluster import connect, issue_ticket, pack_on_cluster
from e2e.store.cluster_worker import list_store_files, pack_slide, worker_problem
from e2e.store.index import index_path, read_index
from e2e.store.pack import Progress, pack
from e2e.store.sources import Job
from e2e.wsi.tiling import Tiling
from tests.helpers.packing import (
    TILING,
    TOOL,
    Jobs,
    cohort,
    contents,
    damage,
    run_tool,
    source,
    table,
    write_slide,
)
from tests.helpers.paths import ROOT

CUT = ("--mpp", 4, "--patch-size", 32)
ONE_THREAD = ("--nthreads", 1, "--no-nanny")
NANNY = ("--nthreads", 1, "--nanny")


@contextmanager
def program(name, *arguments, log, path=ROOT):
    """A program of Dask's until the end of the block; what it says goes to ``log``."""
    command = [sys.executable, "-m", f"distributed.cli.{name}", *map(str, arguments)]
    command += ["--host", "127.0.0.1", "--no-dashboard"]
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd="/", text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()  # a worker may be busy for good


def without_project(folder):
    """Where Python looks first, and finds that the project is not installed."""
    package = folder / "e2e"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no e2e here')")
    return folder


@contextmanager
def started_scheduler():
    """Address and process of a scheduler."""
    said = Queue()

    def listen(lines):
        for line in lines:
            said.put(line)

    options = ("--port", 0, "--no-show")
    with (
        tempfile.TemporaryDirectory() as folder,  # only the command and the workers need the project
        program(
            "dask_scheduler", *options, log=subprocess.PIPE, path=without_project(Path(folder))
        ) as running,
    ):
        listener = threading.Thread(target=listen, args=[running.stdout])
        listener.start()
        words = ""
        while "Scheduler at:" not in words:
            words = said.get(timeout=60)
        yield words.split()[-1], running
    listener.join()


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler, one for all tests."""
    with started_scheduler() as (address, _):
        yield address


@pytest.fixture
def client(scheduler):
    with connect(scheduler, 0) as found:
        yield found


@contextmanager
def workers(address, folder, *options, count=2, path=ROOT):
    """So many worker programs; without ``options`` each of one thread and without a nanny."""
    with ExitStack() as stack:
        for k in range(count):
            log = stack.enter_context((folder / f"worker{k}.log").open("w"))
            arguments = (address, *(options or ONE_THREAD), "--local-directory", folder / "dask")
            stack.enter_context(program("dask_worker", *arguments, log=log, path=path))
        yield


def union(out):
    """Recipe and slides of all store files of ``out``; no slide may be in two."""
    recipes, found = [], {}
    for file in read_index(index_path(out)):
        recipe, slides = contents(file)
        assert not found.keys() & slides.keys()
        recipes.append(recipe)
        found.update(slides)
    assert all(recipe == recipes[0] for recipe in recipes)
    return recipes[0], dict(sorted(found.items()))


def serial(made, tmp_path):
    """What the serial way packs."""
    pack(made, tmp_path / "serial.lmdb", workers=0)
    return contents(tmp_path / "serial.lmdb")


@dataclass(frozen=True)
class Wrapped:
    """A job that does what another does."""

    job: Job
    folder: Path

    @property
    def slide(self):
        return self.job.slide

    @property
    def path(self):
        return self.job.path

    def remark(self, record):
        return self.job.remark(record)

    def plan(self, overview):
        return self.job.plan(overview)

    def encode(self, part, start):
        return self.job.encode(part, start)

    def first(self):
        """Whether nobody has asked before."""
        try:
            (self.folder / f"{self.slide}.met").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Held(Wrapped):
    """The first who packs it stops in the middle of its patches, for good, and says who he is."""

    def encode(self, part, start):
        if start == 5 and self.first():
            (self.folder / "pid").write_text(str(os.getpid()))
            (self.folder / "never").read_text()
        return self.job.encode(part, start)


class Stored(Wrapped):
    """The first who packs it dies when it is stored, before he can say so."""

    def plan(self, overview):
        record = self.job.plan(overview)
        return replace(record, slide=LastWord(record.slide)) if self.first() else record


class LastWord(str):
    """An id that kills whoever looks it up."""

    def __hash__(self):  # asked for when the store writes down, at the very end, what is done
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def wrapped(kind, made, folder, slide="s1"):
    """The jobs of ``made``, one of them of another kind."""
    folder.mkdir()
    for name in ("pid", "never"):
        os.mkfifo(folder / name)
    return Jobs([kind(job, folder) if job.slide == slide else job for job in made.jobs()])


@contextmanager
def killer(folder):
    """Kills, with a signal that nobody can catch, the process that a held slide names."""
    thread = threading.Thread(target=lambda: os.kill(int((folder / "pid").read_text()), 9))
    thread.start()
    yield
    thread.join()


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.slides, self.notes, self.stored = [], [], None

    def started(self, slides, stored):
        self.stored = stored

    def finished(self, row):
        self.slides.append(row.slide)

    def noted(self, text):
        self.notes.append(text)


# --- what comes out ---


@pytest.mark.slow
def test_two_workers_pack_what_the_serial_way_packs(tmp_path, scheduler):
    slides = cohort(tmp_path / "slides", 6)
    damage(slides / "s1.tif", 7)
    write_slide(slides / "glass.tif", tissue=False)
    out = tmp_path / "x" / "out.lmdb"
    command = ["--slides", slides, *CUT, "--out", out, "--scheduler", scheduler]
    with workers(scheduler, tmp_path):
        done = run_tool(*command)
        again = run_tool(*command)
    assert done.returncode == again.returncode == 3, done.stderr + again.stderr
    assert union(out) == serial(source(slides, Tiling(4.0, 32)), tmp_path)
    assert f"{out.with_name('out.stores.json')}: 5 slides" in done.stdout
    assert "5 slides are in the store already" in again.stdout
    for kind in ("report", "quarantine"):
        ours, theirs = (tmp_path / f"{s}.lmdb.{kind}.csv" for s in ("x/out", "serial"))
        assert ours.read_text() == theirs.read_text()
    assert len(list((tmp_path / "x" / "out_overview").iterdir())) == 7
    assert not (tmp_path / "x" / ".out.lmdb.packing").exists()
    index = json.loads(index_path(out).read_text())
    assert sorted(s for store in index["stores"] for s in store["slides"]) == list(union(out)[1])
    assert Tiling.from_recipe(index["recipe"]) == TILING


@pytest.mark.slow
def test_local_workers_come_up_and_go_on_with_a_serial_store_and_nobody_outside_can_reach_them(
    tmp_path,
):
    slides = cohort(tmp_path / "slides", 1)
    out = tmp_path / "out.lmdb"
    assert run_tool("--slides", slides, *CUT, "--out", out).returncode == 0
    cohort(slides, 4)
    before = listening().keys()
    with connect("local", 2) as client:
        assert {host for socket, host in listening().items() if socket not in before} == {LOOPBACK}
        pack_on_cluster(client, source(slides), out)
        assert len(read_index(index_path(out))) in (2, 3)
    assert union(out) == serial(source(slides), tmp_path)
    refused = run_tool("--slides", slides, *CUT, "--out", out)
    assert refused.returncode == 2
    assert "continue with --scheduler local" in refused.stderr
    cohort(slides, 5)
    done = run_tool("--slides", slides, *CUT, "--out", out, "--scheduler", "local", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "4 slides are in the store already" in done.stdout
    assert len(union(out)[1]) == 5


LOOPBACK = "0100007F"


def listening():
    """Socket -> address, in hex, on which this process or one below it listens."""
    below, parents = {os.getpid()}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # a process that has just ended
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")")[-1].split()[1]
            )
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    ours = set()
    for pid in below:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    ours.add(os.readlink(link))
    tables = [Path(f"/proc/net/{kind}").read_text() for kind in ("tcp", "tcp6")]
    fields = [row.split() for table in tables for row in table.splitlines()[1:]]
    found = {f"socket:[{f[9]}]": f[1].split(":")[0] for f in fields if f[3] == "0A"}
    return {socket: host for socket, host in found.items() if socket in ours}


@pytest.mark.slow
def test_a_worker_with_many_threads_has_one_file_and_is_told_of(tmp_path, client, scheduler):
    slides, told = cohort(tmp_path / "slides", 4), Told()
    with workers(scheduler, tmp_path, "--nthreads", 4, "--no-nanny", count=1):
        pack_on_cluster(client, source(slides), tmp_path / "out.lmdb", progress=told)
    assert len(list_store_files(tmp_path / "out.lmdb")) == 1
    assert union(tmp_path / "out.lmdb") == serial(source(slides), tmp_path)
    assert "1 workers with 4 threads" in told.notes[0]


def test_slides_at_one_time_in_one_worker_go_into_one_file(tmp_path):
    made, out = source(cohort(tmp_path / "slides", 8)), tmp_path / "out.lmdb"
    with issue_ticket(out, made.recipe(), 4) as ticket, ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(lambda job: pack_slide(job, ticket)[1], made.jobs()))
    [file] = list_store_files(out)
    assert list(contents(file)[1]) == [row.slide for row in rows]


# --- killed ---


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count"), [(ONE_THREAD, 2), (NANNY, 1)])
def test_a_worker_killed_in_the_middle_of_a_slide_costs_nothing_but_time(
    tmp_path, client, scheduler, options, count
):
    """The same command ends well: another worker takes the slide, or the one that comes back."""
    slides, out = cohort(tmp_path / "slides", 5), tmp_path / "out.lmdb"
    held = wrapped(Held, source(slides), tmp_path / "held")
    with workers(scheduler, tmp_path, *options, count=count), killer(tmp_path / "held"):
        report = pack_on_cluster(client, held, out, batch_size=1)
    assert [row.slide for row in report.packed] == ["s0", "s1", "s2", "s3", "s4"]
    assert union(out)[1] == serial(source(slides), tmp_path)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count"), [(ONE_THREAD, 2), (NANNY, 1)])
def test_a_worker_killed_between_storing_a_slide_and_saying_so_leaves_it_stored_once(
    tmp_path, client, scheduler, options, count
):
    slides, out = cohort(tmp_path / "slides", 4), tmp_path / "out.lmdb"
    made = wrapped(Stored, source(slides), tmp_path / "held")
    with workers(scheduler, tmp_path, *options, count=count):
        report = pack_on_cluster(client, made, out)
    assert (tmp_path / "held" / "s1.met").exists()
    assert [row.slide for row in report.packed] == ["s0", "s1", "s2", "s3"]
    assert union(out)[1] == serial(source(slides), tmp_path)[1]


@pytest.mark.slow
def test_when_the_last_worker_is_killed_the_command_says_so_and_the_next_goes_on(
    tmp_path, client, scheduler
):
    slides, out = cohort(tmp_path / "slides", 3), tmp_path / "out.lmdb"
    held = wrapped(Held, source(slides), tmp_path / "held")
    with workers(scheduler, tmp_path, count=1), killer(tmp_path / "held"):
        client.wait_for_workers(1)
        words = r"(?s)no worker, and 2 slides are waiting.*dask worker tcp://"
        with pytest.raises(UserError, match=words):
            pack_on_cluster(client, held, out, batch_size=1, patience=0.1)
    assert [row["slide"] for row in table(tmp_path / "out.lmdb.report.csv")] == ["s0"]
    told = Told()
    with workers(scheduler, tmp_path, count=1):
        pack_on_cluster(client, held, out, progress=told)
    assert (told.stored, sorted(told.slides)) == (1, ["s1", "s2"])
    assert len(list_store_files(out)) == 1
    assert union(out)[1] == serial(source(slides), tmp_path)[1]


class Deadly(Wrapped):
    """Kills whoever packs it."""

    def encode(self, part, start):
        os.kill(os.getpid(), signal.SIGKILL)
        return []


@pytest.mark.slow
def test_a_slide_that_kills_every_worker_is_quarantined_and_the_others_go_on(
    tmp_path, client, scheduler
):
    slides, out = cohort(tmp_path / "slides", 3), tmp_path / "out.lmdb"
    made = wrapped(Deadly, source(slides), tmp_path / "held")
    with workers(scheduler, tmp_path, *NANNY, count=1):
        report = pack_on_cluster(client, made, out)
    assert [row.slide for row in report.packed] == ["s0", "s2"]
    assert "each worker that packed it died" in table(report.quarantine)[0]["reason"]


class Ending(Wrapped):
    """The command ends while this slide is packed."""

    def encode(self, part, start):
        (self.folder.parent / ".out.lmdb.packing").unlink(missing_ok=True)
        return self.job.encode(part, start)


def test_a_worker_gives_its_slide_up_when_the_command_has_ended(tmp_path):
    slides, out = cohort(tmp_path / "slides", 2), tmp_path / "out.lmdb"
    made = wrapped(Ending, source(slides), tmp_path / "held")
    with issue_ticket(out, made.recipe(), 1) as ticket:
        for job in made.jobs()[:1]:
            pack_slide(job, ticket)
        with pytest.raises(UserError, match="has ended"):
            pack_slide(made.jobs()[1], ticket)
    [file] = list_store_files(out)
    assert list(contents(file)[1]) == ["s0"]


@pytest.mark.slow
def test_a_lost_scheduler_ends_the_command_with_a_message(tmp_path, caplog):
    slides = cohort(tmp_path / "slides", 2)
    made = wrapped(Held, source(slides), tmp_path / "held")
    with (
        started_scheduler() as (address, running),
        workers(address, tmp_path, count=1),
        connect(address, 0) as client,
    ):

        def end():
            (tmp_path / "held" / "pid").read_text()
            running.kill()

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(UserError, match="lost the Dask scheduler"):
            pack_on_cluster(client, made, tmp_path / "out.lmdb", batch_size=1)
        thread.join()
    assert not caplog.text
    assert [row["slide"] for row in table(tmp_path / "out.lmdb.report.csv")] == ["s0"]


# --- the same slide twice ---


@pytest.mark.slow
def test_a_slide_in_two_files_is_dropped_from_the_second(tmp_path, client):
    slides, out, told = cohort(tmp_path / "slides", 3), tmp_path / "out.lmdb", Told()
    pack(source(slides), tmp_path / "out.a-0.lmdb", workers=0)
    shutil.copy(tmp_path / "out.a-0.lmdb", tmp_path / "out.b-0.lmdb")
    write_slide(slides / "t.tif", seed=9)
    pack(source(slides), tmp_path / "out.b-0.lmdb", workers=0)
    report = pack_on_cluster(client, source(slides), out, progress=told)
    assert "out.b-0.lmdb is rewritten without 3 slides" in told.notes[0]
    assert "s1: kept in out.a-0.lmdb" in told.notes[0]
    assert len(report.packed) == 4
    assert list(contents(tmp_path / "out.b-0.lmdb")[1]) == ["t"]
    assert union(out) == serial(source(slides), tmp_path)


# --- mistakes ---


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_named(tmp_path):
    for address in ("nonsense://x", "tls://127.0.0.1:1"):
        with pytest.raises(UserError, match=f"no Dask scheduler answers at {address}"):
            connect(address, 0).__enter__()
    slides, out = cohort(tmp_path / "slides", 1), tmp_path / "o.lmdb"
    done = run_tool("--slides", slides, "--out", out, "--scheduler", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert "error: no Dask scheduler answers at tcp://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*o.*"))


def test_a_scheduler_without_workers_says_how_many_slides_wait(tmp_path, client):
    slides = cohort(tmp_path / "slides", 2)
    with pytest.raises(UserError, match=r"(?s)no worker, and 2 slides are waiting.*--nthreads 1"):
        pack_on_cluster(client, source(slides), tmp_path / "o.lmdb", patience=0.1)


@pytest.mark.slow
def test_a_worker_with_another_version_of_the_project_or_none_is_named(tmp_path, client, scheduler):
    slides = cohort(tmp_path / "slides", 1)
    shutil.copytree(ROOT / "e2e", tmp_path / "other" / "e2e")
    with (tmp_path / "other" / "e2e" / "store" / "sources.py").open("a") as file:
        file.write("# changed\n")
    without_project(tmp_path / "none")
    for folder, words in (
        ("other", "has other versions"),
        ("none", "lacks this version.*no e2e here"),
    ):
        words = f"(?s)1 of 1 workers cannot pack.*{words}"
        with (
            workers(scheduler, tmp_path, count=1, path=tmp_path / folder),
            pytest.raises(UserError, match=words),
        ):
            pack_on_cluster(client, source(slides), tmp_path / "o.lmdb")


def test_a_worker_that_does_not_share_folders_is_told(tmp_path):
    [job] = source(cohort(tmp_path / "slides", 1)).jobs()
    with issue_ticket(tmp_path / "o.lmdb", {}, 1) as ticket:
        assert worker_problem(ticket, job) is None
        (tmp_path / "x").mkdir()
        elsewhere = replace(ticket, out=tmp_path / "x" / "o.lmdb")
        assert "does not share the folder" in str(worker_problem(elsewhere, job))
        job.path.rename(tmp_path / "gone.tif")
        assert "does not see" in str(worker_problem(ticket, job))
        with pytest.raises(UserError, match="does not see"):
            pack_slide(job, ticket)
    assert not list_store_files(tmp_path / "o.lmdb")


def test_files_that_cannot_be_gone_on_with_are_named(tmp_path, client):
    slides, out = cohort(tmp_path / "slides", 1), tmp_path / "out.lmdb"
    pack(source(slides), tmp_path / "out.a-0.lmdb", workers=0)
    pack(source(slides, Tiling(4, 32, overlap=8)), tmp_path / "out.b-0.lmdb", workers=0)
    with pytest.raises(
        UserError, match=r"(?s)out\.b-0\.lmdb was packed with other settings.*overlap"
    ):
        pack_on_cluster(client, source(slides), out)
    with (
        issue_ticket(out, {}, 1),
        pytest.raises(UserError, match="another command is packing"),
    ):
        pack_on_cluster(client, source(slides), out)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create the folder"):
        pack_on_cluster(client, source(slides), tmp_path / "file" / "x" / "o.lmdb")


def test_options_that_make_no_sense_and_a_missing_dask_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(TOOL.parent), *sys.path])
    from e2e.errors import exit_code
    from tools import pack_lmdb

    command = ["pack_lmdb.py", "--slides", str(cohort(tmp_path / "slides", 1)), "--out", "o.lmdb"]
    for options, words in (
        (
            ["--scheduler", "tcp://h:1", "--workers", "2"],
            "uses the workers of the cluster",
        ),
        (["--scheduler", "local", "--workers", "0"], "give --workers 1 or more"),
        (["--scheduler", "local"], "needs the package 'distributed', which is not installed"),
    ):
        monkeypatch.setitem(sys.modules, "distributed", None)
        monkeypatch.setattr(sys, "argv", [*command, *options])
        assert exit_code(pack_lmdb.main) == 2
        assert words in capsys.readouterr().err


def test_an_index_that_is_none_or_has_lost_files_is_refused(tmp_path):
    index = tmp_path / "o.stores.json"
    good = {"format": "e2e patch store index", "version": 1, "stores": [{"file": "a.lmdb"}]}
    for text, words in (
        ("{", "is not an index"),
        ("[]", "is not an index"),
        (json.dumps(good | {"format": "x"}), "its format is 'x'"),
        (json.dumps(good | {"version": 2}), "update the program"),
        (json.dumps(good), "lists 1 store file.* do not exist"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=f"(?s){words}"):
            read_index(index)
    with pytest.raises(UserError, match="cannot read the index"):
        read_index(tmp_path / "none.json")
    (tmp_path / "a.lmdb").touch()
    assert read_index(index) == [tmp_path / "a.lmdb"]
