"""Tensors of checkpoints whose files have pieces of them, as `torch.distributed.checkpoint` writes them.

Each rank has a file of its own, whose ``__metadata__`` says where in its tensor each piece begins. How large
a tensor is, no file says: it is as large as its pieces make it, and they have to cover it exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import TypeAlias

from shardkit.base.errors import CheckpointError
from shardkit.formats.pieces import Piece, Pieces
from shardkit.formats.safetensors import (
    DTYPE_BITS,
    HEADER_BOUNDS,
    Header,
    is_counts,
    reading_json,
    tensor_bytes,
)
from shardkit.formats.tensor import TensorInfo
from shardkit.sources.fileset import FileSet

_OFFSETS = "DCP_SHARDING_INFO"
_Misfit: TypeAlias = Callable[[str, Piece], CheckpointError]


def assembled(files: FileSet, headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    """Return the tensors that the pieces of all files make up.

    Raises
    ------
    CheckpointError
        If a piece is missing, overlaps another, or is of another dtype; names its file, and numbers.
    """
    found: dict[str, list[tuple[str, Piece]]] = {}
    for file, header in headers.items():
        begins = _begins(header, where := files.where(file))
        for name, dtype, shape, begin, _ in header.entries:
            starts = begins.get(name)
            if not is_counts(starts) or len(starts) != len(shape):
                raise CheckpointError(
                    f"has shape {list(shape)}, but {_OFFSETS} has no saved_offsets that fit",
                    file=where,
                    tensor=name,
                )
            piece = Piece(file, header.data_start + begin, tuple(starts), shape)
            found.setdefault(name, []).append((dtype, piece))
    return {
        name: _assembled(name, partial(_misfit, files, name), *zip(*pieces, strict=True))
        for name, pieces in found.items()
    }


def _misfit(files: FileSet, tensor: str, why: str, piece: Piece) -> CheckpointError:
    return CheckpointError(why, file=files.where(piece.file), tensor=tensor)


def _begins(header: Header, where: str) -> dict[str, object]:
    raw = header.metadata.get(_OFFSETS, "{}").encode()
    with reading_json(raw, where, HEADER_BOUNDS):
        said = json.loads(raw)
    entries = said.items() if isinstance(said, dict) else ()
    return {name: entry.get("saved_offsets") for name, entry in entries if isinstance(entry, dict)}


def _assembled(name: str, misfit: _Misfit, dtypes: Sequence[str], pieces: Sequence[Piece]) -> TensorInfo:
    dtype, first = dtypes[0], pieces[0]
    for other, piece in zip(dtypes, pieces, strict=True):
        if (other, len(piece.shape)) != (dtype, len(first.shape)):
            shapes = f"{other} {list(piece.shape)} here, but {dtype} {list(first.shape)} in {first.file}"
            raise misfit(f"has pieces that do not fit: {shapes}", piece)
    shape = tuple(max(p.starts[d] + p.shape[d] for p in pieces) for d in range(len(first.shape)))
    try:
        nbytes = tensor_bytes(dtype, shape)
    except ValueError as error:
        raise misfit(str(error), first) from None
    cells = tuple(sorted((p for p in pieces if prod(p.shape)), key=lambda piece: piece.starts)) or (first,)
    _check_cover(shape, cells, misfit)
    bits, lowest = DTYPE_BITS[dtype], cells[0]
    if len(cells) > 1 and bits % 8:
        raise misfit(f"has pieces of {bits} bits an item ({dtype}), which are not read", lowest)
    layout = Pieces(shape, bits // 8, cells) if len(cells) > 1 else None
    return TensorInfo(name, dtype, shape, lowest.file, lowest.offset, nbytes, layout)


def _check_cover(shape: Sequence[int], pieces: Sequence[Piece], misfit: _Misfit) -> None:
    """Refuse pieces unless they are the cells of a grid, each of which ends where the next one begins."""
    cuts = [sorted({0, *(piece.starts[axis] for piece in pieces)}) for axis in range(len(shape))]
    ends = [dict(zip(cut, [*cut[1:], length], strict=True)) for cut, length in zip(cuts, shape, strict=True)]
    seen: dict[tuple[int, ...], Piece] = {}
    for piece in pieces:
        for axis, (begin, length) in enumerate(zip(piece.starts, piece.shape, strict=True)):
            if (end := begin + length) != (following := ends[axis][begin]):
                why = "two pieces overlap" if end > following else "a piece between them is missing"
                raise misfit(
                    f"has a piece that ends at {end} of dimension {axis}, but the next begins, or the tensor "
                    f"ends, at {following}: {why}",
                    piece,
                )
        if (other := seen.setdefault(piece.starts, piece)) is not piece:
            begins = list(piece.starts)
            raise misfit(f"has a piece that begins at {begins}, as does one in {other.file}", piece)
    if len(seen) < prod(map(len, cuts)):
        lost = next(starts for starts in product(*cuts) if starts not in seen)
        raise misfit(f"has no piece that begins at {list(lost)}: is the file of a rank missing?", pieces[0])
