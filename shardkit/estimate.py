"""How much memory a load will take, from headers alone: nothing is downloaded, nothing is loaded.

transformers 5 maps the files. A parameter whose dtype on disk is the one asked for stays in the mapping;
any other is converted into memory of its own, and so are experts that the model keeps stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from shardkit.layout import quantisation
from shardkit.record import Record, Summary, Table
from shardkit.safetensors_file import DTYPE_BITS
from shardkit.sizes import format_size
from shardkit.tensor import DTYPE_NAMES, FLOAT_DTYPES, QUANTISED_DTYPES

# Anonymous memory of a process that has imported torch and transformers and loaded a small model in a
# dtype that needs no cast: measured with transformers 5.23 and the CPU build of torch 2.13 on Linux.
RUNTIME_BYTES = 268_000_000
# What the free hosts say they give (November 2026); the process that watches the load needs some as well.
HOSTS = {"Colab": 12_700_000_000, "Kaggle": 30_000_000_000, "Binder": 2_000_000_000}
_USABLE_SHARE = 0.9

# transformers keeps these in float32 where float16 is asked for (`_keep_in_fp32_modules`).
_KEPT_IN_FLOAT32 = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), re.compile(r"\.wo\.")),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), re.compile("query_tokens|qformer")),
}
# While it stacks experts, transformers holds some of them twice, for a moment: this share of their bytes,
# as measured with Mixtral's, Qwen3-MoE's and DeepSeek-V3's shapes, with a cast and without.
_STACKING_SHARE = {True: 1.0, False: 0.25}
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Experts that are stacked in the files, but turned: where in their shape the hidden size then stands.
_TURNED = {"qwen3_vl_moe": {"gate_up_proj": 1, "down_proj": 2}}
_BITS = {DTYPE_NAMES[dtype]: DTYPE_BITS[dtype] for dtype in FLOAT_DTYPES}

Verdict = Literal["fits", "fits tightly", "does not fit"]


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
class HostFit:
    """Whether a load fits a host: its name, its memory in bytes, the verdict and the reason for it."""

    name: str
    memory_bytes: int
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Estimate(Record):
    """What a load with transformers 5 on a CPU will take.

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
        Whether it fits this machine and the free hosts; empty where that is not known.
    notes
        What a person should be told.
    """

    source: str
    dtype: str | None
    runtime_bytes: int
    copied_bytes: int
    stacking_bytes: int
    mapped_bytes: int
    hosts: tuple[HostFit, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak_anonymous_bytes(self) -> int:
        """Memory that a machine must have, until the first token."""
        return self.runtime_bytes + self.copied_bytes + self.stacking_bytes

    @property
    def needed(self) -> str:
        """`peak_anonymous_bytes` as people read it; where no more is known, at least that."""
        size = format_size(self.peak_anonymous_bytes)
        return size if self.hosts else f"at least {size}"

    def summary(self) -> Summary:
        """Return the figures, and a verdict for each host."""
        exact = " ±5 %" if self.hosts and not self.stacking_bytes else ""
        facts = (
            ("load in", self.dtype or "the dtype of the files"),
            ("peak anonymous", f"{self.needed}{exact} (memory that must exist)"),
            ("of it weights", f"{format_size(self.copied_bytes)} converted while they are loaded"),
            *(("beside them", f"{format_size(self.stacking_bytes)} while experts are stacked"),)
            * bool(self.stacking_bytes),
            ("mapped", f"{format_size(self.mapped_bytes)} stay in the files; the kernel may drop them"),
        )
        rows = tuple((h.name, format_size(h.memory_bytes), h.verdict, h.why) for h in self.hosts)
        hosts = (Table(("host", "memory", "verdict", "because"), rows),) if rows else ()
        return Summary("Estimated memory of a load", facts, hosts, self.notes)


def estimate_load(
    source: str,
    tensors: Iterable[StoredTensor],
    dtype: str | None,
    *,
    config: Mapping[str, Any] | None = None,
    held_whole: bool = False,
) -> Estimate:
    """Add up what a load in `dtype` ("float16"; None: as stored) copies, and what it leaves mapped.

    Parameters
    ----------
    config
        Of the model, which may say that it is quantised, or of a type of which more is known.
    held_whole
        Whether the files cannot be mapped (legacy pickles), so that all of them is in memory first.
    """
    from shardkit.measure.environment import usable_memory

    copied = mapped = stacking = turning = 0
    config, quantised = config or {}, quantisation(config or {})
    model_type = str(config.get("model_type"))
    keeps = _KEPT_IN_FLOAT32.get(model_type) if dtype == "float16" else None
    for name, elements, stored, shape, is_alias in tensors:
        is_expert = _EXPERT.search(name) is not None
        is_turned = _is_turned(name, shape, model_type, config)
        quantised = quantised or (DTYPE_NAMES[stored] if stored in QUANTISED_DTYPES else None)
        target = "float32" if keeps and keeps.search(name) else dtype
        converts = target is not None and stored in FLOAT_DTYPES and DTYPE_NAMES[stored] != target
        if is_alias and not converts:
            continue
        bits = _BITS[target] if target is not None and converts else DTYPE_BITS[stored]
        nbytes = elements * bits // 8
        stacking += int(is_expert * _STACKING_SHARE[converts] * nbytes)
        turning = max(turning, nbytes * is_turned)  # the one at hand is there twice
        if converts or is_expert or is_turned:
            copied += nbytes
        elif not held_whole:
            mapped += nbytes
        if held_whole and not is_alias:
            copied += elements * DTYPE_BITS[stored] // 8
    stacking += turning
    if quantised:
        note = (
            f"quantised ({quantised}): what a load makes of that is not known from headers; this is the least"
        )
        return Estimate(source, dtype, RUNTIME_BYTES, copied, stacking, mapped, notes=(note,))
    notes: tuple[str, ...] = ()
    if stacking:
        notes = (
            "experts are stacked while they are loaded, and how many are there twice depends on the machine: "
            "10 % more than this, and 21 % less, was seen",
        )
    total = RUNTIME_BYTES + copied + stacking
    machines = {"this machine": usable_memory(), **HOSTS}
    hosts = tuple(fit(name, memory, total, mapped) for name, memory in machines.items())
    return Estimate(source, dtype, RUNTIME_BYTES, copied, stacking, mapped, hosts, notes)


def _is_turned(name: str, shape: tuple[int, ...], model_type: str, config: Mapping[str, Any]) -> bool:
    place = _TURNED.get(model_type, {}).get(name.rpartition(".experts.")[2])
    text = config.get("text_config") or {}
    return place is not None and len(shape) == 3 and shape[place] == text.get("hidden_size")


def fit(name: str, memory: int, anonymous: int, mapped: int) -> HostFit:
    """Return whether a load fits a host: all of it, or only if its mapped pages come and go."""
    usable = int(_USABLE_SHARE * memory)
    if anonymous > usable:
        need = f"needs {format_size(anonymous)}, some {format_size(usable)} can be used"
        return HostFit(name, memory, "does not fit", need)
    if anonymous + mapped > usable:
        why = "the weights do not all stay in memory: each token reads from the disk again"
        return HostFit(name, memory, "fits tightly", why)
    return HostFit(name, memory, "fits", "with all its weights in memory")
