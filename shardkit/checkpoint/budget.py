"""What a process may hold of a model within a memory budget, and what it reads again for every token.

The one place for it: a load plans with the units of a model, an estimate with those that headers show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from shardkit.base.disk import PAGE, pages_of
from shardkit.base.errors import PlanError
from shardkit.base.record import Record, Summary, plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.residence import Residence, choose_residence, smallest_budget

CONTEXT_TOKENS = 1024  # unless another context is requested
# For pages of libraries that every pass touches, page tables, and what a first pass allocates once.
HEADROOM_BYTES = 64_000_000
_GROWTH_BYTES = 1_000_000  # at most of a process, from one load that is refused to the next
# What is cast or put together goes through memory of this size.
STEP_BYTES = 8 << 20
# Activations of a token in a pass, at most: so many vectors of the hidden size, and of the MLP's.
_HIDDEN_VECTORS, _MLP_VECTORS = 10, 4
_TOKENS_WITH_LOGITS = 64  # a prompt has those of its last token alone; guessed tokens have them all
# Decoders for which transformers 5.23 makes a score of each pair of tokens for each head, unless requested
# otherwise; and bytes of one, beside two in the model's dtype: its softmax is float32, and made from a copy.
_MAKES_SCORES = frozenset(("bloom", "codegen", "gemma2", "gpt_oss", "gptj", "mpt", "xglm"))
_SOFTMAX_BYTES = 10
# Decoders with states beside keys and values that count here; and, of a scan over a prompt in float32, how
# many numbers there are at a time for each token, state and channel.
_SCANNING = frozenset(("falcon_mamba", "jamba", "mamba"))
_SCANNED = 3
# Decoders with states that a prompt is scanned into by chunks, in float32; and, of that scan, how many scores
# and values there are at a time for each token and head. What configs call its heads, their width and states.
_CHUNKED = frozenset(
    ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "qwen3_5_text", "qwen3_next")
)
_CHUNK_SCORES, _CHUNK_VECTORS = 6, 12
_SCAN_HEADS = ("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "num_heads")
_SCAN_WIDTH = ("linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "head_dim")
_SCAN_STATES = ("linear_key_head_dim", "mamba_d_state", "ssm_state_size", "state_size")
_CHUNK = ("mamba_chunk_size", "chunk_size")
_KERNEL = ("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim")
STATEFUL = _SCANNING | _CHUNKED | {"recurrent_gemma"}  # all whose states count
MOST = 10**9  # tokens, or whatever else is counted: beyond any model
# What configs call the same number.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "n_inner", "ffn_dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
SIZES = (_LAYERS[0], _HEADS[0], _HIDDEN[0])
# A head gets the last token of a prompt alone, in the strides of all tokens, for which torch copies its
# weights. With its own strides it does not, and gives the same bits in these dtypes, but others in float16.
_OWN_STRIDES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Sequences:
    """The longest sequence, in tokens, and the most sequences at a time that a model is loaded for."""

    context_tokens: int = CONTEXT_TOKENS
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("context_tokens", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST:
                raise PlanError(f"{name} is {value!r:.80}, not a whole number above zero, at most {MOST:,}")

    @property
    def tokens(self) -> str:
        """Both, as people read them."""
        return f"{plural(self.context_tokens, 'token')}, batch of {self.batch_size}"

    def within(self, max_memory: int) -> Workload:
        """Return them with a budget, in bytes."""
        return Workload(self.context_tokens, self.batch_size, max_memory=max_memory)


@dataclass(frozen=True, kw_only=True)
class Workload(Sequences):
    """What a model is loaded for, and the bytes that the process may need: `max_memory`."""

    max_memory: int


@dataclass(frozen=True)
class MemoryPlan(Record):
    """How a model uses the memory that it may have; all in bytes.

    Attributes
    ----------
    work
        What it is for, and the budget.
    process_bytes
        What the process had before it loaded weights, and some headroom.
    cache_bytes, activation_bytes
        Keys and values of the longest sequences, and what a pass over all their tokens needs.
    working_bytes
        Buffers that weights are read into, and what is converted at a time.
    resident_bytes, streamed_bytes
        Weights that stay in memory, and those that are read for every pass; embeddings are in neither.
    """

    work: Workload
    process_bytes: int
    cache_bytes: int
    activation_bytes: int
    working_bytes: int
    resident_bytes: int
    streamed_bytes: int

    def summary(self) -> Summary:
        """Return the figures as people read them."""
        facts = (
            ("budget", format_size(self.work.max_memory)),
            ("process", format_size(self.process_bytes)),
            ("KV cache", f"{format_size(self.cache_bytes)} ({self.work.tokens})"),
            ("activations", format_size(self.activation_bytes)),
            ("buffers", format_size(self.working_bytes)),
            ("resident", format_size(self.resident_bytes)),
            ("read per pass", format_size(self.streamed_bytes)),
        )
        return Summary("Memory plan", facts)


class UnitSize(NamedTuple):
    """The weights of one module, which stay or are read together; in bytes.

    Memory for them, what is read for that, memory beside it while they are read, and whether they must stay.
    """

    nbytes: int
    read_bytes: int
    step_bytes: int = 0
    must_stay: bool = False


def viewed(nbytes: int, offset: int) -> UnitSize:
    """Return the size of a weight that is used as it is read, in the pages of its file."""
    pages = pages_of(nbytes, offset)
    return UnitSize(pages, pages)


def together(sizes: Iterable[UnitSize], must_stay: bool = False) -> UnitSize:
    """Return the size of one module that has weights of these sizes."""
    nbytes, read, steps, _ = zip(*sizes, strict=True)
    return UnitSize(pages_of(sum(nbytes)), sum(read), max(steps), must_stay)


class Needs(NamedTuple):
    """What a process needs beside weights: what it has, KV cache, activations; in bytes."""

    process_bytes: int
    cache_bytes: int
    activation_bytes: int

    @classmethod
    def of(cls, config: Mapping[str, Any], itemsize: int, work: Workload, process: int) -> Self:
        """Return those of a decoder that computes in items of so many bytes, in a process of so many."""
        activations = _activation_bytes(config, itemsize, work)
        return cls(process + HEADROOM_BYTES, cache_bytes(config, itemsize, work), activations)


def plan_memory(
    source: str, units: Sequence[UnitSize], needs: Needs, work: Workload, plain_bytes: int
) -> tuple[MemoryPlan, Residence]:
    """Return how a model runs within a budget, and which of its units stay in memory.

    Raises
    ------
    PlanError
        If the budget is too small; names the smallest that is not, and what a plain load takes beside
        mapped files, if that is less: `plain_bytes`.
    """
    room = work.max_memory - sum(needs) - _step(units)
    chosen = choose_residence([unit.nbytes for unit in units], room, _must_stay(units))
    if chosen is None:
        smallest = smallest_memory(units, needs)
        plain = (
            f"; without max_memory it loads in about {format_size(plain_bytes)}, not counting mapped files"
        )
        raise PlanError(
            f"max_memory of {format_size(work.max_memory)} is too small: {source} needs at least "
            f"{-(-(smallest + _GROWTH_BYTES) // 10**6):,} MB ({smallest:,} bytes); Python and its libraries, "
            f"KV cache and activations (context of {work.tokens}) take {format_size(sum(needs))}"
            f"{plain if plain_bytes < smallest else ''}"
        )
    read = sum(unit.read_bytes for unit, stays in zip(units, chosen.stays, strict=True) if not stays)
    working = chosen.buffer_bytes + _step(units)
    return MemoryPlan(work, *needs, working, chosen.resident_bytes, read), chosen


def smallest_memory(units: Sequence[UnitSize], needs: Needs) -> int:
    """Return the smallest budget that `plan_memory` takes, in bytes."""
    return smallest_budget([unit.nbytes for unit in units], _must_stay(units)) + _step(units) + sum(needs)


def _step(units: Sequence[UnitSize]) -> int:
    return max((unit.step_bytes for unit in units), default=0)


def _must_stay(units: Sequence[UnitSize]) -> set[int]:
    return {place for place, unit in enumerate(units) if unit.must_stay}


def step_bytes(stored: int) -> int:
    """Return the memory through which stored bytes are cast or put together."""
    return min(STEP_BYTES, stored) + 2 * PAGE


def head_scratch(nbytes: int, dtype: str, work: Workload) -> int:
    """Return the memory that a head of so many bytes needs at the end of a prompt; 0 where it is avoided."""
    return nbytes if work.batch_size > 1 or dtype not in _OWN_STRIDES else 0


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return which number of a decoder a config does not have; None if what is needed is there."""
    return next((names[0] for names in (_LAYERS, _HEADS, _HIDDEN) if not _number(config, *names)), None)


