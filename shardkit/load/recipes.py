"""What each weight of a model is made from: ranges of tensors, renamed and fused as in transformers 5."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch

from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import TensorInfo
from shardkit.load.direct import torch_dtype
from shardkit.load.look import naming

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
        del device
        return torch.empty(self._tensor.shape, dtype=dtype or torch_dtype(self._tensor), device="meta")


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
        if self.converter is None:
            source = self.sources[0]
            return {self.target: (Part(source, 0, source.elements, 0),)}
        # Of matrices, rows are followed, else items: numbered from the first on, and after a gap, so that no
        # range reaches from one tensor into the next.
        is_by_row = min(len(source.shape) for source in self.sources) > 1
        widths = {source.shape[-1] if is_by_row else 1 for source in self.sources}
        columns = [(*source.shape[:-1], 1) if is_by_row else source.shape for source in self.sources]
        begins = [*accumulate((prod(shape) + 1 for shape in columns), initial=0)]
        numbered = [
            torch.arange(begin, begin + prod(shape)).view(shape)
            for begin, shape in zip(begins, columns, strict=False)
        ]
        found = {}
        for name, rows in self._convert(numbered, model).items():
            shape = (*shapes[name][:-1], 1) if is_by_row else shapes[name]
            if tuple(rows.shape) != shape:
                raise ValueError(f"{name} becomes {tuple(rows.shape)} instead of {shape}")
            found[name] = tuple(self._runs(rows.reshape(-1), begins, widths))
        return found

    def _convert(self, tensors: Iterable[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(self.target, source.name, pattern, tensor)
        made = converter.convert(self.target, model=model, config=model.config, loading_info=None)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def _runs(self, rows: torch.Tensor, begins: Sequence[int], widths: set[int]) -> Iterator[Part]:
        is_break = rows[1:] - rows[:-1] != 1
        starts = [0, *(is_break.nonzero().view(-1) + 1).tolist(), len(rows)]
        if len(starts) > _MOST_PARTS or len(widths) > 1:
            raise ValueError(f"{len(starts) - 1} ranges in rows of {sorted(widths)}")
        (width,) = widths
        for start, stop in pairwise(starts):
            number = int(rows[start])
            owner = bisect_right(begins, number) - 1
            begin = (number - begins[owner]) * width
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
    from transformers.conversion_mapping import get_model_conversion_mapping  # not in transformers 4
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, named = model.state_dict(), naming(model)
    found: dict[str, _Recipe] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        key, pattern = named(name)
        if key in state:
            recipe = found.setdefault(key, _Recipe(key, by_pattern[pattern] if pattern else None))
            recipe.sources.append(checkpoint.tensors[name])
            recipe.patterns.append(pattern or name)
    return found.values()
