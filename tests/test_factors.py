"""What changes one by one do: which loads are compared, and what is said and drawn of them."""

import re
from dataclasses import replace
from operator import ne

import pytest

from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare.factors import Cell, choose_cells, effects, make_sources
from shardkit.measure.quantities import QUANTITIES
from shardkit.measure.samples import ORIGINAL, SHARDED, Sample
from shardkit.show.effects import plot_effects
from tests.fake_loads import MB, fake_comparison, fake_load, fake_variant

FEW = choose_cells()
PEAK = QUANTITIES["peak_anonymous_bytes"]


def compared(cells, load, pairs=3):
    """A comparison of cells whose loads are made by ``load(cell, pair)``."""
    names = [ORIGINAL, SHARDED, *map(str, cells[2:])]
    samples = [
        Sample(name, pair, load(cell, pair))
        for pair in range(pairs)
        for name, cell in zip(names, cells, strict=True)
    ]
    return replace(
        fake_comparison(samples=()),
        variants=tuple(fake_variant(name, "BF16") for name in names),
        samples=tuple(samples),
    )


def only_dtype_helps(cell, pair):
    """Ten MB more for each pair, so that there is something to vary."""
    anonymous = (300 if cell.dtype == "float16" else 900) * MB
    return fake_load(2.0 + pair / 10, anonymous + 10 * pair * MB, prefetch=cell.loader == "prefetch")


def test_all_combinations_or_one_change_at_a_time_begin_with_the_original_and_its_shards():
    assert [sum(map(ne, cell, Cell())) for cell in FEW] == [0, 1, 1, 1, 1, 2]
    cells = choose_cells(full=True)
    assert len(set(cells)) == len(cells) == 3 * 2 * 2 * 2
    assert set(FEW) < set(cells)
    assert FEW[:2] == cells[:2] == (Cell(), Cell(files=8))


def test_sources_are_what_the_cells_say(demo, tmp_path):
    sources = make_sources(demo, tmp_path, FEW)
    for cell, folder in sources.items():
        made = Checkpoint.open(folder)
        assert len(made.files) == cell.files
        assert all(file.endswith(cell.format) for file in made.files)
        assert [*made.dtypes] == [{"bfloat16": "BF16", "float16": "F16"}[cell.dtype]]
        assert made.tensors.keys() == Checkpoint.open(demo).tensors.keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_sources(demo, tmp_path, FEW) == sources
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("full", [False, True])
def test_what_moves_a_quantity_is_found_and_nothing_else(full):
    cells = choose_cells(full=full)
    found = {stack: compared(cells, only_dtype_helps) for stack in ("2024", "today")}
    changes = effects(found, cells)
    conclusions = {(one.change, one.stack): one.ratios[PEAK].conclusion for one in changes}
    helps = "float16 instead of bfloat16"
    less = {change for (change, _), said in conclusions.items() if said == "less"}
    assert less == {helps, "8 float16 files instead of 1 bfloat16"}
    assert set(conclusions.values()) == {"less", "same"}
    assert len(conclusions) == 2 * (6 if full else 5) + 1
    said = {(one.change, one.stack): str(one) for one in changes}
    assert said[helps, "today"].startswith(f"{helps}, today: peak anonymous 2.9")
    assert said["stack of today instead of 2024", ""].endswith(
        ": no difference in load time, time to first token, peak anonymous, peak total"
    )
    contexts = {len(one.pairs[PEAK][0]) for one in changes if one.change == helps}
    assert contexts == {12 if full else 3}, "combinations, or pairs of the one there is"


def test_times_of_what_prefetches_count_from_process_start():
    changes = effects({"today": compared(FEW, only_dtype_helps)}, FEW)
    prefetched = next(one for one in changes if one.change == "prefetch instead of plain")
    time = QUANTITIES["load_wall_seconds"]
    assert prefetched.pairs[time][0] == pytest.approx([5.0, 5.1, 5.2])
    assert changes[0].pairs[time][0] == pytest.approx([2.0, 2.1, 2.2])


def test_a_change_that_nothing_loads_with_is_left_out_and_the_picture_names_what_matters(tmp_path):
    loads = compared(FEW, lambda cell, pair: (
        fake_load(outcome="failed") if cell.format == ".bin" else only_dtype_helps(cell, pair)
    ))  # fmt: skip
    changes = effects({"2024": loads, "today": loads}, FEW)
    assert ".bin" not in "".join(map(str, changes))
    figure = plot_effects(changes, tmp_path / "effects.png")
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in figure.axes]
    assert titles[0] == "Load time: no change is clear"
    assert re.fullmatch(r"Peak anonymous: 2\.9\dx smaller \(float16, 2024\)", titles[2])
    assert len(figure.axes[0].get_yticklabels()) == 5
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")
