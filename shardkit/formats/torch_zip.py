"""torch's files since 1.6: archives of one pickle, and of storages that lie there as bytes.

Where a storage begins stands in a header right before it: of a file on the Hub, thousands of them would be
thousands of small reads. But torch lays records back to back and aligns their bytes, so that the directory
says where they begin, twice: counted back from the record that follows, and forward from the header by the
alignment. Where both agree, the header may be left for later (`exact=False`); otherwise it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError
from shardkit.formats.ranged import BLOCK_BYTES, RangedFile
from shardkit.formats.torch_program import MAX_PROGRAM_BYTES, Program

ZIP_MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY_BYTES, _MAX_RECORDS = 32_000_000, 200_000
_END, _END64, _LOCATOR = Struct("<4s4H2LH"), Struct("<4sQ2H2L4Q"), Struct("<4sLQL")
_ENTRY, _HEADER = Struct("<4s4x2H8x2L3H8xL"), Struct("<4s2x2H16x2H")
_UNSAID, _UNSAID_COUNT = 0xFFFF_FFFF, 0xFFFF
_HAS_FOOTER = 1 << 3  # sizes and checksum once more, after the bytes
_ALIGNMENT = 64


class Stored(NamedTuple):
    """What a file of torch's holds: what its pickle describes, and where the storages begin, by key.

    `is_exact` is False where a beginning was not read but derived; `is_swapped` where items are big-endian.
    """

    value: Any
    starts: dict[str, int]
    is_exact: bool
    is_swapped: bool = False


class _Record(NamedTuple):
    """A record of the directory: its header is at `at`, its bytes end before `limit`, the next record."""

    name: str
    at: int
    nbytes: int
    flags: int
    limit: int = 0


def read_archive(file: RangedFile, *, exact: bool) -> Stored:
    """Read an archive's directory and pickle; none of its weights.

    Raises
    ------
    CheckpointError
        If it is damaged, packs what torch never packs, or claims storages that it has not.
    Exception
        As `Program`.
    """
    records = _directory(file)
    if any(name.endswith("/constants.pkl") for name in records):
        raise CheckpointError("is a TorchScript archive, not a state dict", file=file.where)
    programs = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise CheckpointError(f"has {len(programs)} records named data.pkl, not one", file=file.where)
    if records[programs[0]].nbytes > MAX_PROGRAM_BYTES:
        raise CheckpointError(
            f"its data.pkl has {records[programs[0]].nbytes} bytes, more than the limit "
            f"of {MAX_PROGRAM_BYTES}",
            file=file.where,
        )
    root = programs[0].removesuffix("data.pkl")
    program = Program(_read(file, records[programs[0]]))
    order = _read(file, records[f"{root}byteorder"]) if f"{root}byteorder" in records else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"its byte order is {order[:20]!r}, not little or big", file=file.where)
    wanted = {}
    for key, storage in program.storages.items():
        record = records.get(f"{root}data/{key}")
        if record is None or record.nbytes != storage.nbytes:
            held = record.nbytes if record else "none"
            raise CheckpointError(
                f"storage {key[:200]!r} claims {storage.nbytes} bytes, but its record has {held}",
                file=file.where,
            )
        wanted[key] = record
    starts, is_exact = _starts(file, wanted, exact)
    return Stored(program.value, starts, is_exact, order == b"big")


def _directory(file: RangedFile) -> dict[str, _Record]:
    position, length, count = _end(file)
    if length > _MAX_DIRECTORY_BYTES or count > _MAX_RECORDS:
        raise CheckpointError(f"has {count} records, more than the limit of {_MAX_RECORDS}", file=file.where)
    found = sorted(_entries(file, file.get(position, length)), key=lambda record: record.at)
    # Readers differ in how they compare names: by case or not, to the first NUL or to the end.
    names = {record.name.lower() for record in found}
    if len(names) != len(found) or not all(name.isascii() and name.isprintable() for name in names):
        raise CheckpointError("has duplicate record names, or names that are not plain text", file=file.where)
    if len(found) != count:
        raise CheckpointError(f"lists {len(found)} records, but declares {count}", file=file.where)
    limits = [record.at for record in found[1:]] + [position]
    for record, limit in zip(found, limits, strict=True):
        if record.at + _HEADER.size + len(record.name) + record.nbytes > limit:
            raise CheckpointError(f"record {record.name!r} overlaps the next one", file=file.where)
    return {r.name: r._replace(limit=limit) for r, limit in zip(found, limits, strict=True)}


def _end(file: RangedFile) -> tuple[int, int, int]:
    """Return where the one directory of records is, its bytes and records: every reader finds the same."""
    size = min(file.size, BLOCK_BYTES)
    tail = file.get(file.size - size, size)
    position = len(tail) - _END.size
    magic, *_, count, length, offset, comment = _unpacked(_END, tail, position)
    is_sound = magic == b"PK\x05\x06" and not comment
    if _unpacked(_LOCATOR, tail, position - _LOCATOR.size)[0] == b"PK\x06\x07":
        # The large form, which torch writes whatever the size; the small one agrees, or leaves it unsaid.
        small, position = (count, length, offset), position - _LOCATOR.size - _END64.size
        magic, *_, count, length, offset = _unpacked(_END64, tail, position)
        unsaid = (_UNSAID_COUNT, _UNSAID, _UNSAID)
        agrees = all(a in (b, c) for a, b, c in zip(small, (count, length, offset), unsaid, strict=True))
        is_sound = is_sound and magic == b"PK\x06\x06" and agrees
    if not is_sound or offset + length != file.size - len(tail) + position:
        raise CheckpointError(
            f"the zip directory is not at the end of its {file.size} bytes: the file may be incomplete",
            file=file.where,
        )
    return offset, length, count


def _unpacked(form: Struct, data: bytes, position: int) -> tuple[Any, ...]:
    return form.unpack(data[position : position + form.size] if position >= 0 else bytes(form.size))


def _entries(file: RangedFile, raw: bytes) -> Iterator[_Record]:
    at = 0
    while at < len(raw):
        magic, flags, method, packed, nbytes, name_bytes, extra_bytes, more, offset = _ENTRY.unpack_from(
            raw, at
        )
        at += _ENTRY.size
        name = raw[at : at + name_bytes].decode("latin-1")
        at += name_bytes + extra_bytes + more
        if magic != b"PK\x01\x02" or at > len(raw):
            raise CheckpointError("the zip directory is damaged", file=file.where)
        if _UNSAID in (packed, nbytes, offset):
            wide = _wide(raw[at - extra_bytes - more : at - more])
            nbytes, packed, offset = (next(wide) if n == _UNSAID else n for n in (nbytes, packed, offset))
        if method or flags & 1 or packed != nbytes:
            raise CheckpointError(
                f"record {name!r} is compressed ({packed} bytes to {nbytes}) or encrypted, which torch never "
                "writes",
                file=file.where,
            )
        yield _Record(name, offset, nbytes, flags)


def _wide(extra: bytes) -> Iterator[int]:
    """Yield the large numbers of an entry, which are in the extra field of kind 1."""
    while extra:
        kind, length = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        if kind == 1:
            for at in range(4, 4 + length, 8):
                yield int.from_bytes(extra[at : at + 8], "little")
        extra = extra[4 + length :]
    raise ValueError("a record has no size")


def _starts(file: RangedFile, wanted: dict[str, _Record], exact: bool) -> tuple[dict[str, int], bool]:
    """Return where the bytes of records begin, by key, and whether each was read in the record's header."""
    headers = {key: (record.at, _HEADER.size + len(record.name)) for key, record in wanted.items()}
    derived: dict[str, int] = {}
    for key, record in wanted.items():
        if not (exact or file.has(*headers[key])) and (start := _derived(record)) is not None:
            derived[key] = start
    rest = wanted.keys() - derived.keys()
    read = file.each(headers[key] for key in rest)
    found = {key: _start(file, wanted[key], read[wanted[key].at]) for key in rest}
    return derived | found, not derived


