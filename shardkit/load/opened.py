"""What transformers opens, and slices tensor by tensor: some can come from elsewhere than the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeAlias

# Given the path of a file, the name of a tensor, and what opens that with safetensors.
Slicing: TypeAlias = Callable[[str, str, Callable[[], Any]], Any]
# What opens files for transformers is replaced for all threads, so one load at a time may do that.
_REPLACING = threading.RLock()


@contextmanager
def sliced_by(slicing: Slicing, names: Callable[[str], Iterable[str] | None]) -> Iterator[None]:
    """Have `from_pretrained` of transformers 5 take tensors of safetensors from what `slicing` returns.

    A file of which `names` knows the tensors is opened only when something else of it is requested.
    """
    from transformers import modeling_utils

    with _REPLACING:
        opens = modeling_utils.safe_open  # which it calls for every file

        def open_here(file: str, *how: Any, **named: Any) -> _Opened:
            return _Opened(os.path.realpath(file), partial(opens, file, *how, **named), slicing, names)

        modeling_utils.safe_open = open_here
        try:
            yield
        finally:
            modeling_utils.safe_open = opens


class _Opened:
    """A file of safetensors, some of whose tensors come from elsewhere."""

    def __init__(
        self,
        path: str,
        opens: Callable[[], Any],
        slicing: Slicing,
        names: Callable[[str], Iterable[str] | None],
    ) -> None:
        self._path, self._opens, self._slicing, self._names = path, opens, slicing, names

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None:
        if "_file" in vars(self):
            self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @cached_property
    def _file(self) -> Any:
        return self._opens()

    def keys(self) -> Iterable[str]:
        """Return the names of its tensors."""
        names = self._names(self._path)
        return self._file.keys() if names is None else names

    def get_slice(self, name: str) -> Any:
        """Return a tensor that is not there before it is indexed."""
        return self._slicing(self._path, name, lambda: self._file.get_slice(name))
