"""Verification finds whatever differs, and nothing else; it does not care how the two sides are laid out."""

import errno
import json
import random
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardkit import (
    Checkpoint,
    Progress,
    Verification,
    make_demo_checkpoint,
    shard_checkpoint,
    verify_checkpoint,
)
from shardkit.base import pages
from shardkit.base.disk import DiskFile
from shardkit.errors import Cancelled, CheckpointError, VerificationError
from shardkit.sources.local import LocalFiles, WrittenFiles
from tests.support import (
    FreshFolder,
    Tensor,
    Tensors,
    checkpoints,
    data_offsets,
    safetensors_bytes,
    tensors,
    union,
    write_checkpoint,
)


def floats(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), struct.pack(f"<{len(values)}f", *values))


def put(folder: Path, made: Tensors) -> Path:
    return write_checkpoint(folder, [made])


def differing(found: Verification) -> list[str]:
    return [mismatch.tensor for mismatch in found.mismatches]


MADE: Tensors = {"a": floats(1, 2), "b": floats(3), "scalar": Tensor("F32", (), b"\0\0\x80?")}


@settings(max_examples=40)
@given(files=checkpoints(), data=st.data())
def test_checkpoint_equals_itself_in_any_layout(
    files: list[Tensors], data: st.DataObject, fresh_folder: FreshFolder
) -> None:
    made = union(files)
    shuffled = {name: made[name] for name in data.draw(st.permutations(list(made)))}
    with fresh_folder() as folder:
        one, other = write_checkpoint(folder / "one", files), put(folder / "other", shuffled)
        found = verify_checkpoint(one, other, workers=2)
        back = verify_checkpoint(other, one, workers=1)
    assert found.equal
    assert back.equal
    assert (found.tensors, found.nbytes) == (len(made), sum(len(t.data) for t in made.values()))
    assert found.digests == back.digests
    assert found.digests.keys() == made.keys()


@settings(max_examples=60)
@given(made=tensors(max_size=30), data=st.data(), side=st.sampled_from(["source", "destination"]))
def test_one_flipped_bit_on_either_side_is_found_with_its_tensor(
    made: Tensors, data: st.DataObject, side: str, fresh_folder: FreshFolder
) -> None:
    names = [name for name, tensor in made.items() if tensor.data]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    place = data.draw(st.integers(0, 8 * len(made[name].data) - 1))
    with fresh_folder() as folder:
        put(folder / "source", made)
        shard_checkpoint(folder / "source", folder / "destination", max_shard_size=3000, verify=False)
        (path,) = (p for p in (folder / side).glob("*.safetensors") if name in data_offsets(p))
        raw = bytearray(path.read_bytes())
        raw[data_offsets(path)[name] + place // 8] ^= 1 << place % 8
        path.write_bytes(raw)
        found = verify_checkpoint(folder / "source", folder / "destination", workers=2)
    assert not found.equal
    assert differing(found) == [name]
    assert "bytes" in found.mismatches[0].reason
    assert (found.missing, found.extra) == ((), ())


def test_large_tensor_is_read_to_its_last_bit(tmp_path: Path) -> None:
    made = {"large": Tensor("U8", (3_333_333,), bytes(3_333_333))}
    flipped = {"large": made["large"]._replace(data=bytes(3_333_332) + b"\1")}
    assert not verify_checkpoint(put(tmp_path / "a", made), put(tmp_path / "b", flipped)).equal


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in MADE.items() if key != name}


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    ours, theirs = put(tmp_path / "ours", without("a")), put(tmp_path / "theirs", without("b"))
    found = verify_checkpoint(ours, theirs)
    assert not found.equal
    assert (found.missing, found.extra, found.mismatches) == (("b",), ("a",), ())
    assert "NOT EQUAL" in str(found)


