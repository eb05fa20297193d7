"""The same notebook on other hosts: badges, what the first cell installs, what Binder builds."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
STAMPED = ["pyproject.toml", "README.md", *(f"notebooks/{path.name}" for path in NOTEBOOKS)]


def stamp(root, *arguments):
    command = [sys.executable, root / "notebooks/badges.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """A copy of all that carries a stamp, and of the tool."""
    (tmp_path / "notebooks").mkdir()
    for name in (*STAMPED, "notebooks/badges.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_stamp_is_that_of_pyproject():
    done = stamp(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_stamping_another_repository_reaches_every_badge_and_every_install(copy):
    old = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert stamp(copy, "--repository", "some-one/other.name").returncode == 0
    assert stamp(copy, "--check").returncode == 0
    for name in STAMPED:
        text = (copy / name).read_text()
        assert old.removeprefix("https://github.com/") not in text
        assert "some-one/other.name" in text
        assert "puts links" not in text
    readme = (copy / "README.md").read_text()
    for link in (
        "https://colab.research.google.com/github/some-one/other.name/blob/main/notebooks/01_shard_and_compare.ipynb",
        "https://kaggle.com/kernels/welcome?src=https://github.com/some-one/other.name/blob/main/notebooks/01_shard_and_compare.ipynb",
        "https://mybinder.org/v2/gh/some-one/other.name/HEAD?labpath=notebooks%2F01_shard_and_compare.ipynb",
    ):
        assert f"]({link})" in readme
    assert "`git clone https://github.com/some-one/other.name`" in readme


def test_no_badge_leads_nowhere(copy):
    stamp(copy, "--repository", "your_name/shardkit")
    for name in STAMPED:
        text = (copy / name).read_text()
        assert "](https://colab." not in text
        assert "REPOSITORY=owner/name puts links" in text or name == "pyproject.toml"


def test_stamping_changes_nothing_but_stamps_and_can_be_undone(copy):
    before = {name: (copy / name).read_bytes() for name in STAMPED}
    repository = re.search(rb"github.com/([\w./-]+)\"", before["pyproject.toml"])[1].decode()
    stamp(copy, "--repository", "some-one/other")
    assert all((copy / name).read_bytes() != data for name, data in before.items())
    stamp(copy, "--repository", repository)
    assert {name: (copy / name).read_bytes() for name in STAMPED} == before


@pytest.mark.parametrize("name", [name for name in STAMPED if name != "pyproject.toml"])
def test_a_stamp_that_differs_is_named(copy, name):
    stamp(copy, "--repository", "some-one/other")
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace("mybinder.org/v2/gh/", "mybinder.org/v2/gh/stranger"))
    done = stamp(copy, "--check")
    assert done.returncode == 1
    assert name in done.stderr
    assert "make badges" in done.stderr


def test_what_is_no_repository_is_refused(copy):
    done = stamp(copy, "--repository", 'a/b"; import os')
    assert done.returncode == 1
    assert "owner/name" in done.stderr
    assert stamp(copy, "--check").returncode == 0


def first_code(path):
    cells = json.loads(path.read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_all_notebooks_begin_with_the_same_install_cell():
    assert len({first_code(path) for path in NOTEBOOKS}) == 1


def run_install_cell(*flags, path=(), attached="/kaggle/input"):
    """Run it where the kernel's own command says what it would do; return what it says."""
    code = (
        TransformerManager()
        .transform_cell(first_code(NOTEBOOKS[0]))
        .replace("get_ipython().run_line_magic", "print")
        .replace("/kaggle/input", str(attached))
    )
    command = [sys.executable, *flags, "-c", f"import sys; sys.path[:0] = {[*map(str, path)]}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_install_cell_does_nothing_where_the_package_is_there():
    assert run_install_cell() == ""


def test_install_cell_minds_no_folder_of_that_name(tmp_path):
    (tmp_path / "shardkit").mkdir()  # what a git clone leaves
    # -I -S: nothing is on the path but Python's own library, and what is put there.
    said = run_install_cell("-I", "-S", path=[tmp_path])
    assert re.fullmatch(r'pip install --quiet "shardkit\[notebook\] @ https://\S+/archive/HEAD\.zip"\n', said)


@pytest.mark.parametrize("folder", ["wheels", "datasets/me/wheels"])
def test_install_cell_takes_what_is_attached_on_kaggle(folder, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "shardkit-0.1.0-py3-none-any.whl").touch()
    said = run_install_cell("-I", "-S", attached=tmp_path)
    offline = "pip install --quiet --no-index --find-links {wheels[0].parent}"
    assert said == f'{offline} "shardkit[notebook]"\n'


@pytest.fixture
def working_tree(tmp_path):
    """A copy of what would be published, named as GitHub names the folder in its archive."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "demo-output"
    )
    return shutil.copytree(ROOT, tmp_path / "shardkit-HEAD", ignore=left_out)


@pytest.mark.skipif(
    "SHARDKIT_INSTALL" not in os.environ, reason="changes its own environment: make test-colab"
)
def test_install_cell_adds_the_package_and_leaves_what_the_host_brings(working_tree, tmp_path):
    def versions():
        return {found.name: found.version for found in distributions()}

    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--yes", "--quiet", "shardkit"], check=True)
    before = versions()
    shutil.make_archive(tmp_path / "archive/HEAD", "zip", tmp_path, working_tree.name)
    code = re.sub(r"https://\S+(?=/archive/HEAD\.zip)", tmp_path.as_uri(), first_code(NOTEBOOKS[0]))
    subprocess.run([sys.executable, "-m", "IPython", "-c", code], check=True, cwd=tmp_path)
    after = versions()
    assert "shardkit" in after
    assert {name: after[name] for name in before} == before
    where = [sys.executable, "-c", "import shardkit; print(shardkit.__file__)"]
    imported = subprocess.run(where, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert Path(imported).is_relative_to(sys.prefix)


def test_repo2docker_builds_binder_from_the_whole_repository(working_tree):
    """Rendered, not built: what can go wrong is the order of the steps, and which files they read."""
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    done = subprocess.run(command, cwd=working_tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = done.stdout + done.stderr
    steps = ["COPY --chown=0:0 src/ ${REPO_DIR}/", 'pip install --no-cache-dir -r "binder/requirements.txt"']
    steps.append("RUN ./binder/postBuild")
    assert [rendered.index(step) for step in steps] == sorted(rendered.index(step) for step in steps)
    wanted = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert f"conda environment for python={wanted}" in rendered
    assert os.access(ROOT / "binder/postBuild", os.X_OK)


def test_binder_takes_the_cpu_build_of_the_torch_that_is_tested():
    pinned = re.search(r"(?m)^torch==(.*)$", (ROOT / "requirements.txt").read_text())[1]
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    assert f"torch=={pinned}+cpu" in lines
    assert "-e .[notebook]" in lines


def test_lower_bounds_admit_what_colab_brings():
    """Or the first cell would replace it, and the host would ask for a restart."""
    lines = (ROOT / "tests/requirements-colab.txt").read_text()
    brought = dict(re.findall(r"(?m)^(.+)==(.+)$", lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, [*project["dependencies"], *extras["load"], *extras["notebook"]])
    found = [one for one in wanted if one.name in brought]
    assert {"torch", "transformers", "numpy", "ipywidgets", "pandas"} <= {one.name for one in found}
    assert all(brought[one.name] in one.specifier for one in found)
