"""What a config says of a model, and the config that goes with its shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite, isnan
from typing import Any


def architecture(config: Mapping[str, Any] | None) -> str | None:
    """Return the model class that a config names, of transformers, diffusers or peft."""
    config = config or {}
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = first or config.get("_class_name") or config.get("peft_type")
    return str(found) if found else None


def config_dtype(config: Mapping[str, Any] | None) -> str | None:
    """Return the dtype that a config asks for ("bfloat16"), or None."""
    config = config or {}
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, dict):  # one for each part: that of the model itself, or torch's default
        said = said.get("", "float32")
    return said.removeprefix("torch.") if isinstance(said, str) else None


def adapted_config(config: Mapping[str, Any], dtype: str | None, auto: str | None = None) -> str | None:
    """Return the JSON of a config that fits the new files; None where it fits as it is.

    `auto` is what a load chooses for the source and would not for the new files: then the config says it.
    """
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if dtype is not None:
        adapted = _cast_value("", adapted, dtype)
        if config_dtype(adapted) is None and adapted.keys() & {"architectures", "model_type"}:
            adapted["dtype"] = dtype
    elif auto is not None:
        adapted["dtype"] = auto
    # A number that is not a number equals no other, nor itself.
    return json.dumps(adapted, indent=2) + "\n" if repr(adapted) != repr(config) else None


def plain_json(value: Any) -> Any:
    """Return what strict JSON can hold, numbers that are none tagged as transformers writes them."""
    if isinstance(value, dict):
        return {key: plain_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_json(part) for part in value]
    if isinstance(value, float) and not isfinite(value):
        return {"__float__": "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def parts_of(value: Any) -> Iterable[Any]:
    """Return what a JSON object or list holds."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _cast_value(key: str, value: Any, dtype: str) -> Any:
    is_dtype = key in ("dtype", "torch_dtype")
    if is_dtype and isinstance(value, str):
        return dtype
    if isinstance(value, dict):  # a dtype may be one for each part
        return {name: _cast_value(key if is_dtype else name, part, dtype) for name, part in value.items()}
    return [_cast_value("", part, dtype) for part in value] if isinstance(value, list) else value
