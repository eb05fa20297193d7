"""How much memory is left for a load: on this machine, and in a control group that is partly in use."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from shardkit import make_demo_checkpoint
from shardkit.base import machine
from shardkit.base.machine import filesystem, usable_memory
from shardkit.measure.limit import limited, why_unlimited

# A notebook's kernel holds 250 MB of a limit, and reads 100 MB of files; what is left, and its verdict.
KERNEL = """
import json, os, sys, shardkit
from shardkit.base.machine import usable_memory
checkpoint = shardkit.Checkpoint.open(sys.argv[1])
ballast = bytearray(os.urandom(1 << 20)) * 250
os.sync()
open(checkpoint.path(checkpoint.files[0]), "rb").read()
here = checkpoint.estimate("float16").hosts[0]
print(json.dumps([here.name, here.verdict, here.memory_bytes, usable_memory()]))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A control group of ours, of files that a test writes."""
    monkeypatch.setattr(machine, "CGROUP_ROOT", str(tmp_path))
    monkeypatch.setattr(machine, "OWN_CGROUP", str(tmp_path / "own-cgroup"))

    def make(line, group, **files):
        (tmp_path / "own-cgroup").write_text(line)
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / group / f"memory.{name}").write_text(text)

    return make


def test_smallest_limit_of_the_group_and_its_ancestors_holds(own):
    own("0::/a/b\n", "", max="max\n")
    own("0::/a/b\n", "a", max="2000000000\n")
    own("0::/a/b\n", "a/b", max="3000000000\n")
    assert machine.limit_in_force() == 2_000_000_000


def test_first_version_of_control_groups_is_read_too(own):
    own("7:cpu:/x\n4:hugetlb,memory:/a\n", "memory", limit_in_bytes="9223372036854771712\n")
    own("7:cpu:/x\n4:hugetlb,memory:/a\n", "memory/a", limit_in_bytes="13000000000\n")
    assert machine.limit_in_force() == 13_000_000_000


@pytest.mark.usefixtures("own")
def test_no_control_group_means_no_limit():
    assert machine.limit_in_force() is None


def test_what_a_group_holds_is_not_left_but_its_file_pages_are(own):
    held = "anon 400\nfile 300\ninactive_file 50\nactive_file 20\nshmem 230\nslab_reclaimable 5\n"
    own("0::/a\n", "a", max="1000", current="700", stat=held)
    assert machine.left_in_force() == usable_memory() == 1000 - 700 + 50 + 20 + 5
    own("0::/a\n", "a", current="1200")  # for a moment, while the kernel drops pages
    assert machine.left_in_force() == 0


def test_the_first_version_of_groups_counts_what_is_held_below(own):
    held = "inactive_file 1\nactive_file 1\ntotal_inactive_file 50\ntotal_active_file 20\n"
    own("4:memory:/a\n", "memory/a", limit_in_bytes="1000", usage_in_bytes="700", stat=held)
    assert machine.left_in_force() == 370


def test_the_ancestor_that_leaves_least_decides(own):
    own("0::/a/b\n", "a", max="1000", current="900", stat="")
    own("0::/a/b\n", "a/b", max="500", current="100", stat="")
    assert machine.left_in_force() == 100


def test_without_a_limit_what_is_available_is_left(own):
    own("0::/a\n", "a", max="max", current="700", stat="")
    assert machine.left_in_force() is None
    assert 0 < usable_memory() < psutil.virtual_memory().total


def test_a_system_without_proc_is_no_error(own, tmp_path, monkeypatch):
    own("", "a")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path), raising=False)
    assert 0 < usable_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert filesystem(str(tmp_path)) is None
    monkeypatch.setattr(os, "sysconf", lambda name: int(f"no {name}"))
    assert usable_memory() is None
    hosts = make_demo_checkpoint(tmp_path / "demo", size="5MB").estimate().hosts
    assert [host.name for host in hosts] == ["Colab", "Kaggle", "Binder"]


@pytest.mark.skipif(why_unlimited() is not None, reason=f"memory cannot be limited here: {why_unlimited()}")
def test_a_load_does_not_fit_a_container_that_a_kernel_holds_half_of(tmp_path):
    source = make_demo_checkpoint(tmp_path / "demo", size="100MB").source
    with limited(600_000_000) as group:
        command = group.command([sys.executable, "-c", KERNEL, source])
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    name, verdict, memory, left = json.loads(done.stdout)
    assert (name, verdict) == ("this machine", "does not fit")
    assert memory == pytest.approx(left, abs=20_000_000)
    assert 230_000_000 < left < 338_000_000  # of the limit, without the ballast


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A driver's tool that prints what a test writes, and counts how often it is asked."""

    def make(text):
        machine._gpus.cache_clear()
        (tmp_path / "says").write_text(text)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/says\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "asked"

    yield make
    machine._gpus.cache_clear()


def test_gpus_are_those_of_the_driver_with_what_is_left_of_their_memory(nvidia_smi):
    asked = nvidia_smi("Tesla T4, 15000, 7.5\nTesla T4, 14000, 7.5\nNVIDIA L4, 22000, 8.9\n")
    t4, l4 = machine.Gpus(2, 14000 << 20, 7.5), machine.Gpus(1, 22000 << 20, 8.9)
    assert machine.gpus() == machine.gpus() == {"Tesla T4": t4, "NVIDIA L4": l4}
    assert asked.read_text().count("memory.free") == 1  # it takes seconds on some machines


@pytest.mark.parametrize("text", ["", "No devices were found\n", "Tesla T4, [N/A], 7.5\n"])
def test_a_driver_without_gpus_is_no_error(nvidia_smi, text):
    nvidia_smi(text)
    assert machine.gpus() == {}


def test_a_machine_without_a_driver_has_no_gpus(nvidia_smi, monkeypatch):
    nvidia_smi("Tesla T4, 15000, 7.5\n")
    monkeypatch.setenv("PATH", "")
    assert machine.gpus() == {}
