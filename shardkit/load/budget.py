"""What a process needs beside weights: what it has already, the cache of keys and values, and activations."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.base.errors import PlanError
from shardkit.base.record import Record, Summary, plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.estimate import LOAD_BITS

# For pages of libraries that every pass touches, page tables, and what a first pass allocates once.
HEADROOM_BYTES = 64_000_000
# Activations of a token in a pass, at most: so many vectors of the hidden size, and of the MLP's.
_HIDDEN_VECTORS, _MLP_VECTORS = 10, 4
_TOKENS_WITH_LOGITS = 64  # a prompt has those of its last token alone; guessed tokens have them all
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size")


@dataclass(frozen=True)
class Workload:
    """What a model is loaded for.

    Attributes
    ----------
    max_memory
        Bytes that the process may need.
    context_tokens, batch_size
        The longest sequence, and the most sequences at a time.
    """

    max_memory: int
    context_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("context_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}: it must be at least 1")


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
        cached = f"{plural(self.work.context_tokens, 'token')}, batch of {self.work.batch_size}"
        facts = (
            ("budget", format_size(self.work.max_memory)),
            ("process", format_size(self.process_bytes)),
            ("KV cache", f"{format_size(self.cache_bytes)} ({cached})"),
            ("activations", format_size(self.activation_bytes)),
            ("buffers", format_size(self.working_bytes)),
            ("resident", format_size(self.resident_bytes)),
            ("read per pass", format_size(self.streamed_bytes)),
        )
        return Summary("Memory plan", facts)


def process_bytes() -> int:
    """Return the memory of this process that cannot be evicted, in bytes."""
    with suppress(OSError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    import psutil

    return int(psutil.Process().memory_info().rss)


def beside_weights(config: Any, dtype: str, work: Workload) -> tuple[int, int, int]:
    """Return what a process needs beside weights: what it has, the KV cache, and activations; in bytes."""
    itemsize = LOAD_BITS.get(dtype, 32) // 8
    return (
        process_bytes() + HEADROOM_BYTES,
        _cache(config, itemsize, work),
        _activations(config, itemsize, work),
    )


def _cache(config: Any, itemsize: int, work: Workload) -> int:
    """Return an upper bound of the bytes of keys and values that a decoder caches."""
    layers, heads, hidden = (_number(config, name) for name in _SIZES)
    key = sum(_number(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))  # wider than values
    width = max(_number(config, "head_dim") or hidden // max(heads, 1), key)
    kept = _number(config, "num_key_value_heads") or _number(config, "num_kv_heads") or heads
    # While a token is added, one layer's are there twice.
    return (layers + 1) * 2 * kept * width * work.context_tokens * work.batch_size * itemsize


def _activations(config: Any, itemsize: int, work: Workload) -> int:
    """Return an upper bound of the bytes that a pass over all tokens needs for a moment."""
    hidden, tokens = _number(config, "hidden_size"), work.context_tokens
    inner = _number(config, "intermediate_size") or _number(config, "n_inner") or 4 * hidden
    vectors = _HIDDEN_VECTORS * hidden + _MLP_VECTORS * inner
    mask = tokens * tokens * 4
    logits = (min(tokens, _TOKENS_WITH_LOGITS) + 4) * _number(config, "vocab_size") * 4
    return work.batch_size * (tokens * vectors * itemsize + mask + logits)


def _number(config: Any, name: str) -> int:
    found = getattr(config.get_text_config(), name, None)
    return found if isinstance(found, int) else 0
