"""Weights that torch saved (.bin, .pt, .pth): which tensors a file holds, and where their bytes are."""

from __future__ import annotations

from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError
from shardkit.base.record import listed, plural, printable
from shardkit.formats.ranged import RangedFile
from shardkit.formats.safetensors import check_name, refuse_lfs_pointer, tensor_bytes
from shardkit.formats.strided import Layout, is_contiguous
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo, collector_paused
from shardkit.formats.torch_legacy import read_legacy
from shardkit.formats.torch_program import View, item_bytes
from shardkit.formats.torch_zip import ZIP_MAGIC, Stored, read_archive

_MOST_EXPANDED = 1 << 30  # of a tensor that repeats what its file holds


class TorchFile(NamedTuple):
    """What a file of torch's holds; torch need not load all of one that is an archive."""

    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    notes: tuple[str, ...]
    is_archive: bool


def read_torch_file(file: RangedFile, name: str, *, exact: bool = True) -> TorchFile:
    """List the tensors of a file; with `exact=False`, some offsets are derived from a few ranges of it.

    A name whose storage, offset, shape and strides are those of an earlier one is an alias of it. It is a
    tensor like any other: what shares storage may be tied again by a load, and may not.
    """
    where = file.where
    beginning = file.get(0, min(file.size, 16))
    refuse_lfs_pointer(beginning, where)
    is_archive = beginning.startswith(ZIP_MAGIC)  # as torch decides it
    try:
        with collector_paused():
            stored = (read_archive if is_archive else read_legacy)(file, exact=exact)
            tensors, skipped = _tensors(stored.value, where)
            infos = tuple(_info(tensor, view, stored, name, file) for tensor, view in tensors.items())
    except CheckpointError:
        raise
    except Exception as error:  # a hostile program can make anything of its interpreter
        text = printable(str(error) or type(error).__name__)[:300]
        raise CheckpointError(f"refused: {text}", file=where) from error
    count = plural(len(skipped), "value")
    notes = (f"{name} contains {count} that are not tensors of its state dict, left out: {listed(skipped)}",)
    return TorchFile(infos, _aliases(tensors), notes * bool(skipped), is_archive)


def _tensors(value: Any, where: str) -> tuple[dict[str, View], list[str]]:
    """Return the tensors of what a pickle describes, and the names of all else."""
    beside: list[Any] = []
    inner = value.get("state_dict") if type(value) is dict else None
    if type(inner) is dict and any(type(item) is View for item in inner.values()):
        beside = [name for name in value if name != "state_dict"]
        value = inner  # as trainers save it; transformers itself loads none of that
    if type(value) is not dict:
        kind = "Tensor" if type(value) is View else type(value).__name__
        raise ValueError(f"it contains a {kind}, not a state dict")
    found = {name: item for name, item in value.items() if type(item) is View}
    skipped = [printable(str(name))[:200] for name in (*beside, *(n for n in value if n not in found))]
    if skipped and not found:
        raise ValueError(f"it contains no named tensors, only {listed(skipped)}")
    tensors = {}
    for name, tensor in found.items():
        if type(name) is not str:
            raise ValueError(f"it contains a tensor whose name is {name!r}, not a string")
        check_name(name, where)
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"safetensors has no dtype for tensor {name[:99]!r}, torch.{tensor.dtype}")
        tensors[name] = tensor
    return tensors, skipped


def _info(name: str, view: View, stored: Stored, file: str, whole: RangedFile) -> TensorInfo:
    storage, itemsize, shape = view.storage, item_bytes(view.dtype), view.shape
    offset = stored.starts[storage.key] + view.offset * itemsize
    if view.dtype == "F4" and shape:  # torch counts pairs, along the last dimension
        shape = (*shape[:-1], shape[-1] * 2)
    nbytes = tensor_bytes(view.dtype, shape)
    if nbytes > max(whole.size, _MOST_EXPANDED):
        raise ValueError(
            f"tensor {name[:99]!r} claims {nbytes} bytes, but its storage has {storage.nbytes} and the file "
            f"{whole.size}: save it as contiguous"
        )
    is_plain = not nbytes or is_contiguous(view.shape, view.strides)
    layout = None if is_plain else Layout(view.shape, view.strides, itemsize)
    return TensorInfo(name, view.dtype, shape, file, offset, nbytes, layout)


def _aliases(tensors: dict[str, View]) -> dict[str, str]:
    first: dict[View, str] = {}
    kept = {name: first.setdefault(view, name) for name, view in tensors.items() if 0 not in view.shape}
    return {name: other for name, other in kept.items() if other != name}
