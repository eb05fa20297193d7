"""What torch's restricted loader leaves open, closed before it is called.

`weights_only=True` runs no code of the file. It still believes the file's own figures: it will unpack what
is compressed, allocate what is claimed, and slice past the end of a record. So a pickle is gone through once
with inert stand-ins for everything it names, and its claims are held against what the file really has.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, ClassVar, NoReturn

from shardkit.base.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 8_000_000  # a tensor takes some 200
_MAX_READS = 1_600_000  # eighty for a tensor: 20,000 of them; more would take seconds
_MAX_MARKS = 100  # open at once: a state dict needs five
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR, _UNSAID = struct.Struct("<4sLQL"), 0xFFFF_FFFF
_LOCAL_HEADER = struct.Struct("<26x2H")
_STORAGE_ITEMSIZE = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1,
    "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
_CALLED = ("OrderedDict", "Size", "device", "_get_layout")
_NEVER_WRITTEN = (
    "DICT", "EMPTY_SET", "ADDITEMS", "FROZENSET", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ",
    "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "FRAME",
)  # fmt: skip


def check_pickle(path: str) -> bool:
    """Hold a pickle's claims against its file; return whether it is a zip, which can be mapped.

    Raises
    ------
    CheckpointError
        If it claims what it has not, packs what torch never packs, or names anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == ZIP_MAGIC  # as torch decides it
            file.seek(0)
            if is_zip:
                _check_zip(file, path)
            else:
                _check_legacy(file, path)
    except CheckpointError:
        raise
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot be read: {error}", file=path) from error
    except Exception as error:  # a hostile pickle makes the unpickler raise anything
        text = str(error) or type(error).__name__
        if isinstance(error, KeyError):  # of the opcode
            text = "it does not begin as one"
        raise CheckpointError(f"not a pickle of tensors alone, refused: {text[:200]}", file=path) from error
    return is_zip


def _check_zip(file: IO[bytes], path: str) -> None:
    _check_directory(file, path)
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        _check_records(file, records, path)
        sizes = {record.filename: record.file_size for record in records}
        if any(name.endswith("/constants.pkl") for name in sizes):
            raise CheckpointError("is a TorchScript program, not a map of tensors", file=path)
        names = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise CheckpointError(f"has {len(names)} records named data.pkl, not one", file=path)
        if sizes[names[0]] > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"its data.pkl has {sizes[names[0]]} bytes", file=path)
        with archive.open(names[0]) as record:
            storages = _go_through(record)
    root = names[0].removesuffix("data.pkl")
    for key, nbytes in storages.items():
        held = sizes.get(f"{root}data/{key}")
        if held != nbytes:
            raise CheckpointError(f"storage {key!r} claims {nbytes} bytes, its record has {held}", file=path)


def _check_directory(file: IO[bytes], path: str) -> None:
    """Make sure that there is one directory of records, so that every zip reader finds the same."""
    size = file.seek(0, os.SEEK_END)
    position = size - _END.size
    magic, *_, length, offset, comment = _read(file, _END, position)
    is_sound = magic == b"PK\x05\x06" and not comment
    locator = _read(file, _LOCATOR, position - _LOCATOR.size)[0] if position >= _LOCATOR.size else b""
    if locator == b"PK\x06\x07":  # torch writes the large form, too, whatever the size
        position -= _LOCATOR.size + _END64.size
        magic, *_, length64, offset64 = _read(file, _END64, position)
        small_agrees = (length, offset) in ((length64, offset64), (_UNSAID, _UNSAID), (length64, _UNSAID))
        is_sound = is_sound and magic == b"PK\x06\x06" and small_agrees
        length, offset = length64, offset64
    if not is_sound or offset + length != position:
        raise CheckpointError(
            f"the zip's directory is not the end of its {size} bytes: the download may have been cut",
            file=path,
        )


def _read(file: IO[bytes], form: struct.Struct, position: int) -> tuple[Any, ...]:
    file.seek(max(position, 0))
    return form.unpack(file.read(form.size))


