"""Work that is done elsewhere: by a Dask cluster, by an executor that is more than threads, in parts."""

import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import shardkit
from shardkit import Progress, shard_checkpoint, shard_on_hub, verify_checkpoint
from shardkit.base.jobs import Crew, run_all
from shardkit.cli import arguments
from shardkit.errors import Cancelled, DestinationError, PlanError, ShardkitError, VerificationError
from shardkit.shard import copy, destination, in_parts, tasks
from shardkit.shard.mark import Mark
from shardkit.sources.local import LocalFiles
from tests.benchmarks import cluster_table
from tests.loopback_hub import LoopbackHub
from tests.support import disk_watched
from tests.torture.bench import Skip, beside, digests, mounted
from tests.unasked import COMMAND, run

LIMIT = "400KB"
QUIET = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "source"
    shardkit.make_demo_checkpoint(folder, size="6MB")
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    """What one process makes of it."""
    out = source.with_name("expected")
    shard_checkpoint(source, out, max_shard_size=LIMIT, dtype="float16")
    return digests(out)


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **QUIET) as running,
        Client(running, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def dask() -> Iterator[Client]:
    with cluster(2) as client:
        yield client


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def moved() -> dict[str, int]:
    """Bytes that this process has read and written, by the kernel's count."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(count) for name, count in lines}


@linux
def test_second_run_of_a_job_on_one_cluster_really_reads_and_writes(
    dask: Client, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Dask remembers results by function and arguments, unless it is asked not to."""
    counts = []
    for name in ("first", "second", "first"):
        before = dask.run(moved)
        report = shard_checkpoint(
            source, tmp_path / name, max_shard_size=LIMIT, dtype="float16", overwrite=True,
            executor=dask.get_executor(),
        )  # fmt: skip
        assert digests(tmp_path / name) == expected
        after = dask.run(moved)
        counts.append({w: sum(after[who][w] - before[who][w] for who in after) for w in ("rchar", "wchar")})
    for count in counts:
        assert count["wchar"] >= report.nbytes
        assert count["rchar"] >= 3 * report.nbytes  # to cast it, to cast it again, and the copy
    read = dask.run(moved)
    assert verify_checkpoint(source, tmp_path / "second", executor=dask.get_executor()).equal
    assert sum(dask.run(moved)[who]["rchar"] - read[who]["rchar"] for who in read) >= 2 * report.nbytes


def test_an_executor_that_remembers_calls_is_not_answered_from_memory() -> None:
    class Remembering(ThreadPoolExecutor):
        known: dict[object, object] = {}  # noqa: RUF012

        def submit(self, function, /, *arguments, **options):  # type: ignore[no-untyped-def]
            call = (function, arguments)
            if call not in self.known:
                self.known[call] = super().submit(function, *arguments, **options)
            return self.known[call]

    done: list[int] = []
    with Remembering(2) as executor:
        for _ in range(2):
            with run_all(done.append, [1, 1], executor=executor) as results:
                assert len(list(results)) == 2
    assert done == [1] * 4


def test_progress_of_all_workers_rises_to_its_total_and_stops_them(
    dask: Client, source: Path, out: Path
) -> None:
    seen: list[Progress] = []
    shard_checkpoint(source, out, max_shard_size=LIMIT, executor=dask.get_executor(), progress=seen.append)
    done = [at.done_bytes for at in seen if at.stage == "copy"]
    assert done == sorted(done)
    assert done[-1] == next(at.total_bytes for at in seen)

    def stop(at: Progress) -> bool:
        return at.done_bytes < at.total_bytes // 3

    stopped = out.with_name("stopped")
    with pytest.raises(Cancelled) as caught:
        shard_checkpoint(source, stopped, max_shard_size=LIMIT, executor=dask.get_executor(), progress=stop)
    assert "run again to resume" in caught.value.__notes__[0]
    deadline = time.monotonic() + 20
    while any(dask.processing().values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = digests(stopped.with_name(".stopped.shardkit-staging"))
    assert not any(".run." in name for name in left)
    report = shard_checkpoint(source, stopped, max_shard_size=LIMIT)
    assert report.reused
    assert digests(stopped) == digests(out)


def test_late_task_of_a_run_that_ended_writes_nothing(source: Path, tmp_path: Path) -> None:
    """Dask cannot stop what has begun; what is in the folder by then may be of another run."""
    mark = Mark.made(tmp_path, LocalFiles(source), ["config.json"])
    made = tmp_path / "model.safetensors"
    made.write_bytes(bytes(100))
    part = tasks.tensor_range(
        LocalFiles(source), shardkit.TensorInfo("t", "U8", (50,), "config.json", 0, 50), "U8"
    )
    task = tasks.Task(str(made), (part,), mark)
    copy.run_task(task)
    assert made.read_bytes()[:50] == (source / "config.json").read_bytes()[:50]
    made.write_bytes(bytes(100))
    Path(mark.path).unlink()
    with pytest.raises(
        DestinationError, match=f"worker on {platform.node()} does not see .*: all workers need"
    ):
        copy.run_task(task)
    assert made.read_bytes() == bytes(100)


def test_other_machines_sync_what_they_wrote_and_what_their_memory_had_is_not_known(
    source: Path, expected: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that take themselves for another machine."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        if platform.node() == "elsewhere":
            synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    def node() -> str:
        return "elsewhere" if threading.current_thread().name.startswith("away") else "here"

    monkeypatch.setattr(platform, "node", node)
    monkeypatch.setattr(os, "fsync", fsync)
    options = {"max_shard_size": LIMIT, "dtype": "float16"}
    with ThreadPoolExecutor(2, thread_name_prefix="away") as executor:
        report = shard_checkpoint(source, out, executor=executor, **options)
    assert digests(out) == expected
    assert synced == {*report.files}
    assert report.verification.equal
    assert not report.verification.is_from_disk
    assert "contents on disk not proven" in str(report)
    synced.clear()
    with ThreadPoolExecutor(2) as executor:
        report = shard_checkpoint(source, out, executor=executor, overwrite=True, **options)
    assert synced == set()
    assert report.verification.is_from_disk


@linux
def test_worker_that_sees_another_disk_is_named_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    """A worker in a mount namespace of its own, where the destination's folder is another, empty disk."""
    shared = tmp_path / "shared"
    try:
        with mounted(shared, "-t", "tmpfs", "none"):
            pass
    except Skip as why:
        pytest.skip(str(why))
    with LocalCluster(n_workers=0, processes=True, **QUIET) as running:
        work = f"{sys.executable} -m distributed.cli.dask_worker {running.scheduler_address} --nthreads 1"
        hidden = f"mount -t tmpfs none {shared} && exec {work} --no-dashboard --local-directory {tmp_path}"
        command = ["unshare", "--mount", "sh", "-c", hidden]
        with (
            subprocess.Popen(command, stderr=subprocess.DEVNULL) as worker,
            Client(running, set_as_default=False) as client,
        ):
            try:
                client.wait_for_workers(1, timeout=60)
                with pytest.raises(DestinationError, match="all workers need the same disk") as caught:
                    shard_checkpoint(source, shared / "out", executor=client.get_executor())
            finally:
                worker.terminate()
    assert "\n" not in str(caught.value)
    assert list(shared.iterdir()) == []


def test_worker_that_sees_another_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    mark = Mark.made(tmp_path, LocalFiles(tmp_path), ["model.safetensors"])
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    mark.check()  # here it has changed, which whoever reads it finds out
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    with pytest.raises(DestinationError, match=r"does not see .*model\.safetensors as"):
        mark.check()


@pytest.mark.slow
def test_shards_go_from_hub_to_hub_by_workers_that_share_no_disk(
    hub: LoopbackHub, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.add_model("org/model", source)
    disk, seen = tmp_path / "disk", []
    with cluster(2) as dask, disk_watched(disk) as most:
        report = shard_on_hub(
            "org/model", "me/target", max_shard_size=LIMIT, dtype="float16", work_folder=disk,
            executor=dask.get_executor(), progress=seen.append,
        )  # fmt: skip
        written = [count["wchar"] for count in dask.run(moved).values()]
    assert min(written) > 10**6  # each did a part of it
    for name in report.files:
        assert hub.files("me/target")[name].size == report.files[name]
    local = shard_checkpoint(source, tmp_path / "local", max_shard_size=LIMIT, dtype="float16")
    assert report.verification.digests == local.verification.digests
    assert most[0] <= 2 * 2 * (max(report.files.values()) + 8192)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert hub.half_heads("me/target") == []
    assert list(disk.iterdir()) == []
    assert set(hub.repo("me/target").branches) == {"main"}
    assert expected


def test_interrupt_from_hub_to_hub_ends_at_once_and_workers_stop(hub: LoopbackHub, tmp_path: Path) -> None:
    large = shardkit.make_demo_checkpoint(tmp_path / "large", size="100MB").source
    hub.add_model("org/large", Path(large))
    hub.fail("slow", "GET storage", times=99, seconds=1.5)

    def asked() -> int:
        return sum(request.range is not None for request in hub.requests)

    with cluster(1) as dask:
        opened = shardkit.Checkpoint.open("org/large")
        before = asked()

        def interrupt() -> None:
            while asked() < before + 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        watcher = threading.Thread(target=interrupt)
        watcher.start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            shard_on_hub(
                opened, "me/target", files=1, executor=dask.get_executor(), work_folder=tmp_path / "disk"
            )
        watcher.join()
        assert time.monotonic() - begun < 6  # of the twelve or so that it takes
        deadline = time.monotonic() + 6
        while list((tmp_path / "disk").iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert asked() < before + 6


def test_run_without_any_worker_can_be_stopped(source: Path, out: Path) -> None:
    with (
        LocalCluster(n_workers=0, processes=False, **QUIET) as running,
        Client(running, set_as_default=False) as client,
    ):
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            shard_checkpoint(source, out, executor=client.get_executor())
        timer.join()
    assert beside(out) == []


def test_scheduler_that_is_gone_is_one_clear_line(source: Path, out: Path) -> None:
    stopped = threading.Event()
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET) as running:
        client = Client(running, set_as_default=False, timeout=1)

        def stop(at: Progress) -> None:
            if at.done_bytes > at.total_bytes // 4 and not stopped.is_set():
                stopped.set()
                running.close()

        with pytest.raises(ShardkitError, match="its scheduler is gone") as caught:
            shard_checkpoint(source, out, max_shard_size=LIMIT, executor=client.get_executor(), progress=stop)
        client.close()
    assert "kept" in caught.value.__notes__[0]
    report = shard_checkpoint(source, out, max_shard_size=LIMIT)
    assert report.reused


def test_twenty_thousand_tasks_are_handed_out_in_less_than_twenty_seconds() -> None:
    with ThreadPoolExecutor(64) as executor:
        begun = time.perf_counter()
        with run_all(abs, range(20_000), executor=executor) as results:
            assert sum(result for _, result in results) == sum(range(20_000))
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    ("total", "workers", "size"),
    [(14 * 10**9, 64, 16 << 20), (14 * 10**11, 64, 256 << 20), (14 * 10**11, 1024, 42_724_609)],
)
def test_many_tasks_are_fewer_and_larger_on_a_cluster(total: int, workers: int, size: int) -> None:
    assert tasks.task_bytes(total, Crew(workers)) == tasks.TASK_BYTES
    with ThreadPoolExecutor(1) as executor:
        assert tasks.task_bytes(total, Crew(workers, executor)) == size
    whole = tasks.file_range(Path("file"), 10**9)
    parts = [part.nbytes for part in tasks.cut(whole, size)]
    assert sum(parts) == 10**9
    assert max(parts) == size // tasks.TASK_BYTES * tasks.TASK_BYTES


def test_command_line_takes_a_cluster_by_its_address(
    dask: Client, source: Path, expected: dict[str, str], out: Path
) -> None:
    address = dask.cluster.scheduler_address.replace("tcp://", "dask://")
    job = ("shard", source, out, "--max-shard-size", LIMIT, "--dtype", "fp16")
    done = run(*job, "--executor", address, "--json")
    assert done.returncode == 0, done.stderr
    assert digests(out) == expected
    assert json.loads(done.stdout)["verification"]["mismatches"] == []
    assert run("verify", source, out, "--executor", address).returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (("--executor", "dask://127.0.0.1:9"), 1, "dask://127.0.0.1:9: no Dask scheduler answers there.*"),
        (("--executor", "127.0.0.1:9"), 2, ".*'127.0.0.1:9' is not dask://HOST:PORT, as in .*"),
        (("--part", "3/2"), 2, ".*there is no part 3 of 2: the first is 1, the last 2; see .*"),
        (("--part", "all"), 2, ".*'all' is not I/N, such as 3/8; see .*"),
        (("--part", "1/99"), 1, r"\d+ files cannot be made in 99 parts: choose at most \d+"),
        (("--finish",), 1, ".*/out: no part of it is finished"),
        (("--part", "1/2", "--free-source"), 1, "a part cannot free the source, .*leave out .*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_executor_or_part_is_one_line(
    words: tuple[str, ...], status: int, line: str, source: Path, out: Path
) -> None:
    done = run("shard", source, out, "--max-shard-size", LIMIT, *words)
    assert done.returncode == status
    assert done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert re.fullmatch(f"shardkit: {line}", said), said
    assert list(out.parent.iterdir()) == []


def one_part(source: Path, out: Path, number: int, of: int = 3, **options: object) -> shardkit.ShardReport:
    return shard_checkpoint(
        source, out, **{"max_shard_size": LIMIT, "dtype": "float16", "part": (number, of)} | options
    )


def test_last_part_publishes_what_one_run_would_have_made(
    source: Path, expected: dict[str, str], out: Path
) -> None:
    for number in (3, 1):
        report = one_part(source, out, number)
        assert not out.exists()
        assert "not finished" in report.notes[-1]
        assert report.verification.equal
    assert one_part(source, out, 3).reused  # as where a job array starts a task again
    report = one_part(source, out, 2)
    assert digests(out) == expected
    assert beside(out) == []
    assert report.destination == str(out)
    assert set(report.files) - set(report.reused) == set(list(report.files)[1::3])  # what it made itself
    assert "0 files" not in re.search("written .*", str(report))[0]
    assert report.verification.digests == verify_checkpoint(source, out).digests
    assert report.verification.model is not None
    with pytest.raises(DestinationError, match="already exists"):
        one_part(source, out, 2)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda part: (part / "part.json").write_text('{"job'),
            r"part\.json is damaged or gone: remove .*-1-of-2",
        ),
        (lambda part: (part / "part.json").unlink(), r"part\.json is damaged or gone: remove .*-1-of-2"),
        (
            lambda part: next(part.glob("*.safetensors")).open("r+b").write(b"\xff" * 8),
            r"safetensors was changed after it was verified: remove .*-1-of-2",
        ),
    ],
)
def test_part_that_is_not_as_it_was_finished_is_not_published(
    damage: Callable[[Path], object], words: str, source: Path, out: Path, expected: dict[str, str]
) -> None:
    one_part(source, out, 1, of=2)
    (part,) = out.parent.glob(".out.shardkit-part-1-of-2")
    damage(part)
    with pytest.raises(DestinationError, match=words):
        one_part(source, out, 2, of=2)
    assert not out.exists()
    shutil.rmtree(part)
    one_part(source, out, 1, of=2)
    if not out.exists():  # where the other part was refused before it was made
        one_part(source, out, 2, of=2)
    assert digests(out) == expected


