"""What part of a model a tensor belongs to, by its name: embedding, block or head."""

from __future__ import annotations

import re
from typing import NamedTuple

EMBEDDING, BLOCK, HEAD = range(3)

# The first number in a name says which block, if it is no longer than a number of blocks can be.
_NUMBERED = re.compile(r"(?:(.*?)\.)??(\d{1,6})\.")
_EMBEDDING = re.compile(r"embed(?!_out)|\bwte\b|\bwpe\b|\bshared\b")
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


class Part(NamedTuple):
    """A part of a model; parts sort in the order of a forward pass.

    Of a block, `stack` is what holds it ("model.layers"). Whatever else stands outside blocks is of the head.
    """

    place: int
    stack: str = ""
    number: int = -1


def part_of(tensor: str) -> Part:
    """Return the part of the model that a tensor belongs to."""
    if block := _NUMBERED.match(tensor):
        return Part(BLOCK, block[1] or "", int(block[2]))
    return Part(EMBEDDING if _EMBEDDING.search(tensor) else HEAD)


def is_single_expert(tensor: str) -> bool:
    """Whether a tensor is of one expert among several, which transformers stacks in one tensor."""
    return _SINGLE_EXPERT.search(tensor) is not None
