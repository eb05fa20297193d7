"""A comparison as one HTML page: figures, pictures, raw samples, and the result itself, in a single file."""

from __future__ import annotations

import base64
import json
from html import escape

from shardkit.base.record import Table
from shardkit.base.sizes import format_size
from shardkit.compare.comparison import CARRIED_IN, Comparison
from shardkit.measure.measurement import format_seconds
from shardkit.measure.quantities import QUANTITIES
from shardkit.show.plots import comparison_png, describe_memory

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; background: white; border: 1px solid #8888; }
summary { cursor: pointer; margin: .8em 0; }
.shardkit { overflow-x: auto; }
"""


def comparison_card(comparison: Comparison) -> str:
    """Return the page. What it shows is escaped; what it carries, `Comparison.load` reads back."""
    # A "<" in a name could end the element that carries it.
    carried = json.dumps(comparison.to_dict()).replace("<", "\\u003c")
    picture = base64.b64encode(comparison_png(comparison)).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>shardkit: {escape(" and ".join(comparison.names))}</title>
<style>{_STYLE}</style>
</head>
<body>
{comparison.summary().html()}
<p><img alt="{escape(alternative(comparison))}" src="data:image/png;base64,{picture}"></p>
<details><summary>Every run</summary><div class="shardkit">{_runs(comparison).html()}</div></details>
{CARRIED_IN}{carried}</script>
</body>
</html>
"""


def alternative(comparison: Comparison) -> str:
    """Return the words that stand for the picture."""
    return f"Wall times and peaks as in the table above, and memory over time: {describe_memory(comparison)}"


def _runs(comparison: Comparison) -> Table:
    rows = []
    for sample in (*comparison.warm_ups, *comparison.samples):
        m = sample.measurement
        peaks = (m.peak_anonymous_bytes, m.peak_total_bytes)
        times = [getattr(m, quantity) for quantity in comparison.times]
        rows.append(
            (
                sample.variant,
                "warm-up" if sample.pair is None else str(sample.pair + 1),
                *map(format_seconds, times),
                *("-" if peak is None else format_size(peak) for peak in peaks),
                f"{m.cache.asked}, {'proven' if m.cache.proven else 'not proven'}",
                f"{m.outcome}: {m.reason}" if m.reason else m.outcome,
            )
        )
    load, token = (QUANTITIES[quantity][0] for quantity in comparison.times)
    columns = ("variant", "pair", load, token, "peak anonymous", "peak total", "page cache", "outcome")
    return Table(columns, tuple(rows))
