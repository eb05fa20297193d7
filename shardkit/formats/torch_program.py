"""What a pickle of torch's describes, without running it: a pickle is a program, and this its interpreter.

Only the opcodes that torch's own `weights_only` reader knows are carried out, only the names below are known,
and all that they make are plain records: a tensor is a storage, an offset, a shape and strides. Nothing is
imported, nothing is called. A hostile program ends in an error, in bounded time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from struct import Struct, unpack_from
from typing import Any, NamedTuple, NoReturn

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
    "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
    "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip
# Bytes of an item as it lies in a storage: of float4, a pair. Of torch's other dtypes, one.
_ITEM_BYTES = {dtype: bits + 7 >> 3 for dtype, bits in DTYPE_BITS.items()} | {
    "complex128": 16, "complex32": 4, "qint32": 4, "bits16": 2,
}  # fmt: skip
_LONG, _STOP = Struct("<L"), ord(".")
_STORAGE = re.compile(r"torch\.(?:storage\.)?(\w+)Storage")
_DTYPE = re.compile(r"torch\.(?:bool|(?:bfloat|float|u?int|complex|bits|qu?int)\d\w*)")
_QUANTIZER = re.compile(r"torch\.per_(?:tensor|channel)_\w+")
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
# What a negative or conjugate view flips in each item; items are little-endian, an imaginary part comes last.
_SIGNS = {"F16": 1 << 15, "BF16": 1 << 15, "F32": 1 << 31, "F64": 1 << 63, "C64": 1 << 63 | 1 << 31}
_SIGN_OF_IMAGINARY = 1 << 63
_MANY = 1 << 60
_MOST_ARGUMENTS = 8


class _Name(str):
    """A global that a program names, which is no text of its own."""

    __slots__ = ()


class Odd:
    """A tensor that is not plain: sparse, quantized, nested or without data."""


class Storage(NamedTuple):
    """What tensors are views of: `items` from item `first` on, of the bytes that the file has under `key`."""

    key: str
    dtype: str
    first: int
    items: int

    @property
    def itemsize(self) -> int:
        """Bytes of an item."""
        return item_bytes(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all its items."""
        return self.items * self.itemsize


