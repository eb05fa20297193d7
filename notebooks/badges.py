"""Stamp the repository's address into README and notebooks: badges, and what their first cell installs from.

The address stands in one place, `[project.urls] Repository` of pyproject.toml; all else follows from it.

    python notebooks/badges.py                           # stamp what pyproject.toml says
    python notebooks/badges.py --repository owner/name   # stamp another, pyproject.toml included
    python notebooks/badges.py --check                   # exit status 1 if a stamp differs
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOK = "notebooks/01_shard_and_compare.ipynb"  # what the README's badges open
# No account on GitHub can have this name, so nobody can answer for what the first cell would install.
UNSET = "your_name/shardkit"
ADDRESS = re.compile(r'(?m)^(Repository = "https://github\.com/)([^"]+)"$')
BLOCK = re.compile(r"(?s)<!-- badges -->.*?<!-- /badges -->")
CLONE = re.compile(r"(?s)<!-- clone -->.*?<!-- /clone -->")
INSTALLED_FROM = re.compile(r"https://github\.com/[^/\s]+/[^/\s]+(?=/archive/HEAD\.zip)")


def badges(repository: str, notebook: str) -> str:
    """Return the block that opens a notebook on three hosts; before there is an address, how to set it."""
    if repository == UNSET:
        how = "make badges REPOSITORY=owner/name puts links to Colab, Kaggle and Binder here"
        return f"<!-- badges -->\n<!-- {how} -->\n<!-- /badges -->"
    path = f"{repository}/blob/main/{notebook}"
    links = {
        ("Open in Colab", "https://colab.research.google.com/assets/colab-badge.svg"): (
            f"https://colab.research.google.com/github/{path}"
        ),
        ("Open in Kaggle", "https://kaggle.com/static/images/open-in-kaggle.svg"): (
            f"https://kaggle.com/kernels/welcome?src=https://github.com/{path}"
        ),
        ("Launch Binder", "https://mybinder.org/badge_logo.svg"): (
            f"https://mybinder.org/v2/gh/{repository}/HEAD?labpath={notebook.replace('/', '%2F')}"
        ),
    }
    lines = [f"[![{label}]({image})]({link})" for (label, image), link in links.items()]
    return "\n".join(["<!-- badges -->", *lines, "<!-- /badges -->"])


def clone(repository: str) -> str:
    """Return the block that says where a clone comes from; before there is an address, nothing of it."""
    if repository == UNSET:
        return "<!-- clone -->\nIn a clone:\n<!-- /clone -->"
    url = f"https://github.com/{repository}"
    without = f'`pip install "shardkit[load] @ git+{url}"`'
    return f"<!-- clone -->\nIn a clone (`git clone {url}`), or without one ({without}):\n<!-- /clone -->"


def stamped(path: Path, repository: str) -> str:
    """Return the text of a file with its stamps renewed."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return ADDRESS.sub(rf'\g<1>{repository}"', text)
    if path.suffix == ".md":
        return CLONE.sub(clone(repository), BLOCK.sub(badges(repository, NOTEBOOK), text))
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        source = BLOCK.sub(badges(repository, f"notebooks/{path.name}"), source)
        source = INSTALLED_FROM.sub(f"https://github.com/{repository}", source)
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def files() -> Iterator[Path]:
    """Yield the files that carry a stamp."""
    yield from (ROOT / "pyproject.toml", ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.ipynb")))


def address() -> str:
    """Return owner/name from pyproject.toml."""
    return ADDRESS.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repository", metavar="OWNER/NAME")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    repository = arguments.repository or address()
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository):
        sys.exit(f"badges: {repository!r} is not of the form owner/name")
    differ = [path for path in files() if path.read_text(encoding="utf-8") != stamped(path, repository)]
    if not arguments.check:
        for path in differ:
            path.write_text(stamped(path, repository), encoding="utf-8")
    names = ", ".join(str(path.relative_to(ROOT)) for path in differ)
    if arguments.check and differ:
        sys.exit(f"badges: {names} not stamped for {repository}: run `make badges`")
    if differ:
        print(f"stamped for {repository}: {names}")


if __name__ == "__main__":
    main()
