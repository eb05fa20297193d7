"""What a worker reports, an event a line; a file is hostile until validated, and so is this one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

_LARGEST = 2**63
_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON can say, and no file or screen takes


def _text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _whole(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _number(value: object) -> bool:
    return _whole(value) or (type(value) is float and abs(value) < _LARGEST)  # which NaN is not


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_text, value)) and all(map(_text, value.values()))


def _wholes(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_CLOCKED = ("at", "wall_seconds", "user_seconds", "system_seconds")
_COUNTED = ("major_faults", "read_bytes", "peak_total_bytes", "anonymous_bytes", "file_bytes")
_FIELDS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "hello": {"pid": _whole},
    "begin": {"name": _text, "at": _number, "peak_reset": _flag},
    "end": {
        "name": _text,
        **dict.fromkeys(_CLOCKED, _number),
        **dict.fromkeys(_COUNTED, _or_none(_whole)),
    },
    "stack": {"versions": _texts, "threads": _or_none(_whole), "gpu": _or_none(_text)},
    "model": {"name": _text},
    "tokens": {"ids": _wholes},
    "device": {"peak_bytes": _whole},
    "note": {"text": _text},
    "error": {"reason": _text},
    "done": {},
}


def read_events(lines: bytes) -> dict[str, list[dict[str, Any]]]:
    """Return the events in whole lines, by kind; what is none, or lacks what its kind has, is left out."""
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _FIELDS}
    for line in lines.split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            kind = event.get("event") if isinstance(event, dict) else None
            if isinstance(kind, str) and kind in _FIELDS:
                told = {name: event.get(name) for name in _FIELDS[kind]}
                if all(fits(told[name]) for name, fits in _FIELDS[kind].items()):
                    events[kind].append(told)
    return events
