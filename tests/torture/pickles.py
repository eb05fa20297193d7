"""Pickles made to harm: none is executed, none eats the memory, what asks for more than tensors is refused.

Every program is written opcode by opcode, since no pickler would write it; a canary file tells what ran.
"""

import io
import pickle
import resource
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from struct import pack
from typing import NamedTuple

from shardkit.base.errors import CheckpointError, ShardkitError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.shard.engine import shard_checkpoint
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, peak

_SECONDS, _MEGABYTES, _SPARE_BYTES = 20.0, 300.0, 6 << 30
_BOMB_MEGABYTES = 600

# What does harm when called: with a shell command, Python code, or the name of a file to make or run.
_GADGETS = {
    "shell": "os.system posix.system nt.system os.popen subprocess.getoutput subprocess.Popen pty.spawn "
    "commands.getoutput torch.utils.collect_env.run",
    "python": "builtins.eval builtins.exec __builtin__.eval timeit.timeit cProfile.run pdb.run "
    "runpy._run_code numpy.f2py.crackfortran.myeval numpy.testing._private.utils.runstring builtins.compile "
    "torch.jit.unsupported_tensor_ops.execWrapper torch.fx.graph_module._exec_with_source",
    "file": "builtins.open io.FileIO os.mkdir logging.FileHandler shutil.rmtree torch.load torch.save "
    "torch.serialization.load torch.hub.load torch.jit.load torch.storage._load_from_bytes joblib.load "
    "pickle.loads _pickle.loads marshal.loads importlib.import_module builtins.__import__ builtins.getattr "
    "ctypes.CDLL types.FunctionType operator.attrgetter functools.partial webbrowser.open numpy.load "
    "copyreg._reconstructor pathlib.Path",
}
_WAYS = ("reduce", "stack global", "dotted", "inst", "obj", "newobj", "build", "legacy")


def text(value: str) -> bytes:
    """Opcodes of a string."""
    return b"X" + pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


_ORDERED = _global("collections.OrderedDict") + b")R"


def call(name: str, *arguments: bytes, way: str = "reduce") -> bytes:
    """Opcodes that call a function, in one of the ways that a pickle can."""
    module, _, last = name.rpartition(".")
    plain, args = b"".join(arguments), _tuple(*arguments)
    return {
        "stack global": text(module) + text(last) + b"\x93" + args + b"R",
        "dotted": text("torch") + text(f"serialization.{name}") + b"\x93" + args + b"R",
        "inst": b"(" + plain + f"i{module}\n{last}\n".encode(),
        "obj": b"(" + _global(name) + plain + b"o",
        "newobj": _global(name) + args + b"\x81",
        "build": _ORDERED + b"}" + text("__setstate__") + _global(name) + b"sb" + args + b"b",
    }.get(way, _global(name) + args + b"R")


def _saved(
    numbers: int = 4, key: str = "0", where: str = "cpu", kind: str = "storage", more: bytes = b""
) -> bytes:
    """Opcodes of a storage of float32 that claims so many numbers."""
    floats = _global("torch.FloatStorage")
    return _tuple(text(kind), floats, text(key), text(where), _number(numbers), more) + b"Q"


def _tensor(saved: bytes = _saved(), shape: int = 4, stride: int = 1, offset: int = 0) -> bytes:
    sizes = _number(offset) + _tuple(_number(shape)) + _tuple(_number(stride))
    return call("torch._utils._rebuild_tensor_v2", saved, sizes, b"\x89", _ORDERED)


def _program(*values: bytes, key: bytes = text("x"), tensor: bytes = _tensor()) -> bytes:
    """A pickle of a map of a tensor, and whatever else."""
    return b"\x80\x02}(" + text("weight") + tensor + b"".join(key + value for value in values) + b"u."


def _made(storage: str) -> bytes:
    """Opcodes of a tensor of 200 numbers that are not in the file: whatever memory holds."""
    sizes = _number(0) + _tuple(_number(200)) + _tuple(_number(1))
    return call("torch._utils._rebuild_tensor_v2", call(storage, _number(200)), sizes, b"\x89", _ORDERED)


