"""What is there: every tensor of a checkpoint, its file and its byte range, without loading any."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from zipfile import is_zipfile

from shardkit.errors import CheckpointError
from shardkit.estimate import Estimate, StoredTensor, estimate_load
from shardkit.layout import (
    CONFIG_FILES,
    architecture,
    config_dtype,
    find_weights,
    is_index,
    output_stem,
    read_config,
    read_weight_map,
    sort_out,
    ties_weights,
)
from shardkit.pickle_file import scan_pickles
from shardkit.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.safetensors_file import read_header
from shardkit.sizes import format_size
from shardkit.tensor import (
    CAST_DTYPES,
    DTYPE_NAMES,
    FLOAT_DTYPES,
    TensorInfo,
    collector_paused,
    parse_dtype,
)


@dataclass(frozen=True)
class Checkpoint(Record):
    """A checkpoint on disk: its tensors, files, config, and all else that belongs to it.

    Attributes
    ----------
    source
        What was opened, as an absolute path.
    folder
        The folder that holds its files.
    format
        "safetensors" or "pickle".
    stem
        What files written from it are called: "model" for ``model-00001-of-00008.safetensors``.
    files
        Names of the weight files, in order of their tensors.
    tensors
        By name, in order of file and offset.
    metadata
        ``__metadata__`` of its files; where they differ, the first counts.
    config
        ``config.json`` (or ``adapter_config.json``); None where there is none.
    side_files
        All that is not weights, with sizes in bytes; they go with the model.
    left_out
        Weights in other formats, which do not go with it.
    aliases
        Tied tensors of a pickle that share another's storage: dropped name to kept name.
    notes
        What a person should be told.
    seen
        State of the weight files just before their headers were read; on this disk alone, so not in JSON.
    """

    source: str
    folder: str
    format: Literal["safetensors", "pickle"]
    stem: str
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    side_files: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seen: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Open a checkpoint: read and validate its headers, none of its weights.

        Parameters
        ----------
        source
            A folder, a weights file, an index file, or a snapshot folder of the Hub's cache.
        revision, token
            For Hub ids, which are not read yet: download first.

        Raises
        ------
        CheckpointError
            If there is no checkpoint, or a file of it is damaged or hostile; names file, tensor, numbers.
        """
        path = Path(os.path.abspath(os.path.expanduser(source)))
        if os.path.isdir(path):  # which, unlike Path, takes any text for an answer
            folder, config = path, read_config(path)
            chosen = find_weights(folder, config)
        elif os.path.isfile(path):
            folder, chosen = path.parent, path.name
            if path.suffix in (".json", ".py", ".txt", ".md") and not is_index(chosen):
                raise CheckpointError("is no weights file: give the folder it lies in", file=str(path))
            config = read_config(folder)
        else:
            raise CheckpointError(_not_found(os.fspath(source), revision, token))
        return cls._open_chosen(path, folder, chosen, config)

    @classmethod
    def _open_chosen(cls, path: Path, folder: Path, chosen: str, config: dict[str, Any] | None) -> Self:
        files: tuple[str, ...] = (chosen,)
        weight_map: dict[str, str] = {}
        if is_index(chosen):
            weight_map = read_weight_map(folder, chosen)
            files = tuple(sorted(set(weight_map.values())))
        seen = _states(folder, files)
        is_pickle = not files[0].endswith(".safetensors")
        if is_pickle:
            tensors, aliases, notes = scan_pickles(folder, files, ties_weights(config))
            metadata: dict[str, str] = {}
        else:
            with collector_paused():
                tensors, metadata = _scan_safetensors(folder, files)
            aliases, notes = {}, ()
        _check_weight_map(weight_map, tensors, aliases, chosen)
        # A file that lies beside no config is alone: what surrounds it is none of its business.
        belongs = path.is_dir() or config is not None
        side_files, left_out = sort_out(folder, {chosen, *files}) if belongs else ({}, ())
        checkpoint = cls(
            source=str(path),
            folder=str(folder),
            format="pickle" if is_pickle else "safetensors",
            stem=output_stem(chosen),
            files=files,
            tensors=tensors,
            metadata=metadata,
            config=config,
            side_files=side_files,
            left_out=left_out,
            aliases=aliases,
            notes=notes,
        )
        checkpoint.seen.update(seen)
        return checkpoint

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype, largest first."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += tensor.nbytes
        return dict(count.most_common())

    @cached_property
    def largest(self) -> TensorInfo | None:
        """The largest tensor; None in an empty checkpoint."""
        return max(self.tensors.values(), key=lambda tensor: tensor.nbytes, default=None)

    @cached_property
    def parameters(self) -> int:
        """Number of elements in all tensors (buffers included, tied weights as often as stored)."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def config_file(self) -> str | None:
        """Name of the file that `config` comes from."""
        return next((name for name in CONFIG_FILES if name in self.side_files), None)

    @property
    def architecture(self) -> str | None:
        """The model class that the config names."""
        return architecture(self.config)

    def estimate(self, dtype: str | None = None) -> Estimate:
        """Return how much memory `from_pretrained` will take, and on which hosts it fits.

        Parameters
        ----------
        dtype
            Asked of `from_pretrained`: "float16"; None and "auto" leave it to the config, as transformers 5
            does, or to the files where the config says nothing.

        Raises
        ------
        PlanError
            If the dtype is unknown.
        """
        asked = config_dtype(self.config) if dtype in (None, "auto") else dtype
        target = parse_dtype(asked) if asked in CAST_DTYPES or asked == dtype else None
        stored = (StoredTensor(t.name, t.elements, t.dtype) for t in self.tensors.values())
        whole = self.format == "pickle" and not all(is_zipfile(self.path(file)) for file in self.files)
        return estimate_load(self.source, stored, DTYPE_NAMES[target] if target else None, held_whole=whole)

    def path(self, file: str) -> str:
        """Return the path of one of the checkpoint's files."""
        return os.path.join(self.folder, file)

    def summary(self) -> Summary:
        """Return what a person wants to know before sharding it."""
        beside = sum(self.side_files.values())
        facts = (
            ("source", shown_path(self.source)),
            ("architecture", self.architecture or "not said (no config.json)"),
            ("parameters", f"{self.parameters:,} in {plural(len(self.tensors), 'tensor')}"),
            (
                "weights",
                f"{format_size(self.total_bytes)} in {plural(len(self.files), 'file')} ({self.format})",
            ),
            ("largest tensor", str(self.largest or "none")),
            ("config says", self._config_against_files()),
            ("beside weights", f"{plural(len(self.side_files), 'file')}, {format_size(beside)}"),
        )
        dtypes = Table(
            ("dtype", "bytes", "share"),
            tuple(
                (DTYPE_NAMES[dtype], format_size(size), f"{size / max(self.total_bytes, 1):.1%}")
                for dtype, size in self.dtypes.items()
            ),
        )
        return Summary("Checkpoint", facts, (dtypes,), self._notes())

    def _config_against_files(self) -> str:
        said = config_dtype(self.config)
        held = [DTYPE_NAMES[dtype] for dtype in self.dtypes if dtype in FLOAT_DTYPES]
        if said is None:
            return "no dtype"
        if not held:
            return f"{said}; the files hold no plain floating-point tensors"
        if held[0] == said:
            return f"{said}, as the files hold"
        return f"{said}, but the files hold mostly {held[0]}"

    def _notes(self) -> tuple[str, ...]:
        notes = list(self.notes)
        if self.aliases:
            notes.append(f"{plural(len(self.aliases), 'tied tensor')} stored once: {listed(self.aliases)}")
        if self.left_out:
            notes.append(f"other weights in the folder, not part of this checkpoint: {listed(self.left_out)}")
        return tuple(notes)


def _states(folder: Path, files: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    try:
        return {file: file_state(os.stat(folder / file)) for file in files}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=error.filename) from error


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells one state of a file from another."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _not_found(source: str, revision: str | None, token: str | None) -> str:
    message = f"{source[:200]!r} is neither a folder nor a file here"
    if revision or token or re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        message += f"; if it is a Hub id, run `hf download {source}` and give the folder that it prints"
    return message


def _scan_safetensors(folder: Path, files: tuple[str, ...]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        entries, found, start = read_header(folder / file)
        metadata = found | metadata
        for name, dtype, shape, begin, end in entries:
            if name in tensors:
                raise CheckpointError(
                    f"is also in {tensors[name].file}", file=str(folder / file), tensor=name
                )
            tensors[name] = TensorInfo(name, dtype, shape, file, start + begin, end - begin)
    return tensors, metadata


def _check_weight_map(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], aliases: Mapping[str, str], index: str
) -> None:
    for name, file in weight_map.items():
        held = tensors.get(aliases.get(name, name))
        if held is None or (held.file != file and name not in aliases):
            where = f"it is in {held.file}" if held else "no file of the index holds it"
            raise CheckpointError(f"{index} says it is in {file}, but {where}", tensor=name)
