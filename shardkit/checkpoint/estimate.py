"""How much memory a load will take, from headers alone: nothing is downloaded, nothing is loaded.

transformers 5 maps the files. A parameter whose dtype on disk is the one requested stays in the mapping;
any other is converted into memory of its own, and so are experts that the model keeps stacked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shardkit.base.machine import usable_memory
from shardkit.base.record import Record, Summary, Table
from shardkit.base.sizes import format_size
from shardkit.checkpoint.hosts import HERE, HOSTS, HostFit, fit
from shardkit.checkpoint.kept import family, listed_patterns
from shardkit.checkpoint.parts import is_single_expert
from shardkit.checkpoint.quantized import quantization
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.tensor import DTYPE_NAMES, FLOAT_DTYPES, QUANTIZED_DTYPES, parse_dtype

# Anonymous memory of a process that has imported torch and transformers, loaded a small model in a dtype that
# needs no cast, and given a token: measured with transformers 5.23 and the CPU build of torch 2.13 on Linux.
RUNTIME_BYTES = 271_000_000
# Model types of which loads kept the ±5 %, first token included, as stored and cast to float16, with
# transformers 5.23; from 0.2 to 2.6 GB the error did not grow with the weights. Others may keep buffers,
# rewrite weights, or need more for the first token, so that nothing is promised of them.
# fmt: off
_MEASURED = frozenset((
    "apertus", "arcee", "bart", "bert", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deberta-v2",
    "distilbert", "electra", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gpt2", "gpt_neox", "gptj", "granite", "helium", "lfm2", "llama", "mbart", "mistral",
    "modernbert", "mpt", "nemotron", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "roberta", "seed_oss", "smollm3", "stablelm", "starcoder2", "t5", "xlm-roberta",
))
# Their tokenizers are Unigram models, which were measured to take three times as much.
_UNIGRAM = frozenset((
    "albert", "camembert", "deberta-v2", "mbart", "mt5", "pegasus", "t5", "umt5", "xlm-roberta", "xlnet",
))
# fmt: on
TOLERANCE = 0.05
# Memory of a tokenizer for each byte of the first of these files that is there, as measured with byte-level
# BPE of 32,000 to 256,000 tokens; where that matters, it is too rough for a promise.
_TOKENIZERS = {"tokenizer.json": 10, "tokenizer.model": 60, "vocab.json": 60, "vocab.txt": 40}
_TOKENIZER_MATTERS = 0.03

# While it stacks experts, transformers holds some of them twice, for a moment: this share of their bytes,
# as measured with Mixtral's, Qwen3-MoE's and DeepSeek-V3's shapes, with a cast and without.
_STACKING_SHARE = {True: 1.0, False: 0.25}
# Experts that are stacked in the files, but transposed: where in their shape the hidden size then stands.
_TRANSPOSED = {"qwen3_vl_moe": {"gate_up_proj": 1, "down_proj": 2}}
# Divided in place before the first token, so that pages of the mapping become memory of the process.
_REWRITTEN = {"rwkv": re.compile(r"attention\.output\.weight|feed_forward\.value\.weight")}
# Large buffers that no file holds, from the config's numbers, as transformers 5.23 makes them: of GPT-Neo a
# mask for each layer, and as seen about three more while they are made; of GPTBigCode one, and one more.
_BUFFERS: dict[str, tuple[tuple[str, ...], Callable[..., int]]] = {
    "gpt_neo": (("num_layers", "max_position_embeddings"), lambda layers, length: (layers + 3) * length**2),
    "gpt_bigcode": (("n_positions",), lambda length: 2 * length**2),
    **dict.fromkeys(
        ("gptj", "codegen"),
        (("n_layer", "n_positions", "rotary_dim"), lambda layers, length, width: 4 * layers * length * width),
    ),
}
# Masks that older files of GPT-2, GPT-Neo, GPT-J and GPT-NeoX hold, and that no load reads any more.
_MASK = re.compile(r"\.(attn|attention)\.bias$")
# Of what a model can be loaded in.
LOAD_BITS = {DTYPE_NAMES[dtype]: DTYPE_BITS[dtype] for dtype in FLOAT_DTYPES}


class StoredTensor(NamedTuple):
    """What counts of a tensor: its name, number of elements, dtype on disk ("BF16"), and shape.

    An alias is another name of what counts already; but where it is converted, it is converted again.
    """

    name: str
    elements: int
    dtype: str
    shape: tuple[int, ...] = ()
    is_alias: bool = False


@dataclass(frozen=True)
class Estimate(Record):
    """What a load with transformers 5 on a CPU will take, up to the first token of a short prompt.

    Attributes
    ----------
    source, dtype
        What would be loaded, and the dtype it would end up in; None: each tensor stays as it is.
    runtime_bytes
        Anonymous memory of Python, torch and transformers by themselves.
    copied_bytes
        Anonymous memory of weights that are converted while they are loaded.
    stacking_bytes
        Second copies, for a moment, of experts that are stacked; known less exactly than the rest.
    mapped_bytes
        Weights that stay in the files' mapping: memory that the kernel may drop, and read again.
    hosts
        Whether it fits what is left of this machine's memory, and the free hosts; empty where not known.
    notes
        For the user.
    tokenizer_bytes, buffer_bytes
        Anonymous memory of the tokenizer beside the weights, and of buffers that no file holds.
    resident_bytes
        Weights in files on tmpfs, which are memory that cannot be evicted, and count as the load's.
    tolerance
        The largest error that is promised (0.05); None where there is no promise.
    """

    source: str
    dtype: str | None
    runtime_bytes: int
    copied_bytes: int
    stacking_bytes: int
    mapped_bytes: int
    hosts: tuple[HostFit, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer_bytes: int = 0
    buffer_bytes: int = 0
    resident_bytes: int = 0
    tolerance: float | None = None

    @property
    def new_bytes(self) -> int:
        """Memory that the load takes beside the files, wherever they are."""
        beside = self.stacking_bytes + self.tokenizer_bytes + self.buffer_bytes
        return self.runtime_bytes + self.copied_bytes + beside

    @property
    def peak_anonymous_bytes(self) -> int:
        """Memory that cannot be evicted, until the first token."""
        return self.new_bytes + self.resident_bytes

    @property
    def needed(self) -> str:
        """`peak_anonymous_bytes` as people read it: with a promise, about as much, or at least that."""
        words = "" if self.tolerance else "about " if self.hosts else "at least "
        return words + format_size(self.peak_anonymous_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready data, with the sum that it stands for."""
        return {**super().to_dict(), "peak_anonymous_bytes": self.peak_anonymous_bytes}

    def summary(self) -> Summary:
        """Return the figures, and a verdict for each host."""
        exact = f" ±{self.tolerance:.0%}".replace("%", " %") if self.tolerance else ""
        others = (
            (self.stacking_bytes, "while experts are stacked"),
            (self.tokenizer_bytes, "for the tokenizer"),
            (self.buffer_bytes, "for buffers that no file contains"),
            (self.resident_bytes, "of files on tmpfs, whose pages cannot be evicted"),
        )
        words = f"{format_size(self.mapped_bytes)} stay in the files; the kernel may evict them"
        mapped = () if self.resident_bytes else (("mapped", words),)
        facts = (
            ("load in", self.dtype or "the dtype of the files"),
            ("peak anonymous", f"{self.needed}{exact} (cannot be evicted)"),
            ("weights", f"{format_size(self.copied_bytes)} converted during loading"),
            *(("also", f"{format_size(size)} {what}") for size, what in others if size),
            *mapped,
        )
        rows = tuple(
            (f"{h.name} (free)" if h.name == HERE else h.name, format_size(h.memory_bytes), h.verdict, h.why)
            for h in self.hosts
        )
        hosts = (Table(("host", "memory", "verdict", "because"), rows),) if rows else ()
        return Summary("Estimated memory to load", facts, hosts, self.notes)


