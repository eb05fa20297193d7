"""torch's files are read as byte ranges, without torch: what torch.load gives, nothing of a hostile file."""

import base64
import gc
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.base.errors import CheckpointError
from shardkit.formats import strided, torch_program
from shardkit.formats.tensor import DTYPE_NAMES
from tests.torch_files import COMMON, NEW, Counted, contents, raw, state_dicts
from tests.torture import bench, pickles

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(state: object, path: Path, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def check(path: Path) -> None:
    """Hold every tensor of a file against what torch gives."""
    theirs = torch.load(path, weights_only=True)
    listed = {tensor.name: tensor for tensor in Counted(path).open().tensors}
    assert list(listed) == list(theirs)
    assert {name: f"torch.{DTYPE_NAMES[t.dtype]}" for name, t in listed.items()} == {
        name: str(t.dtype) for name, t in theirs.items()
    }
    assert [name for name, data in contents(path).items() if data != raw(theirs[name])] == []
    for name, tensor in listed.items():
        if tensor.dtype != "F4":
            assert tensor.shape == tuple(theirs[name].shape)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@settings(max_examples=200)
@given(data=st.data())
def test_every_tensor_of_any_state_dict_is_what_torch_loads(data: st.DataObject, fresh: Path) -> None:
    check(save(data.draw(state_dicts(COMMON + NEW)), fresh / "state.bin"))


@settings(max_examples=100)
@given(data=st.data())
def test_every_tensor_of_any_legacy_file_is_what_torch_loads(data: st.DataObject, fresh: Path) -> None:
    check(save(data.draw(state_dicts(COMMON)), fresh / "legacy.bin", zipped=False))


# torch.save by torch 1.6.0, as an archive and as a legacy file; deflated, since they are mostly padding.
OLD = {
    "zip": (
        "eNqdVUtPE1EUvu2002HkUfEBUgV8F4E+p6WIEShmNrOwjDGZmJhmmA5MY6E901tEE5JuQIkL8Q8YFv4Af4ALVuxcuHDvzr/gxs"
        "R7O20zM7RVue3pZO495/vOPfc7tzmJ8SHEcejUCKJhpJqaUdzWowUVq5HKi5KYHUTPHKPu3QUUVlgS8FIvbhgYPBouk7BIvoaL"
        "pSqfN/W1WrFUyGN9q1o289sJHrzhsBIgEVXiqW7owFghvFgqq/iJNcmDTxkkPvNCTEglhXhCiKfSGfArDJnUKjVgJRZDYFVCkl"
        "di9oGTGMmzD30HmlYulXQNF8tbVf6xWdBNvfCoqGEe+CkZzmHol2FAIZtGuKgXYNAYUHj6Yqpb1Uq5SqaGDJKgwRj2BOYEITaX"
        "nk9D0GClfgznKbGPEg9LHsm3DxcODIp/EcMlGS4rfSSyoprqpo51E0a61KTtwcNoZ9JELJZMwBVC6sUw1tjtHoQkzx5ctQivYR"
        "iXYeJt42XyDVyX4YZCj3NtnVYznoabFnKzxlnRmm6X+ZaLMB5PJeA2IfRjuEMJ/XtwlxKGLcIpDPdkmFb8JErfrOBXMNMt9Qxh"
        "nyVICEOEIiFar6h1UDELLY4hIUOyIQetvFkp6TsgOBJesWad2ki5qDICOZq0VaW5ZpUyNOl5i+Y+hgUZHtQiOSnALXw5+f3Zix"
        "C1XFf9h1DAof+oU4lilqGtYPnWF8nPEvkSqxM7WqI8I4c/P4ySBWq9eCY68bQEJ2ZDrpZzjG78CB0T+0EMLZNeJjZJLLZM89rZ"
        "XX8YIwsxdIb9tzTZ3j/lri9S3MNV9jsF4tq4qCNutCsuEYyYne61X/c4U/5U4s3864utD93B60/P39HLgP9LZWa7IVMditmpf9"
        "+B8+woa4B7//XXSbBxA/fKYggl21ls62aV3HdiNvo/taMjyVPGbx83npJmQN4Go4c+2pz2bgmeysL9D+GOtvdAyBnKoF795Qay"
        "i9YJZHQGajWQG8iuUldGPtRL8S2gzqK2D6UHEJG4OyO76pxAx92BqIbdQHbhOIHG/KiXZN1Adj0MOYCObEBN1eUklp1pLo8zs2"
        "1XzvWMW9VDw6z1JHH01kcrTQdPY87PWjFcw9/y/QP4jMH1"
    ),
    "legacy": (
        "eNqFk0lv01AQx1+8JK1JStgpa9hTlpCkzgZItIBysdjMxRdkpc4jNnLsjP1SKFKlXBJaPgMHjnwMPgpXPgISB+bZaUoqV9geS5"
        "733vxm/jMeCV8U98/X9u/C+++vlksj4fkvEd/bQIpGnhAyCHzmW75rbtIgdHwPUrjByOGK6zDmUpN6XafjgbBjKOhkWwNqhs4n"
        "GoK4DVLRkNEZ2n7AQNYEQ8Qvx2OQ1iRD4jF8rwcZTRoO95hp9H6gTs9mkLKYH1h2yRwyxw0VM6AbQ8ftmox6oR+Ym1UFhGLRyH"
        "AC7uz0KIjxEaXt+h32JnYqIBlLuKelltXaqlqpqpVavQlylIw1GGIy6RcMMq81ogmaOIEFTdRSE1jctbBul1oMyw6Vl0GXBrT7"
        "zLGYAsqKDkcYZHXIRXUwh3Zhyc7FGgQdLxz4IbqO2pihLdr/ZtBQ1XKj3qpD3k5rWSQf42SJk49rKU2awIldmwNOMjilw2ljkb"
        "ehE3T6lNEAzhyiymyHAmeTqdVyebUKy0gVkHouqncM57XUGC7ExIsMLulweSf6KHyGKzpcNRYwxsY7LmilDtfi0FOZn7Rj90zp"
        "6weIlUqtCjeQKCPxJifKY7jFicWYuMLgtg53ojGh/QHbgruHJd9E/D0MRTBUiYciXLL7cbPKcbgKg6oOq9FMWH5/4NKPoM6l/D"
        "T2zg9I7QCrqWJ76lOhGlOhmjztVsx5wOChDo/41L7lU5swX6mklgtJHRGTKpWSlJST8kzTEv9p9q/RY3yt4YM2Qvu2lv3POiE/"
        "0H6ikXVC8mgFtPK6MHcmOhdd8sy7dwuJ0Qn5C/7FEIk="
    ),
}


@pytest.mark.parametrize("form", OLD)
def test_file_of_the_first_torch_that_wrote_archives_is_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zlib.decompress(base64.b64decode(OLD[form])))
    check(path)
    assert Counted(path).open().aliases == {"tied": "weight"}


