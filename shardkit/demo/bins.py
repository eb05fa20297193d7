"""The same weights as `torch.save` writes them: files of the kind that most models had in 2023."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shardkit.base.extras import require
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo


def write_bins(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write a local safetensors checkpoint into a new folder, each file as a `.bin` that torch saves.

    The tensors, their order and the other files stay the same; weights are mapped, so that none is held in
    memory. Needs torch.
    """
    require("load", "writing files that torch saves", "torch")
    checkpoint, target = Checkpoint.open(source), Path(folder)
    target.mkdir(parents=True)
    names = {file: bin_name(file) for file in checkpoint.files}
    for file, name in names.items():
        held = (tensor for tensor in checkpoint.tensors.values() if tensor.file == file)
        _write_bin(checkpoint.path(file), held, target / name)
    if len(names) > 1:
        index = {
            "metadata": {"total_size": checkpoint.total_bytes},
            "weight_map": {tensor.name: names[tensor.file] for tensor in checkpoint.tensors.values()},
        }
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in checkpoint.side_files:
        shutil.copyfile(checkpoint.path(name), target / name)
    return target


def bin_name(file: str) -> str:
    """Return how a `.bin` is named whose weights are those of a safetensors file."""
    return f"pytorch_{Path(file).stem}.bin"


def _write_bin(source: str, held: Iterable[TensorInfo], target: Path) -> None:
    import torch

    mapped, tensors = np.memmap(source, mode="c"), {}
    for tensor in held:
        data = torch.from_numpy(mapped[tensor.offset : tensor.offset + tensor.nbytes])
        tensors[tensor.name] = data.view(getattr(torch, DTYPE_NAMES[tensor.dtype])).view(tensor.shape)
    torch.save(tensors, target)