def too_long(config: Mapping[str, Any], tokens: int) -> str:
    """Return in words that a config allows shorter sequences; empty if it does not."""
    name = next((name for name in _POSITIONS if _number(config, name)), None)
    if name is None or tokens <= config[name]:
        return ""
    return f"{tokens:,} tokens are more than the model is made for: {name} in config.json is {config[name]:,}"


def cache_bytes(config: Mapping[str, Any], itemsize: int, work: Sequences) -> int:
    """Return an upper bound of the bytes of keys and values that a decoder caches, by bytes of an item."""
    layers, heads, hidden = (_number(config, *names) for names in (_LAYERS, _HEADS, _HIDDEN))
    key = sum(_number(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))  # wider than values
    width = max(_number(config, "head_dim") or hidden // max(heads, 1), key)
    kept = _number(config, "num_key_value_heads", "num_kv_heads") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):  # Falcon, StarCoder
        kept = 1
    if config.get("model_type") == "mamba2":  # its heads are not of attention
        kept = 0
    each = 2 * kept * width * work.context_tokens * itemsize
    each += _state_bytes(config) + _chunked_bytes(config)
    each += 4 * _number(config, "lru_width") * (1 + _number(config, "conv1d_width"))  # RecurrentGemma
    return (layers + 1) * each * work.batch_size  # while a token is added, one layer's are there twice


