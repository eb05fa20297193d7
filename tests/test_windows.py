"""On Windows, played by taking away what its Python lacks, checkpoints are planned, sharded, verified."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardkit import shard_checkpoint, verify_checkpoint
from shardkit.errors import Cancelled
from tests.support import read_checkpoint

LIMIT = "40KB"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    # LF bytes all over: written as text, they would not survive.
    tensors = {
        f"model.layers.{i}.w": torch.full((64, 64), 0x0A0A0A0A + i, dtype=torch.int32) for i in range(3)
    }
    tensors["model.norm.w"] = torch.randn(100, 90)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}\n'
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_bytes(b"a\nb\r\n")
    return folder


def on_windows(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.windows", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_checkpoint_is_inspected_and_planned(source: Path) -> None:
    assert "tensors" in on_windows("inspect", source)
    assert "model-00001-of-" in on_windows("plan", source, "--max-shard-size", LIMIT)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_checkpoint_is_sharded_resumed_replaced_and_verified(
    dtype: str | None, source: Path, tmp_path: Path
) -> None:
    out, cast = tmp_path / "out", ["--dtype", dtype] if dtype else []
    shard = ["shard", source, out, "--max-shard-size", LIMIT, *cast]
    with pytest.raises(Cancelled):
        shard_checkpoint(
            source, out, max_shard_size=LIMIT, dtype=dtype, workers=1,
            progress=lambda progress: progress.done_bytes < 30_000,
        )  # fmt: skip
    told = on_windows(*shard)
    assert "reused" in told
    assert "this system does not show whether files were in memory" in told
    on_windows("--unasked", *shard, "--overwrite", "--no-resume")
    assert "equal" in on_windows("--unasked", "verify", source, out)
    assert verify_checkpoint(source, out).equal
    assert [path.name for path in tmp_path.iterdir() if "shardkit" in path.name] == []
    assert (out / "tokenizer" / "vocab.txt").read_bytes() == b"a\nb\r\n"
    if not dtype:
        assert read_checkpoint(out) == read_checkpoint(source)
    empty = tmp_path / "empty"
    empty.mkdir()
    on_windows("--unasked", "shard", source, empty, "--max-shard-size", "1GB")
    assert verify_checkpoint(source, empty).equal
