"""What every result has in common: JSON that round-trips, and a summary, of which text and HTML are made."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from itertools import zip_longest
from pathlib import PurePath
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ClassVar, Self

from shardkit.base.errors import ShardkitError

if TYPE_CHECKING:
    import cattrs

_LITERAL = "python literal"
_NARROWEST = 16  # characters of a column that wraps
_FIGURE = re.compile(r"([-+]?[\d.,]+(x| ?[A-Za-z%]{1,3})?( \d+ s)?|[-…]?)$")


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; columns of figures are right-aligned, the others left."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self, width: int | None = None) -> str:
        """Return the table with its columns aligned by spaces; in a `width`, text wraps in its column."""
        rows = [[[printable(cell)] for cell in row] for row in (self.columns, *self.rows)]
        align = [str.rjust if right else str.ljust for right in self._are_figures]
        texts = (place for place, right in enumerate(self._are_figures) if not right)
        for place in sorted(texts, key=lambda place: -_widths(rows)[place]):
            widths = _widths(rows)
            if width is None or (over := sum(widths) + 2 * (len(widths) - 1) - width) <= 0:
                break
            for row in rows:
                row[place] = _wrapped(row[place][0], max(widths[place] - over, _NARROWEST))
        widths = _widths(rows)
        return "\n".join(
            "  ".join(fit(cell, width) for fit, cell, width in zip(align, line, widths, strict=True)).rstrip()
            for row in rows
            for line in zip_longest(*row, fillvalue="")
        )

    @property
    def _are_figures(self) -> list[bool]:
        cells = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        return [
            place > 0 and all(_FIGURE.match(cell) for cell in column) for place, column in enumerate(cells)
        ]

    def html(self) -> str:
        """Return the table as HTML, every cell escaped."""
        kinds = ["" if right else ' class="sk-text"' for right in self._are_figures]
        cells = [list(zip(kinds, row, strict=True)) for row in (self.columns, *self.rows)]
        head = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for kind, name in cells[0])
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{escaped(cell)}</td>" for kind, cell in row) + "</tr>"
            for row in cells[1:]
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _widths(rows: list[list[list[str]]]) -> list[int]:
    return [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]


def _wrapped(text: str, width: int | None, head: str = "") -> list[str]:
    """Return the lines of a text behind a head, under which it wraps; names are left in one piece."""
    if width is None:
        return [f"{head}{text}".rstrip()]
    lines = wrap(
        text,
        max(width, len(head) + _NARROWEST),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [head.rstrip()]


@dataclass(frozen=True)
class Summary:
    """A title, labelled facts, tables and notes: what a person wants to know of a result."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self, width: int | None = None) -> str:
        """Return the summary as plain text; in a `width`, what is longer wraps under its column."""
        longest = max((len(label) for label, _ in self.facts), default=0)
        lines = [printable(self.title)]
        for label, value in self.facts:
            lines += _wrapped(printable(value), width, f"  {printable(label):<{longest}}  ")
        for table in self.tables:
            lines += ["", *(f"  {line}" for line in table.text(width and width - 2).splitlines())]
        for note in self.notes:
            lines += _wrapped(printable(note), width, "  ! ")
        return "\n".join(lines)

    def html(self) -> str:
        """Return the summary as HTML, every value escaped."""
        facts = "".join(
            f'<tr><th scope="row">{escaped(label)}</th><td>{escaped(value)}</td></tr>'
            for label, value in self.facts
        )
        tables = "".join(table.html() for table in self.tables)
        notes = "".join(f'<p class="sk-note">⚠ {escaped(note)}</p>' for note in self.notes)
        style = files("shardkit").joinpath("static/report.css").read_text(encoding="utf-8")
        return (
            f'<style>{style}</style><div class="shardkit"><h4>{escaped(self.title)}</h4>'
            f'<table class="sk-facts"><tbody>{facts}</tbody></table>{tables}{notes}</div>'
        )


class Record:
    """Base of the result types (frozen dataclasses)."""

    schema: ClassVar[int] = 1

    def summary(self) -> Summary:
        """Return what `__str__` and `_repr_html_` show."""
        raise NotImplementedError

    def complete_summary(self) -> Summary:
        """Return `summary` with the rows that it leaves out."""
        return self.summary()

    def __init_subclass__(cls) -> None:
        # A dataclass keeps the one it finds; its own would show every tensor of a plan.
        cls.__repr__ = Record.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.summary().text()

    def _repr_html_(self) -> str:
        return self.summary().html()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready data, its ``schema`` named: ``shardkit/ShardPlan/1``."""
        return {"schema": self._schema_name(), **_converter().unstructure(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the record that `to_dict` wrote.

        Raises
        ------
        ShardkitError
            If `data` is another record, another schema version, or lacks a field.
        """
        if (found := data.get("schema")) != cls._schema_name():
            raise ShardkitError(f"this is {found!r}, not {cls._schema_name()!r}")
        try:
            return _converter().structure({k: v for k, v in data.items() if k != "schema"}, cls)
        except Exception as error:
            from cattrs import transform_error

            why = "; ".join(transform_error(error))
        # Not in the handler: IPython shows no words of ours where a group of exceptions is the context.
        raise ShardkitError(f"{cls._schema_name()}: not readable: {why}")

    @classmethod
    def _schema_name(cls) -> str:
        return f"shardkit/{cls.__name__}/{cls.schema}"


_TEXTS: dict[type, Callable[[str], Any]] = {}


def as_text(kind: type, restore: Callable[[str], Any]) -> None:
    """Let records hold objects of a kind, which JSON has as their `str`."""
    _TEXTS[kind] = restore


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor: names come from files that strangers wrote."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def escaped(text: str) -> str:
    """Return text as HTML that shows it, whatever is in it."""
    return escape(printable(text))


def plural(count: int, noun: str) -> str:
    """Return ``1 file``, ``1,024 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Return the first names and how many more there are."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def shown_path(path: str) -> str:
    """Return a path as a person would write it here: relative to this folder where it lies inside."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        return path
    return os.path.relpath(path, here) if path.startswith(here + os.sep) else path


@cache
def _converter() -> cattrs.Converter:
    import cattrs.preconf.json

    converter = cattrs.preconf.json.make_converter()
    converter.register_unstructure_hook(PurePath, str)
    for kind in _TEXTS:
        converter.register_unstructure_hook(kind, str)
        converter.register_structure_hook(kind, lambda text, kind: _TEXTS[kind](text))
    # What was asked for by name may be what JSON would change: a tuple, or a dict whose keys are numbers.
    converter.register_unstructure_hook_func(
        _is_options, lambda asked: {name: _kept(value) for name, value in asked.items()}
    )
    converter.register_structure_hook_func(
        _is_options, lambda kept, _: {str(name): _restored(value) for name, value in dict(kept).items()}
    )
    return converter


def _is_options(kind: object) -> bool:
    return bool(kind == dict[str, Any])


def _kept(value: Any) -> Any:
    return value if json.loads(json.dumps(value)) == value else {_LITERAL: repr(value)}


def _restored(value: Any) -> Any:
    is_literal = isinstance(value, dict) and value.keys() == {_LITERAL}
    return ast.literal_eval(value[_LITERAL]) if is_literal else value
