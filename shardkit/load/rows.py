"""An embedding that stays in its file: of its weight, a token needs one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import ShardkitError
from shardkit.load.direct import WeightFiles
from shardkit.load.recipes import torch_dtype
from shardkit.load.units import Weight

if TYPE_CHECKING:
    import torch


def rows_in_file(weight: Weight, files: WeightFiles) -> Any:
    """Return a weight of shape (tokens, width) that `torch.nn.functional.embedding` takes, without data.

    Each lookup reads its rows from the file, and casts them to the weight's dtype; it raises as
    `WeightFiles.read` does. All other uses of the values raise a ShardkitError.
    """
    kind = _in_file()
    made = kind._make_wrapper_subclass(
        kind, weight.shape, dtype=weight.dtype, device="cpu", requires_grad=False
    )
    made.rows = _rows(weight, files)
    return made


def _rows(weight: Weight, files: WeightFiles) -> Callable[[torch.Tensor], torch.Tensor]:
    source, (count, width) = weight.parts[0].source, weight.shape
    nbytes, dtype = source.nbytes // count, torch_dtype(source)

    def rows(tokens: torch.Tensor) -> torch.Tensor:
        import torch

        wanted, places = torch.unique(tokens, return_inverse=True)
        numbers: list[int] = wanted.tolist()
        if numbers and not 0 <= numbers[0] <= numbers[-1] < count:
            raise IndexError(f"index out of range: {weight.name} has {count} rows, not {numbers[-1] + 1}")
        data = memoryview(bytearray(max(nbytes * len(numbers), 1)))
        for place, number in enumerate(numbers):
            files.read_row(source, number * nbytes, data[place * nbytes : (place + 1) * nbytes])
        if not numbers:
            return torch.empty((*tokens.shape, width), dtype=weight.dtype)
        found = torch.frombuffer(data, dtype=dtype, count=len(numbers) * width).view(-1, width)
        return found.to(weight.dtype)[places]

    return rows


@cache
def _in_file() -> Any:
    import torch

    class RowsInFile(torch.Tensor):  # type: ignore[misc]
        """A weight of which `torch.nn.functional.embedding` reads rows."""

        rows: Callable[[torch.Tensor], torch.Tensor]

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

    return RowsInFile
