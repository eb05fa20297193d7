"""How much memory a load will take, from headers alone: nothing is downloaded, nothing is loaded.

transformers 5 maps the files. A parameter whose dtype on disk is the one requested stays in the mapping;
any other is converted into memory of its own, and so are experts that the model keeps stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add
from typing import Any

from shardkit.base.extras import is_torch_for_cuda
from shardkit.base.record import Record, Summary
from shardkit.base.sizes import format_size
from shardkit.checkpoint.bounded import BoundedEstimate, Decoder, why_unknown
from shardkit.checkpoint.budget import Sequences, Workload, cache_bytes, lacks, too_long
from shardkit.checkpoint.fits import DiskFit, Sizes, explained, fit_disks, fit_gpus, fit_memory, tables
from shardkit.checkpoint.hosts import DiskRate, HostFit, Need, Ways
from shardkit.checkpoint.loaded import LOAD_BITS, LoadedTensor, loaded_tensors, units_of_names, weight_bytes
from shardkit.checkpoint.quantized import HELD, Packing, method_of, packing_of, unpacked
from shardkit.checkpoint.scan import GGUF
from shardkit.formats.tensor import TensorInfo

# Anonymous memory of a process that has imported torch and transformers, loaded a small model without a cast,
# and given a token: measured on Linux with transformers 5.23 and torch 2.13 for CPUs, 5.24 and 2.14 for CUDA.
RUNTIME_BYTES = 415_000_000 if is_torch_for_cuda() else 271_000_000
# Model types of which loads kept the ±5 %, first token included, as stored and cast to float16, with
# transformers 5.23; from 0.2 to 2.6 GB the error did not grow with the weights. Others may keep buffers,
# rewrite weights, or need more for the first token, so that nothing is promised of them.
_MEASURED = (
    "apertus arcee bart bert biogpt bloom codegen cohere cohere2 deberta-v2 distilbert electra ernie4_5 "
    "exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox gptj granite helium lfm2 llama mbart "
    "mistral modernbert mpt nemotron olmo olmo2 opt persimmon phi phi3 qwen2 qwen3 roberta seed_oss smollm3 "
    "stablelm starcoder2 t5 xlm-roberta"
)
# Their tokenizers are Unigram models, which were measured to take three times as much.
_UNIGRAM = "albert camembert deberta-v2 mbart mt5 pegasus t5 umt5 xlm-roberta xlnet"
TOLERANCE = 0.05
# Memory of a tokenizer for each byte of the first of these files that is there, as measured with byte-level
# BPE of 32,000 to 256,000 tokens; where that matters, it is too rough for a promise.
_TOKENIZERS = {"tokenizer.json": 10, "tokenizer.model": 60, "vocab.json": 60, "vocab.txt": 40}
_TOKENIZER_MATTERS = 0.03
# Of GGUF, as measured with transformers 5.23 and gguf 0.19: bytes beside each element of the tensor that is
# being unpacked, by those of an element of the result; and bytes for each token of the vocabulary.
_SCRATCH_BYTES, _TOKEN_BYTES = {2: 11, 4: 8}, 2600

# Large buffers that no file holds, from the config's numbers, as transformers 5.23 makes them: of GPT-Neo a
# mask for each layer, and as seen three to nine more while they are made; of GPTBigCode one, and one more.
_BUFFERS: dict[str, tuple[tuple[str, ...], Callable[..., int]]] = {
    "gpt_neo": (("num_layers", "max_position_embeddings"), lambda layers, length: (layers + 6) * length**2),
    "gpt_bigcode": (("n_positions",), lambda length: 2 * length**2),
    "gptj": (("n_layer", "n_positions", "rotary_dim"), lambda layers, length, dim: 4 * layers * length * dim),
}
_BUFFERS["codegen"] = _BUFFERS["gptj"]


@dataclass(frozen=True)
class Estimate(Record):
    """What a load with transformers 5 on a CPU will take, up to the first token of a short prompt.

    Attributes
    ----------
    source, dtype
        What would be loaded, and the dtype it would end up in; None: each tensor stays as it is.
    runtime_bytes
        Anonymous memory of Python, transformers and the torch that is installed here, for CPUs or CUDA.
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
    sequences, cache_bytes
        The context and batch that were requested, and an upper bound of their keys and values (part of
        `new_bytes`): 0 where no context was requested, None where it is not known.
    in_file_bytes
        Mapped embeddings, of which a token needs a row.
    within
        What a load within a budget would do; None where none was requested.
    sizes
        What counts on GPUs and on disks; None where it is not known.
    gpus, disks
        Whether the model fits there, on this machine and on hosts.
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
    sequences: Sequences | None = None
    cache_bytes: int | None = 0
    in_file_bytes: int = 0
    within: BoundedEstimate | None = None
    sizes: Sizes | None = None
    gpus: tuple[HostFit, ...] = ()
    disks: tuple[DiskFit, ...] = ()

    @property
    def new_bytes(self) -> int:
        """Memory that the load takes beside the files, wherever they are."""
        beside = self.stacking_bytes + self.tokenizer_bytes + self.buffer_bytes
        return self.runtime_bytes + self.copied_bytes + beside + (self.cache_bytes or 0)

    @property
    def model_bytes(self) -> int:
        """Memory for all of the model, pages of its files included."""
        return self.new_bytes - self.runtime_bytes + self.mapped_bytes + self.resident_bytes

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
        tokens = (self.sequences or Sequences()).tokens
        size = "not known" if self.cache_bytes is None else f"at most {format_size(self.cache_bytes)}"
        cached = (("KV cache", f"{size} ({tokens})"),) if self.sequences else ()
        words = f"{format_size(self.mapped_bytes)} stay in the files; the kernel may evict them"
        mapped = () if self.resident_bytes else (("mapped", words),)
        facts = (
            ("load in", self.dtype or "the dtype of the files"),
            ("peak anonymous", f"{self.needed}{exact} (cannot be evicted)"),
            ("weights", f"{format_size(self.copied_bytes)} converted during loading"),
            *(("also", f"{format_size(size)} {what}") for size, what in others if size),
            *mapped,
            *(self.within.facts() if self.within else cached),
            *explained(self.hosts, self.gpus, self.disks, self.sizes, tokens),
        )
        answers = tuple(tables(self.hosts, self.gpus, self.disks))
        return Summary("Estimated memory to load", facts, answers, self.notes)


