"""The article's stack: transformers of January 2024, in an environment of its own beside this Python's torch.

The loader of 2024 copied one file after the other, so that more files meant a lower peak; today's maps all.
Of this Python's packages the environment sees torch, and what torch requires, through links: neither its
transformers nor anything that the old one would try to use, such as another framework.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import filelock
import xxhash

from shardkit.base.errors import MeasurementError
from shardkit.base.extras import require

PACKAGES = ("transformers==4.37.2", "numpy<2", "huggingface_hub<1", "psutil")
_WITHOUT_TORCH = "accelerate==0.26.1"  # installed alone, as it would bring a torch of its own
_NEWEST_PYTHON = (3, 12)  # that tokenizers 0.15 and numpy 1.26 have wheels for
_MARK = "shardkit-stack.json"
_TRY = (
    "import accelerate, numpy, torch, transformers; transformers.AutoModelForCausalLM\n"
    "assert transformers.__version__ == '4.37.2', transformers.__file__"
)
_OFFLINE = ("resolve", "connection", "dns", "network", "timed out", "unreachable")


def article_stack(folder: str | os.PathLike[str] | None = None) -> Path:
    """Make the environment that the article's load ran in, unless it is there, and return its Python.

    It has transformers 4.37.2, accelerate 0.26.1, numpy 1 and huggingface_hub 0, and links to the torch of
    the current Python. Making it takes a minute, 250 MB and a package index: by uv where that is installed,
    else by pip. If this Python or its torch has changed since, it is made from scratch.

    Parameters
    ----------
    folder
        Where it is; None for a folder in the assets cache of the Hub's client (below `HF_HOME`), one for each
        environment that torch is in.

    Returns
    -------
    pathlib.Path
        An interpreter, as `measure_load` and `compare_loads` take it.

    Raises
    ------
    MeasurementError
        If the folder contains anything else, this Python is newer than 3.12, or the packages could not be
        installed: without a network, for one.
    MissingPackageError
        If torch is not installed.

    Examples
    --------
    >>> python = article_stack()
    >>> comparison = compare_loads("mistral-demo", "sharded", dtype="float16", python=python)
    """
    require("load", "the 2024 stack", "torch")
    target = _place(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{target.name}.lock")):  # who comes second finds it made
            if _read_mark(target) != _wanted():
                _put(target)
    except OSError as error:
        raise MeasurementError(f"{target} cannot be written: {error.strerror or error}") from error
    return _python(target)


def remove_article_stack(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Remove the environment, and return where it was; None if there was none. Nothing else is removed."""
    target = _place(folder)
    if _read_mark(target) is None:
        return None
    shutil.rmtree(target)
    target.with_name(f".{target.name}.lock").unlink(missing_ok=True)
    return target


def _place(folder: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser().absolute()
    from huggingface_hub import cached_assets_path

    stacks = cached_assets_path("shardkit", namespace="stacks", subfolder="2024")
    return Path(stacks, xxhash.xxh3_64_hexdigest(sys.prefix.encode()))


def _wanted() -> dict[str, object]:
    """Return what an environment is made of: as long as that is the same, it is found again."""
    torch = metadata.distribution("torch")
    place = str(torch.locate_file("torch"))
    return {"packages": [*PACKAGES, _WITHOUT_TORCH], "torch": [torch.version, place], "python": sys.version}


def _read_mark(target: Path) -> dict[str, object] | None:
    """Return what the environment in a folder was made of; None if there is nothing."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        made: dict[str, object] = json.loads((target / _MARK).read_text())
        return made
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise MeasurementError(f"{target} is not a 2024 stack, so it is left alone: choose another folder")
    return None


def _python(environment: Path) -> Path:
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(environment)}), "python")


def _put(target: Path) -> None:
    """Make the environment beside its place, and put it there once it works."""
    if sys.version_info[:2] > _NEWEST_PYTHON:
        here, newest = (".".join(map(str, version[:2])) for version in (sys.version_info, _NEWEST_PYTHON))
        raise MeasurementError(
            f"the 2024 stack has no packages for Python {here}: run shardkit with Python {newest} to use it"
        )
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # which a process that died has left
    try:
        _make(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make(part: Path) -> None:
    venv.EnvBuilder(symlinks=True).create(part)
    python = str(_python(part))
    _install(python, *PACKAGES)
    _install(python, "--no-deps", _WITHOUT_TORCH)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(part)}))
    for source in _torch_files(site):
        if not os.path.lexists(site / source.name):  # of a namespace that several share
            (site / source.name).symlink_to(source)
    done = subprocess.run([python, "-c", _TRY], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise MeasurementError(f"the 2024 stack does not work here: {_last_line(done)}")
    (part / _MARK).write_text(json.dumps(_wanted()))


def _install(python: str, *packages: str) -> None:
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if uv := shutil.which("uv", path=beside):
        command = [uv, "pip", "install", "--python", python]
    else:
        command = [sys.executable, "-m", "pip", "--python", python, "install"]
    command += ["--quiet", "--only-binary", ":all:", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        is_offline = any(word in done.stderr.lower() for word in _OFFLINE)
        hint = ": it has to be downloaded once, and the package index cannot be reached" * is_offline
        raise MeasurementError(f"the 2024 stack could not be installed{hint}: {_last_line(done)}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1].strip()[:300]


def _torch_files(site: Path) -> Iterator[Path]:
    """Yield what stands in this Python's packages of torch and what it requires, but for what `site` has."""
    todo, known = ["torch"], set[str]()
    while todo:
        if (name := todo.pop()) in known or any(metadata.distributions(name=name, path=[str(site)])):
            continue
        known.add(name)
        with suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(name)
            required = (one for one in found.requires or () if "extra ==" not in one)
            todo += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in required]
            tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            yield from (Path(str(found.locate_file(top))) for top in tops if not top.endswith(".pth"))
