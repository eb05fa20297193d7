"""An embedding that stays in its file: of its weight, a token needs one row."""

from __future__ import annotations

from typing import Any

import torch

from shardkit.base.errors import ShardkitError
from shardkit.load.direct import WeightFile, torch_dtype
from shardkit.load.units import Weight


def rows_in_file(weight: Weight, file: WeightFile) -> Any:
    """Return a weight of shape (tokens, width) that `torch.nn.functional.embedding` takes, without data.

    Each lookup reads its rows from the file, and casts them to the weight's dtype; it raises as
    `WeightFile.read` does. All other uses of the values raise a ShardkitError.
    """
    made = RowsInFile._make_wrapper_subclass(
        RowsInFile, weight.shape, dtype=weight.dtype, device="cpu", requires_grad=False
    )
    made.weight, made.file = weight, file
    return made


class RowsInFile(torch.Tensor):  # type: ignore[misc]
    """A weight of which `torch.nn.functional.embedding` reads rows."""

    weight: Weight
    file: WeightFile

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of tokens, each of which is read once."""
        source, (count, width) = self.weight.parts[0].source, self.weight.shape
        wanted, places = torch.unique(tokens, return_inverse=True)
        numbers: list[int] = wanted.tolist()
        if not numbers:
            return torch.empty((*tokens.shape, width), dtype=self.weight.dtype)
        if not 0 <= numbers[0] <= numbers[-1] < count:
            raise IndexError(
                f"index out of range: {self.weight.name} has {count} rows, not {numbers[-1] + 1}"
            )
        nbytes = source.nbytes // count
        data = memoryview(bytearray(nbytes * len(numbers)))
        for place, number in enumerate(numbers):
            self.file.read_row(source, number * nbytes, data[place * nbytes : (place + 1) * nbytes])
        found = torch.frombuffer(data, dtype=torch_dtype(source)).view(-1, width)
        return found.to(self.weight.dtype)[places]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.nn.functional.embedding:
            asked = dict(zip(("input", "weight"), arguments, strict=False), **(named or {}))
            return asked["weight"].rows(asked["input"])
        if function is torch.Tensor.detach:
            return arguments[0]
        return super().__torch_function__(function, types, arguments, named)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        del types, arguments, named
        raise ShardkitError(
            f"{function} needs all rows of an embedding of which max_memory keeps none: load the model "
            "without max_memory"
        )
