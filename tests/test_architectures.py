"""What a model gets from a copy is what it gets from the source, over many architectures, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shardkit import shard_checkpoint
from shardkit.plan.plan import Strategy
from tests.architectures import NAMES, make_model
from tests.torch_files import same

LAYOUTS: dict[str, Strategy] = {"one file": "balanced", "sharded": "layer", "pickle": "size"}


def saved(model: Any, layout: str, folder: Path) -> Path:
    if layout == "pickle":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="30KB" if layout == "sharded" else "1GB")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_model_gets_from_every_layout_what_the_source_gives_it(name: str, dtype: str, tmp_path: Path) -> None:
    model = make_model(name, dtype)
    expected = None
    for layout, strategy in LAYOUTS.items():
        source = saved(model, layout, tmp_path / layout)
        out = tmp_path / f"{layout} sharded"
        report = shard_checkpoint(source, out, max_shard_size="50KB", strategy=strategy)
        assert report.verification is not None
        keys = report.verification.model
        assert keys is not None
        assert (keys.why_unchecked, keys.differences, keys.model) == ("", (), name)
        if expected is None:
            expected = type(model).from_pretrained(source).state_dict()
        found = type(model).from_pretrained(out).state_dict()
        assert found.keys() == expected.keys()
        assert [key for key in expected if not same(found[key], expected[key])] == []