class _Record(NamedTuple):
    """A record of an archive, with all that its headers say."""

    name: str
    data: bytes
    method: int = 0
    size: int | None = None
    crc: int | None = None
    flags: int = 0
    at: int | None = None


def _joined(*records: _Record, directories: int = 1, after: bytes = b"") -> bytes:
    """An archive; with two directories, the second claims that nothing is compressed."""
    body = directory = b""
    for record in records:
        name = f"archive/{record.name}".encode()
        size = len(record.data) if record.size is None else record.size
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        sizes = (crc, len(record.data), size, len(name), 0)
        fields = pack("<5H3I2H", 20, record.flags, record.method, 0, 33, *sizes)
        at = len(body) if record.at is None else record.at
        directory += b"PK\1\2" + pack("<H", 20) + fields + pack("<3H2I", 0, 0, 0, 0, at) + name
        body += b"PK\3\4" + fields + name + record.data
    second = directory.replace(pack("<3H", 20, 0, 8), pack("<3H", 20, 0, 0)) if directories == 2 else b""
    end = pack("<4H2IH", 0, 0, len(records), len(records), len(directory), len(body), 0)
    return body + directory + second + b"PK\5\6" + end + after


_SPARE = _Record("spare", bytes(4000))
_REST = (_Record("version", b"3\n"), _Record("byteorder", b"little"), _Record("data/0", bytes(16)))


def _zip(program: bytes, *more: _Record, flags: int = 0) -> bytes:
    """An archive as torch writes it, and more records."""
    return _joined(_Record("data.pkl", program, flags=flags), *_REST, *more)


