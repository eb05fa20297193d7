"""torch's files since 1.6: archives of one pickle, and of storages that lie there as bytes.

Where a storage begins stands in a header right before it: of a file on the Hub, thousands of them would be
thousands of small reads. But torch lays records back to back and aligns their bytes, so that the directory
says where they begin, twice: counted back from the record that follows, and forward from the header by the
alignment. Where both agree, the header may be left for later (`exact=False`); otherwise it is read.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

from shardkit.formats.ranged import BLOCK_BYTES, RangedFile
from shardkit.formats.torch_program import MAX_PROGRAM_BYTES, Program

ZIP_MAGIC = b"PK\x03\x04"
_END_BYTES = 22
_HEADER = Struct("<4s2x2H16x2H")
_WIDE = 0xFFFF_FFFF
_HAS_FOOTER = 1 << 3  # sizes and checksum once more, after the bytes
_ALIGNMENT = 64


class Stored(NamedTuple):
    """What a file of torch's holds: what its pickle describes, and where the storages begin, by key."""

    value: Any
    starts: dict[str, int]


class _Record(NamedTuple):
    """A record of the directory: its header is at `at`, its bytes end before `limit`, the next record."""

    name: str
    at: int
    nbytes: int
    flags: int
    limit: int


def read_archive(file: RangedFile, *, exact: bool) -> Stored:
    """Read an archive's directory and pickle; none of its weights."""
    records = _directory(file)
    if any(name.endswith("/constants.pkl") for name in records):
        raise ValueError("it is a TorchScript archive, not a state dict")
    programs = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise ValueError(f"it has {len(programs)} records named data.pkl, not one")
    if (nbytes := records[programs[0]].nbytes) > MAX_PROGRAM_BYTES:
        raise ValueError(f"its data.pkl has {nbytes} bytes, more than the limit of {MAX_PROGRAM_BYTES}")
    root = programs[0].removesuffix("data.pkl")
    program = Program(_read(file, records[programs[0]]))
    order = _read(file, records[f"{root}byteorder"]) if f"{root}byteorder" in records else b"little"
    if order != b"little":
        raise ValueError(f"its byte order is {order[:20]!r}, not little")
    wanted = {}
    for key, storage in program.storages.items():
        record = records.get(f"{root}data/{key}")
        if record is None or record.nbytes != storage.nbytes:
            held = record.nbytes if record else "none"
            raise ValueError(f"storage {key[:99]!r} claims {storage.nbytes} bytes, but its record has {held}")
        wanted[key] = record
    return Stored(program.value, _starts(file, wanted, exact))


def _directory(file: RangedFile) -> dict[str, _Record]:
    window = min(file.size, BLOCK_BYTES)
    tail = file.get(file.size - window, window)
    try:
        if not tail[-_END_BYTES:].startswith(b"PK\x05\x06"):
            raise BadZipFile
        archive = ZipFile(file)
    except BadZipFile as error:
        raise ValueError(
            f"the zip directory is not at the end of its {file.size} bytes: the file may be incomplete"
        ) from error
    found = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if found and found[0].header_offset:
        raise ValueError("it has bytes before its first record")
    limits = [entry.header_offset for entry in found[1:]] + [archive.start_dir]
    # Readers differ in how they compare names: by case or not, to the first NUL or to the end.
    names = [entry.orig_filename for entry in found]
    are_plain = all(name.isascii() and name.isprintable() for name in names)
    if len({name.lower() for name in names}) != len(names) or not are_plain:
        raise ValueError("it has duplicate record names, or names that are not plain text")
    records = {}
    for entry, limit in zip(found, limits, strict=True):
        name, at, packed, nbytes = entry.filename, entry.header_offset, entry.compress_size, entry.file_size
        if entry.compress_type or entry.flag_bits & 1 or packed != nbytes:
            raise ValueError(
                f"record {name!r} is compressed ({packed} bytes to {nbytes}) or encrypted, which torch never "
                "writes"
            )
        if at + _HEADER.size + len(name) + nbytes > limit:
            raise ValueError(f"record {name!r} overlaps the next one")
        records[name] = _Record(name, at, nbytes, entry.flag_bits, limit)
    return records


def _starts(file: RangedFile, wanted: dict[str, _Record], exact: bool) -> dict[str, int]:
    """Return where the bytes of records begin, by key."""
    derived = {} if exact else {key: _derived(record) for key, record in wanted.items()}
    starts = {key: start for key, start in derived.items() if start is not None}
    unknown = {key: record for key, record in wanted.items() if key not in starts}
    headers = file.each((record.at, _HEADER.size + len(record.name)) for record in unknown.values())
    return starts | {key: _start(record, headers[record.at]) for key, record in unknown.items()}


def _derived(record: _Record) -> int | None:
    """Return where a record's bytes begin if it lies as torch lays it, else None."""
    is_wide, has_wide_offset = record.nbytes >= _WIDE, record.at >= _WIDE
    footer = (24 if is_wide or has_wide_offset else 16) if record.flags & _HAS_FOOTER else 0
    wide = 4 + 16 * is_wide + 8 * has_wide_offset if is_wide or has_wide_offset else 0
    start = record.limit - footer - record.nbytes
    padding = start - (record.at + _HEADER.size + len(record.name) + wide + 4)
    return start if 0 <= padding < _ALIGNMENT and start % _ALIGNMENT == 0 else None


def _start(record: _Record, header: bytes) -> int:
    """Return where a record's bytes begin by its header, which has to agree with the directory."""
    *said, extra = _HEADER.unpack(header[: _HEADER.size])
    name = record.name.encode()
    start: int = record.at + len(header) + extra
    agrees = said == [ZIP_MAGIC, record.flags, 0, len(name)] and header[_HEADER.size :] == name
    if not agrees or start + record.nbytes > record.limit:
        raise ValueError(f"record {record.name!r} is not where the zip directory says: the file is damaged")
    return start


def _read(file: RangedFile, record: _Record) -> bytes:
    header = file.get(record.at, _HEADER.size + len(record.name))
    return file.get(_start(record, header), record.nbytes)