def load_dtype(dtype: object) -> str | None:
    """Return the name of a dtype to load in, "float64" included; None: as stored.

    Raises
    ------
    PlanError
        If it is none that a model is loaded in.
    """
    if dtype is None or dtype in LOAD_BITS:
        return dtype
    target = parse_dtype(dtype)
    return DTYPE_NAMES[target] if target else None


def estimate_load(
    source: str,
    tensors: Iterable[StoredTensor],
    dtype: str | None,
    *,
    config: Mapping[str, Any] | None = None,
    side_files: Mapping[str, int] | None = None,
    held_whole: bool = False,
    in_memory: bool = False,
) -> Estimate:
    """Add up what a load in `dtype` ("float16"; None: as stored) copies, and what it leaves mapped.

    Parameters
    ----------
    config
        Of the model, which may say that it is quantized, or of a type of which more is known.
    side_files
        Sizes of the files beside the weights, the tokenizer's among them.
    held_whole
        Whether the files cannot be mapped (legacy pickles), so that all of them is in memory first.
    in_memory
        Whether the files are on tmpfs, so that their pages are memory that cannot be evicted.
    """
    config = config or {}
    stored = [tensor for tensor in tensors if not (_MASK.search(tensor.name) and len(tensor.shape) == 4)]
    found = (DTYPE_NAMES[tensor.dtype] for tensor in stored if tensor.dtype in QUANTIZED_DTYPES)
    method = quantization(config) or next(found, None)
    copied, stacking, mapped, read = _weights(stored, dtype, config, held_whole)
    buffers = _buffer_bytes(config)
    made = Estimate(
        source,
        dtype,
        RUNTIME_BYTES,
        copied,
        stacking,
        0 if in_memory else mapped,
        tokenizer_bytes=_tokenizer_bytes(side_files or {}, config.get("model_type")),
        buffer_bytes=buffers or 0,
        resident_bytes=read if in_memory else 0,
    )
    if method:
        note = f"quantized ({method}): headers do not show how it is loaded, so this is a lower bound"
        return replace(made, notes=(note,))
    if why := _why_rough(made, config.get("model_type"), buffers):
        return with_hosts(replace(made, notes=(why,)))
    return with_hosts(replace(made, tolerance=TOLERANCE))


