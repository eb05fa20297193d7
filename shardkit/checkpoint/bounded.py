"""What `load_model(max_memory=...)` would keep in memory, and read for every token: from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shardkit.base.errors import PlanError
from shardkit.base.sizes import format_size
from shardkit.checkpoint.budget import (
    MemoryPlan,
    Needs,
    Sequences,
    Workload,
    cache_bytes,
    head_scratch,
    lacks,
    plan_memory,
    smallest_memory,
)
from shardkit.checkpoint.config import architecture
from shardkit.checkpoint.loaded import LOAD_BITS, Units
from shardkit.checkpoint.quantized import quantized
from shardkit.formats.tensor import TensorInfo

if TYPE_CHECKING:
    from shardkit.checkpoint.estimate import Estimate

_DECODER = re.compile(r".*(ForCausalLM|LMHeadModel)")
# Model types of which an estimate is what a load plans, as stored and cast, with transformers 5.23.
_COMPARED = (
    "arcee biogpt bloom codegen cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text "
    "glm glm4 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite helium llama mistral mixtral mpt olmo olmo2 "
    "olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm "
    "starcoder2 xglm"
)


def about_seconds(seconds: float) -> str:
    """Return a time that is known roughly: ``0.84 s``, ``117 s``."""
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


@dataclass(frozen=True)
class BoundedEstimate:
    """What a load within a budget would do.

    Attributes
    ----------
    work
        The budget, and what the model is for.
    plan
        What stays, and what is read; of a model that fits, all stays. None where that is not known, or the
        budget is too small.
    smallest_bytes
        The smallest budget that would do; None where it is not known.
    why
        Why there is no plan.
    disk_rate
        Bytes a second that the disk gives, as stated or measured; None for neither.
    """

    work: Workload
    plan: MemoryPlan | None = None
    smallest_bytes: int | None = None
    why: str = ""
    disk_rate: int | None = None
    seconds_per_token: float | None = None

    def at_rate(self, disk_rate: int) -> BoundedEstimate:
        """Return it with the seconds that a token's bytes take at a disk's rate, in bytes a second."""
        seconds = self.plan.streamed_bytes / disk_rate if self.plan else None
        return replace(self, disk_rate=disk_rate, seconds_per_token=seconds)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Return the figures as people read them."""
        within = ("within a budget", f"{format_size(self.work.max_memory)} ({self.work.tokens})")
        if self.plan is None:
            return within, ("", self.why)
        read = format_size(self.plan.streamed_bytes)
        if self.seconds_per_token is not None and self.disk_rate is not None:
            seconds = about_seconds(self.seconds_per_token)
            read += f", {seconds} of reading at {format_size(self.disk_rate)}/s"
        return (
            within,
            ("KV cache", format_size(self.plan.cache_bytes)),
            ("resident", f"{format_size(self.plan.resident_bytes)} of weights"),
            ("read per token", read),
            *((("smallest budget", format_size(self.smallest_bytes)),) if self.smallest_bytes else ()),
        )


class Decoder(NamedTuple):
    """What headers and config show of a model that may run within a budget; `why` nothing is known, if so."""

    made: Estimate
    config: Mapping[str, Any]
    units: Units
    why: str

    def cache_bytes(self, work: Sequences) -> int | None:
        """Return an upper bound of the bytes of keys and values; None where it is not known."""
        return None if self.why else cache_bytes(self.config, self._itemsize, work)

    def within(self, work: Workload) -> BoundedEstimate:
        """Return what a load within a budget would do."""
        if self.why:
            return BoundedEstimate(work, why=self.why)
        made, units = self.made, self.units
        needs = Needs.of(self.config, self._itemsize, work, made.runtime_bytes)
        beside = made.tokenizer_bytes + made.buffer_bytes
        scratch = head_scratch(units.head_bytes, made.dtype or "float32", work)
        streaming = Needs(needs.process_bytes + beside, needs.cache_bytes, needs.activation_bytes + scratch)
        smallest = smallest_memory(units.sizes, streaming)
        weights = made.copied_bytes + made.mapped_bytes + made.resident_bytes
        if sum(needs) + made.model_bytes <= work.max_memory:
            return BoundedEstimate(work, MemoryPlan(work, *needs, 0, weights, 0), smallest)
        try:
            plan, _ = plan_memory(made.source, units.sizes, streaming, work, made.peak_anonymous_bytes)
        except PlanError as error:
            return BoundedEstimate(work, None, smallest, str(error))
        return BoundedEstimate(work, plan, smallest)

    @property
    def _itemsize(self) -> int:
        return LOAD_BITS.get(self.made.dtype or "float32", 32) // 8


def why_unknown(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """Return why nothing is known of a load within a budget; empty if something is."""
    named, kind = architecture(config), config.get("model_type")
    if why := quantized(config, {tensor.name: tensor for tensor in tensors}):
        return f"not known: quantized weights cannot be streamed: {why}"
    if config.get("is_encoder_decoder") or not _DECODER.fullmatch(named or ""):
        return f"not known: {str(named or 'the model')[:100]} is not a decoder that can be streamed"
    if kind not in _COMPARED.split():
        return f"not known: models of type {str(kind)[:100]!r} were not compared with real loads"
    if lacking := lacks(config):
        return f"not known: config.json has no {lacking}"
    return ""
