"""Light to install: the engine runs on the base dependencies alone, and names what is missing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.fake_loads import fake_comparison

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BOUNDS = [*PROJECT["dependencies"], *EXTRAS["load"], *EXTRAS["notebook"], *EXTRAS["cluster"]]
# What `pip install shardkit` has to run: the command line and all that its engine is made of.
ROOMS = ("base", "formats", "sources", "checkpoint", "plan", "shard")
ENGINE = ("__*__.py", "cli/*.py", "demo/*.py", "show/progress.py", *(f"{room}/*.py" for room in ROOMS))
OF_A_HOST = {"kaggle_secrets", "kagglehub", "google", "IPython"}  # imported where a notebook has them


def names(requirements):
    """Return the names of distributions, those of extras of our own spelled out."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            found |= {name for extra in requirement.extras for name in names(EXTRAS[extra])}
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imported(*patterns):
    """Return the distributions that files of the package import, late ones too, but not for types alone."""
    seen = set()
    files = {path for pattern in patterns for path in (ROOT / "shardkit").glob(pattern)}
    assert files
    for path in files:
        waiting = [ast.parse(path.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.Import):
                seen |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                seen.add(node.module.partition(".")[0])
            waiting += ast.iter_child_nodes(node)
    of = packages_distributions()
    others = seen - {"shardkit", *sys.stdlib_module_names} - OF_A_HOST
    return {canonicalize_name(of[module][0]) for module in others}


def test_base_dependencies_are_what_the_engine_imports_and_nothing_else():
    # Transformers is asked, and a bucket reached, where that is installed.
    may_be_there = names(EXTRAS["load"]) | names(EXTRAS["cluster"])
    assert imported(*ENGINE) - may_be_there == names(PROJECT["dependencies"])


def test_every_package_that_is_imported_is_in_an_extra():
    given = names(PROJECT["dependencies"]) | names(EXTRAS["notebook"]) | names(EXTRAS["cluster"])
    assert imported("**/*.py") <= given
    # Not imported by name: the kernel of notebooks, what runs them in batches, fsspec's way to S3, and dask,
    # of which distributed is the part that is.
    assert given - imported("**/*.py") == {"dask", "ipykernel", "papermill", "s3fs"}


def test_nothing_is_pinned_where_a_host_brings_its_own():
    for requirement in map(Requirement, BOUNDS):
        assert re.fullmatch(r"(>=[\d.]+)?", str(requirement.specifier)), requirement


def test_versions_for_development_are_within_the_bounds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version for name, version in re.findall(r"(.+)==(.+)", "\n".join(lines))
    }
    for requirement in map(Requirement, BOUNDS):
        if requirement.name != PROJECT["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def closure(requirements):
    """Return the distributions that pip would install for some requirements, as they are installed here."""
    found, waiting = {}, [*map(Requirement, requirements)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        is_meant = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if is_meant and name not in found:
            found[name] = distribution(name)
            waiting += map(Requirement, found[name].requires or [])
    return found


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Variables of an environment that holds what `pip install shardkit` brings; run Python in it with -S."""
    folder = tmp_path_factory.mktemp("light")
    for found in closure(PROJECT["dependencies"]).values():
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(found.locate_file(top))
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def run(light, *arguments):
    # Not -I, which would not see PYTHONPATH; -P, lest the folder of these tests is on the path.
    command = [sys.executable, "-S", "-P", *map(str, arguments)]
    return subprocess.run(command, env=light, capture_output=True, text=True)


def test_engine_does_all_its_work_on_the_base_dependencies(light, tmp_path):
    done = run(light, "-m", "tests.light_engine", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert "the engine needs nothing else" in done.stdout


def test_base_dependencies_are_small():
    files = [
        found.locate_file(file) for found in closure(PROJECT["dependencies"]).values() for file in found.files
    ]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 150e6


MISSING = {
    "ShardApp()": ("ipywidgets and matplotlib", "notebook"),
    "load_model(model)": ("torch and transformers", "load"),
    "measure_load(model)": ("memory_profiler, torch and transformers", "load"),
    "measure_load(model, python='/usr/bin/python3')": ("memory_profiler", "load"),
    "compare_loads(model, model)": ("memory_profiler, torch and transformers", "load"),
    "Comparison.load(result).to_frame()": ("pandas", "notebook"),
    "Comparison.load(result).plot()": ("matplotlib", "notebook"),
    "Comparison.load(result).save(result + '.html')": ("matplotlib", "notebook"),
    "merge_comparisons([result])": ("pandas", "notebook"),
    "read_results(results)": ("pandas", "notebook"),
    "plot_bars(Comparison.load(result))": ("matplotlib", "notebook"),
}
SAY = """
import sys
from shardkit import *
from shardkit.errors import ShardkitError
from shardkit.notebook import read_results
from shardkit.show.plots import plot_bars
results, model = sys.argv[1:]
result = results + "/comparison.json"
for line in sys.stdin:
    try:
        eval(line)
    except ShardkitError as error:
        print(*error._render_traceback_())
    else:
        print("no error")
"""


@pytest.fixture(scope="module")
def said(light, demo, tmp_path_factory):
    """What each call says without the extras, by call."""
    results = tmp_path_factory.mktemp("results")
    fake_comparison().save(results / "comparison.json")
    command = [sys.executable, "-S", "-P", "-c", SAY, str(results), str(demo)]
    done = subprocess.run(command, env=light, capture_output=True, text=True, input="\n".join(MISSING))
    assert done.returncode == 0, done.stderr
    return dict(zip(MISSING, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("call", MISSING)
def test_missing_package_is_one_line_that_names_the_extra(call, said):
    packages, extra = MISSING[call]
    verb = "are" if " and " in packages else "is"
    end = f' needs {packages}, which {verb} not installed: pip install "shardkit[{extra}]"'
    assert said[call].startswith("MissingPackageError: ")
    assert said[call].endswith(end)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["compare", "MODEL", "MODEL"], "load"),
        (["compare", "MODEL", "MODEL", "--plot", "picture.png"], "notebook"),
        (["compare", "MODEL", "MODEL", "--output", "card.html"], "notebook"),
    ],
)
def test_command_line_says_what_is_missing_in_one_line(arguments, extra, light, demo):
    told = [str(demo) if word == "MODEL" else word for word in arguments]
    done = run(light, "-m", "shardkit", *told)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf'shardkit: .* not installed: pip install "shardkit\[{extra}\]"\n', done.stderr)


def test_fit_says_what_is_missing_or_that_no_limit_can_be_set(light, demo):
    done = run(light, "-m", "shardkit", "fit", demo)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r'shardkit: (.* not installed: pip install "shardkit\[load\]"|no memory limit can be set.*)',
        done.stderr.splitlines()[-1],
    )
