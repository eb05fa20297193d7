"""What a worker reports, an event a line; a file is hostile until validated, and so is this one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shardkit.measure.measurement import Phase

_LARGEST = 2**63
_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON can say, and no file or screen takes
_NUMBER, _COUNT_OR_NONE = (int, float), (int, type(None))
_CLOCKED = ("at", "wall_seconds", "user_seconds", "system_seconds", "process_cpu_seconds")
_COUNTED = (
    *(name for name, kind in Phase.__annotations__.items() if kind == "int | None" and "peak_" not in name),
    *("peak_total_bytes", "anonymous_bytes", "file_bytes"),
)
_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "hello": {"pid": (int,)},
    "begin": {"name": (str,), "at": _NUMBER, "peak_reset": (bool,)},
    "end": {"name": (str,), **dict.fromkeys(_CLOCKED, _NUMBER), **dict.fromkeys(_COUNTED, _COUNT_OR_NONE)},
    "stack": {"versions": (dict,), "threads": _COUNT_OR_NONE, "gpu": (str, type(None))},
    "model": {"name": (str,)},
    "tokens": {"ids": (list,)},
    "first": {"tokens": (int,)},
    "device": {"peak_bytes": (int,)},
    "note": {"text": (str,)},
    "error": {"reason": (str,)},
    "done": {},
}


def read_events(lines: bytes) -> dict[str, list[dict[str, Any]]]:
    """Return the events in complete lines, by kind; what is not one, or lacks a field, is left out."""
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _FIELDS}
    for line in lines.split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError, TypeError, KeyError):
            event = json.loads(line)
            types = _FIELDS[event["event"]]
            fields = {name: event.get(name) for name in types}
            if all(map(_fits, fields.values(), types.values())):
                events[event["event"]].append(fields)
    return events


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value is of one of these types, holds what it should, and can be reckoned with and shown."""
    if type(value) not in types:  # exactly: True is no count
        return False
    if isinstance(value, str):
        return not _SURROGATE.search(value)
    if isinstance(value, list):
        return all(_fits(item, (int,)) for item in value)
    if isinstance(value, dict):
        return all(_fits(text, (str,)) for text in (*value, *value.values()))
    return value is None or 0 <= value < _LARGEST  # which NaN is not
