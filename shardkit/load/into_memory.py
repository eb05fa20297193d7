"""Reading weights into memory of their own, where mapping their files would be slow.

On a network or FUSE mount, a mapped file comes in requests of 128 KB, most of which wait for the one before.
Filling the page cache does not help: many FUSE mounts drop what it has of a file when that is opened again,
as transformers does. So the bytes are read once, past the page cache, in large requests, into the memory in
which the parameters stay.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from shardkit.base.disk import CHUNK_BYTES, PAGE, own_memory, pages_of
from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.tensor import TensorInfo
from shardkit.load.direct import WeightFiles
from shardkit.load.opened import sliced_by
from shardkit.load.recipes import torch_dtype

if TYPE_CHECKING:
    import torch

_THREADS = 4
_Block: TypeAlias = tuple[TensorInfo, ...]  # neighbors in a file


class WeightsInMemory:
    """Reads the tensors of a checkpoint in blocks of neighbors, each into memory of its own, in threads.

    Parameters
    ----------
    is_ahead
        Whether to begin at once and read everything, because it stays where it is read to. Else a block is
        read when a tensor of it is requested, and given up when the last has been.

    Raises
    ------
    CheckpointError
        If a file is gone, or is no longer what the checkpoint was opened from.
    """

    def __init__(self, checkpoint: Checkpoint, is_ahead: bool) -> None:
        self._files = WeightFiles(checkpoint)
        self._names = {os.path.realpath(checkpoint.path(name)): name for name in checkpoint.files}
        self._places = {tensor.name: (block, tensor) for block in _blocks(checkpoint) for tensor in block}
        self._left = Counter(block for block, _ in self._places.values())
        self._reads: dict[_Block, Future[memoryview]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shardkit-read")
        self._lock, self._is_stopped = threading.Lock(), False
        self._error: CheckpointError | None = None
        if is_ahead:
            self._reads = {block: self._pool.submit(self._read, block) for block in self._left}

    @contextmanager
    def in_transformers(self) -> Iterator[None]:
        """Have `from_pretrained` of transformers 5 take tensors from here, and stop reading in the end.

        Raises
        ------
        CheckpointError
            If one could not be read.
        """
        try:
            with sliced_by(self._slice, lambda _: None):
                yield
        finally:
            self.stop()
            if self._error:  # of which transformers keeps the text alone
                raise self._error from None

    def _slice(self, path: str, name: str, opens: Callable[[], Any]) -> _Slice:
        return _Slice(self, self._names.get(path), name, opens())

    def stop(self) -> None:
        """End reading, and give up what nobody uses."""
        self._is_stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._reads = {}

    def find(self, file: str | None, name: str) -> torch.Tensor | None:
        """Return a tensor of a file once it is read; None of one that is not read here."""
        block, tensor = self._places.get(name, ((), None))
        if tensor is None or tensor.file != file:
            return None
        with self._lock:
            reading = self._reads.get(block) or self._pool.submit(self._read, block)
            self._reads[block] = reading
            self._left[block] -= 1
            if not self._left[block]:
                del self._reads[block]
        try:
            return _tensor(tensor, reading.result(), block[0].offset)
        except CheckpointError as error:
            self._error = error
            raise

    def _read(self, block: _Block) -> memoryview:
        first, last = block[0], block[-1]
        nbytes = last.offset + last.nbytes - first.offset
        buffer = memoryview(own_memory(pages_of(nbytes, first.offset)))
        self._files.read(replace(first, nbytes=nbytes), buffer, lambda _: not self._is_stopped)
        return buffer


class _Slice:
    """A tensor as safetensors gives it before it is read; all of it comes from memory, a part as always."""

    def __init__(self, weights: WeightsInMemory, file: str | None, name: str, opened: Any) -> None:
        self._weights, self._file, self._name, self._opened = weights, file, name, opened

    def __getitem__(self, part: object) -> torch.Tensor:
        found = self._weights.find(self._file, self._name) if part is ... else None
        return self._opened[part] if found is None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def _blocks(checkpoint: Checkpoint) -> Iterator[_Block]:
    """Yield tensors in blocks of about `CHUNK_BYTES`; not those that are empty, packed or not aligned."""
    pending: list[TensorInfo] = []
    for tensor in checkpoint.tensors.values():
        bits = DTYPE_BITS[tensor.dtype]
        if not tensor.nbytes or bits % 8 or tensor.offset % (bits // 8):
            continue
        if pending and not _fits(pending, tensor):
            yield tuple(pending)
            pending = []
        pending.append(tensor)
    if pending:
        yield tuple(pending)


def _fits(pending: Sequence[TensorInfo], tensor: TensorInfo) -> bool:
    first, last = pending[0], pending[-1]
    is_next = tensor.file == last.file and tensor.offset == last.offset + last.nbytes
    return is_next and tensor.offset + tensor.nbytes - first.offset <= CHUNK_BYTES


def _tensor(tensor: TensorInfo, memory: memoryview, begin: int) -> torch.Tensor:
    """Return a tensor out of memory that holds its file from a page on, in which byte `begin` is."""
    import torch

    at = begin % PAGE + tensor.offset - begin
    flat = torch.frombuffer(memory, dtype=torch_dtype(tensor), count=tensor.elements, offset=at)
    return flat.view(tensor.shape)
