"""What is there: every tensor of a checkpoint, its file and its byte range, without loading any."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, Self

from shardkit.base.disk import measured_rate
from shardkit.base.errors import CheckpointError, DownloadNeededError
from shardkit.base.machine import MEMORY_FILESYSTEMS, filesystem
from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.adapter import estimate_with_base, is_adapter
from shardkit.checkpoint.belonging import Beside, needed_files, sort_out
from shardkit.checkpoint.budget import CONTEXT_TOKENS, Sequences
from shardkit.checkpoint.config import architecture, config_dtype, plain_json
from shardkit.checkpoint.estimate import Estimate
from shardkit.checkpoint.hosts import DiskRate
from shardkit.checkpoint.layout import (
    CONFIG_FILES,
    find_weights,
    index_notes,
    naming_notes,
    output_stem,
    read_config,
)
from shardkit.checkpoint.loaded import LOAD_BITS, load_dtype
from shardkit.checkpoint.metadata import of_checkpoint
from shardkit.checkpoint.scan import confirm_offsets, format_of
from shardkit.formats.strided import MAX_RECEIVED_SPAN, Layout
from shardkit.formats.tensor import DTYPE_NAMES, LoadDtypeLike, TensorInfo, stored_dtype
from shardkit.sources.fileset import FileSet, State
from shardkit.sources.resolve import resolve


@dataclass(frozen=True)
class Checkpoint(Record):
    """A checkpoint on disk or on the Hub: its tensors, files, config, and all else that belongs to it.

    Attributes
    ----------
    source
        What was opened: an absolute path, an address, or ``hf://org/name@commit`` for a model of the Hub.
    place
        Where its files are: a folder here, or a commit on the Hub.
    format
        "safetensors", "pickle" or "gguf".
    stem
        What files written from it are called: "model" for ``model-00001-of-00008.safetensors``.
    files
        Names of the weight files, in order of their tensors.
    tensors
        By name, in order of file and offset.
    metadata
        ``__metadata__`` of its files, as far as it holds for the checkpoint.
    config
        ``config.json`` (or ``adapter_config.json``); None where there is none.
    side_files
        All else that belongs to the model, with sizes in bytes.
    left_out
        Files that stay behind, and why: "the same weights in another format", "training state".
    aliases
        Tensors of a pickle that share another's storage, by name, and the name of that other.
    notes
        For the user.
    file_metadata
        Names of entries of ``__metadata__`` that describe single files.
    index_dtype
        The dtype of its tensors by the index, where the config has none; None where neither has one.
    legacy
        Files that torch wrote before 1.6, each of which a load takes into memory whole.
    made
        How its files came about, as the index of an earlier run says: "source", "strategy".
    seen
        State of the weight files just before their headers were read; on this disk alone, so not in JSON.
    """

    source: str
    place: FileSet
    format: str
    stem: str
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    side_files: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    file_metadata: tuple[str, ...] = ()
    index_dtype: str | None = None
    legacy: tuple[str, ...] = ()
    made: dict[str, str] = field(default_factory=dict)
    seen: dict[str, State] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __fspath__(self) -> str:
        return self.source  # so that it can be given wherever a source is

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        download: bool = False,
    ) -> Self:
        """Open a checkpoint: read and validate its headers, but not its weights.

        Parameters
        ----------
        source
            A folder, a weights file, an index file, or a snapshot folder of the Hub's cache; or a model on
            the Hub, of which only headers and small files are read: "org/name", "org/name@revision",
            "hf://org/name". A local folder of the same name comes first, and so does the Hub cache.
            Or an address that fsspec reaches ("s3://bucket/name"), with its own configuration of credentials
            and endpoints; or a model on Kaggle, attached or downloaded completely by kagglehub:
            "kaggle://owner/model/framework/variation", with "/version" or of the latest.
            Or a `Checkpoint`, a `ShardPlan` (its source), a `ShardReport` (its destination).
        revision
            Branch, tag or commit on the Hub (default: its main branch), pinned to its current commit.
        token
            For the Hub (default: from the environment, the client's store, Colab's or Kaggle's secrets).
        download
            Download what is on the Hub, and check it against the Hub's hashes.

        Returns
        -------
        Checkpoint
            What is there; of a model on the Hub, at the commit that its revision is now.

        Raises
        ------
        CheckpointError
            If there is no checkpoint, access is refused, or a file is damaged or hostile; names file,
            tensor, numbers.

        Examples
        --------
        >>> checkpoint = Checkpoint.open("mistral-demo")
        >>> checkpoint.parameters, checkpoint.dtypes
        (2524032, {'BF16': 5048064})
        """
        if isinstance(source, cls) and source.place.is_fixed:
            if not download:
                return source
            token = token or getattr(source.place, "token", None)
        found = resolve(source, needed_files, revision=revision, token=token, download=download)
        place, chosen = found.files, found.chosen
        config = read_config(place)
        weights = find_weights(place, config, chosen)
        seen = {file: place.state(file) for file in weights.files}
        form = format_of(weights.files[0])
        scan = form.scan(place, weights.files)
        metadata, file_metadata = of_checkpoint(scan.metadata, scan.tensors)
        stem = output_stem(place, weights.chosen, config)
        beside = Beside({}, {})
        if chosen is None or config is not None:  # a file without a config is alone: nothing belongs to it
            beside = sort_out(place, (weights.chosen, *weights.files), stem, config)
        notes = (*found.notes, *weights.notes, *scan.notes, *index_notes(weights, scan.tensors))
        checkpoint = cls(
            source=found.source,
            place=place,
            format=form.name,
            stem=stem,
            files=weights.files,
            tensors=scan.tensors,
            metadata=metadata,
            config=scan.config or config,
            side_files=beside.side_files,
            left_out=beside.left_out,
            aliases=dict(scan.aliases),
            notes=(*notes, *naming_notes(weights.chosen, stem), *beside.notes),
            file_metadata=file_metadata,
            index_dtype=weights.dtype if config_dtype(config) is None else None,
            legacy=scan.legacy,
            made=dict(weights.made),
        )
        checkpoint.seen.update(seen)
        return checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Return the checkpoint as JSON-ready data, what follows from it included; as `Record.to_dict`."""
        data = {**super().to_dict(), "config": plain_json(self.config)}
        shown = ("architecture", "parameters", "total_bytes", "dtypes")
        data |= {name: getattr(self, name) for name in shown}
        data |= {"largest": self.largest and self.largest.name, "config_dtype": config_dtype(self.config)}
        data["side_bytes"] = sum(self.side_files.values())
        return {"folder" if key == "place" else key: value for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the checkpoint that `to_dict` wrote; as `Record.from_dict`."""
        return super().from_dict({"place" if key == "folder" else key: data[key] for key in data})

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

    def estimate(
        self,
        dtype: LoadDtypeLike | None = None,
        *,
        max_memory: int | str | None = None,
        context_tokens: int | None = None,
        batch_size: int = 1,
        disk_rate: int | str | None = None,
    ) -> Estimate:
        """Return how much memory `from_pretrained` will take, and what fits: RAM, GPUs, disks.

        Parameters
        ----------
        dtype
            Passed to `from_pretrained`: "float16"; None and "auto" leave it to transformers 5, which takes
            the config's, the index's, or that of the first file's first floating-point tensor.
        max_memory
            A budget, as `load_model` takes it: adds what stays in memory, and what each token reads.
        context_tokens, batch_size
            The longest sequence and the most sequences at a time, whose KV cache is added; with a budget
            1,024 tokens unless requested otherwise.
        disk_rate
            Bytes a second ("1.2GB"), for the seconds that a token's reads take; or "measure": by reading the
            checkpoint's own files for about a second, past the page cache, for this machine alone.

        Returns
        -------
        Estimate
            Bytes by what they are for, and a verdict for each host.

        Raises
        ------
        PlanError
            If the dtype is unknown, or a count is not above zero.
        SizeError
            If budget or rate is not a size.
        CheckpointError
            If the rate cannot be measured: the files are not on this machine, or its file system forbids it.

        Examples
        --------
        >>> Checkpoint.open("mistral-demo").estimate("float16").copied_bytes
        5048064
        """
        asked = Sequences(CONTEXT_TOKENS if context_tokens is None else context_tokens, batch_size)
        target = None if dtype in (None, "auto") else load_dtype(dtype)
        if target is None and not is_adapter(self.stem, self.config, self.tensors):
            target = self.auto_dtype
        return estimate_with_base(
            self.source,
            self.tensors.values(),
            target,
            type(self).open,
            stem=self.stem,
            config=self.config,
            aliases=self.aliases,
            side_files=self.side_files,
            held_whole=bool(self.legacy),
            in_memory=any(filesystem(folder) in MEMORY_FILESYSTEMS for folder in self.folders),
            sequences=None if (context_tokens, batch_size) == (None, 1) else asked,
            max_memory=None if max_memory is None else parse_size(max_memory),
            disk_rate=None if disk_rate is None else self._disk_rate(disk_rate),
            is_here=self.place.folder is not None,
        )

    def _disk_rate(self, requested: int | str) -> DiskRate:
        if requested != "measure":
            return DiskRate(parse_size(requested), is_measured=False)
        if self.place.folder is None:
            raise CheckpointError("is not on a disk that could be measured: state a rate", file=self.source)
        return DiskRate(measured_rate(map(self.path, self.files)), is_measured=True)

    @cached_property
    def auto_dtype(self) -> str | None:
        """The dtype that transformers 5.23 chooses by itself: see its `modeling_utils._get_dtype`."""
        if said := config_dtype(self.config) or self.index_dtype:
            return said if said in LOAD_BITS else None
        first = [tensor for tensor in self.tensors.values() if tensor.file == self.files[0]]
        if self.format == "safetensors":  # whose reader lists names in order, not as they lie in the file
            first.sort(key=attrgetter("name"))
        return stored_dtype(tensor.dtype for tensor in first)

    @property
    def folders(self) -> set[str]:
        """Where its files are on this machine; of links, as the Hub's client makes them, where they lead."""
        paths = filter(None, map(self.place.path, self.files))
        return {os.path.dirname(os.path.realpath(path)) for path in paths}

    @property
    def folder(self) -> str:
        """The folder that holds its files: a path, an address, or ``hf://org/name@commit`` of the Hub."""
        return self.place.name

    def has_changed(self) -> bool:
        """Whether a file of weights is gone, or no longer the one that was opened."""
        try:
            now = self.place.now()
            return {file: now.state(file) for file in self.files} != self.seen
        except CheckpointError:
            return True

    def confirm(self) -> Self:
        """Return it once all offsets are read in its files; of torch's files on the Hub, some are derived."""
        if self.place.folder is None and self.format == "pickle":
            confirm_offsets(self.place, self.files, self.tensors)
        return self

    def check_streamable(self) -> Self:
        """Return it if its tensors can be received one by one, in bounded memory; as `confirm`.

        Raises
        ------
        DownloadNeededError
            If the items of one lie too far apart in its file: it is not contiguous, and large.
        """
        for tensor in self.tensors.values():
            span = tensor.layout.span if isinstance(tensor.layout, Layout) else 0
            if span > MAX_RECEIVED_SPAN:
                raise DownloadNeededError(
                    f"is not contiguous and spans {format_size(span)} of its file, too much to stream: "
                    "download it (download=True; sharding does so automatically)",
                    file=self.path(tensor.file),
                    tensor=tensor.name,
                )
        return self.confirm()

    def path(self, file: str) -> str:
        """Return the path of one of the checkpoint's files."""
        return self.place.where(file)

    def summary(self) -> Summary:
        """Return what a person wants to know before sharding it."""
        beside = sum(self.side_files.values())
        why = "config.json names none" if self.config else "no config.json"
        facts = (
            ("source", shown_path(self.source)),
            ("architecture", self.architecture or f"unknown ({why})"),
            ("parameters", f"{self.parameters:,} in {plural(len(self.tensors), 'tensor')}"),
            (
                "weights",
                f"{format_size(self.total_bytes)} in {plural(len(self.files), 'file')} ({self.format})",
            ),
            ("largest tensor", str(self.largest or "none")),
            ("config dtype", self._config_against_files()),
            ("other files", f"{plural(len(self.side_files), 'file')}, {format_size(beside)}"),
        )
        dtypes = Table(
            ("dtype", "bytes", "share"),
            tuple(
                (DTYPE_NAMES.get(dtype, dtype), format_size(size), f"{size / max(self.total_bytes, 1):.1%}")
                for dtype, size in self.dtypes.items()
            ),
        )
        return Summary("Checkpoint", facts, (dtypes,), self._notes())

    def _config_against_files(self) -> str:
        said, held = config_dtype(self.config), stored_dtype(self.dtypes)
        if said is None:
            return "not set"
        if held is None:
            return f"{said} (the files contain no plain floating-point tensors)"
        return f"{said} (matches the files)" if held == said else f"{said} (the files are mostly {held})"

    def _notes(self) -> tuple[str, ...]:
        notes = list(self.notes)
        if self.aliases:
            more = format_size(sum(self.tensors[name].nbytes for name in self.aliases))
            notes.append(
                f"{plural(len(self.aliases), 'tensor')} sharing the storage of another in the source, "
                f"written separately ({more} more): {listed(self.aliases)}"
            )
        if self.left_out:
            kinds: dict[str, list[str]] = {}
            for file, kind in self.left_out.items():
                kinds.setdefault(kind, []).append(file)
            by_kind = (f"{kind}: {plural(len(f), 'file')} ({listed(f)})" for kind, f in kinds.items())
            notes.append(f"not copied: {'; '.join(by_kind)}")
        return tuple(notes)