@pytest.mark.parametrize("links", [True, False], ids=["links", "one name for each file"])
def test_parts_are_published_on_demand_where_the_last_could_not(
    links: bool, source: Path, expected: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DestinationError, match="no part of it is finished"):
        one_part(source, out, 0, part="finish")
    one_part(source, out, 1)
    with pytest.raises(DestinationError, match=r"not finished: 2 parts \(2, 3\); run them"):
        one_part(source, out, 0, part="finish")
    one_part(source, out, 2)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    with monkeypatch.context() as patch:
        patch.setattr(in_parts.JoinedStore, "_put_in_place", fail)
        with pytest.raises(DestinationError):
            one_part(source, out, 3)
    assert not out.exists()
    assert one_part(source, out, 0, part="finish").destination == str(out)
    assert digests(out) == expected
    assert beside(out) == []


def test_all_parts_at_once_publish_once(source: Path, expected: dict[str, str], out: Path) -> None:
    job = ("shard", source, out, "--max-shard-size", LIMIT, "--dtype", "fp16", "--json", "--part")
    command = [*COMMAND, *map(str, job)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, f"{n}/4"], **pipes) for n in range(1, 5)]
    reports = []
    for process in running:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        reports.append(json.loads(said))
    assert [report["destination"] for report in reports].count(str(out)) == 1
    assert digests(out) == expected
    assert beside(out) == []