class View(NamedTuple):
    """A tensor as torch describes it; offset and strides count items, of which bits may be `flipped`.

    `dtype` is that of safetensors, or torch's word for what safetensors has not.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    flipped: int = 0


def item_bytes(dtype: str) -> int:
    """Return the bytes of an item as it lies in a storage."""
    return _ITEM_BYTES.get(dtype, 1)


class Program:
    """One pickle, carried out from byte `at` of `data` on.

    Attributes
    ----------
    value
        What it makes.
    end
        Where it ends.
    storages
        Every storage that it names, by key.

    Raises
    ------
    Exception
        Of any kind, where the program is damaged or asks for more than tensors.
    """

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.end = data, at
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: list[Any] = []
        self._made = 0
        self.storages: dict[str, Storage] = {}
        if self._byte() != 0x80 or self._byte() > 5:
            raise ValueError("it does not start like a file of torch.save")
        self.value = self._run()

    def _run(self) -> Any:
        opcodes, data = _OPCODES, self._data
        for _ in range(_MAX_STEPS):
            code = data[self.end]
            self.end += 1
            if code == _STOP:
                value = self._stack.pop()
                if self._stack or self._outer:
                    raise ValueError("it leaves objects on the stack")
                return value
            opcodes[code](self)
        raise ValueError(f"it has more than {_MAX_STEPS} opcodes")

    def _byte(self) -> int:
        self.end += 1
        return self._data[self.end - 1]

    def _long(self) -> int:
        self.end += 4
        return int(_LONG.unpack_from(self._data, self.end - 4)[0])

    def _take(self, nbytes: int) -> bytes:
        begin, self.end = self.end, self.end + nbytes
        if self.end > len(self._data):
            raise IndexError("it ends unexpectedly")
        return self._data[begin : self.end]

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _make(self, value: object, weight: int = 1) -> None:
        self._made += weight
        if self._made > _MAX_MADE:
            raise ValueError(f"it creates more than {_MAX_MADE} tuples, lists and dicts")
        self._stack.append(value)

    def _put(self) -> None:
        self._keep(self._byte())

    def _put_long(self) -> None:
        self._keep(self._long())

    def _keep(self, index: int) -> None:
        if index == len(self._memo):
            self._memo.append(self._stack[-1])
        else:  # none is left out: one opcode could ask for gigabytes
            self._memo[index] = self._stack[-1]

    def _get(self) -> None:
        self._stack.append(self._memo[self._byte()])

    def _get_long(self) -> None:
        self._stack.append(self._memo[self._long()])

    def _small(self) -> None:
        self._stack.append(self._byte())

    def _mark(self) -> None:
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

    def _name(self) -> None:
        middle = self._data.index(b"\n", self.end, self.end + 500)
        end = self._data.index(b"\n", middle + 1, middle + 500)
        name = _Name(self._data[self.end : end].decode().replace("\n", "."))
        self.end = end + 1
        known = name in _CALLS or name in _CLASSES or _ITEM.fullmatch(name)
        if not known:
            raise ValueError(f"it imports {name}, which is not allowed")
        self._stack.append(name)

    def _reduce(self) -> None:
        self._make(_call(*self._last(2)), 3)

    def _build(self) -> None:
        self._stack.pop()  # of a module's state its `_metadata`, which is none of the map
        if type(self._stack[-1]) is not dict:
            raise ValueError("it sets the state of an object, which is not allowed")

    def _persistent(self) -> None:
        kind, name, key, _, count, *view = self._stack.pop()
        found = _STORAGE.fullmatch(name) if type(name) is _Name else None
        if kind != "storage" or found is None or type(key) is not str or not _are_counts([count]):
            raise ValueError("a storage is not described the way torch does")
        whole = Storage(key, _STORAGES[found[1]], 0, count)
        if self.storages.setdefault(key, whole).nbytes != whole.nbytes:
            raise ValueError(f"storage {key[:200]!r} claims different sizes")
        self._push(_part(whole, *view))

    def _refuse(self) -> NoReturn:
        raise ValueError("it contains a set, an object or a buffer, which is not allowed")


_ITEM = re.compile("|".join(pattern.pattern for pattern in (_STORAGE, _DTYPE, _QUANTIZER)))
_OPCODES: list[Callable[[Program], object]] = [Program._refuse] * 256
for _code, _opcode in {
    b"q": Program._put,
    b"r": Program._put_long,
    b"h": Program._get,
    b"j": Program._get_long,
    b"(": Program._mark,
    b"t": lambda p: p._make(tuple(p._since_mark())),
    b"\x85": lambda p: p._make(tuple(p._last(1))),
    b"\x86": lambda p: p._make(tuple(p._last(2))),
    b"\x87": lambda p: p._make(tuple(p._last(3))),
    b"K": Program._small,
    b"M": lambda p: p._push(int.from_bytes(p._take(2), "little")),
    b"J": lambda p: p._push(int.from_bytes(p._take(4), "little", signed=True)),
    b"\x8a": lambda p: p._push(int.from_bytes(p._take(p._byte()), "little", signed=True)),
    b"G": lambda p: p._push(unpack_from(">d", p._take(8))[0]),
    b"X": lambda p: p._push(str(p._take(p._long()), "utf-8", "surrogatepass")),
    b"U": lambda p: p._push(str(p._take(p._byte()), "utf-8")),
    b"N": lambda p: p._push(None),
    b"\x88": lambda p: p._push(True),
    b"\x89": lambda p: p._push(False),
    b")": lambda p: p._push(()),
    b"]": lambda p: p._make([], 3),
    b"}": lambda p: p._make({}, 3),
    b"a": lambda p: p._extend(p._last(1)),
    b"e": lambda p: p._extend(p._since_mark()),
    b"s": lambda p: p._set(p._last(2)),
    b"u": lambda p: p._set(p._since_mark()),
    b"c": Program._name,
    b"R": Program._reduce,
    b"b": Program._build,
    b"Q": Program._persistent,
}.items():
    _OPCODES[_code[0]] = _opcode


def _fill(target: dict[Any, Any], items: Iterable[Sequence[Any]]) -> None:
    for key, value in items:
        # Some keys take for ever to hash: a tuple of itself twice, sixty deep. Large integers can collide.
        if type(key) is not str and not (type(key) is int and -_MANY < key < _MANY):
            raise ValueError(f"a key is a {type(key).__name__}, not a string")
        target[key] = value


def _part(whole: Storage, view: tuple[str, int, int] | None = None) -> Storage:
    if view is None:
        return whole
    _, first, count = view  # as torch wrote slices of a storage, long ago
    if not _are_counts((first, count)) or first + count > whole.items:
        raise ValueError(f"storage {whole.key[:200]!r} has a view that extends beyond its end")
    return whole._replace(first=first, items=count)


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


def _tensor(storage: object, offset: object, shape: object, strides: object) -> View:
    if type(storage) is not Storage:
        raise ValueError("a tensor has no storage in the file")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v2(*given: Any) -> View:
    storage, offset, shape, strides, _, _, *more = given
    return _flip(_tensor(storage, offset, shape, strides), *more)


def _tensor_v3(*given: Any) -> View:
    storage, offset, shape, strides, _, _, name, *more = given
    if type(storage) is not Storage or type(name) is not _Name or not _DTYPE.fullmatch(name):
        raise ValueError("a tensor has no storage in the file, or no dtype")
    dtype = _CODES.get(name, name.removeprefix("torch."))
    return _flip(_view(storage, dtype, offset, shape, strides), *more)


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> View:
    if (
        not (type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MAX_DIMENSIONS)
        or not _are_counts((offset, *shape, *strides))
    ):  # fmt: skip
        raise ValueError("a tensor's offset, shape or strides are not non-negative integers")
    last, is_empty = offset, False
    for length, stride in zip(shape, strides, strict=True):
        last += (length - 1) * stride
        is_empty = is_empty or not length
    end, held = (last + 1) * item_bytes(dtype), storage.nbytes
    if not is_empty and end > held:
        raise ValueError(f"a tensor extends to byte {end} of a storage of {held}")
    return View(storage, dtype, offset, shape, strides)


def _are_counts(values: Iterable[Any]) -> bool:
    for value in values:  # noqa: SIM110  a generator would take twice as long, for each tensor
        if type(value) is not int or not 0 <= value < _MANY:
            return False
    return True


def _flip(view: View, metadata: Any = None) -> View:
    if not metadata:
        return view
    if type(metadata) is not dict or not metadata.keys() <= {"conj", "neg"} or view.dtype not in _SIGNS:
        raise ValueError("a tensor is an unknown kind of view")
    flipped = _SIGNS[view.dtype] if metadata.get("neg") else 0
    if metadata.get("conj") and view.dtype == "C64":
        flipped ^= _SIGN_OF_IMAGINARY
    return view._replace(flipped=flipped)


def _parameter(data: object, *_: object) -> View | Odd:
    if not isinstance(data, (View, Odd)):
        raise ValueError("a parameter has no tensor")
    return data


def _of_type(function: object, kind: object, arguments: object, *_: object) -> View | Odd:
    # As torch writes a tensor with attributes, which are no part of its data.
    made = None
    if type(kind) is _Name and kind in _CLASSES and type(function) is _Name and function in _REBUILDS:
        made = _call(function, arguments)
    if not isinstance(made, (View, Odd)):
        raise ValueError("a tensor has a custom type")
    return made


def _odd(*_: object) -> Odd:
    return Odd()


def _inert(*_: object) -> None:
    return None


_REBUILDS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _odd,
    "torch._utils._rebuild_qtensor": _odd,
    "torch._utils._rebuild_nested_tensor": _odd,
    "torch._utils._rebuild_meta_tensor_no_storage": _odd,
    "torch._utils._rebuild_wrapper_subclass": _odd,
    "torch._utils._rebuild_device_tensor_from_numpy": _odd,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _odd,
}
_CALLS = _REBUILDS | {
    "collections.OrderedDict": _ordered,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.serialization._get_layout": _inert,
    "torch.device": _inert,
    "torch.Size": _inert,
}
