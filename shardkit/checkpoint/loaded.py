"""What becomes of each tensor in a load with transformers 5: what is converted, stacked, or left as it is."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from shardkit.base.disk import pages_of
from shardkit.checkpoint.budget import UnitSize, step_bytes, together, viewed
from shardkit.checkpoint.kept import kept_pattern
from shardkit.checkpoint.parts import EMBEDDING, HEAD, is_single_expert, part_of
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.tensor import CAST_DTYPES, DTYPE_NAMES, FLOAT_DTYPES, TensorInfo, dtype_name

# While it stacks experts, transformers holds some of them twice, for a moment: this share of their bytes,
# as measured with Mixtral's, Qwen3-MoE's and DeepSeek-V3's shapes, with a cast and without.
_STACKING_SHARE = {True: 1.0, False: 0.25}
# Experts that are stacked in the files, but transposed: where in their shape the hidden size then stands.
_TRANSPOSED = {"qwen3_vl_moe": {"gate_up_proj": 1, "down_proj": 2}}
# Divided in place before the first token, so that pages of the mapping become memory of the process.
_REWRITTEN = {"rwkv": re.compile(r"attention\.output\.weight|feed_forward\.value\.weight")}
# Masks that older files of GPT-2, GPT-Neo, GPT-J and GPT-NeoX hold, and that no load reads any more.
_MASK = re.compile(r"\.(attn|attention)\.bias$")
# Of what a model can be loaded in.
LOAD_BITS = {DTYPE_NAMES[dtype]: DTYPE_BITS[dtype] for dtype in FLOAT_DTYPES}


def load_dtype(dtype: object) -> str | None:
    """Return the name of a dtype to load in, "float64" included; None: as stored; as `dtype_name`."""
    return dtype if dtype is None or dtype in LOAD_BITS else dtype_name(dtype)


class LoadedTensor(NamedTuple):
    """A tensor, the dtype that it is converted to ("float16"; None: it stays as it is), and bytes then.

    An alias is another name of what counts already; but where it is converted, it is converted again.
    """

    stored: TensorInfo
    converted: str | None
    nbytes: int
    is_alias: bool = False

    @property
    def size(self) -> UnitSize:
        """Memory of its own that it is read into: pages, but for single experts, which share theirs."""
        stored, is_expert = self.stored, is_single_expert(self.stored.name)
        is_stored = self.converted is None and not is_expert and stored.layout is None
        if is_stored and stored.offset % max(1, DTYPE_BITS[stored.dtype] // 8) == 0:
            return viewed(self.nbytes, stored.offset)
        nbytes = self.nbytes if is_expert else pages_of(self.nbytes)
        return UnitSize(nbytes, stored.nbytes, step_bytes(stored.nbytes))

    def in_shards(self, dtype: str) -> LoadedTensor:
        """Return it as it is loaded from shards that were cast to a dtype, where there is such a cast."""
        if self.converted != dtype or dtype not in CAST_DTYPES:
            return self
        cast = replace(self.stored, dtype=CAST_DTYPES[dtype], nbytes=self.nbytes)
        return self._replace(stored=cast, converted=None)

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows, as embeddings and heads have."""
        return len(self.stored.shape) == 2 and self.stored.elements > 0

    @property
    def is_embedding(self) -> bool:
        """Whether it is one, of which a token needs a row."""
        name = self.stored.name
        is_weight = name.endswith("weight") and self.is_matrix and self.stored.layout is None
        return is_weight and part_of(name).place == EMBEDDING