def test_renamed_tensor_is_missing_and_extra(tmp_path: Path) -> None:
    renamed = {("A" if name == "a" else name): tensor for name, tensor in MADE.items()}
    found = verify_checkpoint(put(tmp_path / "ours", MADE), put(tmp_path / "theirs", renamed))
    assert (found.missing, found.extra) == (("a",), ("A",))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (MADE["a"]._replace(shape=(2, 1)), ["shape", "[2]", "[2, 1]"]),
        (MADE["a"]._replace(dtype="I32"), ["dtype", "float32", "int32"]),
        (Tensor("I64", (2,), bytes(16)), ["dtype", "float32", "int64"]),
        (floats(2, 1), ["bytes"]),
        (floats(1, -2), ["bytes"]),
    ],
)
def test_tensor_that_differs_is_named_with_the_way_it_differs(
    changed: Tensor, words: list[str], tmp_path: Path
) -> None:
    ours, theirs = put(tmp_path / "ours", MADE), put(tmp_path / "theirs", MADE | {"a": changed})
    for found in (verify_checkpoint(ours, theirs), verify_checkpoint(theirs, ours)):
        assert differing(found) == ["a"]
        assert [word for word in words if word not in found.mismatches[0].reason] == []
        assert found.mismatches[0].reason in str(found)


def test_zero_and_minus_zero_differ_and_a_nan_equals_itself(tmp_path: Path) -> None:
    ours = put(tmp_path / "ours", {"zero": floats(0.0), "nan": floats(float("nan"))})
    theirs = put(tmp_path / "theirs", {"zero": floats(-0.0), "nan": floats(float("nan"))})
    assert differing(verify_checkpoint(ours, theirs)) == ["zero"]


def test_swapped_tensors_of_one_size_are_both_found(tmp_path: Path) -> None:
    ours = put(tmp_path / "ours", {"a": floats(1), "b": floats(2)})
    theirs = put(tmp_path / "theirs", {"a": floats(2), "b": floats(1)})
    assert differing(verify_checkpoint(ours, theirs)) == ["a", "b"]


