"""A source that is freed while it is sharded: no tensor is lost, and the disk needs no room for both."""

import errno
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shardkit import Checkpoint, Progress, shard_checkpoint, verify_checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.errors import (
    Cancelled,
    CastError,
    CheckpointError,
    DestinationError,
    ShardkitError,
    SpaceError,
    VerificationError,
)
from shardkit.load.seen import Ask, ModelKeys
from shardkit.shard import freeable, verify
from shardkit.shard.destination import beside, remove_leftovers
from shardkit.shard.report import ShardReport
from tests.torture.bench import Skip, digests, mounted
from tests.torture.freeing import held_bytes, lost

LIMIT = "500KB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 5 MB in two files with an index, which nobody frees."""
    folder = tmp_path_factory.mktemp("original") / "model"
    make_demo_checkpoint(folder, size="5MB", shards=2)
    return folder


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def free(source: Path, out: Path, **options: object) -> ShardReport:
    return shard_checkpoint(source, out, **{"max_shard_size": LIMIT, "free_source": True} | options)  # type: ignore[arg-type]


def finished(out: Path) -> dict[str, str]:
    """Digests of the shards that an interrupted run has proven."""
    journaled = re.findall(r'"shard": "([^"]+)"', beside(out, "journal").read_text())
    return {name: digests(beside(out, "staging"))[name] for name in journaled}


def others(folder: Path) -> dict[str, str]:
    """Digests of what is not weights."""
    return {name: digest for name, digest in digests(folder).items() if "safetensors" not in name}


