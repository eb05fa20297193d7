"""What each weight of a model is made from: ranges of tensors, renamed and fused as in transformers 5."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

# A weight that is put together from more ranges than this is not worth reading again and again.
_MOST_PARTS = 2_000


class Described:
    """A tensor of the checkpoint, as `from_pretrained` takes one: its shape, on the meta device."""

    def __init__(self, tensor: TensorInfo) -> None:
        self._tensor = tensor

    def __getitem__(self, _: object) -> Described:
        return self

    def to(self, *, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return it without data, whatever the device."""
        import torch

        del device
        return torch.empty(self._tensor.shape, dtype=dtype or torch_dtype(self._tensor), device="meta")


def torch_dtype(tensor: TensorInfo) -> torch.dtype:
    """Return the dtype that a tensor has in its file."""
    import torch

    found: torch.dtype = getattr(torch, DTYPE_NAMES[tensor.dtype])
    return found


@dataclass(frozen=True)
class Part:
    """A range of a stored tensor, and the `place` in a weight where it goes; in elements, row by row."""

    source: TensorInfo
    begin: int
    elements: int
    place: int


@dataclass(eq=False)
class _Recipe:
    """Tensors that become a weight, or several; `converter` is None where one is taken as it is."""

    target: str
    converter: Any
    sources: list[TensorInfo] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def parts(self, model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Part, ...]]:
        """Return what the weights are made from, by name."""
        if self.converter is None:
            source = self.sources[0]
            return {self.target: (Part(source, 0, source.elements, 0),)}
        is_by_row = min(len(source.shape) for source in self.sources) > 1
        made = self._convert(self._numbered(is_by_row), model)
        found = {}
        for name, rows in made.items():
            shape = (*shapes[name][:-1], 1) if is_by_row else shapes[name]
            if tuple(rows.shape) != shape:
                raise ValueError(f"{name} becomes {tuple(rows.shape)} instead of {shape}")
            found[name] = tuple(self._runs(rows.reshape(-1), is_by_row))
        return found

    def _numbered(self, is_by_row: bool) -> Iterator[torch.Tensor]:
        """Yield tensors like the sources, of one column, whose rows are numbered from the first on."""
        import torch

        begin = 0
        for source in self.sources:
            shape = (*source.shape[:-1], 1) if is_by_row else source.shape
            yield torch.arange(begin, begin + prod(shape)).view(shape)
            begin += prod(shape)

    def _convert(self, tensors: Iterable[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(self.target, source.name, pattern, tensor)
        made = converter.convert(self.target, model=model, config=model.config, loading_info=None)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def _runs(self, rows: torch.Tensor, is_by_row: bool) -> Iterator[Part]:
        """Yield the ranges that numbers of rows stand for."""
        import torch

        widths = [source.shape[-1] if is_by_row else 1 for source in self.sources]
        ends = torch.tensor([s.elements // max(w, 1) for s, w in zip(self.sources, widths, strict=True)])
        ends = ends.cumsum(0)
        owners = torch.searchsorted(ends, rows, right=True)
        is_break = ((rows[1:] - rows[:-1]) != 1) | (owners[1:] != owners[:-1])
        starts = [0, *(is_break.nonzero().view(-1) + 1).tolist(), len(rows)]
        if len(starts) > _MOST_PARTS or len(set(widths)) > 1:
            raise ValueError(f"{len(starts) - 1} ranges in rows of {sorted(set(widths))}")
        width = widths[0]
        for start, stop in pairwise(starts):
            owner = int(owners[start])
            before = int(ends[owner - 1]) if owner else 0
            begin = (int(rows[start]) - before) * width
            yield Part(self.sources[owner], begin, (stop - start) * width, start * width)


def parts_of(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[Part, ...]]:
    """Return what each name of a model's `state_dict` is made from; without those that no tensor becomes.

    Does, without data, as transformers 5 does in `convert_and_load_state_dict_in_model`.

    Raises
    ------
    CheckpointError
        If tensors are rearranged other than by ranges of rows.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, tuple[Part, ...]] = {}
    for recipe in _recipes(model, checkpoint):
        try:
            found |= recipe.parts(model, shapes)
        except Exception as error:
            why = f"becomes {recipe.target} in a way that cannot be streamed: {error}"
            raise CheckpointError(why, file=checkpoint.source, tensor=recipe.sources[0].name) from error
    return found


def _recipes(model: Any, checkpoint: Checkpoint) -> Iterable[_Recipe]:
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, _Recipe] = {}
    for name in sorted(checkpoint.tensors, key=core_model_loading.dot_natural_key):
        key, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = core_model_loading.rename_source_key(name, [], [], prefix, state)
        if key in state:
            recipe = found.setdefault(key, _Recipe(key, by_pattern[pattern] if pattern else None))
            recipe.sources.append(checkpoint.tensors[name])
            recipe.patterns.append(pattern or name)
    return found.values()
