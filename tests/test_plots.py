"""Pictures: what is drawn, that it can be read, and that it does not depend on a theme."""

import dataclasses
import os
import re
import subprocess
import sys
from io import BytesIO
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection

from shardkit.base.errors import MeasurementError
from shardkit.measure.samples import Sample
from shardkit.show.canvas import INK, color, ink
from shardkit.show.plots import (
    comparison_png,
    plot_bars,
    plot_comparison,
    plot_memory,
    plot_profiler,
    plot_results,
)
from shardkit.show.ways import plot_ways
from tests.fake_loads import MB, VARIANTS, fake_comparison, fake_load, fake_variant


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def texts(axes):
    """Every visible text on some axes."""
    axes.figure.draw_without_rendering()
    found = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    found += [axes._left_title, *axes.get_xticklabels(), *axes.get_yticklabels()]
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def words(axes):
    return [text.get_text().strip() for text in texts(axes)]


def curves_of(axes):
    """The lines of anonymous memory, and those of all memory, in the order of the variants."""
    lines = [line for line in axes.lines if line.get_color() != ink(axes) and line.get_marker() == "None"]
    return [[line for line in lines if line.get_linestyle() == style] for style in ("-", "--")]


def test_bars_show_means_and_every_run_and_join_pairs():
    comparison = fake_comparison(ratio=0.5, noise=0.02, anonymous=(4000 * MB, 400 * MB))
    times, peaks = plot_bars(comparison)
    for axes, quantities, one in (
        (times, ("load_wall_seconds", "time_to_first_token_seconds"), 1),
        (peaks, ("peak_anonymous_bytes", "peak_total_bytes"), 1e9),
    ):
        lengths = sorted(bar.get_width() for bar in axes.patches)
        means = sorted(comparison.mean(variant, q) / one for variant in VARIANTS for q in quantities)
        assert lengths == pytest.approx(means)
        dots = [found for found in axes.collections if isinstance(found, PathCollection)]
        assert sum(len(found.get_offsets()) for found in dots) == 4 * 5
        pairs = [line.get_xdata() for line in axes.lines if line.get_linewidth() < 1]
        seen = {(dot[0] for dot in found.get_offsets()) for found in dots}
        assert len(pairs) == 2 * 5
        assert {len(pair) for pair in pairs} == {2}
        assert len(seen) == 4
    loads = comparison.by_pair("original")[3], comparison.by_pair("sharded")[3]
    assert tuple(run.load_wall_seconds for run in loads) in [tuple(line.get_xdata()) for line in times.lines]


def test_one_axis_has_one_unit_and_titles_say_what_was_found():
    comparison = fake_comparison(ratio=0.5, noise=0.02, anonymous=(4000 * MB, 400 * MB))
    times, peaks, curves = plot_comparison(comparison)
    assert {"4 GB", "0.4 GB", "peak anonymous", "peak total", "GB"} <= set(words(peaks))
    assert not [text for text in words(peaks) if "MB" in text]
    ratios = comparison.ratios
    said = f"Load time: {ratios['load_wall_seconds'].short}"
    assert re.fullmatch(r"Load time: [12](\.\d+)?x faster", said)
    assert words(times)[-1 - len(times.get_xticklabels()) - len(times.get_yticklabels())].startswith(said)
    assert "Peak anonymous: 10x smaller" in words(peaks)
    assert "Memory that cannot be evicted: original 4 GB; sharded 0.4 GB" in words(curves)


def test_every_bar_and_line_is_named_where_it_is_and_nothing_is_hatched():
    axes = plot_comparison(fake_comparison())
    for one in axes:
        assert one.get_legend() is None
        assert {bar.get_hatch() for bar in [*one.patches, *one.collections]} == {None}
    for bars in axes[:2]:
        rows = dict(zip(bars.get_yticks(), (text.get_text() for text in bars.get_yticklabels()), strict=True))
        assert [rows[bar.get_y() + bar.get_height() / 2] for bar in bars.patches] == [*VARIANTS] * 2
    names = {text.get_text(): text.xy for text in axes[2].texts}
    for name, held, total in zip(VARIANTS, *curves_of(axes[2]), strict=True):
        assert names[name] == (held.get_xdata()[-1], held.get_ydata()[-1])
        assert names[f"{name}, with file pages"] == (total.get_xdata()[-1], total.get_ydata()[-1])


def test_curves_begin_with_the_load_and_mark_its_phases_and_what_python_held():
    axes = plot_memory(fake_comparison())
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert all(0 <= line.get_xdata()[0] < 0.1 for lines in curves_of(axes) for line in lines)
    for marker, end in (("o", 2), ("D", 3)):
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == marker]
        assert marks == pytest.approx([end, end], rel=0.1)
    (named,) = (text for text in axes.texts if text.get_text() == "Python and libraries")
    began = curves_of(axes)[0][0].get_ydata()[0]
    assert named.xy[1] == pytest.approx(began / 2)
    shaded = max(path.vertices[:, 1].max() for path in axes.collections[-1].get_paths())
    assert shaded == pytest.approx(began)