def test_part_that_was_killed_resumes_and_holds_nobody_up(
    source: Path, expected: dict[str, str], out: Path
) -> None:
    seen: list[int] = []

    def stop(at: Progress) -> bool:
        seen.append(at.done_bytes)
        return at.stage != "copy" or at.done_bytes < at.total_bytes // 2

    with pytest.raises(Cancelled):
        one_part(source, out, 2, progress=stop, workers=1)
    one_part(source, out, 1)
    one_part(source, out, 3)
    assert one_part(source, out, 2).destination == str(out)
    assert digests(out) == expected


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"max_shard_size": "600KB"}, "part 1 of 3 was made of another source or plan"),
        ({"dtype": "bfloat16"}, "part 1 of 3 was made of another source or plan"),
        ({"part": (2, 4)}, "there are parts of 3, 4"),
    ],
)
def test_parts_of_different_plans_are_refused_before_they_are_made(
    other: dict[str, object], line: str, source: Path, out: Path
) -> None:
    one_part(source, out, 1)
    before = beside(out)
    with pytest.raises(DestinationError, match=line) as caught:
        one_part(source, out, 2, **other)
    assert f"shardkit clean {out}" in str(caught.value)
    assert beside(out) == before
    assert len(destination.remove_leftovers(out)) == 1
    assert beside(out) == []