def _check_records(file: IO[bytes], records: list[zipfile.ZipInfo], path: str) -> None:
    # Readers differ in how they compare names: by case or not, to the first NUL or to the end.
    names = {record.orig_filename.lower() for record in records}
    if len(names) != len(records) or not all(name.isascii() and name.isprintable() for name in names):
        raise CheckpointError("has two records of one name, or names that are not plain text", file=path)
    end = 0
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise CheckpointError(
                f"record {record.filename!r} is compressed ({record.compress_size} bytes to "
                f"{record.file_size}) or encrypted, which torch never writes",
                file=path,
            )
        if record.header_offset < end:
            raise CheckpointError(f"record {record.filename!r} overlaps the one before it", file=path)
        file.seek(record.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        end = record.header_offset + _LOCAL_HEADER.size + name + extra + record.file_size


def _check_legacy(file: IO[bytes], path: str) -> None:
    size = os.fstat(file.fileno()).st_size
    for _ in range(3):  # magic number, protocol version, system
        _go_through(file)
    claimed = sum(_go_through(file).values())
    _go_through(file)  # the storages' keys
    if claimed > size:
        raise CheckpointError(f"its storages claim {claimed} bytes, the file has {size}", file=path)


def _go_through(file: IO[bytes]) -> dict[str, int]:
    """Unpickle one object with inert stand-ins; return the bytes that its storages claim, by key."""
    unpickler = _InertUnpickler(_Bounded(file))  # type: ignore[arg-type]  # it reads, and needs no more
    unpickler.load()
    if unpickler.stack or unpickler.metastack:
        raise pickle.UnpicklingError("it makes objects that nothing holds")
    return unpickler.storages


class _Bounded:
    """Reads at most `_MAX_PICKLE_BYTES` of a file, in at most `_MAX_READS` steps: one or two an opcode."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left, self._reads = file, _MAX_PICKLE_BYTES, _MAX_READS

    def read(self, count: int) -> bytes:
        return self._counted(self._file.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self._reads -= 1
        if self._reads < 0:
            raise pickle.UnpicklingError(f"it describes its tensors in more than {_MAX_READS} steps")
        if self._left < 0:
            raise pickle.UnpicklingError(f"it describes its tensors in more than {_MAX_PICKLE_BYTES} bytes")
        return data


class _Inert:
    """Stands for whatever a pickle makes: takes anything, does nothing."""

    name = ""

    def __init__(self, *arguments: object) -> None:
        # All that a state dict calls. Other names that torch lets pass would make tensors on the spot, of
        # memory that no byte of the file stands behind.
        first = arguments[0] if arguments else None
        called = self.name in _CALLED or self.name.startswith("_rebuild_")
        if self.name.startswith("_rebuild_tensor"):
            called = isinstance(first, _Storage)
        elif self.name == "_rebuild_from_type_v2":
            called = getattr(first, "name", "").startswith("_rebuild_")
        if not called:
            raise pickle.UnpicklingError(f"it calls {self.name}, which is more than tensors")

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, key: object, _: object) -> None:
        _check_key(key)

    def append(self, _: object) -> None:
        pass

    def extend(self, _: object) -> None:
        pass


class _Storage:
    """Stands for a storage that the file holds."""


@lru_cache(maxsize=256)
def _stand_in(name: str) -> type[_Inert]:
    return type("Named", (_Inert,), {"name": name})


def _check_key(key: object) -> None:
    # Some keys take for ever to hash: a tuple of itself twice, sixty deep.
    if not isinstance(key, (str, int)):
        raise pickle.UnpicklingError(f"a key is a {type(key).__name__}, not a name")


class _InertUnpickler(pickle._Unpickler):
    """The standard library's own, in Python, because its C twin cannot be asked to look at keys."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    metastack: list[list[Any]]
    stack: list[Any]  # the standard library's, which its type stubs leave out
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if module.split(".")[0] != "torch" and (module, name) != ("collections", "OrderedDict"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is more than tensors")
        return _stand_in(name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *_ = pid
        itemsize = _STORAGE_ITEMSIZE.get(getattr(storage, "name", ""))
        if kind != "storage" or itemsize is None or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError("a storage is described as torch never does")
        if count < 0 or self.storages.setdefault(key, count * itemsize) != count * itemsize:
            raise pickle.UnpicklingError(f"storage {key!r} claims different sizes")
        return _Storage()

    def _mark(self) -> None:
        if len(self.metastack) >= _MAX_MARKS:
            raise pickle.UnpicklingError(f"it is nested more than {_MAX_MARKS} deep")
        self.metastack.append(self.stack)
        self.stack = []
        self.append = self.stack.append

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _check_key(key)
        self.stack[-1][key] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            self.stack[-1][key] = value

    def _refuse(self) -> NoReturn:
        raise pickle.UnpicklingError("it holds a set, an object or a buffer: more than tensors")


_InertUnpickler.dispatch |= {
    pickle.MARK[0]: _InertUnpickler._mark,
    pickle.SETITEM[0]: _InertUnpickler._set_item,
    pickle.SETITEMS[0]: _InertUnpickler._set_items,
    **{getattr(pickle, name)[0]: _InertUnpickler._refuse for name in _NEVER_WRITTEN},
}
