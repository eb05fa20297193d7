"""Into every shard goes what a file's metadata says of the checkpoint, not what it says of that file."""

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from shardkit import shard_checkpoint

TITLE = {"format": "pt", "modelspec.title": "a model", "ss_sd_model_hash": "1f", "ss_batch_size": "4"}


def sharded(folder: Path, *files: dict[str, str] | None) -> tuple[dict[str, str], str]:
    """Write a file for each metadata, shard them; return what each shard says, and the report."""
    (folder / "source").mkdir()
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for number, (name, metadata) in enumerate(zip(names, files, strict=True)):
        save_file(
            {f"t{number}": torch.ones(100), f"u{number}": torch.ones(100)}, folder / "source" / name, metadata
        )
    weight_map = ",".join(f'"{t}{n}": "{name}"' for n, name in enumerate(names) for t in "tu")
    (folder / "source" / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    report = shard_checkpoint(folder / "source", folder / "out", max_shard_size=700)
    found = []
    for path in sorted((folder / "out").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as shard:
            found.append(shard.metadata())
    assert len(found) == 2 * len(files)
    assert all(metadata == found[0] for metadata in found)
    return found[0], str(report)


def test_what_all_files_agree_on_is_kept(tmp_path: Path) -> None:
    metadata, report = sharded(tmp_path, TITLE, None, TITLE)
    assert metadata == TITLE
    assert "metadata" not in report


def test_what_files_differ_in_is_left_out_and_named(tmp_path: Path) -> None:
    of_one = {"step": "1", "host": "a"}
    metadata, report = sharded(tmp_path, TITLE | of_one, TITLE | {"step": "2"})
    assert metadata == TITLE
    assert "metadata that describes individual files of the source is not copied: step, host" in report


def test_files_that_differ_in_their_format_leave_the_usual_one(tmp_path: Path) -> None:
    assert sharded(tmp_path, {"format": "np"}, {"format": "mlx"})[0] == {"format": "pt"}


OF_A_FILE = "total_size size sha256 model_hash modelspec.hash_sha256 sshs_model_hash MD5 checksum shard "
OF_A_FILE += "shard_index num_shards part part_number filename etag data_offsets DCP_SHARDING_INFO"


@pytest.mark.parametrize("key", OF_A_FILE.split())
def test_what_can_only_be_of_one_file_is_left_out_of_the_only_file_too(key: str, tmp_path: Path) -> None:
    metadata, report = sharded(tmp_path, TITLE | {key: "1"})
    assert metadata == TITLE
    assert key in report


@pytest.mark.parametrize(
    "key", ["modelspec.author", "ss_new_sd_model_hash", "total_parameters", "metagenome", "rank"]
)
def test_what_describes_the_model_is_kept(key: str, tmp_path: Path) -> None:
    assert sharded(tmp_path, TITLE | {key: "1"})[0] == TITLE | {key: "1"}


def test_name_of_a_tied_tensor_is_kept_though_one_file_has_it(tmp_path: Path) -> None:
    metadata, _ = sharded(tmp_path, {"format": "pt", "head": "u0"}, {"format": "pt"})
    assert metadata == {"format": "pt", "head": "u0"}
