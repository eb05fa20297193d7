"""The safetensors file format, and nothing else: read, validate and write one header.

A file is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes. Every rule that
makes a file legal is checked here and nowhere else, before any number in it is trusted. The rules are
those of the format's reference reader: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json.encoder import encode_basestring
from math import inf
from typing import Any, NamedTuple, NoReturn, TypeGuard

from shardkit.base.errors import CheckpointError
from shardkit.formats.ranged import RangedFile

# The format allows 100 MB, the Hub's client reads 25 MB. Parsed, a hostile header of 100 MB would take
# gigabytes, and so would one of 25 MB but for these bounds, which leave room for 100,000 tensors and more.
MAX_HEADER_BYTES = 25_000_000
_MAX_NAME = 4096
_MAX_METADATA = 10_000
PREFIX_BYTES = 8
_USUAL_BYTES = 1 << 17  # nearly every header fits, so that a file takes one read
FORMAT_METADATA = {"format": "pt"}
_clip = reprlib.repr
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class JsonBounds(NamedTuple):
    """What JSON may have, so that a hostile one takes bounded time and memory."""

    structure: int  # brackets and commas
    colons: int  # as many as there are keys
    unquoted: int  # bytes from quote to quote: beyond, one wide character makes each of them four


# Eleven brackets and commas for a tensor of five dimensions, four colons for each tensor.
HEADER_BOUNDS = JsonBounds(structure=1_200_000, colons=600_000, unquoted=4_000_000)


class Entry(NamedTuple):
    """One tensor of a header; `begin` and `end` count bytes from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A validated header: entries by offset, and where the data section starts in the file."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size of a tensor in bytes."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"dtype {_clip(dtype)} is not one of {', '.join(DTYPE_BITS)}")
    elements = 1
    for length in shape:
        elements *= length
        if elements >= 1 << 60 or length >= 1 << 60:  # at each step: a hostile product is never formed
            raise ValueError("the shape has 2**60 elements or more")
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{elements} elements of {DTYPE_BITS[dtype]} bits do not fill whole bytes")
    return bits // 8


def read_header(file: RangedFile) -> Header:
    """Read and validate the header of a safetensors file."""
    prefix = file.get(0, max(PREFIX_BYTES, min(file.size, _USUAL_BYTES)))[:PREFIX_BYTES]
    refuse_lfs_pointer(prefix, file.where)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"declares a header of {length} bytes, more than the limit of {MAX_HEADER_BYTES}: "
            "this is not a safetensors file",
            file=file.where,
        )
    return _parse(file.get(PREFIX_BYTES, length), file.size - PREFIX_BYTES - length, file.where)


def refuse_lfs_pointer(beginning: bytes, file: str) -> None:
    """Tell a file that Git has put in place of the weights from weights that are damaged."""
    if beginning.startswith(b"version "):
        raise CheckpointError(
            "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository", file=file
        )


def _parse(raw: bytes, data_bytes: int, file: str) -> Header:
    """Validate a raw JSON header against the `data_bytes` that follow it in the file."""
    with reading_json(raw, file, HEADER_BOUNDS):
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_integer if b"-0" in raw else None,  # for each number, it would take seconds
        )
        if _SURROGATE.search(raw):  # only an escape can hide half of a surrogate pair, which is no text
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    if not raw.startswith(b"{") or not isinstance(document, dict):
        raise CheckpointError("the header is not a JSON object", file=file)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ is not a map of strings", file=file)
    _bound(len(metadata), "entries of __metadata__", _MAX_METADATA, file)  # which would go into every shard
    entries = []
    for name, value in document.items():
        check_name(name, file)
        try:
            entries.append(_entry(name, value))
        except ValueError as error:
            raise CheckpointError(str(error), file=file, tensor=name) from None
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(entries, data_bytes, file)
    return Header(tuple(entries), metadata, PREFIX_BYTES + len(raw))


@contextmanager
def reading_json(raw: bytes, file: str, bounds: JsonBounds) -> Iterator[None]:
    """Refuse JSON beyond the bounds before it is parsed, and name the file if it cannot be."""
    _bound(sum(map(raw.count, (b"[", b"{", b","))), "brackets and commas", bounds.structure, file)
    _bound(raw.count(b":"), "colons", bounds.colons, file)
    if _has_long_token(raw, bounds.unquoted):
        raise CheckpointError(f"has a string or a list of more than {bounds.unquoted} bytes", file=file)
    try:
        yield
    except UnicodeEncodeError:
        raise CheckpointError("a name or value has unprintable (unpaired) surrogates", file=file) from None
    except RecursionError:
        raise CheckpointError("the JSON is nested too deeply", file=file) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError included
        raise CheckpointError(f"not valid JSON: {str(error)[:200]}", file=file) from error


