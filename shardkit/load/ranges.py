"""Tensors read as transformers slices them, for processes that share a model: the part of each, and no more.

Mapped, a part of a matrix comes with what the kernel reads ahead of it, and stays in memory that several
processes count. Here its rows are one range, read past the page cache into memory of their own; columns are
gathered from all rows, some at a time, or are one range too in a matrix in blocks of columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from shardkit.base.disk import CHUNK_BYTES, PAGE, own_memory, pages_of
from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.strided import Layout
from shardkit.formats.tensor import TensorInfo
from shardkit.load.direct import WeightFiles
from shardkit.load.opened import sliced_by
from shardkit.load.recipes import torch_dtype

if TYPE_CHECKING:
    import torch


@contextmanager
def reading_ranges(checkpoint: Checkpoint) -> Iterator[None]:
    """Have `from_pretrained` of transformers 5 read no more of safetensors than it slices.

    Raises
    ------
    CheckpointError
        If a file is changed meanwhile, or cannot be read.
    """
    ranges = _Ranges(checkpoint)
    try:
        with sliced_by(ranges.slice, ranges.names):
            yield
    finally:
        if ranges.error:  # of which transformers keeps the text alone
            raise ranges.error from None


class _Ranges:
    """The files of a checkpoint, and the first error in reading them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files, self._tensors = WeightFiles(checkpoint), checkpoint.tensors
        self._names = {os.path.realpath(checkpoint.path(name)): name for name in checkpoint.files}
        self.error: CheckpointError | None = None

    def names(self, path: str) -> Iterable[str] | None:
        """Return the names of tensors in a file."""
        file = self._names.get(path)
        return file and [name for name, tensor in self._tensors.items() if tensor.file == file]

    def slice(self, path: str, name: str, opens: Callable[[], Any]) -> Any:
        """Return a tensor that is read when it is indexed; as safetensors has it where it is not here."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.file != self._names.get(path) or DTYPE_BITS[tensor.dtype] % 8:
            return opens()
        return Sliced(tensor, self.rows, opens)

    def rows(self, tensor: TensorInfo, first: int, last: int) -> torch.Tensor:
        """Return some rows of a tensor, which lie together."""
        import torch

        dtype, shape = torch_dtype(tensor), (last - first, *tensor.shape[1:])
        begin, count = prod((first, *tensor.shape[1:])) * dtype.itemsize, prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        buffer = memoryview(own_memory(pages_of(nbytes) + PAGE))
        try:
            data, at = self._files.read_range(tensor, begin, nbytes, buffer)
        except CheckpointError as error:
            self.error = self.error or error
            raise
        if at % dtype.itemsize:
            data, at = bytearray(data[at : at + nbytes]), 0
        return torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)


class Sliced:
    """A tensor as safetensors gives it before it is read."""

    def __init__(
        self,
        tensor: TensorInfo,
        rows: Callable[[TensorInfo, int, int], torch.Tensor],
        opens: Callable[[], Any],
    ) -> None:
        self._tensor, self._rows, self._opens = tensor, rows, opens

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Return its dtype in safetensors' words."""
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