def loaded_tensors(
    stored: Iterable[TensorInfo], dtype: str | None, config: Mapping[str, Any], aliases: Container[str] = ()
) -> list[LoadedTensor]:
    """Return what each tensor becomes in a load in `dtype`; without those that no load reads."""
    keeps, found = kept_pattern(config, dtype or ""), []
    for tensor in stored:
        if _MASK.search(tensor.name) and len(tensor.shape) == 4:
            continue
        target = "float32" if keeps.search(tensor.name) else dtype
        is_kept = target is None or tensor.dtype not in FLOAT_DTYPES or DTYPE_NAMES[tensor.dtype] == target
        converted = None if is_kept else target
        nbytes = tensor.elements * LOAD_BITS[converted] // 8 if converted else tensor.nbytes
        found.append(LoadedTensor(tensor, converted, nbytes, tensor.name in aliases))
    return found


class WeightBytes(NamedTuple):
    """Bytes of weights: copied, there twice while stacked, mapped, and read through a mapping."""

    copied: int
    stacking: int
    mapped: int
    read: int


def weight_bytes(
    tensors: Iterable[LoadedTensor], config: Mapping[str, Any], held_whole: bool = False
) -> WeightBytes:
    """Add up what a plain load takes; `held_whole`: from files that are in memory first."""
    copied = mapped = stacking = transposing = read = 0
    model_type = str(config.get("model_type"))
    rewritten = _REWRITTEN.get(model_type)
    for tensor, converted, nbytes, is_alias in tensors:
        is_expert = is_single_expert(tensor.name)
        is_transposed = _is_transposed(tensor.name, tensor.shape, model_type, config)
        in_file = 0 if is_alias else tensor.nbytes
        if is_alias and not converted:
            continue
        stacking += int(is_expert * _STACKING_SHARE[bool(converted)] * nbytes)
        transposing = max(transposing, nbytes * is_transposed)  # the one at hand is there twice
        if converted or is_expert or is_transposed or (rewritten and rewritten.search(tensor.name)):
            copied += nbytes
        elif not held_whole:
            mapped += nbytes
        copied += in_file * held_whole
        read += in_file * (not held_whole)
    return WeightBytes(copied, stacking + transposing, mapped, read)


def _is_transposed(name: str, shape: tuple[int, ...], model_type: str, config: Mapping[str, Any]) -> bool:
    place = _TRANSPOSED.get(model_type, {}).get(name.rpartition(".experts.")[2])
    text = config.get("text_config") or {}
    return place is not None and len(shape) == 3 and shape[place] == text.get("hidden_size")


class Units(NamedTuple):
    """What of a decoder stays or is read together, module by module; and bytes of its head.

    `in_file` are names of embeddings, which stay in their files, and of which a token needs a row.
    """

    sizes: list[UnitSize]
    head_bytes: int
    in_file: frozenset[str]

    def row_bytes(self, tensors: Iterable[LoadedTensor]) -> int:
        """Return the bytes of embeddings that a plain load maps, of which a token needs a row."""
        return sum(t.nbytes for t in tensors if t.stored.name in self.in_file and not t.converted)


def units_of_names(tensors: Iterable[LoadedTensor]) -> Units:
    """Return the units of a decoder, as far as names and shapes show its modules."""
    modules: dict[str, list[UnitSize]] = {}
    embeddings, heads = [], []
    for tensor in tensors:
        if tensor.is_embedding:
            embeddings.append(tensor)
        else:
            name = tensor.stored.name
            parts = name.partition(".experts.") if is_single_expert(name) else name.rpartition(".")
            modules.setdefault(parts[0], []).append(tensor.size)
            if tensor.is_matrix and part_of(name).place == HEAD:
                heads.append(tensor)
    token = max(embeddings, key=lambda tensor: tensor.nbytes, default=None)
    heads = [head for head in heads if token is None or head.stored.shape[0] == token.stored.shape[0]]
    names = {tensor.stored.name for tensor in embeddings}
    if token and not heads:  # the head is tied to it, and in no file of its own
        heads, modules["(head)"] = [token], [token.size]
        names.remove(token.stored.name)
    return Units(
        [together(sizes) for sizes in modules.values()],
        max((head.nbytes for head in heads), default=0),
        frozenset(names),
    )
