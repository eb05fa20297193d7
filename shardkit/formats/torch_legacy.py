"""torch's files before 1.6: five pickles, then the storages one after the other, each after its length."""

from __future__ import annotations

from io import BytesIO

from shardkit.formats.ranged import BLOCK_BYTES, RangedFile
from shardkit.formats.torch_program import MAX_PROGRAM_BYTES, Program
from shardkit.formats.torch_zip import Stored

_PICKLE = b"\x80\x02"
_MAGIC, _VERSION, _LENGTH_BYTES = 0x1950A86A20F9469CFC6C, 1001, 8


def read_legacy(file: RangedFile, *, exact: bool) -> Stored:
    """Read the pickles of a file; none of its weights."""
    most = min(file.size, MAX_PROGRAM_BYTES)
    first = min(most, 16 * BLOCK_BYTES)
    try:
        program, keys, at = _programs(file.get(0, first))
    except (IndexError, ValueError):
        if first == most:
            raise
        program, keys, at = _programs(file.get(0, most))  # it may have been cut in its middle
    starts = {}
    for key in keys:
        starts[key] = at + _LENGTH_BYTES
        at = starts[key] + program.storages[key].nbytes
    if at > file.size:
        claimed = sum(storage.nbytes for storage in program.storages.values())
        raise ValueError(f"its storages claim {claimed} bytes, but the file has {file.size}")
    # torch writes nothing after the last, so that all are where they have to be if the file ends there.
    if exact or at != file.size or file.size <= first:
        lengths = file.each((start - _LENGTH_BYTES, _LENGTH_BYTES) for start in starts.values())
        for key, start in starts.items():
            said = int.from_bytes(lengths[start - _LENGTH_BYTES], "little", signed=True)
            if said != (claimed := program.storages[key].items):
                raise ValueError(f"storage {key[:200]!r} has {said} items, but its tensors claim {claimed}")
    return Stored(program.value, starts)


def _programs(data: bytes) -> tuple[Program, list[str], int]:
    stream = BytesIO(data)
    for expected in (_MAGIC, _VERSION):
        if not data.startswith(_PICKLE) or Program(stream).value != expected:
            raise ValueError("it does not start like a file of torch.save")
    Program(stream)  # what is said of the system that wrote it
    program, keys = Program(stream), Program(stream).value
    if type(keys) is not list or sorted(keys) != sorted(program.storages):
        raise ValueError("its storage keys do not match those of its tensors")
    return program, keys, stream.tell()
