"""Pictures: what is drawn, that it can be read, and that it does not depend on a theme."""

import os
import subprocess
import sys
from io import BytesIO

import matplotlib as mpl
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection

from shardkit.base.errors import MeasurementError
from shardkit.measure.samples import Sample
from shardkit.show.canvas import look
from shardkit.show.plots import (
    comparison_png,
    plot_bars,
    plot_comparison,
    plot_medians,
    plot_memory,
)
from tests.fake_loads import MB, VARIANTS, fake_comparison, fake_load, fake_variant


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def texts(axes):
    """Every visible text on some axes."""
    axes.figure.draw_without_rendering()
    found = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    found += [axes._left_title, *axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
    if axes.get_legend():
        found += axes.get_legend().get_texts()
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def test_bars_show_means_and_every_run():
    comparison = fake_comparison(ratio=0.5, noise=0.02, anonymous=(4000 * MB, 400 * MB))
    times, peaks = plot_bars(comparison)
    for axes, quantities, scale in (
        (times, ("load_wall_seconds", "time_to_first_token_seconds"), 1),
        (peaks, ("peak_anonymous_bytes", "peak_total_bytes"), 1e9),
    ):
        heights = sorted(bar.get_height() for bar in axes.patches)
        means = sorted(comparison.mean(variant, q) / scale for variant in VARIANTS for q in quantities)
        assert heights == pytest.approx(means)
        dots = [found for found in axes.collections if isinstance(found, PathCollection)]
        assert sum(len(found.get_offsets()) for found in dots) == 4 * 5
    labels = [text.get_text().strip() for text in texts(peaks)]
    assert {"4 GB", "400 MB", "peak anonymous", "peak total", "GB"} <= set(labels)


def test_variants_differ_by_more_than_colour():
    times, _ = plot_bars(fake_comparison())
    assert len({bar.get_hatch() or "" for bar in times.patches}) == 2
    curves = plot_memory(fake_comparison())
    assert len({area.get_hatch() or "" for area in curves.collections}) == 2


def test_curves_start_with_the_load_and_mark_its_phases():
    axes = plot_memory(fake_comparison())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    for label in ("original: anonymous", "sharded: with file pages", "end of load", "end of first token"):
        assert label in labels
    marks = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(marks) == 2
    assert all(1.8 < mark.get_xdata()[0] < 2.2 for mark in marks)
    assert min(axes.lines[0].get_xdata()) >= -0.2


def test_given_axes_are_drawn_on():
    figure, axes = plt.subplots(1, 3)
    assert list(plot_bars(fake_comparison(), axes[:2])) == list(axes[:2])
    assert plot_memory(fake_comparison(), axes[2]) is axes[2]
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
def test_every_variant_has_a_name_and_a_look_of_its_own(count):
    times, _, curves = plot_comparison(with_variants(count))
    shown = {text.get_text() for text in times.get_legend().get_texts()}
    assert len(shown) == count
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in times.patches}
    assert len(looks) == count
    lines = [line for line in curves.lines if "with file pages" in line.get_label()]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count
    figure = times.figure
    figure.draw_without_rendering()
    assert all(
        ax.get_window_extent().width > 0.45 * figure.bbox.width for ax in (curves, *([times] * (count > 3)))
    )


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
def test_all_text_lies_inside_the_figure_and_tick_labels_keep_apart(comparison):
    axes = plot_comparison(comparison)
    figure = axes[0].figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for one in axes:
        box = one.get_tightbbox(renderer)
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
    for one in axes[:2]:
        boxes = [label.get_window_extent(renderer) for label in one.get_xticklabels()]
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
    assert len({text.get_text() for text in times.get_legend().get_texts()}) == 3
    lines = [line.get_label() for line in curves.lines if "with file pages" in line.get_label()]
    assert len(set(lines)) == 3
    index = pd.MultiIndex.from_product([names[:2], names])
    axes = plot_medians(pd.DataFrame({"load (s)": range(6), "peak (GB)": range(6)}, index), names).axes
    assert len({text.get_text() for text in axes[0].get_yticklabels()}) == 2
    assert len(set(axes[0].get_legend_handles_labels()[1])) == 3


