"""What a model gets from a copy, by transformers' own account, and that it is said where nobody was asked."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from shardkit import Checkpoint, Progress, shard_checkpoint, verify_checkpoint
from shardkit.base.pages import resident_bytes
from shardkit.checkpoint import asking
from shardkit.errors import Cancelled, VerificationError
from shardkit.load import seen
from shardkit.load.seen import ModelKeys
from shardkit.shard import verify
from tests.fake_loads import gone
from tests.loopback_hub import LoopbackHub
from tests.support import sparse_file
from tests.test_checkpoint import CONFIG, WEIGHTS, put

TinyModel = Callable[..., Any]


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model("gpt2", tie_word_embeddings=False).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def asked(source: Path, copy: Path) -> ModelKeys:
    with seen.model_keys(Checkpoint.open(source)) as ask:
        keys: ModelKeys = ask(Checkpoint.open(copy))()
    return keys


def changed(copy: Path, **changes: Any) -> None:
    path = copy / "model.safetensors"
    tensors = {
        name: tensor for name, tensor in load_file(path).items() if changes.get(name, tensor) is not None
    }
    save_file(
        {**tensors, **{name: t for name, t in changes.items() if t is not None}}, path, {"format": "pt"}
    )


@pytest.mark.asks_a_process
def test_process_of_its_own_says_that_a_copy_gives_a_model_every_key(source: Path, tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    report = shard_checkpoint(source, tmp_path / "out", max_shard_size="20KB")
    assert report.verification is not None
    keys = report.verification.model
    assert keys == ModelKeys("GPT2LMHeadModel", keys.stack if keys else "", 29)
    assert "GPT2LMHeadModel gets the same 29 keys (transformers " in str(report)
    assert report.to_dict()["verification"]["model"]["keys"] == 29
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


def test_key_that_only_the_source_gives_is_a_difference(source: Path, copy: Path) -> None:
    changed(copy, **{"transformer.h.1.ln_1.bias": None})
    found = verify_checkpoint(source, copy)
    assert found.model is not None
    assert found.model.differences == ("transformer.h.1.ln_1.bias is missing in the copy only",)
    assert not found.equal
    assert "DIFFERENT for GPT2LMHeadModel" in str(found)


def test_key_of_another_shape_is_a_difference(source: Path, copy: Path) -> None:
    changed(copy, **{"lm_head.weight": load_file(copy / "model.safetensors")["lm_head.weight"][:40].clone()})
    keys = asked(source, copy)
    assert [text for text in keys.differences if "lm_head.weight" in text and "mismatched" in text]


def test_config_of_another_model_is_a_difference_though_every_byte_is_equal(source: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    found = verify_checkpoint(source, copy)
    assert (found.mismatches, found.missing, found.extra, found.equal) == ((), (), (), False)


def test_copy_that_does_not_load_is_a_difference(source: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_head": 5}))
    assert "loads the source but not the copy: ValueError" in str(asked(source, copy))


def test_difference_is_not_published(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_model_keys", lambda *_: ModelKeys("M", "T", 2, differences=("w is missing",)))
    with pytest.raises(VerificationError, match=r"not published: all tensors are equal, but .*w is missing"):
        shard_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_key_that_neither_side_has_is_told_and_no_difference(source: Path, copy: Path) -> None:
    for folder in (source, copy):
        changed(folder, **{"lm_head.weight": None})
    keys = asked(source, copy)
    assert (keys.missing, keys.differences) == (("lm_head.weight",), ())
    assert "1 in neither (lm_head.weight)" in str(keys)


MODEL: dict[str, object] = {"model.safetensors": WEIGHTS}
UNCHECKED: dict[str, tuple[dict[str, object], str]] = {
    "no config": (MODEL, "no config.json"),
    "adapter": ({"adapter_model.safetensors": WEIGHTS, "adapter_config.json": {}}, "an adapter alone is no"),
    "code of its own": ({**MODEL, "config.json": {"architectures": ["Own"]}}, "Own is not a class of"),
    "no class": ({**MODEL, "config.json": {"a": 1}}, "config.json names no model class"),
    "damaged config": ({**MODEL, "config.json": {**CONFIG, "hidden_size": "x"}}, "does not load the source"),
}


@pytest.mark.parametrize("kind", UNCHECKED)
def test_what_could_not_be_asked_is_said_with_the_reason(kind: str, tmp_path: Path) -> None:
    files, reason = UNCHECKED[kind]
    report = shard_checkpoint(put(tmp_path / "source", files), tmp_path / "out")
    assert report.verification is not None
    assert reason in str(report.verification.model)
    assert f"not checked: {report.verification.model.why_unchecked}" in str(report)  # type: ignore[union-attr]


def test_absence_of_transformers_is_said(source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "find_spec", lambda _: None)
    assert asked(source, copy).why_unchecked == "transformers is not installed"


@pytest.mark.parametrize(("most", "first"), [(8_000_000_000, "asked"), (0, "copy")])
def test_process_is_started_before_a_short_copy_and_after_a_long_one(
    most: int, first: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, asked_here = [], asking.asked

    def asked() -> Any:
        events.append("asked")
        return asked_here()

    monkeypatch.setattr(asking, "asked", asked)
    monkeypatch.setattr(verify, "_SOON_BYTES", most)
    shard_checkpoint(source, tmp_path / "out", progress=lambda progress: events.append(progress.stage))
    assert (events[0], events.count("asked")) == (first, 1)
    assert events.index("asked") < events.index("verify")
    events.clear()
    shard_checkpoint(source, tmp_path / "unverified", verify=False)
    assert events == []


@pytest.mark.asks_a_process
def test_process_ends_with_whoever_was_to_ask_it() -> None:
    words = """
