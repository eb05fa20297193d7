"""Reading tensors from the files of a checkpoint that must not change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable

from shardkit.base.disk import CHUNK_BYTES, PAGE, DiskFile, pages_of
from shardkit.base.errors import CheckpointError, reading
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.strided import Layout, read_strided
from shardkit.formats.tensor import TensorInfo
from shardkit.sources.fileset import State
from shardkit.sources.local import file_state


class WeightFiles:
    """The weight files of a checkpoint, open for reading: what is deleted stays readable.

    Raises
    ------
    CheckpointError
        If a file is gone, or is no longer what the checkpoint was opened from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = {
            name: _OpenFile(checkpoint.path(name), checkpoint.seen.get(name)) for name in checkpoint.files
        }

    def read(
        self, tensor: TensorInfo, buffer: memoryview, may_hold: Callable[[int], bool] = lambda _: True
    ) -> None:
        """Read the pages of a contiguous tensor into a page-aligned buffer of their size.

        Parameters
        ----------
        may_hold
            Called before so many bytes more of the buffer are filled; False ends the reading.

        Raises
        ------
        CheckpointError
            If a file ends too early, was changed, or cannot be read; names file, tensor and numbers.
        """
        self._files[tensor.file].read_pages(tensor, tensor.offset, tensor.nbytes, buffer, may_hold)

    def read_range(
        self, tensor: TensorInfo, begin: int, nbytes: int, buffer: memoryview
    ) -> tuple[bytearray | memoryview, int]:
        """Read bytes of a tensor, and return what they are in, and where; raises as `read` does.

        The page-aligned buffer, two pages larger than they, is used where they lie together in the file.
        """
        if tensor.layout is None:
            first = tensor.offset + begin
            self._files[tensor.file].read_pages(tensor, first, nbytes, buffer, lambda _: True)
            return buffer, first % PAGE
        assert isinstance(tensor.layout, Layout)  # noqa: S101 - pieces of ranks are not loaded
        pieces = read_strided(self._files[tensor.file].path, tensor.offset, tensor.layout, begin, nbytes)
        return bytearray().join(map(bytes, pieces)), 0

    def read_row(self, tensor: TensorInfo, begin: int, buffer: memoryview) -> None:
        """Read a few bytes of a tensor, from its byte `begin` on; raises as `read` does."""
        self._files[tensor.file].read_part(tensor, begin, buffer)


class _OpenFile:
    """One file, and the state that it must stay in."""

    def __init__(self, path: str, seen: State | None) -> None:
        self.path, self._file = path, DiskFile(path)
        self._state = seen or self._state_now()
        self._check("")

    def read_pages(
        self, tensor: TensorInfo, first: int, nbytes: int, buffer: memoryview, may_hold: Callable[[int], bool]
    ) -> None:
        start = first // PAGE * PAGE
        needed, done, held = first + nbytes - start, 0, 0
        self._check(tensor.name)
        while done < needed:
            end = min(done + CHUNK_BYTES, pages_of(needed))
            if end > held and not may_hold(end - held):
                return
            held = max(end, held)
            with reading(self.path, tensor.name):
                count = self._file.read(buffer[done:end], start + done)
            done += self._counted(count, tensor)

    def read_part(self, tensor: TensorInfo, begin: int, buffer: memoryview) -> None:
        done = 0
        self._check(tensor.name)
        while done < len(buffer):
            with reading(self.path, tensor.name):
                count = os.preadv(self._file.cached, [buffer[done:]], tensor.offset + begin + done)
            done += self._counted(count, tensor)

    def _state_now(self) -> State:
        return file_state(os.fstat(self._file.cached))

    def _counted(self, count: int, tensor: TensorInfo) -> int:
        if count:
            return count
        size, end = self._state_now()[0], tensor.offset + tensor.nbytes
        raise CheckpointError(
            f"ends at byte {size}, but its data extends to byte {end}: it was truncated while in use",
            file=self.path,
            tensor=tensor.name,
        )

    def _check(self, tensor: str) -> None:
        now = self._state_now()
        if now[:2] != self._state[:2]:
            had, has = self._state[0], now[0]
            sizes = f": it had {had} bytes, and has {has} now" if has != had else ", with its size as before"
            raise CheckpointError(
                f"was changed while in use{sizes}; load the model again",
                file=self.path,
                tensor=tensor or None,
            )