def interrupt(source: Path, out: Path, share: float = 0.5, **options: object) -> None:
    """Stop a run when so much is copied and proven."""

    def stop(progress: Progress) -> bool:
        return progress.stage != "copy" or progress.done_bytes < share * progress.total_bytes

    with pytest.raises(Cancelled):
        free(source, out, progress=stop, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "layer"},
        {"strategy": "balanced"},
        {"files": 7, "max_shard_size": "2GB"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_result_is_the_same_and_the_source_keeps_all_but_its_weights(
    options: dict[str, object], model: Path, source: Path, out: Path
) -> None:
    usual = shard_checkpoint(model, out.parent / "usual", **{"max_shard_size": LIMIT} | options)  # type: ignore[arg-type]
    report = free(source, out, **options)
    assert digests(out) == digests(out.parent / "usual")
    assert digests(source) == others(model)
    assert {path.name for path in out.parent.iterdir()} == {"source", "out", "usual"}
    sizes = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
    assert report.freed == sizes
    assert report.verification is not None
    assert usual.verification is not None
    assert report.verification.freed
    assert report.verification.equal
    assert report.verification.digests == usual.verification.digests
    assert "equal to the source before it was freed" in str(report)
    assert "compared with the source before it was freed" in str(report.verification)
    assert "the source was freed: 2 files" in str(report)
    assert ShardReport.from_dict(report.to_dict()) == report
    with pytest.raises(DestinationError, match="a run that freed it seems to have finished"):
        free(source, out, **options)


def test_disk_needs_room_for_one_shard_alone(model: Path, tmp_path: Path) -> None:
    room = held_bytes(model) + 500_000 + 300_000  # a shard; files that are not weights, headers, folders
    try:
        with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={room}", "none") as disk:
            shutil.copytree(model, disk / "source")
            with pytest.raises(SpaceError):
                shard_checkpoint(disk / "source", disk / "out", max_shard_size=LIMIT)
            free(disk / "source", disk / "out", workers=3)
            assert lost(model, disk / "source", disk / "out", disk / "out") == set()
    except Skip as reason:
        pytest.skip(str(reason))


def test_disk_too_small_for_a_plan_is_found_before_anything_is_freed(model: Path, tmp_path: Path) -> None:
    room = held_bytes(model) + 800_000
    try:
        with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={room}", "none") as disk:
            shutil.copytree(model, disk / "source")
            with pytest.raises(SpaceError, match="free another"):
                free(disk / "source", disk / "out", strategy="balanced")  # whose shards come from all over
            assert digests(disk / "source") == digests(model)
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_interrupted_run_has_lost_nothing_and_resumes(
    dtype: str | None, share: float, model: Path, source: Path, out: Path
) -> None:
    shard_checkpoint(model, out.parent / "usual", max_shard_size=LIMIT, dtype=dtype)  # type: ignore[arg-type]
    interrupt(source, out, share, dtype=dtype)
    assert lost(model, source, out, out.parent / "usual") == set()
    assert held_bytes(source) < held_bytes(model)
    with pytest.raises(CheckpointError):
        Checkpoint.open(source)  # nobody takes it for a complete one
    report = free(source, out, dtype=dtype)
    assert report.reused
    assert digests(out) == digests(out.parent / "usual")
    assert digests(source) == others(model)
    assert {path.name for path in out.parent.iterdir()} == {"source", "out", "usual"}


@pytest.fixture
def interrupted(source: Path, out: Path) -> Iterator[Path]:
    """A source half of which is freed; in the end nothing of it has changed, and the run resumes."""
    interrupt(source, out)
    before = digests(source), finished(out)
    yield source
    assert (digests(source), finished(out)) == before
    assert free(source, out).freed


UNSAFE: dict[str, Callable[[Path, Path, Path], object]] = {
    "clean": lambda _source, out, _model: remove_leftovers(out),
    "not freeing": lambda source, out, _model: shard_checkpoint(source, out, max_shard_size=LIMIT),
    "starting over": lambda source, out, _model: free(source, out, resume=False),
    "another plan": lambda source, out, _model: free(source, out, max_shard_size="400KB"),
    "another source": lambda _source, out, model: free(model, out),
    "another source, not freed": lambda _source, out, model: shard_checkpoint(model, out),
}


@pytest.mark.parametrize("what", UNSAFE)
@pytest.mark.filterwarnings("ignore:starting over")
def test_nothing_discards_shards_that_are_the_only_copy(
    what: str, interrupted: Path, out: Path, model: Path
) -> None:
    planned = r"\(\d+ files of at most 500,000 bytes, strategy size, as stored\)"
    said = f"only copy of tensors of {interrupted}.*repeat it as it was {planned}"
    with pytest.raises(DestinationError, match=said):
        UNSAFE[what](interrupted, out, model)


BESIDE: dict[str, Callable[[Path], object]] = {
    "touched": lambda source: os.utime(source / "config.json"),
    "edited": lambda source: (source / "README.md").write_text("# Better words"),
    "added": lambda source: (source / "notes.txt").write_text("mine"),
    "removed": lambda source: (source / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("how", BESIDE)
def test_files_beside_the_weights_may_change_before_the_run_is_repeated(
    how: str, source: Path, out: Path, model: Path
) -> None:
    interrupt(source, out)
    BESIDE[how](source)
    report = free(source, out)
    assert report.reused
    assert verify_checkpoint(model, out).tensors
    assert others(out) == others(source)
    gone = "removed from the source since it was first opened, so not copied: generation_config.json"
    assert (gone in str(report)) == (how == "removed")


def test_file_that_cannot_be_cut_is_named_and_the_run_resumes(
    model: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.truncate

    def truncate(path: Path, size: int) -> None:
        if str(path).startswith(str(source)):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", truncate)
        with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors cannot be freed: Oper"):
            free(source, out)
    assert digests(source) == digests(model)
    assert free(source, out).reused


@pytest.mark.parametrize("how", ["a second name", "mapped", "immutable"])
def test_a_run_is_not_repeated_while_others_have_the_files(how: str, interrupted: Path, out: Path) -> None:
    weights, other = interrupted / "model-00001-of-00002.safetensors", interrupted.parent / "other"
    if how == "a second name":
        os.link(weights, other)
    held = _map(weights) if how == "mapped" else None
    words = {"a second name": "has 2 names", "mapped": "open in a program", "immutable": "may be immutable"}
    refused = pytest.raises(CheckpointError, match=f"{words[how]}.*so it is not freed; repeat this once")
    with immutable(weights) if how == "immutable" else nullcontext(), refused:
        free(interrupted, out)
    other.unlink(missing_ok=True)
    del held


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Let nobody write a file, root included."""
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.parametrize("damage", ["shard", "journal", "source"])
def test_damage_that_cannot_be_made_good_is_said_and_nothing_is_discarded(
    damage: str, interrupted: Path, out: Path
) -> None:
    last = beside(out, "staging") / max(finished(out))  # the end is freed first
    path = {"shard": last, "journal": beside(out, "journal"), "source": min(interrupted.glob("*01-of*"))}[
        damage
    ]
    was, state = path.read_bytes(), os.stat(path)
    half = len(was) // 2
    path.write_bytes(was[:half] + (b"#" * (len(was) - half) if damage != "source" else b""))
    with pytest.raises(ShardkitError, match="is not what it was"):
        free(interrupted, out)
    path.write_bytes(was)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_cast_that_overflows_is_refused_before_anything_is_freed(tmp_path: Path, out: Path) -> None:
    (tmp_path / "source").mkdir()
    tensors = {"a": torch.full((1000,), 1e30), "b": torch.ones(1000)}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    before = digests(tmp_path / "source")
    with pytest.raises(CastError, match=r"a \(1,000 values\)"):
        free(tmp_path / "source", out, dtype="float16", max_shard_size=2500)
    assert digests(tmp_path / "source") == before
    report = free(tmp_path / "source", out, dtype="float16", max_shard_size=2500, allow_overflow=True)
    assert [(x.tensor, x.overflowed) for x in report.lost] == [("a", 1000)]
    assert torch.equal(load_file(out / "model-00001-of-00002.safetensors")["a"], tensors["a"].half())


def test_copy_that_a_model_cannot_use_is_found_before_anything_is_freed(
    model: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def differing(_: Checkpoint) -> Iterator[Ask]:
        yield (
            lambda _: lambda: ModelKeys("Mistral", "a stack", 2, (), ("lm_head is missing in the copy only",))
        )

    monkeypatch.setattr(verify, "model_keys", differing)
    with pytest.raises(VerificationError, match=r"nothing was freed.*lm_head"):
        free(source, out)
    assert digests(source) == digests(model)


def test_tensor_that_is_not_as_in_the_source_is_not_freed(
    model: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def flipping(source: int, target: int, *rest: int) -> int:
        done = real(source, target, *rest)
        if rest[2] > 0:  # of a tensor, behind a header
            os.pwrite(target, b"!", rest[2])
        return done

    monkeypatch.setattr(os, "copy_file_range", flipping)
    with pytest.raises(VerificationError, match="not as in the source"):
        free(source, out)
    assert digests(source) == digests(model)


def _linked(source: Path) -> None:
    blob = source.parent / "blobs" / "1"
    blob.parent.mkdir()
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)


def _torch(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def _twice(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    save_file({"a": torch.zeros(4)}, source / "model-00002-of-00002.safetensors")


def _differing(source: Path) -> None:
    for number, said in ((1, {"step": "1", "file": "1"}), (2, {"step": "2", "file": "2"})):
        path = source / f"model-0000{number}-of-00002.safetensors"
        save_file({f"t{number}": torch.ones(1000)}, path, {"format": "pt", **said})
    (source / "model.safetensors").unlink()


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a second name": (lambda s: os.link(s / "model.safetensors", s.parent / "other"), "has 2 names"),
    "a link": (_linked, "is a link to|outside the folder"),
    "a file beside it that is a link to it": (
        lambda s: (s / "weights.txt").symlink_to("model.safetensors"),
        "is what weights.txt is a link to",
    ),
    "torch's": (_torch, "is not safetensors"),
    "a tensor in two files": (_twice, "contains tensors that a load takes from another file: a"),
    "a loaded model": (lambda s: load_file(s / "model.safetensors"), "open in a program"),
    "mapped": (lambda s: _map(s / "model.safetensors"), "open in a program"),
    "differing metadata": (_differing, r"differ in metadata that no shard would have \(step\), so"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_files_that_are_not_only_a_source_are_refused(why: str, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    change, words = REFUSED[why]
    held = change(source)
    before = digests(source)
    with pytest.raises(CheckpointError, match=words):
        free(source, out)
    assert digests(source) == before
    assert not out.exists()
    del held


@pytest.mark.parametrize("options", [{"verify": False}, {"overwrite": True}], ids=str)
def test_options_that_would_lose_something_are_refused(
    options: dict[str, object], model: Path, source: Path, out: Path
) -> None:
    given = "=".join(map(str, *options.items()))
    with pytest.raises(ShardkitError, match=f"{given} and free_source=True .* leave out free_source"):
        free(source, out, **options)
    assert digests(source) == digests(model)


def test_a_source_on_a_disk_is_not_freed_into_memory(model: Path, source: Path, tmp_path: Path) -> None:
    try:
        refused = pytest.raises(DestinationError, match=r"is in memory \(tmpfs\), which a restart clears")
        with mounted(tmp_path / "memory", "-t", "tmpfs", "none") as memory, refused:
            free(source, memory / "out")
    except Skip as reason:
        pytest.skip(str(reason))
    assert digests(source) == digests(model)


def test_what_a_file_says_of_the_model_is_in_every_shard_of_a_freed_source(tmp_path: Path, out: Path) -> None:
    said = {"format": "pt", "author": "me", "sha256": "of a file that is gone"}
    save_file({f"t{n}": torch.ones(1000) for n in range(4)}, tmp_path / "weights.safetensors", said)
    report = free(tmp_path / "weights.safetensors", out, max_shard_size=9000)
    for file in report.files:
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt", "author": "me"}
    assert "metadata that describes individual files of the source is not copied: sha256" in str(report)


def test_single_file_by_its_name_is_freed_and_what_lies_beside_it_is_not(tmp_path: Path, out: Path) -> None:
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(8)}
    save_file(tensors, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    report = free(tmp_path / "weights.safetensors", out, max_shard_size=9000)
    assert list(report.freed) == ["weights.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "out"}
    assert [name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)] == list(tensors)


def test_a_source_is_freed_by_one_run_at_a_time(
    source: Path, out: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeable, "_is_in_use", lambda _: False)  # where no leases are granted
    refused: list[str] = []

    def second(_: Progress) -> None:
        if not refused:
            with pytest.raises(CheckpointError) as error:
                free(source, out.with_name("other"), max_shard_size="1MB")
            refused.append(str(error.value))

    assert free(source, out, progress=second).verification.equal
    assert "is being freed by another run" in refused[0]
    assert verify_checkpoint(model, out).equal


@pytest.mark.parametrize("is_freed", [True, False])
@pytest.mark.parametrize("role", ["staging", "trash", "old"])
def test_a_source_where_a_destination_keeps_its_own_is_refused_and_kept(
    model: Path, out: Path, role: str, is_freed: bool
) -> None:
    source = shutil.copytree(model, beside(out, role))
    with pytest.raises(DestinationError, match="rename it, or choose another destination"):
        free(source, out, free_source=is_freed)
    assert verify_checkpoint(model, source).equal
    assert not out.exists()


def test_one_file_of_several_does_not_free_the_others(source: Path, out: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is one of 2 files that would be freed; name the folder"):
        free(source / "model-00001-of-00002.safetensors", out)
    assert verify_checkpoint(model, source).equal