def test_limits_that_are_near_are_drawn_and_named():
    def named(**asked):
        runs = [Sample(v, 0, fake_load(anonymous=1000 * MB, **asked)) for v in VARIANTS]
        return {text for text in words(plot_memory(fake_comparison(samples=tuple(runs)))) if "GB" in text}

    assert "memory of Binder, 2 GB" in named()
    assert not [text for text in named() if "Colab" in text or "limit" in text]
    assert "memory limit, 2.5 GB" in named(memory_limit_bytes=2500 * MB)
    assert "budget, 0.9 GB" in named(max_memory_bytes=900 * MB)
    assert not [text for text in named(memory_limit_bytes=90_000 * MB) if "limit" in text]


def test_tokens_after_the_first_are_drawn():
    runs = [Sample(v, n, fake_load(token=0.2 + n / 100, read=100 * MB)) for n in range(3) for v in VARIANTS]
    times, peaks = plot_bars(fake_comparison(samples=tuple(runs)))
    assert "time per token" in words(times)
    assert "read per token" in words(peaks)
    assert "0.21 s" in words(times)
    assert "100 MB" in words(peaks)


def test_readings_of_memory_profiler_are_in_a_picture_of_their_own():
    found = fake_comparison()
    axes = plot_profiler(found)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses] == [[0.4, 0.6]] * 2
    assert not [line for ax in plot_comparison(found) for line in ax.lines if line.get_marker() == "x"]
    assert set(VARIANTS) <= set(words(axes))


def test_given_axes_are_drawn_on(tmp_path):
    figure, axes = plt.subplots(1, 3)
    assert list(plot_bars(fake_comparison(), axes[:2])) == list(axes[:2])
    assert plot_memory(fake_comparison(), axes[2]) is axes[2]
    assert plot_profiler(fake_comparison(), axes[2]) is axes[2]
    assert list(fake_comparison().plot(tmp_path / "a.svg", axes)) == list(axes)
    assert (tmp_path / "a.svg").exists()
    assert plt.get_fignums() == [figure.number]


def with_variants(count):
    """Return a comparison of many variants, some with names that matplotlib reads in its own way."""
    names = ["original", "sharded", "_hidden", "a" * 150, "$x^2$", "bell\a", "seventh", "eighth"][:count]
    runs = [
        Sample(name, pair, fake_load(wall=1.0 + place))
        for pair in range(3)
        for place, name in enumerate(names)
    ]
    return fake_comparison(variants=tuple(fake_variant(name, "F16") for name in names), samples=tuple(runs))


@pytest.mark.parametrize("count", [3, 4, 6, 8])
def test_every_variant_has_a_name_at_its_bars_and_at_its_line(count):
    times, _, curves = plot_comparison(with_variants(count))
    rows = [text.get_text() for text in times.get_yticklabels()]
    assert len(set(rows)) == count
    assert len(rows) == len(times.patches) == 2 * count
    held, _ = curves_of(curves)
    assert len(held) == count
    assert set(rows) <= {text.get_text() for text in curves.texts}
    places = sorted(text.xyann[1] for text in curves.texts)
    assert all(after - before > 0.03 * curves.get_ylim()[1] for before, after in pairwise(places))
    figure = times.figure
    figure.draw_without_rendering()
    assert all(ax.get_window_extent().width > 0.45 * figure.bbox.width for ax in (curves, times))


@pytest.mark.parametrize(
    "comparison",
    [
        fake_comparison(anonymous=(14_523 * MB, 1_234 * MB)),
        with_variants(3),
        with_variants(4),
        with_variants(8),
    ],
    ids=["two", "three", "four", "eight"],
)
def test_all_text_lies_inside_the_figure_and_keeps_apart(comparison):
    axes = plot_comparison(comparison)
    figure = axes[0].figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for one in axes:
        box = one.get_tightbbox(renderer)
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
    for one in axes[:2]:
        boxes = [text.get_window_extent(renderer) for text in (*one.get_yticklabels(), *one.texts)]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


