"""What the house promises of itself: CONTRIBUTING.md says why."""

import ast
import importlib
import json
import pydoc
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardkit
from shardkit.cli import arguments, commands
from shardkit.cli.terminal import in_the_terminal

assert commands  # which declares them

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "shardkit").rglob("*.py"))
PROSE = [
    *(ROOT / "README.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
BANNED = re.compile(
    r"\b(arms?|(not )?told|taken up again|(begun )?anew|asked for ((a|the) )?dtype|went along|to mail"
    r"|memory that must exist|is heard|let it be|(un|de)?quantised|licence|(un)?initialised|undecided"
    r"|play Colab|made on the spot|say that you mean it|config says|lost in the cast|goes? on|going on"
    r"|cut short|have been cut|as asked|must not be asked|held against|nobody could|replaced whole"
    r"|is no (folder|file|model|weights|revision|list|map)|give (another|a) (folder|name|repository)"
    r"|(be|is) taken|run the same again|tick|even so|at work)\b"
    r"|Say what a checkpoint|Say which files|Find the least memory|Write again what|Into the folder|Write as:"
    r"|Load as:|beside weights|as the files hold|whole (a )?(folder|file|model)s?\b|turned experts",
    re.IGNORECASE,
)
# Files and functions (without their docstrings) that are longer than most may be, and how long they are.
LONG_FILES = {"checkpoint/checkpoint.py": 425, "measure/worker.py": 435}
LONG_FUNCTIONS = {"minimum_memory": 45}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "shardkit").as_posix()


def docstring(node: ast.AST) -> ast.Constant | None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr):
        value = node.body[0].value
        return value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
    return None


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(docstring(node)) for node in ast.walk(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def read_by_people(path: Path) -> Iterator[str]:
    """Yield the words of a document; of a notebook, those of its cells and of what they printed."""
    if path.suffix != ".ipynb":
        yield path.read_text()
        return
    for cell in json.loads(path.read_text())["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", ()):
            yield "".join(output.get("text", ()))
            yield "".join(output.get("data", {}).get("text/plain", ()))
            yield re.sub(
                r"<style>.*?</style>|<[^>]*>", " ", "".join(output.get("data", {}).get("text/html", ()))
            )


@pytest.mark.parametrize(
    ("words", "places"),
    [("hf:/", ("sources/", "cli/")), (r"(?<![\w`-])--(?!privileged|cgroupns|revision)[a-z]", ("cli/",))],
    ids=["the Hub's names", "options of the command line"],
)
def test_a_word_stands_only_where_it_belongs(words: str, places: tuple[str, ...]) -> None:
    found = {name_of(path) for path in FILES for text in texts(path) if re.search(words, text)}
    found -= {"measure/limit.py", "measure/article_stack.py"}  # they call systemd-run and pip
    found -= {"base/machine.py"}  # which calls nvidia-smi
    assert {name for name in found if not name.startswith(places)} == set()


def test_a_terminal_is_advised_in_its_own_words() -> None:
    elsewhere = ("cli/", "app/", "shard/model_card.py")
    paths = [path for path in FILES if not name_of(path).startswith(elsewhere)]
    found = [in_the_terminal(text) for path in paths for text in texts(path)]
    pythons = r"\b[a-z_]+=(True|False)\b|(leave out|lower|raise) (\w*_|dtype|files)"
    assert [text for text in found if re.search(pythons, text)] == []


def test_no_two_files_of_different_rooms_have_one_name() -> None:
    in_rooms = (path.name for path in FILES if path.parent != ROOT / "shardkit")
    names = Counter(name for name in in_rooms if name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short() -> None:
    longest = dict.fromkeys(map(name_of, FILES), 350) | LONG_FILES
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > longest[name]} == {}


def test_functions_are_short() -> None:
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if length > LONG_FUNCTIONS.get(node.name, 40):
                    found[f"{name_of(path)}:{node.name}"] = length
    assert found == {}


@pytest.mark.parametrize("registry", ["STRATEGIES", "FORMATS", "SOURCES", "QUANTITIES", "HOSTS"])
def test_a_registry_is_made_in_one_place(registry: str) -> None:
    made = rf"^{registry}\b(:.*)? = "
    assert len([path for path in FILES if re.search(made, path.read_text(), re.MULTILINE)]) == 1


def table_of_words() -> Iterator[str]:
    """Yield what CONTRIBUTING lists as words not to use, each with the nouns that it is not to have."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| not | but |\n|---|---|\n")[2]
    for line in table.partition("\n\n")[0].splitlines():
        words, _, nouns = line.split("|")[1].strip(" )").partition(" (")
        yield from (f"{word} {noun}".strip() for word in words.split(", ") for noun in nouns.split(", "))


@pytest.mark.parametrize("words", list(table_of_words()))
def test_words_that_contributing_advises_against_are_banned(words: str) -> None:
    assert BANNED.search(words)


def test_help_of_the_package_and_of_every_command_uses_the_words_of_the_field() -> None:
    helps = [pydoc.plain(pydoc.render_doc(shardkit))]
    helps += [parser.format_help() for parser in arguments._COMMANDS.choices.values()]
    assert len(helps) > 10
    assert "find the smallest memory limit" in " ".join(helps).lower()
    assert [text[found.start() - 60 : found.end()] for text in helps for found in BANNED.finditer(text)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_texts_of_the_package_use_the_words_of_the_field(path: Path) -> None:
    assert [text for text in texts(path) if BANNED.search(text)] == []


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_documents_use_the_words_of_the_field(path: Path) -> None:
    assert [found[0] for text in read_by_people(path) for found in BANNED.finditer(text)] == []


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py")])
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)