def _nested() -> bytes:
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save({"weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, file)
    return file.getvalue()


def _odd(**tensor: int) -> bytes:
    return _zip(_program(tensor=_tensor(**tensor)))


def _lie(shape: int = 4, **storage: object) -> bytes:
    return _zip(_program(tensor=_tensor(_saved(**storage), shape=shape)))


def _bomb(name: str, start: bytes = b"", filler: bytes = bytes(2), end: bytes = b"") -> _Record:
    """A compressed record that unpacks to `_BOMB_MEGABYTES` of filler."""
    packer, crc, size, packed = zlib.compressobj(1, wbits=-15), 0, 0, b""
    for part in (start, *[filler * 500_000] * _BOMB_MEGABYTES, end):
        packed += packer.compress(part)
        crc, size = zlib.crc32(part, crc), size + len(part)
    return _Record(name, packed + packer.flush(), 8, size, crc)


def _big_program() -> _Record:
    return _bomb("data.pkl", b"\x80\x02", b"N0", _program()[2:])


def _legacy(program: bytes, numbers: int = 4, head: bytes = b"", keys: bytes = b"") -> bytes:
    """A file as torch wrote it before it wrote archives."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = head or b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
    return head + program + (keys or pickle.dumps(["0"], 2)) + pack("<q", numbers) + bytes(16)


def _old(numbers: int) -> bytes:
    return _program(tensor=_tensor(_saved(numbers, more=b"N")))


_MORE = _Record("data.pkl", _program(tensor=_tensor(_saved(24), shape=24)))
# A tuple of the same tuple twice, and so on: small to hold, endless to hash or to print.
_LAUGHS = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
_ZEROS = call("builtins.bytearray", _number(1 << 31))
_META = (_global("torch.float32"), _tuple(_number(1 << 40)), _tuple(_number(1)), b"\x89")

# Where harmless, a file may be opened as well; it must not run anything, nor eat the memory.
_HARMLESS = {
    "sound": _zip(_program()),
    "sound and old": _legacy(_old(4)),
    "a number for a name of what is no tensor": _zip(_program(b"N", key=_number(1))),
    "map in a map": _zip(_program(b"}")),
    "storage on another device": _lie(where="nowhere:9"),
    "program twice": _zip(_program(), _Record("data.pkl", _program())),
    "records on top of each other": _zip(_program(), _Record("data/1", b"", at=0)),
    "record outside the archive": _zip(_program(), _Record("../../canary", b"x")),
    "evil record that nobody asks for": _zip(
        _program(), _Record("x.pkl", b"cposix\nsystem\nX\0\0\0\0\x85R.")
    ),
}
_HARMFUL: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "header alone": b"PK\3\4",
    "end record alone": b"PK\5\6" + bytes(18),
    "no program": _joined(*_REST),
    "cut": _zip(_program())[:-30],
    "compressed storage": lambda: _joined(_Record("data.pkl", _program()), _bomb("data/0")),
    "compressed program": lambda: _joined(_big_program(), *_REST),
    "compressed program, hidden by a directory": lambda: _joined(_big_program(), *_REST[:1], directories=2),
    "compressed program, hidden by a far end": lambda: _joined(_big_program(), *_REST, after=bytes(66_500)),
    "storage that goes on beyond its record": _lie(numbers=24, shape=24),
    "storage that goes on beyond the file": _lie(numbers=5000, shape=5000),
    "storage that goes on into the directory": _joined(_MORE, _Record("data/0", bytes(16), size=96)),
    "storage that is claimed twice": _zip(_program(_tensor(), tensor=_tensor(_saved(24), shape=24))),
    "storage that takes for ever to print": _zip(_program(tensor=_tensor(_tuple(*[_LAUGHS] * 5) + b"Q"))),
    "storage made on the spot": _zip(_program(_made("torch.storage.TypedStorage")), _SPARE),
    "tensor made on the spot": _zip(_program(call("torch.Tensor", _number(200), way="newobj")), _SPARE),
    "tensor made of numbers": _zip(_program(call("torch.Tensor", b"](K\1K\2e"))),
    "storage of 4 TB": _lie(numbers=1 << 40, shape=1 << 40),
    "storage whose bytes overflow": _lie(numbers=1 << 62),
    "storage of negative size": _lie(numbers=-4),
    "storage that is missing": _lie(key="7"),
    "storage outside the archive": _lie(key="../../../etc/passwd"),
    "storage that is a module": _lie(kind="module"),
    "storage that is no tuple": _zip(_program(tensor=_tensor(text("0") + b"Q"))),
    "tensor of 4 TB in 4 bytes": _odd(shape=1 << 40, stride=0),
    "tensor of 2 GB in 4 bytes": _odd(shape=1 << 29, stride=0),
    "tensor beyond its storage": _odd(offset=3),
    "tensor of negative stride": _odd(stride=-1, offset=3),
    "tensor of negative shape": _odd(shape=-4),
    "tensor of no storage": _zip(_program(call("torch.FloatTensor", _number(1 << 28)))),
    "tensor on the meta device": _zip(_program(call("torch._utils._rebuild_meta_tensor_no_storage", *_META))),
    "tensor that is nested": _nested,
    "two gigabytes of zeros": _zip(_program(_ZEROS)),
    "two gigabytes of zeros by an opcode": _zip(_program(b"\x96" + pack("<Q", 1 << 31))),
    "two gigabytes of zeros in capitals": _zip(_program(), _Record("DATA.PKL", _program(_ZEROS))),
    "two gigabytes of zeros by another name": _joined(
        _Record("data.pkl\0", _program()), _Record("DATA.PKL", _program(_ZEROS)), *_REST
    ),
    "old, two gigabytes of zeros for keys": _legacy(_old(4), keys=b"\x80\x02" + _ZEROS + b"."),
    "old, keys that take for ever to hash": _legacy(_old(4), keys=b"\x80\x02}" + _LAUGHS + b"Ns."),
    "thirty million lists": lambda: _zip(_program(b"]" * 30_000_000)),
    "a million classes": lambda: _zip(_program(b"".join(b"ctorch\na%d\n" % n for n in range(1_000_000)))),
    "a name that takes for ever to hash": _zip(_program(b"N", key=_LAUGHS)),
    "list": _zip(b"\x80\x02](" + _tensor() + b"e."),
    "program without an end": _zip(_program()[:-1]),
    "stack that is empty": _zip(b"\x80\x02R."),
    "memo that is empty": _zip(b"\x80\x02h\x05."),
    "extension": _zip(_program(b"\x82\x01)R")),
    "encrypted": _zip(_program(), flags=1),
    "TorchScript": _zip(_program(), _Record("constants.pkl", _program()), _Record("code/a.py", b"")),
    "archive in an archive": _joined(_Record("inner.zip", _zip(_program()))),
    "old, with a storage of 4 TB": _legacy(_old(1 << 40), 1 << 40),
    "old, with sizes that do not agree": _legacy(_old(4), 1 << 30),
    "old, with another magic number": _legacy(_program(), head=pickle.dumps(1, 2)),
    "tar": b"storages".ljust(257, b"\0") + b"ustar\00000" + bytes(10_000),
}


def _evil(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every gadget called in every way, with a canary to be made."""
    canary = folder / "canary"
    shell = text(f"touch '{canary}'")
    arguments = {"shell": shell, "python": text(f"open({str(canary)!r}, 'w')"), "file": text(str(canary))}
    for kind, names in _GADGETS.items():
        for name, way in product(names.split(), _WAYS):
            wrap = _legacy if way == "legacy" else _zip
            yield f"{name} by {way}", wrap(_program(call(name, arguments[kind], way=way)))
    chain = (
        call("builtins.getattr", call("builtins.__import__", text("os")), text("system"))
        + _tuple(shell)
        + b"R"
    )
    yield from ((f"chain in {wrap.__name__}", wrap(_program(chain))) for wrap in (_zip, _legacy))
    yield "in the magic number", _legacy(_program(), head=call("posix.system", shell) + b".")


def _case(place: Place) -> tuple[str, bytes]:
    files = _HARMLESS | _HARMFUL
    if place.number < len(files):
        name = list(files)[place.number]
        made = files[name]
        return name, made if isinstance(made, bytes) else made()
    evil = list(_evil(place.work))
    Random(0).shuffle(evil)
    return evil[place.number - len(files)]


def _open(file: Path, answer: Connection) -> None:
    """Open the file, and shard what opens, in a process that may die of it; say what came of it."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    opened, wrong = False, ""
    with peak() as risen:
        try:
            opened = bool(Checkpoint.open(file))
            shard_checkpoint(file, file.parent / "out")
        except ShardkitError as error:
            wrong = "" if opened or isinstance(error, CheckpointError) else type(error).__name__
        except BaseException as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    answer.send((opened, wrong, risen[0]))


def _opened(place: Place) -> Iterator[Finding]:
    name, raw = _case(place)
    file = place.work / "pytorch_model.bin"
    file.write_bytes(raw)
    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_open, args=(file, theirs))
    begun = time.perf_counter()
    process.start()
    theirs.close()
    opened, wrong, megabytes = False, f"hung for {_SECONDS:.0f} s", 0.0
    if ours.poll(_SECONDS):
        wrong = "crashed, or ran out of memory"
        with suppress(EOFError):
            opened, wrong, megabytes = ours.recv()
    process.kill()
    process.join()
    yield from (
        Most("MB", megabytes),
        Most("s", time.perf_counter() - begun),
        Seen("opened" if opened else "refused"),
    )
    if (place.work / "canary").exists() or (place.shared / "canary").exists():
        yield Fault(f"({name}) was EXECUTED")
    if wrong or megabytes > _MEGABYTES:
        yield Fault(f"({name}) took {megabytes:.0f} MB. {wrong}")
    if opened and name not in _HARMLESS:
        yield Fault(f"({name}) was not refused")


_FILES = len(_HARMLESS) + len(_HARMFUL)
PICKLES = Kind("malicious pickles", _opened, _FILES + len(list(_evil(Path()))), _FILES + 70)
