"""Text from a model, token by token, with what each token cost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from shardkit.base.errors import CheckpointError, PlanError
from shardkit.base.extras import require
from shardkit.base.machine import process_bytes
from shardkit.base.record import Record, Summary, plural
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.budget import too_long
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.scan import refuse_gguf
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.load.load_model import load_model

_SAMPLE_SECONDS = 0.02
# Keeps the cache of keys and values small where the prompt is short.
_CONTEXT_STEP = 64


@dataclass(frozen=True)
class Generation(Record):
    """What a model wrote, and what that took.

    Attributes
    ----------
    source
        The checkpoint.
    text, token_ids
        What came after the prompt.
    first_token_seconds
        From the start of generation; the model is loaded by then.
    seconds_per_token
        Median of the tokens after the first; None if there is none.
    read_bytes_per_token
        Bytes read from disk, likewise; None where the system does not report them.
    peak_bytes
        Most memory of the process that could not be evicted.
    max_memory_bytes
        The budget; None without one.
    resident_bytes, streamed_bytes
        Weights in memory, and those read for every pass; of a model that fits, all are resident.
    """

    source: str
    text: str
    token_ids: tuple[int, ...]
    first_token_seconds: float
    seconds_per_token: float | None
    read_bytes_per_token: int | None
    peak_bytes: int
    max_memory_bytes: int | None
    resident_bytes: int
    streamed_bytes: int

    def summary(self) -> Summary:
        """Return the text, and what it took."""
        weights = f"{format_size(self.resident_bytes)} resident, {format_size(self.streamed_bytes)} streamed"
        facts = (("text", self.text), ("weights", weights), ("cost", self.status))
        return Summary("Generation", facts)

    @property
    def status(self) -> str:
        """Seconds, bytes read and memory as people read them, in one line."""
        limit = f" of {format_size(self.max_memory_bytes)}" if self.max_memory_bytes else ""
        parts = [f"{plural(len(self.token_ids), 'token')}, the first in {self.first_token_seconds:.2f} s"]
        if self.seconds_per_token is not None:
            parts.append(f"then {self.seconds_per_token:.2f} s each")
        if self.read_bytes_per_token is not None:
            parts.append(f"{format_size(self.read_bytes_per_token)} read each")
        return ", ".join([*parts, f"peak memory {format_size(self.peak_bytes)}{limit} (cannot be evicted)"])


def generate_text(
    source: str | os.PathLike[str],
    prompt: str,
    *,
    max_memory: int | str | None = None,
    max_new_tokens: int = 32,
    dtype: LoadDtypeLike = "auto",
    on_text: Callable[[str], None] | None = None,
    **from_pretrained_options: Any,
) -> Generation:
    """Continue a prompt greedily, within a memory budget, and measure each token.

    Parameters
    ----------
    source, max_memory, dtype, **from_pretrained_options
        As for `load_model`.
    prompt
        Text to continue.
    max_new_tokens
        The most tokens to add.
    on_text
        Called with each piece of text as it is made.

    Raises
    ------
    CheckpointError
        If there is no tokenizer; also as `load_model` does.
    PlanError
        If the prompt has no tokens, or is too long for the model; also as `load_model` does.
    """
    require("load", "generating text", "torch", "transformers")
    checkpoint = Checkpoint.open(source, download=True)
    refuse_gguf(checkpoint.format, checkpoint.source)
    tokenizer = _tokenizer(checkpoint)
    tokens = tokenizer(prompt, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    if not length:
        raise PlanError("the prompt has no tokens")
    if why := too_long(checkpoint.config or {}, length + max_new_tokens):
        raise PlanError(f"prompt and new tokens: {why}")
    context = -(-(length + max_new_tokens) // _CONTEXT_STEP) * _CONTEXT_STEP
    options = {"max_memory": max_memory, "context_tokens": context, **from_pretrained_options}
    asked = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
    meter = _Meter(tokenizer, on_text)
    with _peak() as peak:
        model = load_model(source, dtype=dtype, **options)
        if not model.can_generate():
            raise CheckpointError(f"is {type(model).__name__}: it generates no text", file=checkpoint.source)
        model.generate(**asked, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=meter)
    plan = getattr(model, "memory_plan", None)
    return Generation(
        source=checkpoint.source,
        text=meter.text,
        token_ids=tuple(meter.tokens),
        **meter.costs(),
        peak_bytes=peak[0],
        max_memory_bytes=None if max_memory is None else parse_size(max_memory),
        resident_bytes=plan.resident_bytes if plan else checkpoint.total_bytes,
        streamed_bytes=plan.streamed_bytes if plan else 0,
    )


def _tokenizer(checkpoint: Checkpoint) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"has no tokenizer that can be loaded (tokenizer.json, tokenizer.model, ...): {why}",
            file=checkpoint.source,
        ) from error


class _Meter:
    """What `generate` hands each token to: notes when it came and what was read until then."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self.text, self.tokens = "", list[int]()
        self._moments: list[tuple[float, int | None]] = []

    def put(self, value: Any) -> None:
        self._moments.append((time.perf_counter(), _read_bytes()))
        if value.dim() == 1:  # else it is the prompt
            self.tokens += value.tolist()
            self._show(is_all=False)

    def end(self) -> None:
        self._show(is_all=True)

    def _show(self, is_all: bool) -> None:
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and not is_all:
            return  # the last characters may be part of one that takes several tokens
        new, self.text = text[len(self.text) :], text
        if self._on_text is not None:
            self._on_text(new)

    def costs(self) -> dict[str, Any]:
        seconds = [after[0] - before[0] for before, after in pairwise(self._moments)]
        counts = [count for _, count in self._moments if count is not None]
        read = [after - before for before, after in pairwise(counts)]
        return {
            "first_token_seconds": seconds[0] if seconds else 0.0,
            "seconds_per_token": median(seconds[1:]) if len(seconds) > 1 else None,
            "read_bytes_per_token": int(median(read[1:])) if len(read) > 1 else None,
        }


def _read_bytes() -> int | None:
    """Return the bytes that this process has read from disks; None where the system does not report it."""
    import psutil

    with suppress(psutil.Error, OSError, AttributeError, ValueError):
        return int(psutil.Process().io_counters().read_bytes)
    return None


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Give a list of the most memory that the process had in the block."""
    most, done = [process_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], process_bytes())
        most[0] = max(most[0], process_bytes())

    thread = threading.Thread(target=watch, name="shardkit-peak", daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