def _state_bytes(config: Mapping[str, Any], tokens: int = 1) -> int:
    """Return the bytes of a layer's states, of convolutions among them, at so many tokens at a time."""
    channels = _number(config, "expand", "mamba_expand") * _number(config, *_HIDDEN)
    states = tokens * _number(config, "state_size", "mamba_d_state")
    states += _number(config, "conv_kernel", "mamba_d_conv")
    return (config.get("model_type") in _SCANNING) * channels * states * 4


def _chunked_bytes(config: Mapping[str, Any], tokens: int = 0) -> int:
    """Return the bytes of a layer's states, and of what scans so many tokens into them by chunks."""
    names = (_SCAN_HEADS, _SCAN_WIDTH, _SCAN_STATES)
    heads, width, states = (_number(config, *each) for each in names)
    chunk = _number(config, *_CHUNK) or 64
    chunks = -(-tokens // chunk)
    scanned = chunks * chunk * (_CHUNK_SCORES * chunk + _CHUNK_VECTORS * (width + states))
    kept = (1 + 3 * chunks) * width * states + _number(config, *_KERNEL) * (width + 2 * states)
    return (config.get("model_type") in _CHUNKED) * heads * (scanned + kept) * 4


def _activation_bytes(config: Mapping[str, Any], itemsize: int, work: Sequences) -> int:
    """Return an upper bound of the bytes that a pass over all tokens needs for a moment."""
    hidden, tokens = _number(config, *_HIDDEN), work.context_tokens
    inner = _number(config, *_INNER) or 4 * hidden
    # Each expert that is chosen gets a copy of a token; of Llama 4, each expert does.
    chosen = "num_local_experts" if config.get("model_type") == "llama4_text" else "num_experts_per_tok"
    routed = _number(config, chosen) * (hidden + (_number(config, "moe_intermediate_size") or inner))
    vectors = _HIDDEN_VECTORS * hidden + _MLP_VECTORS * max(inner, routed)
    mask = tokens * tokens * 4 + _score_bytes(config, itemsize, tokens)
    logits = (min(tokens, _TOKENS_WITH_LOGITS) + 4) * _number(config, "vocab_size") * 4
    scanned = _SCANNED * _state_bytes(config, tokens) + _chunked_bytes(config, tokens)
    return work.batch_size * (tokens * vectors * itemsize + mask + logits + scanned)


def _score_bytes(config: Mapping[str, Any], itemsize: int, tokens: int) -> int:
    """Return the bytes of attention scores where a model makes them, with their softmax in float32."""
    chosen = config.get("attn_implementation")
    kind = config.get("model_type")
    makes_them = chosen == "eager" or (chosen is None and kind in _MAKES_SCORES)
    # Falcon's masks differ by head with alibi; else all heads share one of keys, which torch does not fuse.
    makes_them |= kind == "falcon" and bool(config.get("alibi") or not config.get("new_decoder_architecture"))
    return makes_them * tokens**2 * _number(config, *_HEADS) * (2 * itemsize + _SOFTMAX_BYTES)


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = (config.get(name) for name in names)
    return next((value for value in found if type(value) is int and 0 < value <= MOST), 0)
