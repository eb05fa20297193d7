"""Matrices stored in blocks of columns, for processes that need some of the columns each.

Tensor parallelism gives each process some rows of most matrices, which lie together in a file, but some
columns of those that multiply what the others gave (`o_proj`, `down_proj`): a part of every row, so that
reading it fetches all pages. A file may hold these as (blocks, rows, columns of a block), each block in one
piece. Its ``__metadata__`` then says how many blocks there are: tensors of such a shape are these matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.strided import Layout
from shardkit.formats.tensor import TensorInfo

# Of a file, not of the checkpoint: what is made from it has its own, or none (`checkpoint.metadata`).
COLUMN_BLOCKS = "shardkit_column_blocks"
IN_BLOCKS = (
    "matrices are stored in blocks of columns, for tensor parallelism: load_model reads them, plain "
    "from_pretrained does not; shard it to have ordinary files"
)


def in_blocks(tensor: TensorInfo, count: int) -> TensorInfo:
    """Return a matrix that lies in its file by rows as it is written in `count` blocks of columns."""
    rows, columns = tensor.shape
    shape = (count, rows, columns // count)
    return _laid_out(tensor, shape, shape, (columns // count, columns, 1))


def as_matrix(tensor: TensorInfo, metadata: Mapping[str, str]) -> TensorInfo:
    """Return a tensor of a file as a model has it: by rows, where the file holds it in blocks of columns."""
    bits = DTYPE_BITS[tensor.dtype]
    if len(tensor.shape) != 3 or metadata.get(COLUMN_BLOCKS) != str(tensor.shape[0]) or bits % 8:
        return tensor
    count, rows, width = tensor.shape
    return _laid_out(tensor, (rows, count * width), (rows, count, width), (width, rows * width, 1))


def _laid_out(
    tensor: TensorInfo, shape: tuple[int, ...], lengths: tuple[int, ...], strides: tuple[int, ...]
) -> TensorInfo:
    itemsize = DTYPE_BITS[tensor.dtype] // 8
    return replace(tensor, shape=shape, layout=Layout(lengths, strides, itemsize))
