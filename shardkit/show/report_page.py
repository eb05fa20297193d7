"""Runs as one HTML page: summary, picture, every run, and the result itself as data, in a single file."""

from __future__ import annotations

import base64
import json
import re
from html import escape
from typing import Any

from shardkit.base.record import Summary, Table
from shardkit.measure.samples import Samples
from shardkit.show.plots import comparison_png, profiler_png

CARRIED_IN = '<script type="application/json" id="shardkit-comparison">'
_CARRIED = re.compile(re.escape(CARRIED_IN) + "(.*?)</script>", re.DOTALL)
_CHECKED = "All resident memory over time, and readings of memory_profiler"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; margin: .8em 0; }
.shardkit { overflow-x: auto; }
"""


def result_page(runs: Samples, summary: Summary, data: dict[str, Any]) -> str:
    """Return the page. What it shows is escaped; the data that it carries, `carried` gives back."""
    # A "<" in a name could end the element that carries it.
    text = json.dumps(data).replace("<", "\\u003c")
    pictures = [base64.b64encode(png).decode() for png in (comparison_png(runs), profiler_png(runs))]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>shardkit: {escape(" and ".join(runs.names))}</title>
<style>{_STYLE}</style>
</head>
<body>
{summary.html()}
<p><img alt="{escape(alternative(data["verdict"]))}" src="data:image/png;base64,{pictures[0]}"></p>
<details><summary>Every run</summary><div class="shardkit">{_table(runs).html()}</div></details>
<details><summary>Appendix: the same memory as memory_profiler reads it</summary>
<p><img alt="{_CHECKED}" src="data:image/png;base64,{pictures[1]}"></p></details>
{CARRIED_IN}{text}</script>
</body>
</html>
"""


def carried(page: str) -> str | None:
    """Return the JSON that a page carries; None if the text is no such page."""
    return found.group(1) if (found := _CARRIED.search(page)) else None


def alternative(verdict: str) -> str:
    """Return the words that stand for the picture."""
    return f"Wall times and peaks as in the table above, and memory over time. {verdict}"


def _table(runs: Samples) -> Table:
    quantities = runs.drawn()
    rows = [
        (
            sample.variant,
            "warm-up" if sample.pair is None else str(sample.pair + 1),
            *(quantity.format(quantity.of(run)) for quantity in quantities),
            str(run.cache),
            run.end,
        )
        for sample in runs.all_runs
        for run in (sample.measurement,)
    ]
    labels = (quantity.label for quantity in quantities)
    return Table(("variant", "pair", *labels, "page cache", "outcome"), tuple(rows))