def _bound(count: int, what: str, most: int, file: str) -> None:
    if count > most:
        raise CheckpointError(f"has {count} {what}, more than the limit of {most}", file=file)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        [(most, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {most[:200]!r} appears twice")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> float:
    # The reference reader takes -0 for a float, which is no count; int("-0") would be one.
    return -0.0 if text == "-0" else int(text)


def _has_long_token(raw: bytes, most: int) -> bool:
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    starts = range(0, len(bare) - most + 1, most)
    return any(bare.find(b'"', at, at + most) < 0 for at in starts)


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise ValueError("the header entry is not a JSON object")
    unknown = [value[key] for key in value.keys() - _ENTRY_KEYS] if len(value) > len(_ENTRY_KEYS) else ()
    if any(isinstance(other, (dict, list)) or other in (inf, -inf) for other in unknown):
        raise ValueError("the header entry has an unknown key with a nested or infinite value")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"dtype is {_clip(dtype)}, not a string")
    if not is_counts(shape):
        raise ValueError(f"shape is {_clip(shape)}, not a list of non-negative integers")
    if not is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets is {_clip(offsets)}, not two non-negative integers")
    begin, end = offsets
    expected = tensor_bytes(dtype, shape)
    if end - begin != expected:
        raise ValueError(
            f"data_offsets span {_clip(end - begin)} bytes, but {dtype} {_clip(shape)} needs {expected}"
        )
    return Entry(name, dtype, tuple(shape), begin, end)


def check_name(name: str, file: str) -> None:
    """Refuse a tensor name that could deceive a terminal, or that a header could not hold."""
    if len(name) > _MAX_NAME:
        raise CheckpointError(
            f"the name has {len(name)} characters, more than the limit of {_MAX_NAME}", file=file, tensor=name
        )
    if not name.isprintable():
        raise CheckpointError("the name has control or other unprintable characters", file=file, tensor=name)
    if name == "__metadata__":
        raise CheckpointError("the name is reserved by the format", file=file, tensor=name)


def is_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of JSON is a list of integers, none below zero."""
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  a generator would take twice as long, for each tensor of each file
        if type(item) is not int or item < 0:
            return False
    return True


def _check_layout(entries: Sequence[Entry], data_bytes: int, file: str) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps that tensor" if entry.begin < position else "leaves a gap"
            raise CheckpointError(
                f"starts at byte {_clip(entry.begin)} of the data, but the previous tensor ends at "
                f"{position}: it {problem}",
                file=file,
                tensor=entry.name,
            )
        position = entry.end
    if position != data_bytes:
        rest = data_bytes - position
        problem = f"{rest} bytes belong to no tensor" if rest > 0 else "the file may be incomplete"
        raise CheckpointError(
            f"the tensors end at byte {position} of the data, but the file has {data_bytes}: {problem}",
            file=file,
        )


def entry_text(name: str, dtype: str, shape: Sequence[int], begin: int, end: int) -> str:
    """Return one header entry as the reference writer formats it (compact, not ASCII-escaped)."""
    lengths = ",".join(map(str, shape))
    return (
        f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{lengths}],"data_offsets":[{begin},{end}]}}'
    )


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str] = FORMAT_METADATA) -> bytes:
    """Return length prefix and header of a file with these entries, padded to 8 bytes by spaces."""
    text = ",".join([_metadata_text(metadata), *(entry_text(*entry) for entry in entries)])
    raw = f"{{{text}}}".encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def empty_header_chars(metadata: Mapping[str, str]) -> int:
    """Return how many bytes of JSON a header has before its first entry."""
    return len(f"{{{_metadata_text(metadata)}}}".encode())


def header_bytes(empty_chars: int, entry_chars: int, entries: int) -> int:
    """Return the length of `build_header`, prefix included, from what its parts take."""
    raw = empty_chars + entry_chars + entries  # a comma before each entry
    return PREFIX_BYTES + raw + -raw % 8


def _metadata_text(metadata: Mapping[str, str]) -> str:
    return f'"__metadata__":{json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))}'