def test_where_a_variant_reads_ahead_times_start_with_the_process():
    runs = [
        Sample(name, pair, fake_load(prefetch=name == "sharded", wall=0.5))
        for pair in (0, 1)
        for name in VARIANTS
    ]
    found = fake_comparison(samples=tuple(runs))
    times, _, curves = plot_comparison(found)
    assert {bar.get_height() for bar in times.patches} == {3.5, 4.5}
    shown = " ".join(text.get_text() for text in texts(times))
    assert "load\nfrom process start" in shown
    assert "first token\nfrom process start" in shown
    assert curves.get_xlabel() == "seconds since the start of the process"
    marks = [line for line in curves.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [mark.get_xdata()[0] for mark in marks] == [3.5, 3.5]


def test_bars_that_a_system_does_not_report_are_missed_aloud():
    runs = [Sample(name, 0, fake_load(peak_anonymous_bytes=None)) for name in VARIANTS]
    found = fake_comparison(samples=tuple(runs))
    _, peaks, _ = plot_comparison(found)
    assert "peak anonymous\n(not reported by this system)" in "".join(t.get_text() for t in texts(peaks))


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


def test_own_figures_are_black_on_white_in_a_dark_theme():
    with plt.style.context("dark_background"):
        axes = plot_comparison(fake_comparison())
    assert mpl.colors.to_hex(axes[0].figure.get_facecolor()) == "#ffffff"
    assert {mpl.colors.to_hex(text.get_color()) for one in axes for text in texts(one)} == {"#000000"}


def test_picture_for_a_page_is_the_same_in_any_theme_and_leaves_pyplot_alone():
    light = comparison_png(fake_comparison())
    with plt.style.context(["dark_background", {"savefig.facecolor": "black"}]):
        before = dict(mpl.rcParams)
        dark = comparison_png(fake_comparison())
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    first, second = (plt.imread(BytesIO(png))[..., :3] for png in (light, dark))
    assert (first == 1).all(axis=2).mean() > 0.6
    assert abs(first - second).mean() < 0.01


def test_given_axes_keep_the_ink_of_their_theme():
    with plt.style.context("dark_background"):
        _, axes = plt.subplots(1, 3)
        plot_bars(fake_comparison(), axes[:2])
        plot_memory(fake_comparison(), axes[2])
    assert {mpl.colors.to_hex(text.get_color()) for one in axes for text in texts(one)} == {"#ffffff"}


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
    assert "killed" in {text.get_text() for text in axes[2].texts}
    assert len(axes[0].patches) == 2


def test_nothing_measured_is_said_rather_than_drawn():
    axes = plot_comparison(fake_comparison(samples=(), warm_ups=()))
    assert "nothing was measured" in {text.get_text() for text in axes[0].texts}


def test_three_variants_fit_into_the_picture():
    base = fake_comparison()
    third = tuple(Sample("prefetched", s.pair, s.measurement) for s in base.samples if s.variant == "sharded")
    found = fake_comparison(
        variants=(*base.variants, fake_variant("prefetched", "F16")), samples=(*base.samples, *third)
    )
    times, *_ = plot_comparison(found)
    assert len(times.patches) == 3 * 2
    assert len({bar.get_hatch() or "" for bar in times.patches}) == 3


@pytest.mark.parametrize("count", [1, 700])
def test_medians_of_many_results_have_a_bar_for_each_variant_in_its_colour(count):
    names = [(f"$run_{number}", variant) for number in range(count) for variant in (*VARIANTS, "mine")]
    index = pd.MultiIndex.from_tuples(names[1:], names=["result", "variant"])  # one original does not load
    medians = pd.DataFrame(
        {"load (s)": range(1, len(names)), "peak (GB)": [None, *range(2, len(names))]}, index
    )
    figure = plot_medians(medians, [*VARIANTS, "mine"])
    assert [len(axes.patches) for axes in figure.axes] == [len(names) - 1, len(names) - 2]
    color = mpl.colors.to_rgb(look(2)["color"])
    assert figure.axes[0].patches[-1].get_facecolor()[:3] == pytest.approx(color)
    assert figure.get_figheight() * 300 < 2**16
    figure.draw_without_rendering()


def test_no_medians_are_said_rather_than_drawn():
    index = pd.MultiIndex.from_tuples([], names=["result", "variant"])
    axes, _ = plot_medians(pd.DataFrame({"load (s)": [], "peak (GB)": []}, index), VARIANTS).axes
    assert "nothing was measured" in [text.get_text() for text in texts(axes)]