def _weights(
    tensors: Iterable[StoredTensor], dtype: str | None, config: Mapping[str, Any], held_whole: bool
) -> tuple[int, int, int, int]:
    """Return bytes of weights: copied, there twice while stacked, mapped, and read through a mapping."""
    copied = mapped = stacking = transposing = read = 0
    model_type = str(config.get("model_type"))
    patterns = "|".join(sorted(listed_patterns(family(model_type), dtype))) if dtype else ""
    keeps = re.compile(patterns) if patterns else None
    rewritten = _REWRITTEN.get(model_type)
    for name, elements, stored, shape, is_alias in tensors:
        is_expert = is_single_expert(name)
        is_transposed = _is_transposed(name, shape, model_type, config)
        target = "float32" if keeps and keeps.search(name) else dtype
        converts = target is not None and stored in FLOAT_DTYPES and DTYPE_NAMES[stored] != target
        in_file = 0 if is_alias else elements * DTYPE_BITS[stored] // 8
        if is_alias and not converts:
            continue
        bits = LOAD_BITS[target] if target is not None and converts else DTYPE_BITS[stored]
        nbytes = elements * bits // 8
        stacking += int(is_expert * _STACKING_SHARE[converts] * nbytes)
        transposing = max(transposing, nbytes * is_transposed)  # the one at hand is there twice
        if converts or is_expert or is_transposed or (rewritten and rewritten.search(name)):
            copied += nbytes
        elif not held_whole:
            mapped += nbytes
        copied += in_file * held_whole
        read += in_file * (not held_whole)
    return copied, stacking + transposing, mapped, read


def _is_transposed(name: str, shape: tuple[int, ...], model_type: str, config: Mapping[str, Any]) -> bool:
    place = _TRANSPOSED.get(model_type, {}).get(name.rpartition(".experts.")[2])
    text = config.get("text_config") or {}
    return place is not None and len(shape) == 3 and shape[place] == text.get("hidden_size")


def _buffer_bytes(config: Mapping[str, Any]) -> int | None:
    """Return the bytes of buffers that no file holds; None where the config does not say how large."""
    names, count = _BUFFERS.get(str(config.get("model_type")), ((), lambda: 0))
    numbers = [config.get(name) for name in names]
    return count(*numbers) if all(type(number) is int for number in numbers) else None


def _tokenizer_bytes(side_files: Mapping[str, int], model_type: object) -> int:
    sizes = (share * side_files[name] for name, share in _TOKENIZERS.items() if name in side_files)
    return next(sizes, 0) * (3 if model_type in _UNIGRAM else 1)


def _why_rough(made: Estimate, model_type: object, buffers: int | None) -> str | None:
    """Return why no ±5 % can be promised; None if it can."""
    if made.stacking_bytes:
        return (
            "experts are stacked during loading, and how many exist twice at a time depends on the machine: "
            "measured peaks were up to 10 % above and 21 % below this estimate"
        )
    if model_type not in _MEASURED or buffers is None:
        kind = f"models of type {str(model_type)[:100]!r}" if model_type else "models of an unknown type"
        return (
            f"accuracy not measured: {kind} may keep buffers that no file contains, rewrite weights, or need "
            "more for the first token"
        )
    if made.tokenizer_bytes > _TOKENIZER_MATTERS * made.peak_anonymous_bytes:
        return "the tokenizer takes a large share of this, and its memory is known only roughly"
    return None


def estimate_adapter(
    source: str, tensors: Iterable[StoredTensor], dtype: str | None, named: object, base: Estimate | None
) -> Estimate:
    """Add a peft adapter to the estimate of the base model that it names; without that, no host fits."""
    # Whatever the base is loaded in, peft keeps an adapter that can be trained in float32.
    copied = sum(tensor.elements for tensor in tensors) * LOAD_BITS["float32"] // 8
    if base is None:
        called = str(named or "not named")[:200]
        note = (
            f"an adapter: its base model ({called}) is not on this machine and not included: inspect it too"
        )
        return Estimate(source, dtype, RUNTIME_BYTES, copied, 0, 0, notes=(note,))
    notes = (*base.notes, f"an adapter: the estimate includes its base model, {base.source}")
    both = replace(base, source=source, copied_bytes=base.copied_bytes + copied, notes=notes, tolerance=None)
    return with_hosts(both) if base.hosts else both


def with_hosts(made: Estimate) -> Estimate:
    """Return an estimate with its verdicts: what is left of this machine's memory, and the free hosts."""
    files = made.mapped_bytes + made.resident_bytes
    hosts = [fit(name, memory, made.new_bytes, files) for name, memory in HOSTS.items()]
    if (left := usable_memory()) is not None:
        # Files on tmpfs are part of what is used here already.
        hosts.insert(0, fit(HERE, left, made.new_bytes, made.mapped_bytes))
    return replace(made, hosts=tuple(hosts))
