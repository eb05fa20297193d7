"""A model larger than the memory it may use: some weights stay there, the others are read as it runs.

What stays is spread evenly over the blocks, so that one thread reads what is next while the model computes,
and reads the first block of the next pass during the last of this one. A weight is provided where the model
looks it up, so that it does not matter whether a model calls a module or only reads its weight; its memory
counts until no tensor views it any more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, NoReturn, TypeAlias

import torch

from shardkit.base.disk import own_memory
from shardkit.base.errors import CheckpointError, ShardkitError
from shardkit.base.machine import process_bytes
from shardkit.base.record import listed
from shardkit.checkpoint.budget import SIZES, MemoryPlan, Needs, Workload, head_scratch, plan_memory
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.loaded import LOAD_BITS
from shardkit.load.direct import open_files
from shardkit.load.guard import guard
from shardkit.load.read_ahead import ReadAhead
from shardkit.load.recipes import parts_of
from shardkit.load.rows import rows_in_file
from shardkit.load.units import Filler, Unit, units_of

_Place: TypeAlias = tuple[Unit, Any]  # weights, and the module that they are of


def fill_within(model: Any, checkpoint: Checkpoint, work: Workload, plain_bytes: int) -> MemoryPlan:
    """Give a decoder on the meta device its weights such that the process stays within a budget; return how.

    The checkpoint is left as it is while the model is used. A pass over more than `work` raises a PlanError.
    A plain load takes `plain_bytes`, which the error for a budget that is too small says.

    Raises
    ------
    PlanError
        If the memory is too little; names the least that is not.
    CheckpointError
        If weights are missing, or files were changed or cannot be read.
    """
    needs = needs_of(model.config, dtype_name(model.dtype), work)
    needs = needs._replace(activation_bytes=needs.activation_bytes + _head_scratch(model, work))
    files = open_files(checkpoint)
    filler, rows, units = Filler(files), list[_Place](), list[_Place]()
    for unit, module in units_of(model, parts_of(model, checkpoint)):
        (rows if _stays_in_file(unit, module) else units).append((unit, module))
    sizes = [unit.size for unit, _ in units]
    plan, chosen = plan_memory(checkpoint.source, sizes, needs, work, plain_bytes)
    resident = _made_resident([*compress(units, chosen.stays)], filler)
    _attach_stream([*compress(units, map(not_, chosen.stays))], chosen.buffer_bytes, filler)
    for unit, module in rows:  # of a head in memory that is tied to the embedding, there is no second copy
        weight = unit.weights[0]
        tied = resident.get(weight.name)
        file = files[weight.parts[0].source.file]
        module._parameters[weight.attribute] = rows_in_file(weight, file) if tied is None else tied
    _check_complete(model, checkpoint)
    guard(model, plan)
    return plan


def needs_of(config: Any, dtype: str, work: Workload) -> Needs:
    """Return what this process needs beside the weights of a model that is loaded in a dtype."""
    text = config.get_text_config()
    named = {"attn_implementation": getattr(text, "_attn_implementation", None)}
    named |= {name: getattr(text, name, None) for name in (*text.attribute_map, *SIZES)}
    described = {**text.to_dict(), **named}
    return Needs.of(described, LOAD_BITS.get(dtype, 32) // 8, work, process_bytes())


def dtype_name(dtype: object) -> str:
    """Return "float16" for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def _head_scratch(model: Any, work: Workload) -> int:
    """Return the memory that a head needs at the end of a prompt, once it is avoided where it can be."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0
    if not (needed := head_scratch(weight.nbytes, dtype_name(weight.dtype), work)):
        head.register_forward_pre_hook(_with_own_strides)
    return needed


def _with_own_strides(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    value, *others = arguments
    return (value.reshape(-1).view(value.shape) if value.is_contiguous() else value, *others)


def _stays_in_file(unit: Unit, module: Any) -> bool:
    """Whether a unit is an embedding, of which a token needs one row."""
    part, *others = unit.weights[0].parts
    is_plain = not others and part.source.layout is None and len(part.source.shape) == 2
    return isinstance(module, torch.nn.Embedding) and is_plain and part.elements > 0


def _made_resident(units: Sequence[_Place], filler: Filler) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for unit, module in units:
        buffer = memoryview(own_memory(unit.size.nbytes))
        filler.fill(unit, buffer)
        if unit.are_buffers:
            module._buffers.update(unit.tensors(buffer))
        else:
            module._parameters.update(_parameters(unit, buffer))
            made |= {weight.name: module._parameters[weight.attribute] for weight in unit.weights}
    return made


def _parameters(unit: Unit, buffer: memoryview) -> dict[str, Any]:
    made = unit.tensors(buffer).items()
    return {name: torch.nn.Parameter(value, requires_grad=False) for name, value in made}


def _attach_stream(units: Sequence[_Place], buffer_bytes: int, filler: Filler) -> None:
    if units:
        stream = Stream([unit for unit, _ in units], buffer_bytes, filler)
        for unit, module in units:
            module.__dict__["_parameters"] = StreamedParameters(module._parameters, unit, stream)
            module.register_forward_hook(partial(stream.release, unit))


def _check_complete(model: Any, checkpoint: Checkpoint) -> None:
    missing = []
    for path, module in model.named_modules():
        own = {} if isinstance(module._parameters, StreamedParameters) else module._parameters
        for name, value in (*own.items(), *module._buffers.items()):
            if value is not None and value.is_meta:
                missing.append(f"{path}.{name}")
    if missing:
        raise CheckpointError(
            f"has no {listed(missing)}, which {type(model).__name__} needs", file=checkpoint.source
        )


class Stream:
    """Weights of units as they are needed: what reads them ahead, and which are in use."""

    def __init__(self, units: Sequence[Unit], buffer_bytes: int, filler: Filler) -> None:
        self._lock = threading.Lock()
        self._unit: Unit | None = None
        self._weights: dict[str, Any] = {}
        self._ahead = ReadAhead({unit: unit.size.nbytes for unit in units}, buffer_bytes, filler.fill)
        weakref.finalize(self, self._ahead.close)

    def weights(self, unit: Unit) -> dict[str, Any]:
        """Return a unit's parameters by attribute, and give up those before; raises as `ReadAhead.take`."""
        with self._lock:
            if unit is not self._unit:
                self._unit, self._weights = None, {}
                self._weights = _parameters(unit, self._ahead.take(unit))
                self._unit = unit
            return self._weights

    def release(self, unit: Unit, *_: object) -> None:
        """Give up a unit's parameters: a hook for after the forward pass of its module."""
        with self._lock:
            if unit is self._unit:
                self._unit, self._weights = None, {}


class StreamedParameters(dict[str, Any]):
    """A module's parameters, on the meta device, that are looked up in a stream."""

    def __init__(self, described: dict[str, Any], unit: Unit, stream: Stream) -> None:
        super().__init__(described)
        self._unit, self._stream = unit, stream

    def __getitem__(self, name: str) -> Any:
        described = super().__getitem__(name)
        return described if described is None else self._stream.weights(self._unit)[name]

    def __setitem__(self, name: str, value: Any) -> NoReturn:
        raise ShardkitError(
            f"{self._unit.module}.{name} is read from its file for every pass: it cannot be set"
        )
