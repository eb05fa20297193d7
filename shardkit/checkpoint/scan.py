"""The tensors of weight files, wherever they are: one reader for each format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError
from shardkit.base.record import plural
from shardkit.checkpoint.assembly import assembled
from shardkit.formats.columns import IN_BLOCKS, as_matrix
from shardkit.formats.gguf import read_gguf
from shardkit.formats.names import is_of_rank
from shardkit.formats.pieces import Pieces
from shardkit.formats.safetensors import Header, read_header
from shardkit.formats.tensor import TensorInfo, collector_paused
from shardkit.formats.torch_file import TorchFile, read_torch_file
from shardkit.sources.fileset import FileSet


class Scan(NamedTuple):
    """What weight files hold together: `metadata` of each file, the rest as of `Checkpoint`.

    `config` is what the files themselves say of the model; None where they say nothing.
    """

    tensors: dict[str, TensorInfo]
    metadata: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    legacy: tuple[str, ...] = ()
    config: dict[str, Any] | None = None


def _scan_torch(files: FileSet, names: Sequence[str]) -> Scan:
    """List the tensors of files that torch saved; elsewhere than here, some offsets are derived."""
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    notes: list[str] = []
    legacy = []
    for name, read in _torch_files(files, names, exact=files.folder is not None).items():
        notes += read.notes
        if not read.is_archive:
            legacy.append(name)
            notes.append(f"{name} was saved by torch before 1.6: loading reads all of it into memory")
        for tensor in read.tensors:
            aliases.pop(tensor.name, None)
            _add(tensors, tensor, notes)
        aliases |= read.aliases
    return Scan(tensors, (), tuple(notes), aliases, tuple(legacy))


def _scan_safetensors(files: FileSet, names: Sequence[str]) -> Scan:
    tensors: dict[str, TensorInfo] = {}
    metadata, notes = [], list[str]()
    with collector_paused():
        headers = files.each(lambda name: read_header(files.ranged(name)), names)
        if any(map(is_of_rank, names)):
            return _put_together(files, headers)
        for name, (entries, found, start) in headers.items():
            metadata.append(found)
            for tensor, dtype, shape, begin, end in entries:
                stored = TensorInfo(tensor, dtype, shape, name, start + begin, end - begin)
                _add(tensors, as_matrix(stored, found), notes)
    if any(tensor.layout for tensor in tensors.values()):
        notes.append(IN_BLOCKS)
    return Scan(tensors, tuple(metadata), tuple(notes))


def _put_together(files: FileSet, headers: Mapping[str, Header]) -> Scan:
    tensors = assembled(files, headers)
    cut = sum(isinstance(tensor.layout, Pieces) for tensor in tensors.values())
    many = f"{plural(cut, 'tensor')} put together from pieces in {plural(len(headers), 'file')}"
    metadata = tuple(header.metadata for header in headers.values())
    return Scan(tensors, metadata, (f"{many}; no file says how many ranks wrote them",) * bool(cut))


def _scan_gguf(files: FileSet, names: Sequence[str]) -> Scan:
    """List the tensors of GGUF files; the first says what model they are."""
    tensors: dict[str, TensorInfo] = {}
    notes = [f"GGUF: {NO_GGUF}"]
    found = files.each(lambda name: read_gguf(files.ranged(name), name), names)
    for read in found.values():
        for tensor in read.tensors:
            _add(tensors, tensor, notes)
    return Scan(tensors, (), tuple(notes), config=found[names[0]].config)


def _add(tensors: dict[str, TensorInfo], tensor: TensorInfo, notes: list[str]) -> None:
    """Add a tensor; of two of one name, transformers uses the last that it reads."""
    if (other := tensors.pop(tensor.name, None)) is not None:
        notes.append(
            f"{tensor.name} is in both {other.file} and {tensor.file}: using the one in {tensor.file}, as "
            "transformers does"
        )
    tensors[tensor.name] = tensor


def _torch_files(files: FileSet, names: Sequence[str], *, exact: bool) -> dict[str, TorchFile]:
    return files.each(lambda name: read_torch_file(files.ranged(name), name, exact=exact), names)


class Format(NamedTuple):
    """A format of weight files: its name, and what reads them."""

    name: str
    scan: Callable[[FileSet, Sequence[str]], Scan]


GGUF = "gguf"
NO_GGUF = "what a load takes can be estimated; shard and load the safetensors that it was made from"


def refuse_gguf(form: str, source: str) -> None:
    """Refuse weights of this format where others are needed."""
    if form == GGUF:
        raise CheckpointError(f"is GGUF: {NO_GGUF}", file=source)


# By the ending of a file's name; a file that was given by name and has another is torch's.
FORMATS = {
    ".safetensors": Format("safetensors", _scan_safetensors),
    ".gguf": Format(GGUF, _scan_gguf),
}
FORMATS |= dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), Format("pickle", _scan_torch))


def format_of(file: str) -> Format:
    """Return the format of a weight file."""
    return FORMATS.get(os.path.splitext(file)[1], FORMATS[".bin"])


def confirm_offsets(files: FileSet, names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse files of torch's, elsewhere than here, of which an offset was derived that is another."""
    for read in _torch_files(files, names, exact=True).values():
        for found in read.tensors:
            tensor = tensors[found.name]
            if tensor.file == found.file and tensor != found:
                raise CheckpointError(
                    f"is not at byte {tensor.offset} of the file, where torch would have written it: "
                    "download it (download=True), and shard that",
                    file=files.where(tensor.file),
                    tensor=tensor.name,
                )
