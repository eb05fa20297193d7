"""What a pickle of torch's describes, without running it: a pickle is a program, and this its interpreter.

Only the opcodes that torch's own `weights_only` reader knows are carried out, only the names below are known,
and all that they make are plain records: a tensor is a storage, an offset, a shape and strides. Nothing is
imported, nothing is called. A hostile program ends in an error, in bounded time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pickletools import genops
from typing import IO, Any, NamedTuple

from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.tensor import DTYPE_NAMES

# Room for 100,000 tensors, each of which takes some 160 bytes, 33 to 47 steps, and 5 tuples and 2 maps. What
# a hostile program of that size makes takes some 250 MB.
MAX_PROGRAM_BYTES = 24_000_000
_MAX_STEPS = 5_500_000
_MAX_MADE = 2_000_000  # a tuple counts one, a list or a map counts three
_MAX_MARKS = 100  # open at once: a state dict needs five
_MAX_DIMENSIONS = 64  # as many as numpy has

_CODES = {f"torch.{name}": code for code, name in DTYPE_NAMES.items()}
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "Untyped": "U8",
    "ComplexDouble": "complex128",
}  # fmt: skip
# Bytes of an item as it lies in a storage: of float4, a pair. Of torch's other dtypes, one.
_ITEM_BYTES = {dtype: bits + 7 >> 3 for dtype, bits in DTYPE_BITS.items()} | {
    "complex128": 16, "complex32": 4, "bits16": 2,
}  # fmt: skip
_STORAGE = re.compile(rf"torch\.(?:storage\.)?({'|'.join(_STORAGES)})Storage")
_DTYPE = re.compile(r"torch\.(?:bool|(?:bfloat|float|u?int|complex|bits)\d\w*)")
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_BUILTINS = ("builtins", "__builtin__")  # as Python 2 called it, and protocol 2 does
_MANY = 1 << 60
_MOST_ARGUMENTS = 8


class _Name(str):
    """A global that a program names, which is no text of its own."""

    __slots__ = ()


class Storage(NamedTuple):
    """What tensors are views of: `items` of the bytes that the file has under `key`."""

    key: str
    dtype: str
    items: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its items."""
        return self.items * item_bytes(self.dtype)