def test_formats_do_not_matter(tmp_path: Path) -> None:
    state = {"w": torch.randn(7, 5), "n": torch.arange(3), "b": torch.tensor(True)}
    folders = [tmp_path / name for name in ("safetensors", "zip", "legacy")]
    for folder in folders:
        folder.mkdir()
    save_file(state, folders[0] / "model.safetensors")
    torch.save(state, folders[1] / "pytorch_model.bin")
    torch.save(state, folders[2] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    digests = [verify_checkpoint(a, b).digests for a in folders for b in folders]
    assert all(verify_checkpoint(a, b).equal for a in folders for b in folders)
    assert all(digest == digests[0] for digest in digests)


def cast_pair(tmp_path: Path, dtype: str) -> tuple[Path, Path]:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {f"t{i}": torch.randn(333, generator=generator) for i in range(4)} | {"n": torch.arange(5)}
    save_file(state, source / "model.safetensors")
    shard_checkpoint(source, destination, max_shard_size=1000, dtype=dtype, verify=False)
    return source, destination


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_is_proved_from_the_source(dtype: str, tmp_path: Path) -> None:
    found = verify_checkpoint(*cast_pair(tmp_path, dtype))
    assert found.equal
    assert (found.tensors, found.cast) == (5, 4)
    assert "4 tensors compared with the cast computed again" in str(found)


def test_copy_given_before_its_source_gets_a_hint(tmp_path: Path) -> None:
    source, destination = cast_pair(tmp_path, "bfloat16")
    found = verify_checkpoint(destination, source)
    assert not found.equal
    assert "swap them" in str(found)


def test_damage_after_a_cast_names_its_file_and_gives_no_such_hint(tmp_path: Path) -> None:
    source, destination = cast_pair(tmp_path, "bfloat16")
    file = sorted(destination.glob("*.safetensors"))[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    found = str(verify_checkpoint(source, destination))
    assert f"in {file.name}" in found
    assert "swap them" not in found


@pytest.mark.parametrize("place", [0, 1, 300, -1])
def test_one_flipped_bit_after_a_cast_is_found(place: int, tmp_path: Path) -> None:
    source, destination = cast_pair(tmp_path, "bfloat16")
    (path,) = (p for p in destination.glob("*.safetensors") if "t2" in data_offsets(p))
    raw = bytearray(path.read_bytes())
    raw[data_offsets(path)["t2"] + place if place >= 0 else place] ^= 1
    path.write_bytes(raw)
    found = verify_checkpoint(source, destination)
    expected = "t2" if place >= 0 else max(data_offsets(path), key=data_offsets(path).__getitem__)
    assert differing(found) == [expected]


def test_rounding_another_way_is_not_taken_for_the_cast(tmp_path: Path) -> None:
    source = put(tmp_path / "source", {"w": floats(1 / 3)})
    (bits,) = struct.unpack("<I", struct.pack("<f", 1 / 3))
    cut = Tensor("BF16", (1,), struct.pack("<H", bits >> 16))  # truncated, where torch rounds to nearest
    assert not verify_checkpoint(source, put(tmp_path / "destination", {"w": cut})).equal


def test_cast_to_integers_is_no_cast(tmp_path: Path) -> None:
    source = put(tmp_path / "source", {"w": floats(1, 2)})
    destination = put(tmp_path / "destination", {"w": Tensor("I16", (2,), struct.pack("<2h", 1, 2))})
    assert "dtype" in verify_checkpoint(source, destination).mismatches[0].reason


def test_open_checkpoints_are_as_good_as_paths(tmp_path: Path) -> None:
    folder = put(tmp_path / "ours", MADE)
    assert verify_checkpoint(Checkpoint.open(folder), folder / "model.safetensors").equal


def test_verification_can_be_stopped(tmp_path: Path) -> None:
    folder = put(tmp_path / "ours", MADE)
    with pytest.raises(Cancelled, match="verify"):
        verify_checkpoint(folder, folder, progress=lambda _: False)


def test_progress_of_a_verification_counts_both_sides(tmp_path: Path) -> None:
    seen: list[Progress] = []
    folder = put(tmp_path / "ours", MADE)
    verify_checkpoint(folder, folder, progress=seen.append)
    assert [step for step in seen if step.stage == "verify"][-1] == Progress("verify", 32, 32)


def test_empty_checkpoints_are_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(safetensors_bytes({}))
    assert verify_checkpoint(tmp_path / "a", tmp_path / "b").equal


def test_finding_survives_json(tmp_path: Path) -> None:
    ours, theirs = put(tmp_path / "ours", MADE), put(tmp_path / "theirs", without("a") | {"b": floats(4)})
    found = verify_checkpoint(ours, theirs)
    assert found.mismatches
    assert Verification.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_file_that_the_source_names_and_the_copy_lacks_is_missing(tmp_path: Path) -> None:
    model = {"model.safetensors": safetensors_bytes({"w": Tensor("F32", (1,), b"abcd")})}
    own = {"auto_map": {"AutoModel": "modeling_own.Own"}, "voices": "spk_dict.pt"}
    documents = {
        "config.json": own,
        "modules.json": [{"path": "1_Dense"}],
        "tokenizer_config.json": {"f": "v.txt"},
    }
    needed = ["modeling_own.py", "spk_dict.pt", "1_Dense/model.safetensors", "v.txt"]
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        files = {**model, **{name: json.dumps(document).encode() for name, document in documents.items()}}
        for name, content in {**files, **dict.fromkeys(needed, b"x"), "README.md": b"card"}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (copy / "README.md").unlink()
    assert verify_checkpoint(source, copy).equal
    for name in needed:
        (copy / name).unlink()
    found = verify_checkpoint(source, copy)
    assert (found.equal, sorted(found.missing_files)) == (False, sorted(needed))
    assert "missing files" in str(found)


CHANGES = {
    "heads": ({"num_attention_heads": 8}, "config num_attention_heads is 4, but 8 in the copy"),
    "epsilon": ({"rms_norm_eps": 1e-3}, "config rms_norm_eps is"),
    "tying": ({"tie_word_embeddings": True}, "config tie_word_embeddings is"),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from tests.architectures import make_model

    make_model("LlamaForCausalLM").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", CHANGES)
def test_config_of_another_model_is_not_equal_though_all_shapes_are(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    changes, words = CHANGES[kind]
    shutil.copytree(llama, tmp_path / "copy")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, **changes, "_name_or_path": "x"}))
    found = verify_checkpoint(llama, tmp_path / "copy")
    assert not found.equal
    assert found.model is not None
    assert [text for text in found.model.differences if words in text]
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0"}))
    assert verify_checkpoint(llama, tmp_path / "copy").equal


def test_files_that_a_load_looks_for_are_compared(llama: Path, tmp_path: Path) -> None:
    (llama / "modeling_own.py").write_text("a = 1")
    (llama / "2_Dense").mkdir()
    save_file({"w": torch.ones(2)}, llama / "2_Dense" / "model.safetensors")
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    (copy / "README.md").write_text("another card")
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**generation, "transformers_version": "4"}))
    assert verify_checkpoint(llama, copy).equal
    (copy / "modeling_own.py").write_text("a = 2")
    save_file({"w": torch.zeros(2)}, copy / "2_Dense" / "model.safetensors")
    (copy / "generation_config.json").write_text('{"do_sample": true}')
    found = verify_checkpoint(llama, copy)
    assert sorted(found.changed_files) == [
        "2_Dense/model.safetensors",
        "generation_config.json",
        "modeling_own.py",
    ]
    (copy / "config.json").unlink()
    found = verify_checkpoint(llama, copy)
    assert (found.equal, found.missing_files) == (False, ("config.json",))


