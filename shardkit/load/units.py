"""The weights of one module, which are read together into one piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from shardkit.base.disk import PAGE, own_memory, pages_of
from shardkit.checkpoint.budget import STEP_BYTES, UnitSize, step_bytes, together, viewed
from shardkit.load.direct import WeightFile, torch_dtype
from shardkit.load.recipes import Part


@dataclass(frozen=True)
class Weight:
    """A parameter or saved buffer: its names in model and module, what it is, and what it is made from."""

    name: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def is_view(self) -> bool:
        """Whether it is used as it is read, in the pages of its file."""
        first, *others = self.parts
        source = first.source
        is_stored = torch_dtype(source) == self.dtype and source.layout is None
        return not others and is_stored and source.offset % self.dtype.itemsize == 0

    @property
    def size(self) -> UnitSize:
        """Memory that it is read into, in pages, and what is read for that."""
        if self.is_view:
            return viewed(self.parts[0].source.nbytes, self.parts[0].source.offset)
        stored = [part.elements * torch_dtype(part.source).itemsize for part in self.parts]
        nbytes = prod(self.shape) * self.dtype.itemsize
        return UnitSize(pages_of(nbytes), sum(stored), step_bytes(max(stored)))

    def tensor(self, buffer: memoryview, begin: int) -> torch.Tensor:
        """Return it in the place that it has in a buffer, which lives as long as the tensor does."""
        if not (count := prod(self.shape)):
            return torch.empty(self.shape, dtype=self.dtype)
        begin += self.parts[0].source.offset % PAGE if self.is_view else 0
        return torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=begin).view(self.shape)


@dataclass(frozen=True, eq=False)
class Unit:
    """The weights that a module has itself: parameters, or buffers."""

    module: str
    weights: tuple[Weight, ...]
    are_buffers: bool

    @property
    def size(self) -> UnitSize:
        """What a plan has to know of it."""
        return together([weight.size for weight in self.weights], self.are_buffers)

    def tensors(self, buffer: memoryview) -> dict[str, torch.Tensor]:
        """Return the weights by attribute, out of a buffer that was filled."""
        at, found = 0, {}
        for weight in self.weights:
            found[weight.attribute] = weight.tensor(buffer, at)
            at += weight.size.nbytes
        return found


class Filler:
    """Fills buffers with units, one at a time, from the files where their tensors are."""

    def __init__(self, files: Mapping[str, WeightFile]) -> None:
        self._files = files
        self._step: memoryview | None = None

    def fill(self, unit: Unit, buffer: memoryview, may_hold: Callable[[int], bool] = lambda _: True) -> None:
        """Read a unit, and cast and put together what is stored otherwise; as `WeightFile.read` does."""
        at = 0
        for weight in unit.weights:
            if weight.is_view:
                source, place = weight.parts[0].source, buffer[at : at + weight.size.nbytes]
                self._files[source.file].read(source, 0, source.nbytes, place, may_hold)
            else:
                whole = weight.tensor(buffer, at).view(-1)
                for part in weight.parts:
                    if not may_hold(part.elements * weight.dtype.itemsize):
                        return
                    self._copy(part, whole[part.place : part.place + part.elements])
            at += weight.size.nbytes

    def _copy(self, part: Part, target: torch.Tensor) -> None:
        source, dtype = part.source, torch_dtype(part.source)
        file, size = self._files[source.file], dtype.itemsize
        self._step = self._step or memoryview(own_memory(STEP_BYTES + 2 * PAGE))
        for done in range(0, part.elements, STEP_BYTES // size):
            count = min(part.elements - done, STEP_BYTES // size)
            data, at = file.read(source, (part.begin + done) * size, count * size, self._step)
            values = torch.frombuffer(data, dtype=dtype, count=count, offset=at)
            target[done : done + count].copy_(values)


def units_of(model: Any, parts: Mapping[str, tuple[Part, ...]]) -> Iterable[tuple[Unit, Any]]:
    """Yield the units of a model in order of its modules, and the module of each."""
    same: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in parts:
            same.setdefault(id(value), name)
    for path, module in model.named_modules():
        for own, are_buffers in ((module._parameters, False), (module._buffers, True)):
            weights = tuple(
                Weight(name, attribute, tuple(value.shape), value.dtype, parts[name])
                for attribute, value in own.items()
                if (name := same.get(id(value)))
            )
            if weights:
                yield Unit(path, weights, are_buffers), module
