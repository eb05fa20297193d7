"""The tensors of weight files, wherever they are: one reader for each format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.jobs import ResultT, TaskT, run_all
from shardkit.formats.ranged import Span
from shardkit.formats.tensor import TensorInfo, collector_paused
from shardkit.formats.torch_file import TorchFile, read_torch_file
from shardkit.sources.fileset import FileSet

_AT_ONCE = 8  # on the Hub, where each read costs a round trip


class Scan(NamedTuple):
    """What weight files hold together.

    Attributes
    ----------
    tensors
        By name, in order of file and offset.
    metadata
        ``__metadata__`` of each file that has any.
    notes
        What a person should be told.
    aliases, legacy, derived
        As of `Checkpoint`.
    """

    tensors: dict[str, TensorInfo]
    metadata: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    legacy: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()


def _scan_torch(files: FileSet, names: Sequence[str]) -> Scan:
    """List the tensors of files that torch saved; on the Hub, by a few ranged reads of each.

    Raises
    ------
    CheckpointError
        If a file is damaged, or wants more than tensors when loaded.
    """
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    notes: list[str] = []
    is_here = files.folder is not None
    read = dict(_all(partial(_read, files, exact=is_here), names, is_here))
    for name in names:
        notes += read[name].notes
        if not read[name].is_archive:
            notes.append(f"{name} was saved by torch before 1.6: loading reads all of it into memory")
        for tensor in read[name].tensors:
            if (other := tensors.pop(tensor.name, None)) is not None:
                notes.append(twice_note(tensor.name, other.file, name))
                aliases.pop(tensor.name, None)
            tensors[tensor.name] = tensor
        aliases |= read[name].aliases
    legacy = tuple(name for name in names if not read[name].is_archive)
    derived = tuple(name for name in names if not read[name].is_exact)
    return Scan(tensors, (), tuple(notes), aliases, legacy, derived)


def _scan_safetensors(files: FileSet, names: Sequence[str]) -> Scan:
    """List the tensors of safetensors files, by their headers."""
    is_here = files.folder is not None
    headers = dict(_all(files.header, names, is_here)) if not is_here else {}
    tensors: dict[str, TensorInfo] = {}
    metadata, notes = [], []
    with collector_paused():
        for name in names:
            entries, found, start = headers.pop(name) if name in headers else files.header(name)
            metadata.append(found)
            for tensor, dtype, shape, begin, end in entries:
                if (other := tensors.pop(tensor, None)) is not None:
                    notes.append(twice_note(tensor, other.file, name))
                tensors[tensor] = TensorInfo(tensor, dtype, shape, name, start + begin, end - begin)
    return Scan(tensors, tuple(metadata), tuple(notes))


class Format(NamedTuple):
    """A format of weight files: its name, and what reads them."""

    name: str
    scan: Callable[[FileSet, Sequence[str]], Scan]


# By the ending of a file's name; a file that was given by name and has another is torch's.
FORMATS = {".safetensors": Format("safetensors", _scan_safetensors)}
FORMATS |= dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), Format("pickle", _scan_torch))


def format_of(file: str) -> Format:
    """Return the format of a weight file."""
    return FORMATS.get(os.path.splitext(file)[1], FORMATS[".bin"])


def confirm_offsets(files: FileSet, names: Iterable[str], tensors: Iterable[TensorInfo]) -> None:
    """Read in files on the Hub where each storage begins, which was derived from their directories.

    Raises
    ------
    CheckpointError
        If any begins elsewhere: the file was not written by torch, or is damaged.
    """
    found = {(t.file, t.name): t for name in names for t in _read(files, name, exact=True).tensors}
    for tensor in tensors:
        if (tensor.file, tensor.name) in found and found[tensor.file, tensor.name] != tensor:
            raise CheckpointError(
                f"is not at byte {tensor.offset} of the file, where torch would have written it: "
                "download it (download=True), and shard that",
                file=files.where(tensor.file),
                tensor=tensor.name,
            )


def twice_note(name: str, first: str, last: str) -> str:
    """Say which of two tensors of one name is meant: the last that transformers reads."""
    return f"{name} is in both {first} and {last}: using the one in {last}, as transformers does"


def _read(files: FileSet, name: str, *, exact: bool) -> TorchFile:
    where = files.where(name)
    with reading(where):
        size = files.size(name)

    def read(span: Span) -> bytes:
        return files.read_bytes(name, *span)

    def read_all(spans: Sequence[Span]) -> Iterable[bytes]:
        found = dict(_all(read, spans, files.folder is not None))
        return [found[span] for span in spans]

    return read_torch_file(read_all, size, name, where, exact=exact)


def _all(
    function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT], is_here: bool
) -> list[tuple[TaskT, ResultT]]:
    if is_here or len(tasks) == 1:
        return [(task, function(task)) for task in tasks]
    with run_all(function, tasks, _AT_ONCE) as results:
        return list(results)