def estimate_load(
    source: str,
    tensors: Iterable[TensorInfo],
    dtype: str | None,
    *,
    config: Mapping[str, Any] | None = None,
    aliases: Container[str] = (),
    side_files: Mapping[str, int] | None = None,
    held_whole: bool = False,
    in_memory: bool = False,
    sequences: Sequences | None = None,
    max_memory: int | None = None,
    disk_rate: DiskRate | None = None,
    is_here: bool = False,
) -> Estimate:
    """Add up what a load in `dtype` ("float16"; None: as stored) copies, and what it leaves mapped.

    Parameters
    ----------
    side_files, max_memory
        Bytes of the files beside the weights, the tokenizer's among them; and of a budget.
    held_whole
        Whether the files cannot be mapped (legacy pickles), so that all of them is in memory first.
    in_memory
        Whether the files are on tmpfs, so that their pages are memory that cannot be evicted.
    is_here
        Whether the files are on this machine, and so need no download.
    """
    config, stored = config or {}, tuple(tensors)
    method, asked = method_of(config, stored), sequences or Sequences()
    work = None if max_memory is None else asked.within(max_memory)
    if method == GGUF:
        return _estimate_gguf(source, stored, dtype or "float32", config, sequences, work, is_here)
    packing = packing_of(config, method)
    loaded = [unpacked(tensor, packing) for tensor in loaded_tensors(stored, dtype, config, aliases)]
    weights, units = weight_bytes(loaded, config, held_whole), units_of_names(loaded)
    buffers, side = _buffer_bytes(config), sum((side_files or {}).values())
    made = Estimate(
        source,
        dtype,
        RUNTIME_BYTES,
        weights.copied,
        weights.stacking,
        0 if in_memory else weights.mapped,
        tokenizer_bytes=_tokenizer_bytes(side_files or {}, config.get("model_type")),
        buffer_bytes=buffers or 0,
        resident_bytes=weights.read if in_memory else 0,
        in_file_bytes=units.row_bytes(loaded),
    )
    decoder = Decoder(made, config, units, why_unknown(config, stored))
    cache = decoder.cache_bytes(asked)
    bounded = decoder.within(work) if work else None
    made = replace(
        made,
        sequences=sequences,
        cache_bytes=cache if sequences else 0,
        within=bounded.at_rate(disk_rate.nbytes) if bounded and disk_rate else bounded,
        sizes=Sizes.of(loaded, None if method else dtype, cache or 0, side, is_here, packing),
    )
    if method:
        return with_hosts(_as_quantized(made, method, packing, stored))
    rough = _why_rough(made, config.get("model_type"), buffers)
    exceeded = too_long(config, sequences.context_tokens) if sequences else ""
    made = replace(made, notes=tuple(filter(None, (rough, exceeded))), tolerance=None if rough else TOLERANCE)
    called, needs = _other_loads(made, decoder, loaded, loaded_tensors(stored, None, config, aliases))
    return with_hosts(made, Ways(called, needs, lambda room: decoder.within(asked.within(room)), disk_rate))


