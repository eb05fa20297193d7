"""Reading tensors from the files of a checkpoint that must not change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardkit.base.disk import CHUNK_BYTES, PAGE, DiskFile, pages_of
from shardkit.base.errors import CheckpointError, reading
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.strided import Layout, read_strided
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo
from shardkit.sources.fileset import State
from shardkit.sources.local import file_state

if TYPE_CHECKING:
    import torch


def torch_dtype(tensor: TensorInfo) -> torch.dtype:
    """Return the dtype that a tensor has in its file."""
    import torch

    found: torch.dtype = getattr(torch, DTYPE_NAMES[tensor.dtype])
    return found


def open_files(checkpoint: Checkpoint) -> dict[str, WeightFile]:
    """Open the weight files of a checkpoint, by name; raises as `WeightFile` does."""
    return {name: WeightFile(checkpoint.path(name), checkpoint.seen[name]) for name in checkpoint.files}


class WeightFile:
    """A file of weights, open for reading: what is deleted stays readable.

    Raises
    ------
    CheckpointError
        If it is gone, or its state is no longer that in which the checkpoint was opened.
    """

    def __init__(self, path: str, state: State) -> None:
        self._path, self._file, self._state = path, DiskFile(path), state
        self._check(None)

    def read(
        self,
        tensor: TensorInfo,
        begin: int,
        nbytes: int,
        buffer: memoryview,
        may_hold: Callable[[int], bool] = lambda _: True,
    ) -> tuple[bytearray | memoryview, int]:
        """Read bytes of a tensor, from its byte `begin` on; return what they are in, and where in that.

        Parameters
        ----------
        buffer
            Page-aligned, of all pages that the bytes touch in the file; used if they lie together there.
        may_hold
            Called before so many bytes more of the buffer are filled; False ends the reading.

        Raises
        ------
        CheckpointError
            If the file ends too early, was changed, or cannot be read; names file, tensor and numbers.
        """
        if tensor.layout is not None:
            assert isinstance(tensor.layout, Layout)  # noqa: S101 - pieces of ranks are not loaded
            pieces = read_strided(self._path, tensor.offset, tensor.layout, begin, nbytes)
            return bytearray().join(map(bytes, pieces)), 0
        self._check(tensor.name)
        first = tensor.offset + begin
        inside = first % PAGE
        done = held = 0
        while done < inside + nbytes:
            end = min(done + CHUNK_BYTES, pages_of(inside + nbytes))
            if not may_hold(end - held):
                break
            held = end
            done += self._counted(tensor, self._file.read, buffer[done:end], first - inside + done)
        return buffer, inside

    def read_row(self, tensor: TensorInfo, begin: int, buffer: memoryview) -> None:
        """Read a few bytes of a tensor, from its byte `begin` on; raises as `read` does."""
        self._check(tensor.name)
        done = 0
        while done < len(buffer):
            place = tensor.offset + begin + done
            done += self._counted(tensor, os.preadv, self._file.cached, [buffer[done:]], place)

    def _counted(self, tensor: TensorInfo, read: Callable[..., int], *what: Any) -> int:
        with reading(self._path, tensor.name):
            count = read(*what)
        if count:
            return count
        size, end = self._state_now()[0], tensor.offset + tensor.nbytes
        raise CheckpointError(
            f"ends at byte {size}, but its data extends to byte {end}: it was truncated while in use",
            file=self._path,
            tensor=tensor.name,
        )

    def _state_now(self) -> State:
        return file_state(os.fstat(self._file.cached))

    def _check(self, tensor: str | None) -> None:
        now = self._state_now()
        if now[:2] == self._state[:2]:
            return
        had, has = self._state[0], now[0]
        sizes = f": it had {had} bytes, and has {has} now" if has != had else ", with its size as before"
        raise CheckpointError(
            f"was changed while in use{sizes}; load the model again", file=self._path, tensor=tensor
        )
