"""torch's files before 1.6: five pickles, then the storages one after the other, each after its length."""

from __future__ import annotations

from struct import error as StructError  # noqa: N812  which says nothing of its own

from shardkit.base.errors import CheckpointError
from shardkit.formats.ranged import BLOCK_BYTES, RangedFile
from shardkit.formats.torch_program import MAX_PROGRAM_BYTES, Program
from shardkit.formats.torch_zip import Stored

_MAGIC, _VERSION, _LENGTH_BYTES = 0x1950A86A20F9469CFC6C, 1001, 8


def read_legacy(file: RangedFile, *, exact: bool) -> Stored:
    """Read the pickles of a file; none of its weights.

    Raises
    ------
    CheckpointError
        If it claims storages that it has not.
    Exception
        As `Program`.
    """
    most = min(file.size, MAX_PROGRAM_BYTES)
    first = min(most, 16 * BLOCK_BYTES)
    try:
        program, keys, at = _programs(file.get(0, first))
    except (IndexError, ValueError, StructError):
        if first == most:
            raise
        program, keys, at = _programs(file.get(0, most))  # it may have been cut in its middle
    starts = {}
    for key in keys:
        starts[key] = at + _LENGTH_BYTES
        at = starts[key] + program.storages[key].nbytes
    if at > file.size:
        claimed = sum(storage.nbytes for storage in program.storages.values())
        raise CheckpointError(
            f"its storages claim {claimed} bytes, but the file has {file.size}", file=file.where
        )
    lengths = [(start - _LENGTH_BYTES, _LENGTH_BYTES) for start in starts.values()]
    # torch writes nothing after the last, so that all are where they have to be if the file ends there.
    is_exact = exact or at != file.size or all(file.has(*length) for length in lengths)
    if is_exact:
        _check(file, file.each(lengths), program, starts)
    return Stored(program.value, starts, is_exact)


def _programs(data: bytes) -> tuple[Program, list[str], int]:
    at = 0
    for expected in (_MAGIC, _VERSION):
        head = Program(data, at)
        if head.value != expected:
            raise ValueError("it does not start like a file of torch.save")
        at = head.end
    program = Program(data, Program(data, at).end)  # after what is said of the system that wrote it
    keys = Program(data, program.end)
    if type(keys.value) is not list or sorted(keys.value) != sorted(program.storages):
        raise ValueError("its storage keys do not match those of its tensors")
    return program, keys.value, keys.end


def _check(file: RangedFile, lengths: dict[int, bytes], program: Program, starts: dict[str, int]) -> None:
    for key, start in starts.items():
        said = int.from_bytes(lengths[start - _LENGTH_BYTES], "little", signed=True)
        if said != program.storages[key].items:
            raise CheckpointError(
                f"storage {key[:200]!r} has {said} items, but its tensors claim "
                f"{program.storages[key].items}",
                file=file.where,
            )
