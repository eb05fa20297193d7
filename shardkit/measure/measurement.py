"""What one measured load says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from shardkit.base.record import Record, Summary, Table, listed
from shardkit.base.sizes import format_size
from shardkit.measure.environment import Environment
from shardkit.measure.page_cache import CacheState
from shardkit.measure.quantities import NOT_REPORTED, QUANTITIES, format_seconds

Outcome = Literal["ok", "failed", "killed", "timeout"]

LOAD = "load"
FIRST_TOKEN = "first token"  # noqa: S105 - a phase, not a password
FURTHER_TOKENS = "further tokens"

_AHEAD = " (files were read ahead before it: compare times from process start)"
_PEAKS = ("peak_anonymous_bytes", "peak_file_bytes", "peak_total_bytes")
_LONG_GAP_SECONDS = 0.1
# A spike of this length is meant to be seen.
_SPIKE_SECONDS = 0.02


@dataclass(frozen=True)
class Phase:
    """One step of a load, by the clocks of the process with all its threads; None: not reported here.

    It starts so many seconds after its process; the total peak is the kernel's own (VmHWM, reset before);
    `process_cpu_seconds` count from the start of the process.
    """

    name: str
    start_seconds: float
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_total_bytes: int | None
    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    major_faults: int | None
    read_bytes: int | None
    process_cpu_seconds: float

    @property
    def end_seconds(self) -> float:
        """When it ended, since the process was started."""
        return self.start_seconds + self.wall_seconds

    @property
    def cpu_seconds(self) -> float:
        """User and system time together."""
        return self.user_seconds + self.system_seconds


@dataclass(frozen=True)
class MemoryCurve:
    """Resident memory since the process was started; a point is the largest reading since that before it.

    The split is what Linux reports; what memory_profiler reads, on every system, is all of it.
    """

    seconds: tuple[float, ...] = ()
    anonymous_bytes: tuple[int, ...] = ()
    file_bytes: tuple[int, ...] = ()
    profiler_seconds: tuple[float, ...] = ()
    profiler_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplerCost:
    """How closely memory was watched, a spike shorter than the gap may be missing; and the cost in cores."""

    readings: int
    longest_gap_seconds: float | None
    cpu_share: float


@dataclass(frozen=True)
class LoadMeasurement(Record):
    """One load of one checkpoint in a fresh process.

    Attributes
    ----------
    source, dtype, device, generate, prefetch, memory_limit_bytes, max_memory_bytes, options
        What was requested; dtype None leaves the choice to transformers, `options` went to
        `from_pretrained` as they are.
    into_memory
        Whether prefetching read the weights into memory, as it does on a slow mount: nothing was mapped.
    loader, prompt, generation
        Likewise: the name of the file that loaded instead, the text if it was not the fixed prompt, and the
        arguments of `generate`.
    outcome
        "ok"; "failed" (it raised, or ended without a result), "killed" (by a signal), "timeout".
    reason
        Why it is not "ok": one line.
    phases
        Those that were completed, in order.
    load_start_seconds
        When the load began, completed or not, since the process was started; None if it never did.
    peak_total_bytes, peak_anonymous_bytes, peak_file_bytes
        Largest from the start of the load to the end of the process: all resident memory, anonymous memory
        (which cannot be evicted), file pages that the kernel may drop. None where it is not known.
    peak_is_kernels
        Whether the total is the kernel's own figure (VmHWM, reset before the load) or a sampler's.
    peak_device_bytes
        Largest memory that torch allocated on the GPU, or on each of them, added up; None for a load on
        the CPU.
    cache
        State of the page cache, and whether it was proven.
    model_class, token_ids
        What was loaded, and the tokens that it gave for the prompt.
    first_tokens
        How many of them the first pass gave.
    curve, sampler
        Memory over time, and how it was taken.
    environment
        Machine and stack.
    output
        The end of what the process printed, kept where it did not end well.
    notes
        Warnings.
    """

    source: str
    dtype: str | None
    device: str
    generate: int
    outcome: Outcome
    reason: str
    phases: tuple[Phase, ...]
    load_start_seconds: float | None
    peak_total_bytes: int | None
    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    peak_is_kernels: bool
    peak_device_bytes: int | None
    cache: CacheState
    model_class: str | None
    token_ids: tuple[int, ...]
    curve: MemoryCurve
    sampler: SamplerCost
    environment: Environment
    prefetch: bool = False
    memory_limit_bytes: int | None = None
    max_memory_bytes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    notes: tuple[str, ...] = ()
    loader: str | None = None
    prompt: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    first_tokens: int = 1
    into_memory: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything requested was done."""
        return self.outcome == "ok"

    @property
    def end(self) -> str:
        """How it ended: the outcome, and the reason for it."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome

    def phase(self, name: str) -> Phase | None:
        """Return a completed phase by name, or None."""
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def load_wall_seconds(self) -> float | None:
        """Wall time of `from_pretrained`."""
        return phase.wall_seconds if (phase := self.phase(LOAD)) else None

    @property
    def load_cpu_seconds(self) -> float | None:
        """CPU time of `from_pretrained`, user and system."""
        return phase.cpu_seconds if (phase := self.phase(LOAD)) else None

    @property
    def time_to_first_token_seconds(self) -> float | None:
        """Wall time of the load and the first forward pass, which includes work that the load deferred."""
        load, first = self.phase(LOAD), self.phase(FIRST_TOKEN)
        return load.wall_seconds + first.wall_seconds if load and first else None

    @property
    def start_to_first_token_seconds(self) -> float | None:
        """Wall time from the start of the process: imports, behind which prefetch works, and all."""
        return phase.end_seconds if (phase := self.phase(FIRST_TOKEN)) else None

    @property
    def start_to_load_seconds(self) -> float | None:
        """Wall time from the start of the process to the end of the load."""
        return phase.end_seconds if (phase := self.phase(LOAD)) else None

    @property
    def process_cpu_seconds(self) -> float | None:
        """CPU time of all threads from process start to the first token, or of the load if none is wanted."""
        phase = self.phase(FIRST_TOKEN if self.generate else LOAD)
        return phase.process_cpu_seconds if phase else None

    @property
    def read_bytes(self) -> int | None:
        """Bytes that came from the disk for the load and all tokens; None if unknown."""
        counts = [p.read_bytes for p in self.phases if p.name in (LOAD, FIRST_TOKEN, FURTHER_TOKENS)]
        return None if None in counts or not counts else sum(filter(None, counts))

    @property
    def seconds_per_token(self) -> float | None:
        """Wall time of a token after the first."""
        return self._per_token("wall_seconds")

    @property
    def read_bytes_per_token(self) -> float | None:
        """Bytes that came from the disk for a token after the first."""
        return self._per_token("read_bytes")

    def _per_token(self, name: str) -> float | None:
        phase, count = self.phase(FURTHER_TOKENS), len(self.token_ids) - self.first_tokens
        value = getattr(phase, name) if phase else None
        return value / count if value is not None and count > 0 else None

    def time_line(self) -> str:
        """Return the load's times in the words of IPython's ``%%time``."""
        if (load := self.phase(LOAD)) is None:
            return "not completed"
        user, system, both, wall = map(
            format_seconds, (load.user_seconds, load.system_seconds, load.cpu_seconds, load.wall_seconds)
        )
        return f"CPU times: user {user}, sys: {system}, total: {both} / Wall time: {wall}"

    def start_line(self) -> str:
        """Return the load's times from the start of its process, which count what reads ahead of the load."""
        if self.phase(LOAD) is None:
            return "not completed"
        load, token, cpu = map(
            format_seconds,
            (self.start_to_load_seconds, self.start_to_first_token_seconds, self.process_cpu_seconds),
        )
        return f"from process start: loaded after {load}, first token after {token}, CPU time {cpu}"

    def unreported(self) -> dict[str, str]:
        """Return what people call the quantities that this system does not report, by quantity."""
        if not self.ok or self.load_start_seconds is None:
            return {}
        # Of a process that could not be sampled only the kernel's own peak is known, and a note says why.
        seen = self.curve.profiler_seconds or self.curve.seconds
        missing = {name: QUANTITIES[name].label for name in _PEAKS if seen and getattr(self, name) is None}
        if (load := self.phase(LOAD)) and load.read_bytes is None:
            missing["read_bytes"] = "bytes read from the disk"
        return missing

    def summary(self) -> Summary:
        """Return outcome, times and peaks, phase by phase."""
        gap = self.sampler.longest_gap_seconds or 0.0
        unseen = f"; spikes under {format_seconds(gap)} may be missing" if gap > _SPIKE_SECONDS else ""
        peaks = {
            "peak_anonymous_bytes": f"cannot be evicted{unseen}",
            "peak_file_bytes": "pages that the kernel may drop",
            "peak_total_bytes": "the kernel's own figure" if self.peak_is_kernels else "as sampled",
        }
        if self.peak_device_bytes is not None:
            peaks["peak_device_bytes"] = "allocated by torch, without what CUDA itself takes"
        facts = (
            ("source", self.source),
            ("requested", self.asked_for()),
            ("outcome", self.end),
            ("load", self.time_line() + (_AHEAD if self.prefetch else "")),
            ("time to first token", format_seconds(self.time_to_first_token_seconds)),
            ("from process start", format_seconds(self.start_to_first_token_seconds)),
            *((QUANTITIES[name].label, self._peak(name, meaning)) for name, meaning in peaks.items()),
            ("page cache", str(self.cache)),
            ("stack", self.stack()),
            ("machine", str(self.environment)),
        )
        size = QUANTITIES["peak_total_bytes"].format
        phases = Table(
            ("phase", "wall", "user", "sys", "peak anonymous", "peak total", "from disk"),
            tuple(
                (
                    phase.name,
                    *map(format_seconds, (phase.wall_seconds, phase.user_seconds, phase.system_seconds)),
                    *map(size, (phase.peak_anonymous_bytes, phase.peak_total_bytes, phase.read_bytes)),
                )
                for phase in self.phases
            ),
        )
        tables = (phases,) if self.phases else ()
        return Summary(f"Load of {PurePath(self.source).name}", facts, tables, self.warnings())

    def _peak(self, name: str, meaning: str) -> str:
        if name in self.unreported():
            return NOT_REPORTED
        return f"{QUANTITIES[name].format(getattr(self, name))} ({meaning})"

    def asked_for(self) -> str:
        """Return what was requested, in words: ``float16 on cpu, prefetch, within 12.7 GB``."""
        words = [f"{self.dtype or 'no dtype'} on {self.device}"]
        words += ["prefetch into memory" if self.into_memory else "prefetch"] * self.prefetch
        words += [f"by {self.loader}"] if self.loader else []
        words += [f"{name}={value}" for name, value in (self.options | self.generation).items()]
        words += [f"within {format_size(self.memory_limit_bytes)}"] if self.memory_limit_bytes else []
        words += [f"budget of {format_size(self.max_memory_bytes)}"] if self.max_memory_bytes else []
        return ", ".join(words)

    def stack(self) -> str:
        """Return what loaded, in short: ``transformers 5.23.0, torch 2.13.0``."""
        versions = self.environment.versions
        known = (f"{name} {versions[name]}" for name in ("transformers", "torch") if name in versions)
        return ", ".join(known) or "unknown"

    def warnings(self) -> tuple[str, ...]:
        """Return what makes the figures weaker than they look."""
        notes = list(self.notes)
        if unreported := self.unreported():
            notes.append(f"{NOT_REPORTED}: {listed(unreported.values())}")
        if not self.cache.proven:
            notes.append(f"page cache: {self.cache.asked} was requested, not proven: {self.cache.why_not}")
        if self.memory_limit_bytes and self.cache.asked == "warm":
            notes.append("the memory limit does not count what was in the page cache before: use cold")
        if self.memory_limit_bytes and (self.peak_total_bytes or 0) > self.memory_limit_bytes:
            notes.append(
                "peak total exceeds the limit: libraries shared with other processes do not count in it"
            )
        gap = self.sampler.longest_gap_seconds
        if self.load_start_seconds is not None and gap is None and "peak_anonymous_bytes" not in unreported:
            notes.append("memory was not seen from outside during the load: short peaks may be missing")
        if gap is not None and gap > _LONG_GAP_SECONDS:
            notes.append("memory was not seen for more than 100 ms at a time: a short peak may be missing")
        return tuple(notes)