def test_copy_that_a_load_would_take_in_another_dtype_is_not_equal(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    found = verify_checkpoint(llama, copy)
    assert not found.equal
    assert "a load chooses float32, but float16 for the copy" in str(found)


def test_config_that_chooses_another_dtype_than_that_of_the_cast_is_found(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    make_demo_checkpoint(demo, size="6MB")
    shard_checkpoint(demo, tmp_path / "copy", dtype="float16")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    for key, wrong in (("torch_dtype", "float32"), ("torch_dtype", "float16")):
        (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, key: wrong}))
        found = verify_checkpoint(demo, tmp_path / "copy")
        assert found.equal == (wrong == "float16")
        assert (
            "a load chooses float32 for the copy, which is stored in float16" in str(found)
        ) != found.equal


MIB = 1 << 20
BYTES = random.Random(0).randbytes(3 * MIB + 1234)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("written") / "file"
    file.write_bytes(BYTES)
    return file


def joined(pieces: Iterable[memoryview]) -> bytes:
    return b"".join(map(bytes, pieces))  # each at once: the buffer is used again


@settings(max_examples=60)
@given(begin=st.integers(0, len(BYTES)), end=st.integers(0, len(BYTES)))
def test_range_past_the_page_cache_is_the_same(begin: int, end: int, written: Path) -> None:
    files = WrittenFiles(written.parent)
    pieces = [bytes(piece) for piece in files.read("file", begin, max(0, end - begin))]
    assert b"".join(pieces) == BYTES[begin:end]
    assert all(0 < len(piece) <= MIB for piece in pieces)


def test_what_is_read_past_the_page_cache_is_not_left_there(written: Path) -> None:
    if pages.drop([written]) != 0:
        pytest.skip("this file system keeps its pages, or does not show them")
    assert joined(WrittenFiles(written.parent).read("file", 5, 3 * MIB)) == BYTES[5 : 3 * MIB + 5]
    assert pages.resident_bytes([written]) == 0
    assert joined(LocalFiles(written.parent).read("file", 5, 3 * MIB)) == BYTES[5 : 3 * MIB + 5]
    assert pages.resident_bytes([written]) == len(BYTES)


@pytest.mark.parametrize("works", [0, 1, 2])
def test_disk_that_refuses_direct_reads_is_read_through_the_page_cache(
    works: int, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, asked = DiskFile.read_direct, []

    def refusing(file: DiskFile, buffer: memoryview, offset: int) -> int:
        asked.append(offset)
        if len(asked) > works:
            raise OSError(errno.EINVAL, "Invalid argument")
        return direct(file, buffer, offset)

    monkeypatch.setattr(DiskFile, "read_direct", refusing)
    assert joined(WrittenFiles(written.parent).read("file", 7, 3 * MIB)) == BYTES[7 : 3 * MIB + 7]
    assert len(asked) == works + 1


def test_end_of_a_file_before_the_end_of_a_range_is_an_error(written: Path) -> None:
    pieces = WrittenFiles(written.parent).read("file", 100, len(BYTES))
    with pytest.raises(CheckpointError, match=f"ends at byte {len(BYTES)}, but its data extends to byte"):
        print(sum(map(len, pieces)))


def test_shards_that_a_load_would_take_in_another_dtype_are_refused_with_what_to_do(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2000).half(), "b.weight": torch.ones(9000)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    (tmp_path / "source/config.json").write_text('{"hidden_size": 90}')  # names no model, so gets no dtype
    loads = "a load chooses float16, but float32 for the copy: request a dtype"
    with pytest.raises(VerificationError, match=f"not published: {loads}\n"):
        shard_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size="38KB")