@pytest.mark.parametrize(
    "names",
    [
        ("a-model-of-long-name-v1", "a-model-of-long-name-v2", "a-model-of-long-name"),
        ("x" * 40 + "1" + "y" * 40, "x" * 40 + "2" + "y" * 40, "x" * 40 + "3" + "y" * 40),
        ("bell\a", "bell\\x07", "other"),
    ],
)
def test_variants_whose_names_are_alike_when_short_are_all_drawn(names):
    runs = [Sample(name, 0, fake_load(wall=1.0 + place)) for place, name in enumerate(names)]
    found = fake_comparison(variants=tuple(fake_variant(name, "F16") for name in names), samples=tuple(runs))
    times, peaks, curves = plot_comparison(found)
    assert len(times.patches) == len(peaks.patches) == 3 * 2
    assert len({text.get_text() for text in times.get_yticklabels()}) == 3
    assert {text.get_text() for text in times.get_yticklabels()} <= {text.get_text() for text in curves.texts}
    axes = plot_results(results([("m", "1 GB", "float16", "r", name) for name in names]))
    assert len({text.get_text() for text in axes[0].get_yticklabels()}) == 3


def test_where_a_variant_reads_ahead_times_start_with_the_process():
    runs = [
        Sample(name, pair, fake_load(prefetch=name == "sharded", wall=0.5))
        for pair in (0, 1)
        for name in VARIANTS
    ]
    found = fake_comparison(samples=tuple(runs))
    times, _, curves = plot_comparison(found)
    assert {bar.get_width() for bar in times.patches} == {3.5, 4.5}
    assert {"load from process start", "first token from process start"} <= set(words(times))
    assert curves.get_xlabel().startswith("seconds since the start of the process\n")
    marks = [line for line in curves.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [mark.get_xdata()[0] for mark in marks] == [3.5, 3.5]


def test_bars_that_a_system_does_not_report_are_missed_aloud():
    runs = [Sample(name, 0, fake_load(peak_anonymous_bytes=None)) for name in VARIANTS]
    found = fake_comparison(samples=tuple(runs))
    _, peaks, _ = plot_comparison(found)
    assert "peak anonymous (not reported by this system)" in words(peaks)


@pytest.mark.parametrize("backend", ["module://not_here.backend", "nonsense"])
def test_pictures_need_no_backend_of_a_screen(tmp_path, backend):
    fake_comparison().save(tmp_path / "c.json")
    script = (
        "import sys; from shardkit import Comparison; from shardkit.show.plots import plot_bars\n"
        "found = Comparison.load(sys.argv[1] + '/c.json')\n"
        "found.plot(sys.argv[1] + '/a.png'); found.save(sys.argv[1] + '/a.html')\n"
        "plot_bars(found)[0].figure.savefig(sys.argv[1] + '/b.png')"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, check=True)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (tmp_path / "a.html").read_text()


def contrast(color, page):
    """The ratio of two colors' luminance, as the Web's rules for readable text have it."""
    levels = []
    for one in (color, page):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(one)]
        levels.append(0.05 + sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)))
    return max(levels) / min(levels)


def test_own_figures_are_transparent_and_readable_on_white_and_on_dark_pages():
    with plt.style.context("dark_background"):
        axes = plot_comparison(fake_comparison())
    assert mpl.colors.to_rgba(axes[0].figure.get_facecolor())[3] == 0
    assert {mpl.colors.to_rgba(one.get_facecolor())[3] for one in axes} == {0}
    used = {mpl.colors.to_hex(text.get_color()) for one in axes for text in texts(one)}
    assert used == {INK, color(0).lower(), color(1).lower()}
    for page in ("#ffffff", "#0d1117"):
        assert contrast(INK, page) > 4
        assert all(contrast(color(number), page) > 3 for number in range(6))


def test_picture_for_a_page_is_the_same_in_any_theme_and_leaves_pyplot_alone():
    light = comparison_png(fake_comparison())
    with plt.style.context(["dark_background", {"savefig.facecolor": "black"}]):
        before = dict(mpl.rcParams)
        dark = comparison_png(fake_comparison())
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    first, second = (plt.imread(BytesIO(png)) for png in (light, dark))
    assert (first[..., 3] == 0).mean() > 0.5
    assert abs(first - second).mean() < 0.01


def test_given_axes_keep_the_ink_of_their_theme():
    with plt.style.context("dark_background"):
        _, axes = plt.subplots(1, 3)
        plot_bars(fake_comparison(), axes[:2])
        plot_memory(fake_comparison(), axes[2])
    used = {mpl.colors.to_hex(text.get_color()) for one in axes for text in texts(one)}
    assert used == {"#ffffff", color(0).lower(), color(1).lower()}


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_comparison_saves_its_picture(tmp_path, name, start):
    fake_comparison().plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_picture_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    for path in (tmp_path / "missing" / "a.png", tmp_path / "a.nonsense"):
        with pytest.raises(MeasurementError, match="the plot cannot be saved"):
            fake_comparison().plot(path)


def test_killed_variant_is_drawn_as_far_as_it_came():
    killed = tuple(
        Sample(variant, 0, fake_load(outcome="killed" if variant == "original" else "ok"))
        for variant in ("original", "sharded")
    )
    axes = plot_comparison(fake_comparison(samples=killed))
    assert "original (killed)" in words(axes[2])
    assert words(axes[0]).count("killed") == len(axes[0].patches) == 2
    assert "Does not load: original (killed)" in words(axes[0])