def _derived(record: _Record) -> int | None:
    """Return where a record's bytes begin if it lies as torch lays it, else None."""
    is_wide, has_wide_offset = record.nbytes >= _UNSAID, record.at >= _UNSAID
    footer = (24 if is_wide or has_wide_offset else 16) if record.flags & _HAS_FOOTER else 0
    wide = 4 + 16 * is_wide + 8 * has_wide_offset if is_wide or has_wide_offset else 0
    start = record.limit - footer - record.nbytes
    padding = start - (record.at + _HEADER.size + len(record.name) + wide + 4)
    return start if 0 <= padding < _ALIGNMENT and start % _ALIGNMENT == 0 else None


def _start(file: RangedFile, record: _Record, header: bytes) -> int:
    """Return where a record's bytes begin by its header, which has to agree with the directory."""
    magic, flags, method, name_bytes, extra = _HEADER.unpack(header[: _HEADER.size])
    name = header[_HEADER.size :]
    start: int = record.at + _HEADER.size + name_bytes + extra
    agrees = (magic, flags, method, name_bytes) == (ZIP_MAGIC, record.flags, 0, len(record.name))
    if not agrees or name != record.name.encode() or start + record.nbytes > record.limit:
        raise CheckpointError(
            f"record {record.name!r} is not where the zip directory says: the file is damaged",
            file=file.where,
        )
    return start


def _read(file: RangedFile, record: _Record) -> bytes:
    header_bytes = _HEADER.size + len(record.name)
    all_of_it = file.get(
        record.at, min(header_bytes + 2 * _ALIGNMENT + record.nbytes, record.limit - record.at)
    )
    return file.get(_start(file, record, all_of_it[:header_bytes]), record.nbytes)
