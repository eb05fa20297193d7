"""The article's stack, made once, whole or absent, of its own packages and our torch alone; and its clock.

The stack's packages are stand-ins here, in a folder that pip takes for an index; notebook 04
makes the real ones.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from shardkit.base.errors import MeasurementError
from shardkit.cli import run
from shardkit.measure import article_stack as stacks
from shardkit.measure.article_clock import article_table, clock_from_hub
from shardkit.measure.article_stack import article_stack

MODULES = {
    "transformers": ("4.37.2", "AutoModelForCausalLM = None"),
    "accelerate": ("0.26.1", "Requires-Dist: torch"),  # of which there is no wheel here
    "numpy": ("1.26.4", "ndarray = number = bool_ = object_ = object"),  # as much as torch's import asks for
    "huggingface_hub": ("0.20.3", ""),
    "psutil": ("5.9.8", ""),
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels; there is nothing else to install from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, (version, more) in MODULES.items():
        info, code = f"{name}-{version}.dist-info", f"__version__ = {version!r}\n"
        required = f"{more}\n" if more.startswith("Requires") else ""
        with ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", code if required else code + more)
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}"
            wheel.writestr(f"{info}/METADATA", about)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def seen_by(python):
    """Return versions and places of what an interpreter imports, and what it does not find."""
    code = (
        "import importlib.util, json, torch, transformers; find = importlib.util.find_spec\n"
        "others = [name for name in ('matplotlib', 'pandas', 'safetensors') if find(name)]\n"
        "print(json.dumps([transformers.__version__, transformers.__file__, torch.__version__, others]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def beside(folder):
    return {path.name for path in folder.parent.iterdir()} - {"wheels", f".{folder.name}.lock"}


@pytest.mark.usefixtures("index")
def test_it_has_its_own_transformers_and_our_torch_and_is_made_once(tmp_path, monkeypatch, capsys):
    place = tmp_path / "stack"
    with ThreadPoolExecutor(2) as two_at_once:
        python, same = two_at_once.map(article_stack, [place, place])
    assert python == same
    version, file, torchs, others = seen_by(python)
    assert (version, torchs, others) == ("4.37.2", torch.__version__, [])
    assert Path(file).is_relative_to(place)
    assert beside(place) == {"stack"}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)
        run(["stack", "--folder", str(place)])
    run(["stack", "--folder", str(place), "--remove"])
    run(["stack", "--folder", str(place), "--remove"])
    assert capsys.readouterr().out == f"{python}\nremoved {place}\nnothing to remove\n"
    assert not place.exists()
    assert Path(torch.__file__).exists()


@pytest.mark.usefixtures("index")
def test_another_torch_makes_it_again(tmp_path):
    place = tmp_path / "stack"
    article_stack(place)
    mark = place / stacks._MARK
    mark.write_text(mark.read_text().replace(torch.__version__, "2.0"))
    article_stack(place)
    assert torch.__version__ in mark.read_text()


def test_one_that_could_not_be_made_is_absent_and_says_why_in_one_line(index, tmp_path):
    next(index.glob("accelerate*")).unlink()
    with pytest.raises(MeasurementError, match=r"could not be installed: .*accelerate==0\.26\.1.*") as caught:
        article_stack(tmp_path / "stack")
    assert "\n" not in str(caught.value)
    assert beside(tmp_path / "stack") == set()


def test_without_a_network_it_says_so(index, tmp_path, monkeypatch):
    for name, value in {"NO_INDEX": "0", "INDEX_URL": "http://127.0.0.1:9", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv(f"UV_{name}", value)
    next(index.glob("transformers*")).unlink()
    with pytest.raises(MeasurementError, match="has to be downloaded once, and the package index cannot be"):
        article_stack(tmp_path / "stack")


def test_by_default_it_is_among_the_assets_of_the_hubs_client(tmp_path):
    command = [sys.executable, "-m", "shardkit", "stack", "--remove"]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n"), done.stderr
    assert list(tmp_path.glob("assets/shardkit/stacks/2024"))


def test_a_newer_python_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "_NEWEST_PYTHON", (3, 10))
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(MeasurementError, match=rf"no packages for Python {here}: .* with Python 3\.10"):
        article_stack(tmp_path / "stack")


@pytest.mark.parametrize("do", [article_stack, stacks.remove_article_stack])
def test_a_folder_of_anything_else_is_left_alone(do, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(MeasurementError, match="is not a 2024 stack, so it is left alone"):
        do(tmp_path)
    assert (tmp_path / "mine").exists()


@pytest.mark.slow
def test_the_articles_clock_includes_the_download(hub, demo):
    hub.add_model("org/demo", demo)
    hub.bytes_a_second = 10_000_000  # of 20 MB
    found = clock_from_hub("org/demo", dtype="bfloat16")
    assert found.wall_seconds - found.load_wall_seconds > 1
    assert 0 < found.download_share < 1
    assert found.load_cpu_seconds > 0
    ratios = article_table({"original": found, "sharded": found})["ratio"]
    assert list(ratios) == ["1.93", "1.20", "1.00", "1.00", "1.00", "1.00"]
    with pytest.raises(MeasurementError, match=r"org/none could not be loaded from the Hub: .*"):
        clock_from_hub("org/none", dtype="bfloat16")