def _estimate_gguf(
    source: str,
    stored: Sequence[TensorInfo],
    dtype: str,
    config: Mapping[str, Any],
    sequences: Sequences | None,
    work: Workload | None,
    is_here: bool,
) -> Estimate:
    """Estimate a load by `from_pretrained(folder, gguf_file=...)`, which unpacks one tensor after another."""
    itemsize = LOAD_BITS[dtype] // 8
    cache = None if lacks(config) else cache_bytes(config, itemsize, sequences or Sequences())
    loaded = [LoadedTensor(tensor, dtype, itemsize * tensor.elements) for tensor in stored]
    scratch = (_SCRATCH_BYTES.get(itemsize, 0) * tensor.elements for tensor in stored)
    sizes = Sizes.of(loaded, dtype, cache or 0, 0, is_here)
    made = Estimate(
        source,
        dtype,
        RUNTIME_BYTES,
        max(map(add, accumulate(tensor.nbytes for tensor in loaded), scratch), default=0),
        0,
        0,
        tokenizer_bytes=_TOKEN_BYTES * config.get("vocab_size", 0),
        sequences=sequences,
        cache_bytes=cache if sequences else 0,
        within=BoundedEstimate(work, why="not known: GGUF is not streamed") if work else None,
        sizes=replace(sizes, shard_bytes=0),
        notes=(
            f"transformers unpacks GGUF into {dtype}, unless it has a kernel for it; llama.cpp maps the "
            f"file, {format_size(sizes.file_bytes)} that may be evicted, and needs the KV cache beside it",
        ),
    )
    return replace(with_hosts(made), disks=())


def _as_quantized(
    made: Estimate, method: str, packing: Packing | None, stored: Sequence[TensorInfo]
) -> Estimate:
    """Return the estimate of quantized weights: as transformers unpacks them, or as they are stored."""
    copied, mapped = made.copied_bytes, made.mapped_bytes
    if packing:
        words = f"unpacked into bfloat16, as transformers 5 does without a GPU that runs it; {packing.spread}"
        copied += packing.spare_bytes(stored)
    elif held := HELD.get(method):
        words = f"as stored, which its library computes with; {held.spread}"
        copied += held.spare_bytes(stored)
        mapped = max(0, mapped - sum(tensor.nbytes for tensor in stored if held.packs(tensor)))
    else:
        words = "as stored and copied: less where a library maps them, more where it unpacks them"
        copied, mapped = copied + mapped, 0
    notes = (f"quantized ({method}): counted {words}",)
    return replace(made, copied_bytes=copied, mapped_bytes=mapped, notes=notes)


def _other_loads(
    made: Estimate, decoder: Decoder, loaded: list[LoadedTensor], as_stored: list[LoadedTensor]
) -> tuple[str, dict[str, Need]]:
    """Return what a load is called, and what others of the model need, from files that can be mapped."""
    shards = [tensor.in_shards(str(made.dtype)) for tensor in loaded]
    if shards == loaded:
        return "as stored", {}
    needs = {}
    for name, tensors in (("as stored", as_stored), ("shards", shards)):
        other = weight_bytes(tensors, decoder.config)
        less = made.copied_bytes + made.stacking_bytes - other.copied - other.stacking
        rows = decoder.units.row_bytes(tensors)
        needs[name] = Need(made.new_bytes - less, other.mapped, other.mapped - rows)
    return f"in {made.dtype}", needs


def _buffer_bytes(config: Mapping[str, Any]) -> int | None:
    """Return the bytes of buffers that no file holds; None where the config does not say how large."""
    names, count = _BUFFERS.get(str(config.get("model_type")), ((), lambda: 0))
    numbers = [config.get(name) for name in names]
    return count(*numbers) if all(type(number) is int for number in numbers) else None


def _tokenizer_bytes(side_files: Mapping[str, int], model_type: object) -> int:
    sizes = (share * side_files[name] for name, share in _TOKENIZERS.items() if name in side_files)
    return next(sizes, 0) * (3 if model_type in _UNIGRAM.split() else 1)


def _why_rough(made: Estimate, model_type: object, buffers: int | None) -> str | None:
    if made.sequences:
        return "with a context: its KV cache is an upper bound, and activations are not included"
    if made.stacking_bytes:
        return (
            "experts are stacked during loading, and how many exist twice at a time depends on the machine: "
            "measured peaks were up to 10 % above and 21 % below this estimate"
        )
    if model_type not in _MEASURED.split() or buffers is None:
        kind = f"models of type {str(model_type)[:100]!r}" if model_type else "models of an unknown type"
        return (
            f"accuracy not measured: {kind} may keep buffers that no file contains, rewrite weights, or need "
            "more for the first token"
        )
    if made.tokenizer_bytes > _TOKENIZER_MATTERS * made.peak_anonymous_bytes:
        return "the tokenizer takes a large share of this, and its memory is known only roughly"
    return None


def with_hosts(made: Estimate, ways: Ways | None = None) -> Estimate:
    """Return an estimate with its verdicts: of this machine, as it is now, and of hosts."""
    files = made.mapped_bytes + made.resident_bytes
    elsewhere = Need(made.new_bytes, files, max(0, files - made.in_file_bytes))
    # Files on tmpfs are part of what is used here already.
    here = Need(made.new_bytes, made.mapped_bytes, max(0, made.mapped_bytes - made.in_file_bytes))
    found = replace(made, hosts=tuple(fit_memory(elsewhere, here, ways or Ways())))
    if made.sizes is None:
        return found
    return replace(found, gpus=tuple(fit_gpus(made.sizes)), disks=tuple(fit_disks(made.sizes)))
