"""What each weight of a model is made from: tensors of the checkpoint, as transformers 5 fuses them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.strided import Layout, gather
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo
from shardkit.load.direct import PAGE, pages_of
from shardkit.load.residence import UnitSize

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True, eq=False)
class Recipe:
    """Tensors of the checkpoint that become a weight, or several.

    Attributes
    ----------
    target
        The model's name of the weight; of several, the first.
    converter
        What rearranges the tensors (transformers' `WeightConverter`); None where one is taken as it is.
    sources, patterns
        The tensors, and for each the pattern of the converter that its name matches.
    """

    target: str
    converter: Any = None
    sources: list[TensorInfo] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def made(self, tensors: Sequence[torch.Tensor], config: object) -> dict[str, torch.Tensor]:
        """Return weights by name, from the sources' data in the weights' dtype."""
        if self.converter is None:
            return {self.target: tensors[0]}
        converter = copy.deepcopy(self.converter)
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(self.target, source.name, pattern, tensor)
        made = converter.convert(self.target, model=None, config=config, loading_info=None)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


def recipes_of(model: Any, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """Return what each name of a model's `state_dict` is made from; without those that no tensor becomes.

    Does, without data, as transformers 5 does in `convert_and_load_state_dict_in_model`.
    """
    import torch
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Recipe] = {}
    for name in sorted(checkpoint.tensors, key=core_model_loading.dot_natural_key):
        key, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = core_model_loading.rename_source_key(name, [], [], prefix, state)
        if key in state:
            recipe = found.setdefault(key, Recipe(key, by_pattern[pattern] if pattern else None))
            # Of two files' tensors of one weight, the first is taken, as in transformers.
            recipe.sources.append(checkpoint.tensors[name])
            recipe.patterns.append(pattern or name)
    made = {}
    for recipe in found.values():
        try:
            parts = recipe.made([torch.empty(s.shape, device="meta") for s in recipe.sources], model.config)
        except Exception as error:
            why = f"is rearranged in a way that cannot be streamed: {error}"
            raise CheckpointError(why, file=checkpoint.source, tensor=recipe.sources[0].name) from error
        made |= {name: recipe for name in parts if name in state}
    return made


@dataclass(frozen=True)
class Weight:
    """A parameter, or a buffer that is saved, of a module.

    Attributes
    ----------
    name, attribute
        In the model, and in its module.
    dtype
        That it has in the model.
    elements
        How many it has.
    recipe
        What it is made from.
    """

    name: str
    attribute: str
    dtype: torch.dtype
    elements: int
    recipe: Recipe

    @property
    def is_view(self) -> bool:
        """Whether its bytes can be used as they are read."""
        source = self.recipe.sources[0]
        is_plain = self.recipe.converter is None and source.layout is None
        return is_plain and torch_dtype(source) == self.dtype and source.offset % self.dtype.itemsize == 0

    @property
    def sources(self) -> Sequence[TensorInfo]:
        """The tensors that are read for it."""
        return self.recipe.sources if self.recipe.converter is not None else self.recipe.sources[:1]


@dataclass(frozen=True, eq=False)
class Unit:
    """The weights of one module, which are read together.

    Attributes
    ----------
    module
        The module's name.
    weights
        Those that it has itself: parameters, or buffers.
    are_buffers
        Which of both.
    """

    module: str
    weights: tuple[Weight, ...]
    are_buffers: bool = False

    @property
    def sources(self) -> Iterator[TensorInfo]:
        """The tensors that are read, one after the other."""
        return (source for weight in self.weights for source in weight.sources)

    @property
    def size(self) -> UnitSize:
        """The memory that it takes."""
        read, resident, converted = sum(map(pages_of, self.sources)), 0, 0
        for weight in self.weights:
            nbytes = weight.elements * weight.dtype.itemsize
            resident += sum(map(pages_of, weight.sources)) if weight.is_view else nbytes
            if weight.recipe.converter is not None:
                # The sources cast, stacked, and joined.
                converted += 3 * sum(s.elements for s in weight.sources) * weight.dtype.itemsize
            elif not weight.is_view:
                converted += 2 * nbytes
        return UnitSize(resident, read, converted, must_stay=self.are_buffers)

    def tensors(self, buffer: memoryview, config: object) -> dict[str, torch.Tensor]:
        """Return the weights by attribute, from the pages of their sources: views, or made from them."""
        at, found = 0, {}
        for weight in self.weights:
            parts = []
            for source in weight.sources:
                parts.append(viewed(buffer, at + source.offset % PAGE, source).to(weight.dtype))
                at += pages_of(source)
            made = weight.recipe.made(parts, config)[weight.name]
            places = {part.untyped_storage().data_ptr() for part in parts}
            is_part = made.untyped_storage().data_ptr() in places
            found[weight.attribute] = made.clone() if is_part and not weight.is_view else made
        return found


def viewed(buffer: memoryview, begin: int, tensor: TensorInfo) -> torch.Tensor:
    """Return a tensor whose bytes begin at a place in a buffer, which lives as long as the tensor does."""
    import torch

    dtype = torch_dtype(tensor)
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.layout is not None:
        buffer, begin = memoryview(_gathered(buffer, begin, tensor, tensor.layout)), 0
    return torch.frombuffer(buffer, dtype=dtype, count=tensor.elements, offset=begin).view(tensor.shape)


def _gathered(buffer: memoryview, begin: int, tensor: TensorInfo, layout: Layout) -> bytearray:
    return bytearray().join(map(bytes, gather(buffer, begin, layout, 0, tensor.nbytes)))


def units_of(model: Any, recipes: Mapping[str, Recipe]) -> Iterable[tuple[Unit, Any]]:
    """Yield the units of a model in order of its modules, and the module of each."""
    same: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in recipes:
            same.setdefault(id(value), name)
    for path, module in model.named_modules():
        for own, are_buffers in ((module._parameters, False), (module._buffers, True)):
            named = ((attribute, value, same.get(id(value), "")) for attribute, value in own.items())
            weights = tuple(
                Weight(name, attribute, value.dtype, value.numel(), recipes[name])
                for attribute, value, name in named
                if name
            )
            if weights:
                yield Unit(path, weights, are_buffers), module
