"""The tensors of files that torch saved, wherever the files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.jobs import ResultT, TaskT, run_all
from shardkit.formats.ranged import Span
from shardkit.formats.tensor import TensorInfo
from shardkit.formats.torch_file import TorchFile, read_torch_file
from shardkit.sources.fileset import FileSet

_AT_ONCE = 8  # on the Hub, where each read costs a round trip


class TorchScan(NamedTuple):
    """What files of torch's hold together.

    Attributes
    ----------
    tensors, aliases, notes
        As of `TorchFile`, of all files.
    legacy
        Files from before torch 1.6, which a load takes into memory whole.
    derived
        Files on the Hub whose offsets are to be confirmed before their bytes are used.
    """

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    notes: tuple[str, ...]
    legacy: tuple[str, ...]
    derived: tuple[str, ...]


def scan_torch_files(files: FileSet, names: Sequence[str]) -> TorchScan:
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
            notes.append(f"{name} was saved by torch before 1.6: a load takes all of it into memory")
        for tensor in read[name].tensors:
            if (other := tensors.pop(tensor.name, None)) is not None:
                notes.append(twice_note(tensor.name, other.file, name))
                aliases.pop(tensor.name, None)
            tensors[tensor.name] = tensor
        aliases |= read[name].aliases
    legacy = tuple(name for name in names if not read[name].is_archive)
    derived = tuple(name for name in names if not read[name].is_exact)
    return TorchScan(tensors, aliases, tuple(notes), legacy, derived)


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
    return f"{name} is in {first} and in {last}: that of {last} is taken, as transformers does"


def _read(files: FileSet, name: str, *, exact: bool) -> TorchFile:
    where = files.where(name)
    with reading(where):
        size = files.size(name)

    def read(span: Span) -> bytes:
        return b"".join(map(bytes, files.read(name, *span)))  # each piece is in the same buffer

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