def test_part_whose_shard_is_not_as_in_the_source_is_not_finished(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = in_parts.PartStore._proof

    def spoil(store: in_parts.PartStore) -> shardkit.Verification:
        path = store.folder / store.job.plan.shards[0].file
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return real(store)

    monkeypatch.setattr(in_parts.PartStore, "_proof", spoil)
    with pytest.raises(VerificationError, match="not as in the source"):
        one_part(source, out, 1)
    assert not any(part.exists() for part in destination.parts(out))


def test_part_in_the_making_is_neither_cleaned_nor_made_twice(source: Path, out: Path) -> None:
    refused: list[str] = []

    def meanwhile(at: Progress) -> None:
        if not refused and at.done_bytes:
            assert destination.leftovers(out) == []
            for call in (lambda: destination.remove_leftovers(out), lambda: one_part(source, out, 2)):
                with pytest.raises(DestinationError, match="is being written by another run") as caught:
                    call()
                refused.append(str(caught.value))

    one_part(source, out, 1)
    one_part(source, out, 2, progress=meanwhile)
    assert len(refused) == 2


def test_parts_of_a_model_on_the_hub_are_streamed(hub: LoopbackHub, source: Path, out: Path) -> None:
    hub.add_model("org/model", source)
    for number in (1, 2):
        report = shard_checkpoint("org/model", out, max_shard_size=LIMIT, part=(number, 2))
    assert report.verification.received
    assert verify_checkpoint(source, out).equal


def test_number_of_a_part_is_checked(source: Path, out: Path) -> None:
    for wrong in ((0, 2), (3, 2), (-1, 1)):
        with pytest.raises(PlanError, match="there is no part"):
            one_part(source, out, 0, part=wrong)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


PAGE = Path(__file__).parents[1] / "docs/cluster.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_page_has_the_table_that_its_constants_give() -> None:
    assert f"<!-- table -->\n{cluster_table.table()}\n<!-- /table -->" in PAGE.read_text()


@pytest.mark.slow
def test_what_the_page_shows_for_a_laptop_and_a_job_array_runs(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(source)
    here = {"capture_output": True, "text": True, "cwd": tmp_path}
    (tmp_path / "laptop.py").write_text(snippets("python")[0])
    done = subprocess.run([sys.executable, "laptop.py"], **here)
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
    laptop = digests((tmp_path / "sharded").rename(tmp_path / "by-dask"))
    (script,) = snippets("bash")
    script = script.replace("shardkit shard", f"{shlex.join(COMMAND)} shard --files 8")
    for number in range(1, 9):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", "-c", script], env=environment, **here)
        assert done.returncode == 0, done.stderr
    assert verify_checkpoint(tmp_path / "by-dask", tmp_path / "sharded").equal
    assert len(laptop) < len(digests(tmp_path / "sharded"))  # as many files as parts
    assert beside(tmp_path / "sharded") == ["by-dask", "laptop.py", "model"]


def test_every_command_of_the_page_is_known() -> None:
    for line in (line for text in snippets("console") for line in text.splitlines() if "$ shardkit" in line):
        assert arguments.parse(shlex.split(line.removeprefix("$ shardkit ")))
