"""Tensors read as transformers slices them: what it slices of each, and no more, past the page cache.

Mapped, a part of a matrix comes with what the kernel reads ahead of it, and stays in memory that several
processes count. Here its rows are one range, read into memory of their own; columns are gathered from all
rows, some at a time, or are one range too in a matrix in blocks of columns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from shardkit.base.disk import CHUNK_BYTES, PAGE, own_memory, pages_of
from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.strided import Layout
from shardkit.formats.tensor import TensorInfo
from shardkit.load.direct import open_files, torch_dtype

if TYPE_CHECKING:
    import torch

Rows: TypeAlias = "Callable[[TensorInfo, int, int], torch.Tensor]"
# What opens files for transformers is replaced for all threads, so one load at a time may do that.
_REPLACING = threading.RLock()


class Ranges:
    """The weight files of a checkpoint, as transformers slices them; raises as `WeightFile` does."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = open_files(checkpoint)
        self._error: CheckpointError | None = None
        held: dict[str, dict[str, TensorInfo]] = {file: {} for file in checkpoint.files}
        for name, tensor in checkpoint.tensors.items():
            held[tensor.file][name] = tensor
        self._held = {os.path.realpath(checkpoint.path(file)): held[file] for file in held}

    @contextmanager
    def in_transformers(self) -> Iterator[None]:
        """Have `from_pretrained` of transformers 5 take from here what it slices of safetensors.

        Raises
        ------
        CheckpointError
            If a file is changed meanwhile, or cannot be read.
        """
        try:
            from transformers import modeling_utils

            with _REPLACING:
                opens = modeling_utils.safe_open  # which it calls for every file
                modeling_utils.safe_open = partial(self._open, opens)
                try:
                    yield
                finally:
                    modeling_utils.safe_open = opens
        finally:
            self.stop()
            if self._error:  # of which transformers keeps the text alone
                raise self._error from None

    def stop(self) -> None:
        """End what goes on beside the load: here, nothing does."""

    def _open(self, opens: Callable[..., Any], path: str, *how: Any, **named: Any) -> Any:
        tensors, opened = self._held.get(os.path.realpath(path)), partial(opens, path, *how, **named)
        return opened() if tensors is None else _Opened(tensors, self.rows, opened)

    def rows(self, tensor: TensorInfo, first: int, last: int) -> torch.Tensor:
        """Return some rows of a tensor, which lie together."""
        import torch

        dtype, shape = torch_dtype(tensor), (last - first, *tensor.shape[1:])
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        begin, nbytes = first * prod(shape[1:]) * dtype.itemsize, count * dtype.itemsize
        try:
            data, at = self._read(tensor, begin, nbytes)
        except CheckpointError as error:
            self._error = self._error or error
            raise
        if at % dtype.itemsize:
            data, at = bytearray(data[at : at + nbytes]), 0
        return torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)

    def _read(self, tensor: TensorInfo, begin: int, nbytes: int) -> tuple[bytearray | memoryview, int]:
        buffer = memoryview(own_memory(pages_of(nbytes) + PAGE))
        return self._files[tensor.file].read(tensor, begin, nbytes, buffer)


class _Opened:
    """A file of safetensors, opened only when something else than what is read here is requested of it."""

    def __init__(self, tensors: Mapping[str, TensorInfo], rows: Rows, opens: Callable[[], Any]) -> None:
        self._tensors, self._rows, self._opens = tensors, rows, opens

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None:
        if "_file" in vars(self):
            self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @cached_property
    def _file(self) -> Any:
        return self._opens()

    def keys(self) -> list[str]:
        return [*self._tensors]

    def get_slice(self, name: str) -> Any:
        tensor = self._tensors[name]
        if DTYPE_BITS[tensor.dtype] % 8:
            return self._file.get_slice(name)
        return _Sliced(tensor, self._rows, lambda: self._file.get_slice(name))


class _Sliced:
    """A tensor as safetensors gives it before it is read."""

    def __init__(self, tensor: TensorInfo, rows: Rows, opens: Callable[[], Any]) -> None:
        self._tensor, self._rows, self._opens = tensor, rows, opens

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return self._tensor.dtype

    def __getitem__(self, part: Any) -> torch.Tensor:
        """Return a part of it, or all (``...``): of a matrix rows and columns, else whole rows at best."""
        every = tuple(slice(0, length) for length in self._tensor.shape)
        part = every if part is ... else part if isinstance(part, tuple) else (part, *every[1:])
        if not every:
            return self._rows(replace(self._tensor, shape=(1,)), 0, 1)[0]
        first, last, _ = part[0].indices(self._tensor.shape[0])
        if isinstance(self._tensor.layout, Layout):
            return self._of_blocks(self._tensor.layout, first, last, part[1])
        if part[1:] == every[1:]:
            return self._rows(self._tensor, first, last)
        return self._of_rows(first, last, part[1]) if len(every) == 2 else self._opens()[part]

    def _of_rows(self, first: int, last: int, columns: slice) -> torch.Tensor:
        """Gather columns, of so many rows at a time that those take little memory."""
        import torch

        length = self._tensor.shape[1]
        found = torch.empty((last - first, len(range(length)[columns])), dtype=torch_dtype(self._tensor))
        step = max(1, CHUNK_BYTES // (length * found.itemsize))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            found[begin - first : end - first] = self._rows(self._tensor, begin, end)[:, columns]
        return found

    def _of_blocks(self, layout: Layout, first: int, last: int, columns: slice) -> torch.Tensor:
        import torch

        rows, count, width = layout.shape
        stored = replace(self._tensor, shape=(count * rows, width), layout=None)
        start, stop, _ = columns.indices(count * width)
        numbers = range(start // width, max(start // width + 1, -(-stop // width)))
        blocks = [self._rows(stored, number * rows + first, number * rows + last) for number in numbers]
        found = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        return found[:, start - numbers[0] * width : stop - numbers[0] * width]
