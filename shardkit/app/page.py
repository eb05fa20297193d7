"""The app's HTML: pure functions of what is shown. Names in files are hostile: all of it is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import count, groupby
from typing import NamedTuple

from shardkit.base.record import escaped, listed, plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.parts import BLOCK, part_of
from shardkit.formats.tensor import TensorInfo
from shardkit.plan.plan import ShardPlan

_DRAWN_FILES = 300  # more are thinner than a pixel


class File(NamedTuple):
    """A weights file as the layout map draws it."""

    name: str
    nbytes: int
    tensors: list[str]


# JupyterLab takes arrow keys and letters for its own, even if a menu or a slider in a cell's output has the
# focus, which then could not be used without a mouse. It leaves alone what is marked so: the element itself.
# And ipywidgets gives a slider's handle no name that a screen reader could say.
_ON_FOCUS = (
    "this.closest('.sk-app').addEventListener('focusin', ({target}) => {"
    "target.setAttribute('data-lm-suppress-shortcuts', 'true');"
    "const label = target.closest('.widget-slider')?.querySelector('.widget-label');"
    "if (label) target.setAttribute('aria-label', label.innerText)})"
)


@cache
def stylesheet() -> str:
    """Return the app's CSS as an element, which also sees to the keyboard."""
    css = files("shardkit").joinpath("static/app.css").read_text(encoding="utf-8")
    return f'<style onload="{_ON_FOCUS}">{css}</style>'


def heading(title: str, told: str) -> str:
    """Return the title of a step."""
    return f'<h3 class="sk-heading">{escaped(title)}</h3>{hint(told)}'


def hint(text: str) -> str:
    """Return a remark."""
    return f'<p class="sk-hint">{escaped(text)}</p>'


def status(text: str) -> str:
    """Return a line that a screen reader says when it has time."""
    return f'<div role="status" class="sk-status">{escaped(text)}</div>'


def done(text: str, *commands: str) -> str:
    """Return the good end of a job: what was done, and code to go on with."""
    code = "".join(f"<pre><code>{escaped(command)}</code></pre>" for command in commands)
    return f'<div role="status" class="sk-done"><strong>✓ Done.</strong> {escaped(text)}</div>{code}'


def error(text: str) -> str:
    """Return what went wrong; a screen reader says it at once."""
    return f'<div role="alert" class="sk-error"><strong>✗ Failed.</strong> {escaped(text)}</div>'


def region(label: str, body: str, *, name: str) -> str:
    """Return an area of fixed height, which scrolls, by keyboard too; its body is HTML."""
    return f'<div class="sk-area sk-{name}" role="region" aria-label="{label}" tabindex="0">{body}</div>'


def columns(*parts: str) -> str:
    """Return parts side by side where there is room."""
    return f'<div class="sk-columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def layout_map(checkpoint: Checkpoint, plan: ShardPlan) -> str:
    """Return both layouts, one above the other on one scale of bytes: a box for each file."""
    held: defaultdict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        held[tensor.file].append(tensor)
    now = [File(f, sum(t.nbytes for t in tensors), [t.name for t in tensors]) for f, tensors in held.items()]
    planned = [File(s.file, s.nbytes, [t.source.name for t in s.tensors]) for s in plan.shards]
    scale = max(sum(file.nbytes for file in row) for row in (now, planned)) or 1
    return f'<div class="sk-map">{_row("now", now, scale)}{_row("planned", planned, scale)}</div>'


def _row(label: str, row: Sequence[File], scale: int) -> str:
    total = sum(file.nbytes for file in row)
    some = f" (the first {_DRAWN_FILES} shown)" * (len(row) > _DRAWN_FILES)
    words = escaped(f"{label}: {plural(len(row), 'file')}, {format_size(total)}{some}")
    drawn = row[:_DRAWN_FILES]
    boxes = "".join(_box(number, file) for number, file in enumerate(drawn, 1))
    width = 100 * sum(file.nbytes for file in drawn) / scale
    return (
        f'<div class="sk-label">{words}</div><div class="sk-strip" role="img" aria-label="{words}" '
        f'style="width:{width:.3f}%">{boxes}</div>'
    )


def _box(number: int, file: File) -> str:
    held = contents(file.tensors)
    told = f"{file.name}: {format_size(file.nbytes)}, {plural(len(file.tensors), 'tensor')}: {held}"
    return (
        f'<div class="sk-box" style="flex-grow:{max(file.nbytes, 1)}" title="{escaped(told)}"><div>'
        f"<b>{number}</b><span>{format_size(file.nbytes)}</span><span>{escaped(held)}</span></div></div>"
    )


def contents(names: Iterable[str]) -> str:
    """Say what part of a model some tensors are: ``embed_tokens, blocks 0-3``."""
    blocks: set[int] = set()
    beside: dict[str, None] = {}
    for name in names:
        if (part := part_of(name)).place == BLOCK:
            blocks.add(part.number)
        else:
            beside[name.split(".")[-2:][0]] = None
    # Consecutive numbers differ from their place by the same amount.
    places = count()
    runs = [list(run) for _, run in groupby(sorted(blocks), key=lambda block: block - next(places))]
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    told = [f"{'block' if len(blocks) == 1 else 'blocks'} {listed(ranges, 3)}"] if blocks else []
    return ", ".join([*filter(None, [listed(beside, 3)]), *told])


def picture(png: bytes, alternative: str) -> str:
    """Return a picture with the words that stand for it."""
    return f'<img class="sk-picture" alt="{escaped(alternative)}" src="{_data_uri("image/png", png)}">'


def download(name: str, media_type: str, content: bytes) -> str:
    """Return a link that saves `content` under a name, without a server behind it."""
    return (
        f'<a class="sk-download" download="{escaped(name)}" href="{_data_uri(media_type, content)}">'
        f"Download {escaped(name)} ({format_size(len(content))})</a>"
    )


def links(*downloads: str) -> str:
    """Return the place for download links, which takes room before there are any."""
    return f'<div class="sk-links">{"".join(downloads)}</div>'


def no_picture(text: str) -> str:
    """Return the place where a picture will be, as large as that."""
    return f'<div class="sk-picture sk-empty">{escaped(text)}</div>'


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode()}"