import os, psutil, signal
from shardkit.checkpoint.asking import asked
with asked():
    print(psutil.Process().children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert gone(int(killed.stdout), 3)


@pytest.mark.asks_a_process
def test_process_that_has_a_job_ends_with_whoever_waits_for_the_answer(tmp_path: Path) -> None:
    script, begun = tmp_path / "slow.py", tmp_path / "begun"
    script.write_text(f"""
import pathlib, time
from shardkit.load import look
def answer(job):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(60)
look.answer = answer
look.main()
""")
    words = f"""
import os, pathlib, psutil, signal, time
from shardkit.checkpoint import asking
asking._SCRIPT = {str(script)!r}
with asking.asked() as ask:
    ask({{}})
    print(psutil.Process().children()[0].pid, flush=True)
    while not pathlib.Path({str(begun)!r}).exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert begun.exists()
    assert gone(int(killed.stdout), 3)


@pytest.mark.asks_a_process
def test_copy_that_is_stopped_leaves_no_process(source: Path, tmp_path: Path) -> None:
    before, during = psutil.Process().children(recursive=True), []

    def stop(_: Progress) -> bool:
        during.extend(child for child in psutil.Process().children() if child not in before)
        return False

    with pytest.raises(Cancelled):
        shard_checkpoint(source, tmp_path / "out", progress=stop)
    assert len(during) == 1
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.asks_a_process
def test_model_without_end_is_given_up_and_its_process_ended(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (source, copy):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "n_layer": 10**9}))
    monkeypatch.setattr(asking, "_SECONDS", 20.0)
    monkeypatch.setattr(asking, "_MEMORY_BYTES", 1_500_000_000)
    before, start = psutil.Process().children(recursive=True), time.monotonic()
    keys = asked(source, copy)
    assert "no answer within 20 s" in keys.why_unchecked or "MemoryError" in keys.why_unchecked
    assert time.monotonic() - start < 40
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


@pytest.mark.asks_a_process
def test_process_that_dies_is_said(source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = copy.parent / "dies.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(asking, "_SCRIPT", script)
    assert asked(source, copy).why_unchecked == "the process that asks transformers ended with status 3"


@pytest.mark.parametrize("gigabytes", [4, 400])
def test_no_weights_are_read_for_the_answer(gigabytes: int, tmp_path: Path) -> None:
    from transformers import GPT2Config

    rows = gigabytes * 10**9 // 4 // 4096  # of a sparse file, and of more than any memory that could map it
    config = GPT2Config(n_layer=1, n_embd=4096, n_head=4, vocab_size=rows, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    sparse_file(file, {"transformer.wte.weight": (rows, 4096)}, "F32")
    keys = asked(tmp_path, tmp_path)
    assert keys.why_unchecked == ""
    assert "transformer.h.0.ln_1.weight" in keys.missing
    assert (resident_bytes([str(file)]) or 0) < 50_000_000


def test_streamed_copy_is_asked_about_with_the_tensors_that_the_hub_lists(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    hub.add_model("org/tiny", source)
    report = shard_checkpoint("org/tiny", tmp_path / "out", stream=True, max_shard_size="20KB")
    assert report.verification is not None
    assert report.verification.model is not None
    assert report.verification.model.keys == 29