def test_nothing_measured_is_said_rather_than_drawn():
    axes = plot_comparison(fake_comparison(samples=(), warm_ups=()))
    assert "nothing was measured" in {text.get_text() for text in axes[0].texts}


def results(keys):
    """Return figures of results as a notebook has them, in which some load knows no peak."""
    names = ["model", "size", "dtype", "result", "variant"]
    index = pd.MultiIndex.from_tuples(keys, names=names) if keys else pd.MultiIndex.from_arrays([[]] * 5)
    times = np.arange(1.0, len(keys) + 1)
    peaks = np.where(times == 1, np.nan, times)
    return pd.DataFrame(
        {
            f"{part}{name}": values * by
            for name, values in (("load time (s)", times), ("peak anonymous (GB)", peaks))
            for part, by in (("", 1), ("lowest ", 0.9), ("highest ", 1.2))
        },
        index,
    )


@pytest.mark.parametrize("count", [1, 300])
def test_many_results_have_a_row_for_each_variant_below_model_size_and_dtype(count):
    names = [("org/m", "2 GB", "float16", f"$run_{n}", v) for n in range(count) for v in (*VARIANTS, "mine")]
    axes = plot_results(results(names[1:]))  # one original does not load
    dots, spread = ([line for line in axes[0].lines if line.get_marker() == of] for of in ("o", "None"))
    assert len(dots) == len(spread) == len(names) - 1
    assert len(axes[1].lines) == 2 * (len(names) - 2)
    assert list(spread[0].get_xdata()) == pytest.approx([0.9, 1.2])
    rows = dict(
        zip(axes[0].get_yticks(), (text.get_text() for text in axes[0].get_yticklabels()), strict=True)
    )
    assert [rows[dot.get_ydata()[0]] for dot in dots] == [name[-1] for name in names[1:]]
    assert dots[0].get_color() == color(1)
    assert "org/m, 2 GB, float16, \\$run_0" in {text.get_text() for text in axes[0].texts}
    figure = axes[0].figure
    assert figure.get_figheight() * 300 < 2**16
    figure.draw_without_rendering()


def test_no_results_are_said_rather_than_drawn():
    axes = plot_results(results([]))
    assert "nothing was measured" in words(axes[0])


def ways(**outcomes):
    """Loads whose further tokens take a second each, or twice as long as those before; or that died."""
    found = {}
    for number, (name, outcome) in enumerate(outcomes.items()):
        further = dataclasses.replace(
            fake_load().phases[2], name="further tokens", wall_seconds=4.0 * 2**number, read_bytes=400 * MB
        )
        run = fake_load(outcome=outcome, token_ids=(1,) * 5, memory_limit_bytes=650 * MB)
        phases = (*run.phases, further) if run.ok else run.phases
        found[name] = dataclasses.replace(run, phases=phases)
    return found


def test_ways_are_drawn_with_what_was_found_of_them(tmp_path):
    runs = ways(wrong="killed", mapped="ok", budget="ok")
    smallest = {"wrong": 700 * MB, "mapped": 300 * MB, "budget": 400 * MB}
    figure = plot_ways(runs, smallest, {"Colab": 650 * MB, "Binder": 350 * MB}, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")
    memory, first, each, read = figure.axes
    said = [{" ".join(text.get_text().split()) for text in texts(axes)} for axes in figure.axes]
    assert "Smallest memory, ways of 3 that fit: Colab 2, Binder 1" in said[0]
    assert {"700 MB", "300 MB", "400 MB", "Colab 650 MB", "Binder 350 MB"} <= said[0]
    assert sorted(line.get_xdata()[0] for line in memory.lines) == [0.35, 0.65]
    assert "Time to first token: no difference" in said[1]
    assert "Time per token: mapped 2x less than budget" in said[2]
    assert {"2 s", "4 s", "died: killed at its limit of 650 MB"} <= said[2]
    assert "Read per token: no difference" in said[3]
    assert [len(axes.patches) for axes in (memory, first, each, read)] == [3, 2, 2, 2]


def test_ways_without_limits_show_what_they_held():
    figure = plot_ways(ways(mapped="ok", budget="ok"), {}, {"Colab": 650 * MB})
    said = {" ".join(text.get_text().split()) for text in texts(figure.axes[0])}
    assert "Peak anonymous memory (no limit could be set), ways of 2 that fit: Colab 0" in said


def test_titles_of_ways_do_not_reach_beyond_their_axes():
    long = ways(
        **{"accelerate, device_map auto with max_memory": "ok", "shardkit within a memory budget": "ok"}
    )
    figure = plot_ways(long, {}, {"Colab": 650 * MB})
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes._left_title.get_window_extent().width <= axes.get_window_extent().width