class View(NamedTuple):
    """A tensor as torch describes it; offset and strides count items.

    `dtype` is that of safetensors, or torch's word for what safetensors has not.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def item_bytes(dtype: str) -> int:
    """Return the bytes of an item as it lies in a storage."""
    return _ITEM_BYTES.get(dtype, 1)


class Program:
    """One pickle, carried out: the `value` that it makes, and every storage that it names, by key.

    Any exception may come of one that is damaged, or asks for more than tensors.
    """

    def __init__(self, data: bytes | IO[bytes]) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: list[Any] = []
        self._made = 0
        self.storages: dict[str, Storage] = {}
        for step, (opcode, argument, _) in enumerate(genops(data)):
            if step == _MAX_STEPS:
                raise ValueError(f"it has more than {_MAX_STEPS} opcodes")
            if (carry_out := _OPCODES.get(opcode.name)) is None:
                raise ValueError(f"it contains the opcode {opcode.name}, which is not allowed")
            carry_out(self, argument)
        self.value = self._stack.pop()
        if self._stack or self._outer:
            raise ValueError("it leaves objects on the stack")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _make(self, value: object, weight: int = 1) -> None:
        self._made += weight
        if self._made > _MAX_MADE:
            raise ValueError(f"it creates more than {_MAX_MADE} tuples, lists and dicts")
        self._stack.append(value)

    def _put(self, index: int) -> None:
        if index == 1 and not self._memo:
            self._memo.append(None)  # Python 2 counts from one
        if index == len(self._memo):
            self._memo.append(self._stack[-1])
        else:  # none is left out: one opcode could ask for gigabytes
            self._memo[index] = self._stack[-1]

    def _mark(self, _: object) -> None:
        if len(self._outer) >= _MAX_MARKS:
            raise ValueError(f"it is nested more than {_MAX_MARKS} deep")
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _last(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError("it pops from an empty stack")
        del self._stack[-count:]
        return items

    def _extend(self, items: Iterable[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("it appends to something that is not a list")
        self._stack[-1].extend(items)

    def _set(self, items: Sequence[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise ValueError("it sets an item of something that is not a dict")
        _fill(self._stack[-1], zip(items[::2], items[1::2], strict=True))

    def _global(self, named: str) -> None:
        name = _Name(named.replace(" ", "."))
        if not (name in _CALLS or name in _CLASSES or _STORAGE.fullmatch(name) or _DTYPE.fullmatch(name)):
            raise ValueError(f"it imports {name}, which is not allowed")
        self._stack.append(name)

    def _build(self, _: object) -> None:
        self._stack.pop()  # of a module's state its `_metadata`, which is none of the map
        if type(self._stack[-1]) is not dict:
            raise ValueError("it sets the state of an object, which is not allowed")

    def _persistent(self, _: object) -> None:
        kind, name, key, _device, count, *view = self._stack.pop()
        found = _STORAGE.fullmatch(name) if type(name) is _Name else None
        is_usual = kind == "storage" and type(key) is str and _are_counts([count])
        if not (found and is_usual and view in ([], [None])):  # files before 0.4 have slices of storages
            raise ValueError("a storage is not described the way torch does")
        storage = Storage(key, _STORAGES[found[1]], count)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError(f"storage {key[:200]!r} claims different sizes")
        self._push(storage)


def _fill(target: dict[Any, Any], items: Iterable[Sequence[Any]]) -> None:
    for key, value in items:
        # Some keys take for ever to hash: a tuple of itself twice, sixty deep. Large integers can collide.
        if type(key) is not str and not (type(key) is int and -_MANY < key < _MANY):
            raise ValueError(f"a key is a {type(key).__name__}, not a string")
        target[key] = value


def _call(name: object, arguments: object) -> object:
    if type(name) is not _Name or name not in _CALLS:
        called = name if type(name) is _Name else f"a {type(name).__name__}"
        raise ValueError(f"it calls {called}, which is not allowed")
    if type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
        raise ValueError(f"it calls {name} in a way that torch never does")
    return _CALLS[name](*arguments)


def _ordered(pairs: object = None) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    if pairs is not None:  # as Python 2 wrote it
        if type(pairs) is not list:
            raise ValueError("it builds a dict from something that is not a list")
        _fill(made, pairs)
        pairs.clear()  # or a program could have one long list gone through for ever
    return made


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any, dtype: Any = None) -> View:
    if type(storage) is not Storage:
        raise ValueError("a tensor has no storage in the file")
    if any(more[2:]):  # after what is said of gradients
        raise ValueError("a tensor is a conjugate or negative view: save it resolved")
    are_tuples = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MAX_DIMENSIONS
    if not (are_tuples and _are_counts((offset, *shape, *strides))):
        raise ValueError("a tensor's offset, shape or strides are not non-negative integers")
    dtype = dtype or storage.dtype
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    end, held = (last + 1) * item_bytes(dtype), storage.nbytes
    if 0 not in shape and end > held:
        raise ValueError(f"a tensor extends to byte {end} of a storage of {held}")
    return View(storage, dtype, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View:
    gradient, hooks, dtype, *rest = more
    if type(dtype) is not _Name or not _DTYPE.fullmatch(dtype):
        raise ValueError("a tensor has no dtype")
    dtype = _CODES.get(dtype, dtype.removeprefix("torch."))
    return _tensor(storage, offset, shape, strides, gradient, hooks, *rest, dtype=dtype)


def _are_counts(values: Iterable[Any]) -> bool:
    for value in values:  # noqa: SIM110  a generator would take twice as long, for each tensor
        if type(value) is not int or not 0 <= value < _MANY:
            return False
    return True


def _parameter(data: object, *_: object) -> View:
    if type(data) is not View:
        raise ValueError("a parameter has no tensor")
    return data


def _of_type(function: object, kind: object, arguments: object, *_: object) -> View:
    # As torch writes a tensor with attributes, which are no part of its data.
    if not (type(kind) is type(function) is _Name and kind in _CLASSES and function in _REBUILDS):
        raise ValueError("a tensor has a custom type")
    return _parameter(_call(function, arguments))


def _inert(*_: object) -> None:
    return None


_REBUILDS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS = _REBUILDS | {
    "collections.OrderedDict": _ordered,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    **dict.fromkeys(("torch.device", "torch.Size", "_codecs.encode", "collections.Counter"), _inert),
    **dict.fromkeys((f"{module}.{name}" for module in _BUILTINS for name in ("set", "complex")), _inert),
}
_OPCODES: dict[str, Callable[[Program, Any], object]] = {
    **dict.fromkeys(("PROTO", "STOP"), _inert),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Program._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda p, index: p._push(p._memo[index])),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), Program._push),
    "SHORT_BINSTRING": lambda p, text: p._push(text.encode("latin-1").decode()),
    "NONE": lambda p, _: p._push(None),
    "NEWTRUE": lambda p, _: p._push(True),
    "NEWFALSE": lambda p, _: p._push(False),
    "EMPTY_TUPLE": lambda p, _: p._push(()),
    "EMPTY_LIST": lambda p, _: p._make([], 3),
    "EMPTY_DICT": lambda p, _: p._make({}, 3),
    "MARK": Program._mark,
    "TUPLE": lambda p, _: p._make(tuple(p._since_mark())),
    "TUPLE1": lambda p, _: p._make(tuple(p._last(1))),
    "TUPLE2": lambda p, _: p._make(tuple(p._last(2))),
    "TUPLE3": lambda p, _: p._make(tuple(p._last(3))),
    "APPEND": lambda p, _: p._extend(p._last(1)),
    "APPENDS": lambda p, _: p._extend(p._since_mark()),
    "SETITEM": lambda p, _: p._set(p._last(2)),
    "SETITEMS": lambda p, _: p._set(p._since_mark()),
    "GLOBAL": Program._global,
    "REDUCE": lambda p, _: p._make(_call(*p._last(2)), 3),
    "BUILD": Program._build,
    "BINPERSID": Program._persistent,
}
