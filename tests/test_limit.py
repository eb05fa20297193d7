"""Memory limits: kept by the kernel where it can be, told where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit import measure_load
from shardkit.base import machine
from shardkit.errors import MeasurementError
from shardkit.measure import limit
from shardkit.measure.limit import limited, why_unlimited
from tests.fake_loads import MB, fake_interpreter, gone, happens

needs_groups = pytest.mark.skipif(
    why_unlimited() is not None, reason=f"memory cannot be limited here: {why_unlimited()}"
)


def groups_left(pid):
    return list(Path(machine.CGROUP_ROOT).rglob(f"shardkit-{pid}-*"))


def touch(megabytes):
    return [sys.executable, "-c", f"b = bytearray({megabytes} * 10**6); b[::4096] = b'x' * len(b[::4096])"]


@needs_groups
def test_kernel_kills_what_exceeds_the_limit_and_nothing_else():
    with limited(200 * MB) as limits:
        assert subprocess.run(limits.command(touch(100)), check=False).returncode == 0
        assert limits.kills() == 0
        assert subprocess.run(limits.command(touch(300)), check=False).returncode == -9
        assert limits.kills() == 1
    assert not groups_left(os.getpid())


@needs_groups
def test_what_still_runs_in_the_group_ends_with_it():
    with limited(200 * MB) as limits:
        sleeper = subprocess.Popen(limits.command(["sleep", "600"]), start_new_session=True)
        while "sleep" not in Path(f"/proc/{sleeper.pid}/cmdline").read_text().split("\0")[0]:
            pass
    assert sleeper.wait(10) == -9
    assert not groups_left(os.getpid())


def test_process_of_another_namespace_is_not_taken_for_our_own(tmp_path):
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").write_text("0\n")  # what version 2 shows of it
    code = (
        f"from pathlib import Path; from shardkit.measure import limit; limit._remove(Path({str(group)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], start_new_session=True, check=False)
    assert done.returncode == 0


@needs_groups
def test_load_killed_for_its_limit_is_a_result_with_its_curve(demo, tmp_path):
    script = """
        with reporter.phase("load"):
            blocks = []
            while True:
                blocks.append(bytearray(os.urandom(1_000_000)))
                time.sleep(0.002)
    """
    python = fake_interpreter(tmp_path, script)
    measurement = measure_load(demo, python=python, memory_limit="150MB", timeout=60)
    assert measurement.outcome == "killed"
    assert "memory limit of 150 MB during load" in measurement.reason
    assert 0 < measurement.load_start_seconds < measurement.curve.seconds[-1]
    assert measurement.memory_limit_bytes == measurement.environment.memory_limit_bytes == 150 * MB
    assert 100 * MB < measurement.peak_anonymous_bytes <= 150 * MB
    assert max(measurement.curve.anonymous_bytes) > 100 * MB
    assert "within 150 MB" in str(measurement)


@needs_groups
def test_daemon_that_left_its_session_ends_with_the_limit(demo, tmp_path):
    script = """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                reporter.send("note", text=str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        os.wait()
        time.sleep(0.3)
        reporter.send("done")
    """
    measurement = measure_load(demo, python=fake_interpreter(tmp_path, script), memory_limit="200MB")
    assert measurement.ok, measurement
    assert gone(int(measurement.notes[0]))


@needs_groups
def test_killed_parent_leaves_no_group_and_nothing_that_runs_in_it(demo, tmp_path):
    told = tmp_path / "told"
    script = f"""
        if os.fork() == 0:
            os.setsid()
            with open({str(told) + ".part"!r}, "w") as file:
                print(os.getpid(), os.getppid(), file=file)
            os.rename({str(told) + ".part"!r}, {str(told)!r})
        time.sleep(600)
    """
    python = fake_interpreter(tmp_path, script)
    arguments = f"{str(demo)!r}, python={str(python)!r}, memory_limit='200MB'"
    code = f"from shardkit import measure_load; measure_load({arguments})"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            assert happens(told.exists, 30)
            pids = told.read_text().split()
            assert groups_left(parent.pid)
        finally:
            parent.kill()
    assert all(gone(int(pid)) for pid in pids)
    assert happens(lambda: not groups_left(parent.pid), 10)


@needs_groups
def test_kill_of_what_a_wrapper_started_is_the_limits_too(demo, tmp_path):
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    measurement = measure_load(demo, python=wrapper, memory_limit="100MB", timeout=100)
    assert measurement.outcome == "killed"
    assert "memory limit of 100 MB" in measurement.reason


@needs_groups
def test_load_killed_before_it_began_says_what_it_held(demo):
    measurement = measure_load(demo, memory_limit="100MB", timeout=100)
    assert measurement.outcome == "killed"
    assert "during imports" in measurement.reason
    assert measurement.load_start_seconds is None
    assert 50 * MB < measurement.peak_anonymous_bytes <= 100 * MB
    assert f"{measurement.peak_anonymous_bytes / MB:.3g} MB anonymous" in measurement.reason


@needs_groups
def test_limit_that_suffices_changes_nothing(demo):
    measurement = measure_load(demo, memory_limit="900MB")
    assert measurement.ok, measurement.reason
    assert measurement.token_ids == measure_load(demo).token_ids


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A tree of control groups that is ours to make."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    root.mkdir()
    monkeypatch.setattr(machine, "CGROUP_ROOT", str(root))
    monkeypatch.setattr(machine, "OWN_CGROUP", str(own))
    monkeypatch.setenv("PATH", str(tmp_path))  # no systemd-run
    why_unlimited.cache_clear()
    yield root, own
    why_unlimited.cache_clear()


def test_where_memory_cannot_be_limited_it_is_said(elsewhere, demo):
    elsewhere[1].write_text("0::/a\n")
    assert "control groups cannot be written" in why_unlimited()
    with pytest.raises(MeasurementError, match="no memory limit can be set here"):
        measure_load(demo, memory_limit="1GB")


def test_second_version_of_control_groups_is_asked_for_the_controller(elsewhere, monkeypatch):
    root, own = elsewhere
    (root / "user" / "session").mkdir(parents=True)
    own.write_text("0::/user/session\n")
    make = Path.mkdir

    def kernel_mkdir(path, *args, **options):
        make(path, *args, **options)
        if path.parent == root / "user":  # a session with processes of its own has no controllers to give
            for file in ("memory.max", "memory.swap.max", "cgroup.procs"):
                (path / file).touch()

    monkeypatch.setattr(Path, "mkdir", kernel_mkdir)
    group = limit._make_group(5 * MB)
    assert group.parent == root / "user"
    assert (root / "user" / "cgroup.subtree_control").read_text() == "+memory"
    assert (group / "memory.max").read_text() == str(5 * MB)
    assert (group / "memory.swap.max").read_text() == "0"


def test_group_names_that_leave_the_tree_are_left_alone(elsewhere):
    root, own = elsewhere
    own.write_text("0::/../../somewhere\n")
    assert [group for group, _ in machine.control_groups()] == [root]
