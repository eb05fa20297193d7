"""What a load of GGUF takes: transformers unpacks all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from shardkit.base.sizes import format_size
from shardkit.checkpoint.bounded import BoundedEstimate
from shardkit.checkpoint.budget import Sequences, cache_bytes, lacks
from shardkit.checkpoint.estimate import RUNTIME_BYTES, Estimate, with_hosts
from shardkit.checkpoint.fits import Sizes
from shardkit.checkpoint.loaded import LOAD_BITS, StoredTensor
from shardkit.checkpoint.parts import Part, part_of

# As measured with transformers 5.23 and gguf 0.19: bytes beside each element of the tensor that is being
# unpacked, by those of an element of the result; and bytes for each token of the vocabulary.
_SCRATCH_BYTES = {2: 11, 4: 8}
_TOKEN_BYTES = 2600


def estimate_gguf(
    source: str,
    tensors: Iterable[StoredTensor],
    dtype: str | None,
    *,
    config: Mapping[str, Any],
    sequences: Sequences | None = None,
    max_memory: int | None = None,
    is_here: bool = False,
    **_: object,
) -> Estimate:
    """Estimate a load by `from_pretrained(folder, gguf_file=...)` of tensors that are all unpacked."""
    target, asked = dtype or "float32", sequences or Sequences()
    itemsize, stored = LOAD_BITS[target] // 8, tuple(tensors)
    cache = None if lacks(config) else cache_bytes(config, itemsize, asked)
    blocks: Counter[Part] = Counter()
    for tensor in stored:
        blocks[part_of(tensor.name)] += tensor.elements * itemsize
    weights, files = blocks.total(), sum(tensor.nbytes for tensor in stored)
    vocabulary = config.get("vocab_size", 0)
    within = None
    if max_memory is not None:
        within = BoundedEstimate(asked.within(max_memory), why="not known: GGUF is not streamed")
    made = Estimate(
        source,
        target,
        RUNTIME_BYTES,
        _peak_bytes(stored, itemsize),
        0,
        0,
        tokenizer_bytes=_TOKEN_BYTES * vocabulary,
        sequences=sequences,
        cache_bytes=cache if sequences else 0,
        within=within,
        sizes=Sizes(target, weights, cache or 0, max(blocks.values(), default=0), files, 0, is_here),
        notes=(
            f"transformers unpacks GGUF into {target}, unless it has a kernel for it; llama.cpp maps "
            f"the file, {format_size(files)} that may be evicted, and needs the KV cache beside it",
        ),
    )
    return replace(with_hosts(made), disks=())


def _peak_bytes(tensors: Iterable[StoredTensor], itemsize: int) -> int:
    """Return the most bytes of weights at a time, while they are unpacked one after another."""
    done = most = 0
    for tensor in tensors:
        done += tensor.elements * itemsize
        most = max(most, done + tensor.elements * _SCRATCH_BYTES.get(itemsize, 0))
    return most
