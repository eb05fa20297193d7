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
from shardkit.compare.comparison import Comparison
from shardkit.formats.tensor import TensorInfo
from shardkit.measure.quantities import Quantity, Ratio, format_seconds
from shardkit.plan.plan import ShardPlan

_DRAWN_FILES = 300  # more are thinner than a pixel
_PLAIN = {
    "peak_anonymous_bytes": "Memory",
    "load_wall_seconds": "Load time",
    "time_to_first_token_seconds": "First token",
}
_MARKS = {
    kind: f'<span class="sk-mark sk-{kind}" aria-hidden="true">{sign}</span>'
    for kind, sign in (("fits", "✓"), ("tight", "!"), ("not", "✗"))
}
REPLACE = "Replace an existing checkpoint"
FREE = "Free the source's disk space meanwhile"
TRUSTS = "Run custom code from the checkpoint, which I trust"
# Messages name what to write in Python or a shell; the app has controls for it.
_IN_THE_APP = {
    "replace it with overwrite=True": f'check "{REPLACE}"',
    "overwrite=True and free_source=True exclude each other": "an existing checkpoint is not replaced by it",
    "leave out free_source": f'uncheck "{FREE}" (step 3)',
    ", with free_source=True, to resume": f', with "{FREE}" checked, to resume',
    "leave out dtype": 'set "Dtype of shards" to "as stored" (step 2)',
    ", or allow it with allow_overflow=True": "",
    "lower max_shard_size": "choose a smaller shard size (step 2)",
    'allow it with options={"trust_remote_code": True}': f'check "{TRUSTS}"',
    "same_model=False compares them anyway": "shard this one into another folder (step 3)",
}


class File(NamedTuple):
    """A weights file as the layout map draws it."""

    name: str
    nbytes: int
    tensors: list[str]


# JupyterLab takes arrow keys and letters for its own, even if a menu or a slider in a cell's output has the
# focus, which then could not be used without a mouse. It leaves alone what is marked so: the element itself.
# And ipywidgets gives a slider's handle no name that a screen reader could say. What somebody has unfolded
# stays so when a job or a slider writes it again.
_ON_LOAD = (
    "const app = this.closest('.sk-app'), open = new Set();"
    "app.addEventListener('focusin', ({target}) => {"
    "target.setAttribute('data-lm-suppress-shortcuts', 'true');"
    "const label = target.closest('.widget-slider')?.querySelector('.widget-label');"
    "if (label) target.setAttribute('aria-label', label.textContent)});"
    "app.addEventListener('click', ({target}) => {"
    "const folded = target.closest('summary')?.parentNode;"
    "if (folded) open[folded.open ? 'delete' : 'add'](folded.className)});"
    "new MutationObserver(() => app.querySelectorAll('details').forEach("
    "folded => {folded.open = open.has(folded.className)})).observe(app, {childList: true, subtree: true})"
)


@cache
def stylesheet() -> str:
    """Return the app's CSS as an element, which also sees to the keyboard, and to what is unfolded."""
    css = files("shardkit").joinpath("static/app.css").read_text(encoding="utf-8")
    return f'<style onload="{_ON_LOAD}">{css}</style>'


def _in_the_app(html: str) -> str:
    for words, here in _IN_THE_APP.items():
        html = html.replace(escaped(words), escaped(here))
    return html


def heading(number: int, title: str, told: str, *, later: bool, done: bool) -> str:
    """Return the heading of a step: its number, or a check mark; its title, and a remark."""
    state = "later" if later else "finished" if done else "now"
    mark = '<span role="img" aria-label="done">✓</span>' if done else str(number)
    return (
        f'<div class="sk-heading sk-{state}"><span class="sk-number">{mark}</span>'
        f"<h3>{escaped(title)}</h3>{hint(told)}</div>"
    )


def hint(text: str) -> str:
    """Return a remark."""
    return f'<p class="sk-hint">{escaped(text)}</p>'


def status(text: str) -> str:
    """Return a line that a screen reader says when it has time."""
    return f'<div role="status" class="sk-status">{escaped(text)}</div>'


def warning(text: str) -> str:
    """Return a line about what may not be as expected."""
    return f'<div role="status" class="sk-warning">{_MARKS["tight"]} {_in_the_app(escaped(text))}</div>'


def advice(text: str) -> str:
    """Return what to do."""
    return f'<p class="sk-advice">{escaped(text)}</p>'


def done(text: str, command: str = "") -> str:
    """Return the good end of a job: what was done, and code to use it."""
    code = f"<pre><code>{escaped(command)}</code></pre>" * bool(command)
    return f'<div role="status" class="sk-done">{_MARKS["fits"]} {escaped(text)}</div>{code}'


def error(text: str) -> str:
    """Return what went wrong; a screen reader says it at once."""
    words = _in_the_app(escaped(text))
    return f'<div role="alert" class="sk-error">{_MARKS["not"]} <b>Failed.</b> {words}</div>'


def details(summary: str, *bodies: str, name: str) -> str:
    """Return HTML that is folded to one line."""
    body = _in_the_app("".join(bodies))
    return f'<details class="sk-details sk-{name}"><summary>{escaped(summary)}</summary>{body}</details>'


def verdict(kind: str, words: str, why: str) -> str:
    """Return a verdict as word, sign and color, and what is to be said of it."""
    return f"{_MARKS.get(kind, '')} {escaped(words)}" + (f"<small>{escaped(why)}</small>" if why else "")


def ways(columns: Sequence[str], rows: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """Return a table of ways to load; a row is a label, a remark on it, and a cell of HTML for each way."""
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escaped(label)}<small>{escaped(remark)}</small></th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for label, remark, cells in rows
    )
    return f'<table class="sk-ways"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def tiles(comparison: Comparison) -> str:
    """Return what each variant changed, a tile for each main quantity; in words if there is no pair."""
    shown, main = "", sorted(comparison.main, key=lambda quantity: quantity.unit == "seconds")
    for name in comparison.names:
        found = {quantity: comparison.found(name).get(quantity) for quantity in main}
        made = [_tile(q, ratio) for q, ratio in found.items() if isinstance(ratio, Ratio)]
        sides = hint(f"{comparison.reference} to {name}")
        shown += f'{sides}<div class="sk-tiles">{"".join(made)}</div>' if made else ""
    return warning(comparison.verdict) + shown if comparison.failures or not shown else shown


def _tile(quantity: Quantity, ratio: Ratio) -> str:
    before, after = map(quantity.format, (ratio.original, ratio.other))
    if before != after:
        same_unit = before.split()[1:] == after.split()[1:]
        after = f"{before.split()[0] if same_unit else before} to {after}"  # 336 to 272 MB
    words, _, more = str(ratio).partition(" (")
    rest = f"<small>({escaped(more)}</small>" if more else ""
    kind = {"less": "fits", "more": "tight"}.get(str(ratio.conclusion), "")
    figures = f"<b>{escaped(after)}</b>" if kind else f"<div>{escaped(after)}</div>"  # large if they differ
    return (
        f'<div class="sk-tile"><span>{escaped(_PLAIN.get(quantity.name, quantity.label))}</span>'
        f"{figures}{_MARKS.get(kind, '')} {escaped(words)}{rest}</div>"
    )


def whole_seconds(seconds: float) -> str:
    """Return about how long something takes, for people who wait: ``1 min 10 s``; a second at least."""
    return format_seconds(max(1, round(seconds)))


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


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode()}"
