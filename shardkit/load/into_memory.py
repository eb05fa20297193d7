"""Reading weights into memory of their own, where mapping their files would be slow.

On a network or FUSE mount, a mapped file comes in requests of 128 KB, most of which wait for the one before.
Filling the page cache does not help: many FUSE mounts drop what it has of a file when that is opened again,
as transformers does. So the bytes are read once, past the page cache, in large requests, into the memory in
which the parameters stay.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from shardkit.base.disk import CHUNK_BYTES, PAGE, own_memory, pages_of
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.tensor import TensorInfo
from shardkit.load.ranges import Ranges

_THREADS = 4
_Block: TypeAlias = tuple[TensorInfo, ...]  # neighbors in a file


class WeightsInMemory(Ranges):
    """Reads the tensors of a checkpoint in blocks of neighbors, each into memory of its own, in threads.

    Parameters
    ----------
    is_ahead
        Whether to begin at once and read everything, because it stays where it is read to. Else a block is
        read when a tensor of it is requested, and given up when the last has been.
    """

    def __init__(self, checkpoint: Checkpoint, is_ahead: bool) -> None:
        super().__init__(checkpoint)
        self._blocks = {tensor.name: block for block in _blocks(checkpoint) for tensor in block}
        self._left = Counter(self._blocks.values())
        self._reads: dict[_Block, Future[memoryview]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shardkit-read")
        self._lock, self._is_stopped = threading.Lock(), False
        if is_ahead:
            self._reads = {block: self._pool.submit(self._read_block, block) for block in self._left}

    def stop(self) -> None:
        """End reading, and give up what nobody uses."""
        self._is_stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._reads = {}

    def _read(self, tensor: TensorInfo, begin: int, nbytes: int) -> tuple[bytearray | memoryview, int]:
        if nbytes < tensor.nbytes:
            return super()._read(tensor, begin, nbytes)
        block = self._blocks[tensor.name]
        with self._lock:
            reading = self._reads.get(block) or self._pool.submit(self._read_block, block)
            self._reads[block] = reading
            self._left[block] -= 1
            if not self._left[block]:
                del self._reads[block]
        start = block[0].offset
        return reading.result(), start % PAGE + tensor.offset - start

    def _read_block(self, block: _Block) -> memoryview:
        first, last = block[0], block[-1]
        nbytes = last.offset + last.nbytes - first.offset
        buffer = memoryview(own_memory(pages_of(nbytes, first.offset)))
        self._files[first.file].read(first, 0, nbytes, buffer, lambda _: not self._is_stopped)
        return buffer


def _blocks(checkpoint: Checkpoint) -> Iterator[_Block]:
    """Yield tensors in blocks of about `CHUNK_BYTES`; not those that are empty or packed."""
    pending: list[TensorInfo] = []
    for tensor in checkpoint.tensors.values():
        if not tensor.nbytes or DTYPE_BITS[tensor.dtype] % 8:
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
