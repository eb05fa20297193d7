"""The examples of the public functions are run, and the quick start of the package; loads are stand-ins."""

import doctest
import inspect
import re
import shutil
from pathlib import Path
from textwrap import dedent

import pytest

import shardkit
from shardkit import Checkpoint, make_demo_checkpoint, shard_checkpoint
from shardkit.compare import experiment, fit
from shardkit.measure import launch
from tests.fake_loads import fake_comparison, fake_load
from tests.loopback_hub import LoopbackHub

FUNCTIONS = {name: value for name in shardkit.__all__ if inspect.isfunction(value := getattr(shardkit, name))}
DOCUMENTED = {**FUNCTIONS, "Checkpoint.open": Checkpoint.open, "Checkpoint.estimate": Checkpoint.estimate}
EXAMPLES = {**DOCUMENTED, "ProgressBar": shardkit.ProgressBar}
ON_THE_HUB = ("push_checkpoint", "shard_on_hub")
INSTALLS = "article_stack"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make_demo_checkpoint(folder / "mistral-demo", size="5MB")
    shard_checkpoint(folder / "mistral-demo", folder / "sharded", max_shard_size="3MB", verify=False)
    fake_comparison().save(folder / "comparison.json")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that examples name, where no load takes seconds."""
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    def load(source: object, spec: launch.LoadSpec, **_: object) -> object:
        fits = (spec.memory_limit_bytes or 10**12) > 300_000_000
        return fake_load(source=str(source), dtype=spec.dtype, outcome="ok" if fits else "killed")

    for module in (launch, experiment, fit):
        monkeypatch.setattr(module, "run_load", load)
    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    return tmp_path / "here"


def run(text: str, name: str) -> None:
    names = {public: getattr(shardkit, public) for public in shardkit.__all__}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert said == []


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {*ON_THE_HUB, INSTALLS}))
@pytest.mark.usefixtures("here")
def test_example_says_what_is_true(name: str) -> None:
    run(inspect.getdoc(EXAMPLES[name]) or "", name)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_example_of_the_hub_says_what_is_true(name: str, here: Path, hub: LoopbackHub) -> None:
    hub.add_model("me/mistral", here / "mistral-demo")
    run(inspect.getdoc(EXAMPLES[name]) or "", name)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_docstring_says_what_comes_back(name: str) -> None:
    assert re.search(r"^Returns\n-+\n\S", inspect.getdoc(DOCUMENTED[name]) or "", re.MULTILINE)


def test_quick_start_runs_as_it_stands(here: Path) -> None:
    block = re.search(r"\n\n((?: {4}.*\n|\n)+)", shardkit.__doc__ or "")
    assert block
    code = dedent(block[1]).strip()
    assert len(code.splitlines()) <= 9
    shutil.rmtree(here / "sharded")
    exec(code.replace("org/name", str(here / "mistral-demo")), {})
    assert Checkpoint.open(here / "sharded").dtypes.keys() == {"F16"}