def starts(path: Path, exact: bool) -> list[int]:
    return [tensor.offset for tensor in Counted(path).open(exact).tensors]


@FORMATS
def test_file_of_many_storages_is_listed_in_three_ranged_reads(zipped: bool, tmp_path: Path) -> None:
    state = {f"model.layers.{n}.weight": torch.full((20_000,), float(n)) for n in range(600)}
    path = save(state, tmp_path / "pytorch_model.bin", zipped)
    counted = Counted(path)
    found = counted.open(exact=False)
    assert (len(found.tensors), found.is_archive) == (600, zipped)
    assert len(counted.ranges) <= 3
    assert sum(nbytes for _, nbytes in counted.ranges) < 1_500_000
    assert starts(path, exact=False) == starts(path, exact=True)


@settings(max_examples=100)
@given(data=st.data())
def test_beginning_that_is_derived_is_the_one_that_is_read(data: st.DataObject, fresh: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardkit.formats.torch_zip.BLOCK_BYTES", 100)
        patch.setattr("shardkit.formats.ranged.BLOCK_BYTES", 100)
        for zipped, dtypes in ((True, COMMON + NEW), (False, COMMON)):
            path = save(data.draw(state_dicts(dtypes)), fresh / "derived.bin", zipped)
            assert starts(path, exact=False) == starts(path, exact=True)


def test_records_beyond_four_gigabytes_are_where_torch_says(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    sizes = {"small": 12, "large": 5 << 30, "after": 4000, "larger": (4 << 30) - 1, "last": 3}
    with torch.serialization.skip_data():  # makes holes, and so takes no disk
        torch.save({name: torch.empty(n, dtype=torch.uint8) for name, n in sizes.items()}, path)
    derived = starts(path, exact=False)
    mapped = torch.load(path, weights_only=True, mmap=True)
    begin = mapped["small"].data_ptr()
    assert derived == starts(path, exact=True)
    assert [t.data_ptr() - begin for t in mapped.values()] == [at - derived[0] for at in derived]


def repacked(path: Path, **options: Any) -> None:
    """Write an archive again, as another tool would: nothing aligned, no sizes after the bytes."""
    with zipfile.ZipFile(path) as archive:
        records = [(record, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records:
            entry = zipfile.ZipInfo(record.filename)
            entry.extra = options.get("extra", b"")
            archive.writestr(entry, data)


@pytest.mark.parametrize("extra", [b"", b"XX\x04\x00abcd", b"XX" + (700).to_bytes(2, "little") + bytes(700)])
def test_archive_that_another_tool_has_written_is_read_by_its_headers(extra: bytes, tmp_path: Path) -> None:
    path = save({f"t{n}": torch.randn(20_000) for n in range(20)}, tmp_path / "pytorch_model.bin")
    repacked(path, extra=extra)
    assert starts(path, exact=False) == starts(path, exact=True)
    check(path)


def test_wrong_header_never_gives_other_bytes_in_silence(tmp_path: Path) -> None:
    path = save({f"t{n}": torch.randn(20_000) for n in range(4)}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("pytorch_model/data/2")
    sound = path.read_bytes()
    right = starts(path, exact=True)
    silent = []
    for at in range(record.header_offset, record.header_offset + 30 + len(record.filename)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                read = starts(path, exact=True)
            except CheckpointError:
                continue
            # What torch reads as well: dates, versions and checksums do not move anything.
            if read != right:
                theirs = torch.load(path, weights_only=True)
                silent += [(at, bit)] * (contents(path)["t2"] != raw(theirs["t2"]))
    assert silent == []


def test_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    path = save({"w": torch.randn(3, 4)}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="byte order is b'big', not little"):
        Counted(path).open()


def test_map_of_pairs_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    # As Python 2 wrote an OrderedDict.
    pairs = b"](](" + pickles.text("weight") + pickles._tensor(pickles._saved(more=b"N")) + b"ee"
    state = b"\x80\x02" + pickles._global("collections.OrderedDict") + pairs + b"\x85R."
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickles._legacy(state)[:-16] + raw(torch.arange(4.0)))
    check(path)


def test_file_that_is_cut_while_it_is_read_is_said_to_be(tmp_path: Path) -> None:
    path = save({"w": torch.randn(300, 200).t()}, tmp_path / "pytorch_model.bin")
    (tensor,) = Counted(path).open().tensors
    assert tensor.layout is not None
    for size in (100_000, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=f"ends at byte {size}, .*truncated while being read"):
            next(strided.read_strided(str(path), tensor.offset, tensor.layout, 0, tensor.nbytes))


# Memory ------------------------------------------------------------------------------------------------


def peak(action: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_tensor_that_is_not_contiguous_is_gathered_in_little_memory(tmp_path: Path) -> None:
    path = save({"w": torch.arange(30_000_000, dtype=torch.int32).view(6000, 5000).t()}, tmp_path / "w.bin")
    (tensor,) = Counted(path).open().tensors
    assert tensor.layout is not None

    def gather() -> None:
        done = 0
        for piece in strided.read_strided(str(path), tensor.offset, tensor.layout, 0, tensor.nbytes):
            done += len(piece)
        assert done == 120_000_000

    assert peak(gather) < 4_000_000


@pytest.mark.slow
def test_hundred_thousand_tensors_are_listed(tmp_path: Path) -> None:
    base = torch.zeros(1000)
    state = torch.nn.Module().state_dict()
    for n in range(100_000):
        state[f"model.layers.{n // 10}.self_attn.q_proj_{n % 10}.weight"] = torch.nn.Parameter(
            base[n % 900 :][:9]
        )
    counted = Counted(save(state, tmp_path / "many.bin"))
    begun = time.process_time()
    assert len(counted.open().tensors) == 100_000
    assert time.process_time() - begun < 15


# What is refused -----------------------------------------------------------------------------------------


def in_a_process(action: Callable[[], object]) -> tuple[Any, float, float]:
    """What came of an action, by how many MB memory rose, and its seconds of processor time."""

    def run(answer: Any) -> None:
        begun = time.process_time()
        with bench.peak() as risen:
            found = action()
        answer.send((found, risen[0], time.process_time() - begun))

    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.poll(300)
    answer = ours.recv()
    process.join()
    return answer


@pytest.mark.parametrize("name", pickles._HARMLESS | pickles._HARMFUL)
def test_file_made_to_harm_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    data = (pickles._HARMLESS | pickles._HARMFUL)[name]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data if isinstance(data, bytes) else data())

    def read() -> list[str]:
        refused = []
        for exact in (True, False):
            try:
                Counted(path).open(exact)
            except CheckpointError as error:
                refused.append(str(error))
        return refused

    refused, megabytes, _ = in_a_process(read)
    assert megabytes < 300
    assert len(refused) == 2 or name in pickles._HARMLESS
    assert all(str(path) in text and text.isprintable() for text in refused)


def test_gadgets_called_in_every_way_are_refused_and_not_run(tmp_path: Path) -> None:
    path, accepted, tried = tmp_path / "pytorch_model.bin", [], 0
    for name, data in pickles._evil(tmp_path):
        path.write_bytes(data)
        tried += 1
        try:
            Counted(path).open()
            accepted.append(name)
        except CheckpointError:
            pass
        assert not (tmp_path / "canary").exists(), name
    assert accepted == []
    assert tried > 300


def program(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


MUCH = 5_900_000
LONG_LIST = b"](](X\x01\0\0\0wNeq\x00" + b"h\x00" * 1_000_000 + b"eq\x01"
LONG_TUPLE = b"((" + b"K\x01" * 1_000_000 + b"tq\x00"
COLLIDING = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(100_000))
KEPT = b"".join(b"M\xff\xffr" + n.to_bytes(4, "little") for n in range(MUCH // 2))
HEAVY = {
    "lists": b"(" + b"]" * MUCH + b"t",
    "numbers": b"](" + b"J\xff\xff\xff\x00" * MUCH + b"e",
    "numbers that are kept": b"](" + KEPT + b"e",
    "maps of one": b"](" + b"}K\x01Ns" * (MUCH // 4) + b"e",
    "tuples in tuples": b")" + b"\x85" * MUCH,
    "strings": b"](" + b"X\x04\0\0\0\xf0\x9f\x98\x80" * (MUCH // 2) + b"e",
    "large numbers as keys": b"}(" + COLLIDING + b"u",
    "one list made a map again and again": LONG_LIST + b"ccollections\nOrderedDict\nh\x01\x85R" * 100_000,
    "one tuple as arguments again and again": LONG_TUPLE + b"ctorch\nSize\nh\x00R" * 100_000,
    "one far memo": b"}r\xff\xff\xff\x7f",
    "deep": b"(" * 1000,
}


@pytest.mark.parametrize("kind", HEAVY)
def test_program_that_makes_work_is_refused_in_bounded_time_and_memory(kind: str) -> None:
    data = program(HEAVY[kind])

    def refused() -> str:
        try:
            torch_program.Program(data[: torch_program.MAX_PROGRAM_BYTES])
        except Exception as error:
            return str(error)
        return ""

    said, megabytes, seconds = in_a_process(refused)
    print(kind, said, f"{megabytes:.0f} MB, {seconds:.1f} s")
    assert said
    assert megabytes < 300
    assert seconds < 15


NO_TORCH = """
import os, sys
sys.modules["torch"] = None
from shardkit.formats.ranged import RangedFile
from shardkit.formats.strided import read_strided
from shardkit.formats.torch_file import read_torch_file
assert "numpy" not in sys.modules
path = sys.argv[1]
file = open(path, "rb")
read = lambda ranges: [os.pread(file.fileno(), n, at) for at, n in ranges]
found = read_torch_file(RangedFile(read, os.path.getsize(path), path), "w")
assert "numpy" not in sys.modules
(tensor,) = found.tensors
print(b"".join(map(bytes, read_strided(path, tensor.offset, tensor.layout, 0, tensor.nbytes))).hex())
"""


@FORMATS
def test_torch_is_not_needed(zipped: bool, tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0).view(2, 3).t()}
    path = save(state, tmp_path / "pytorch_model.bin", zipped)
    done = subprocess.run([sys.executable, "-c", NO_TORCH, path], check=True, capture_output=True, text=True)
    assert bytes.fromhex(done.stdout) == raw(state["w"])
