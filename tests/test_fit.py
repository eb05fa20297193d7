"""The least memory for a load: the search by itself, and one for real."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import measure_load, minimum_memory
from shardkit.compare import fit
from shardkit.compare.fit import LimitedRun, _bracket, _search
from shardkit.errors import Cancelled, MeasurementError
from shardkit.measure import limit
from shardkit.measure.limit import why_unlimited
from tests.fake_loads import MB, fake_load
from tests.test_limit import elsewhere, needs_groups  # noqa: F401 - a fixture

GB = 10**9


def search(guess, load, token, *, tolerance=0.05, most=96 * GB):
    """Return what the search ran, for floors that are known, and the run that ended it, if one did."""
    runs = []

    def run(limit):
        runs.append(LimitedRun(limit, limit >= load, limit >= token, 1.0, "an end"))

    return runs, _search(run, runs, guess, tolerance, most)


@given(
    load=st.integers(30 * MB, 40 * GB),
    more=st.one_of(st.just(1.0), st.floats(1, 1.6), st.floats(1, 100)),
    error=st.floats(-1, 1).map(lambda power: 10**power),
    tolerance=st.sampled_from([0.05, 0.05, 0.2, 0.01]),
)
def test_search_ends_close_above_both_floors_however_wrong_the_guess(load, more, error, tolerance):
    token = min(int(load * more), 90 * GB)
    runs, odd = search(int(load * error), load, token, tolerance=tolerance)
    assert odd is None
    assert len(runs) <= (20 if tolerance >= 0.05 else 25)
    for floor, goal in ((load, "loaded"), (token, "generated")):
        failed, succeeded = _bracket(runs, goal)
        assert 0 < failed < floor <= succeeded <= failed * (1 + tolerance)


@pytest.mark.parametrize("load", [0.3, 0.70, 1.0, 3.0])
@pytest.mark.parametrize("more", [1.0, 1.04, 1.5, 4.0])
def test_floors_in_the_usual_places_take_few_loads(load, more):
    runs, odd = search(GB, int(load * GB), int(load * more * GB))
    assert odd is None
    assert len(runs) <= 15


def test_no_limit_is_tried_twice_nor_above_the_most():
    runs, _ = search(GB, 40 * GB, 47 * GB, most=48 * GB)
    limits = [run.limit_bytes for run in runs]
    assert len(limits) == len(set(limits))
    assert max(limits) <= 48 * GB


def test_good_guess_takes_two_loads():
    limits = [run.limit_bytes for run in search(1000 * MB, 1001 * MB, 1001 * MB)[0]]
    assert limits == pytest.approx([1000 * MB, 1045 * MB])


@pytest.mark.parametrize(
    ("guess", "load", "token", "ends_at"),
    [
        (GB, 100 * GB, 100 * GB, 96 * GB),
        (GB, GB, 100 * GB, 96 * GB),
        (10**12, 100 * GB, 100 * GB, 96 * GB),
        (GB, 0, 0, MB),
        (5000, 0, 0, MB),
    ],
)
def test_floor_outside_of_all_limits_ends_with_the_outermost(guess, load, token, ends_at):
    runs, odd = search(guess, load, token)
    assert odd.limit_bytes == ends_at
    assert odd in runs


@pytest.mark.skipif(why_unlimited() is not None, reason=f"memory cannot be limited here: {why_unlimited()}")
def test_a_load_succeeds_above_its_floor_and_fails_below(demo):
    seen = []
    floor = minimum_memory(demo, dtype="float16", tolerance=0.1, progress=seen.append)
    assert tuple(seen) == floor.runs
    assert floor.load_bytes <= floor.first_token_bytes <= 1.1 * floor.first_token_failed_bytes
    assert floor.predicted_bytes == pytest.approx(floor.load_bytes, rel=0.2)
    above = measure_load(demo, dtype="float16", memory_limit=int(1.1 * floor.first_token_bytes))
    below = measure_load(demo, dtype="float16", memory_limit=int(0.85 * floor.load_bytes), timeout=60)
    assert above.ok, above.reason
    assert below.outcome in ("killed", "timeout")
    assert all(run.end in str(floor) for run in floor.runs)


def test_search_stops_when_asked(demo, monkeypatch):
    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "run_load", lambda *_, **__: fake_load())
    with pytest.raises(Cancelled, match="after 1 limited load"):
        minimum_memory(demo, progress=lambda _: False)


@pytest.mark.usefixtures("elsewhere")
def test_without_limits_the_prediction_is_told(demo):
    assert limit.why_unlimited()
    with pytest.raises(MeasurementError, match=r"no memory limit.*takes about 27\d MB"):
        minimum_memory(demo)


@needs_groups
def test_load_that_fails_anyway_is_refused(demo):
    with pytest.raises(MeasurementError, match="does not load without a limit"):
        minimum_memory(demo, python="/bin/false")


@pytest.mark.parametrize("tolerance", [0, -0.05, 1e-9, float("nan"), float("inf"), "x"])
def test_tolerance_that_nobody_can_reach_is_refused_before_any_load(demo, monkeypatch, tolerance):
    monkeypatch.setattr(fit, "run_load", lambda *_, **__: pytest.fail("a load was run"))
    with pytest.raises(MeasurementError, match="tolerance: "):
        minimum_memory(demo, tolerance=tolerance)


@pytest.mark.parametrize("lives", [True, False])
def test_limit_that_decides_nothing_is_an_error_with_how_loads_ended(demo, monkeypatch, lives):
    def measure(_, spec):
        return fake_load(outcome="ok" if lives or spec.memory_limit is None else "killed")

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "run_load", measure)
    with pytest.raises(MeasurementError, match=r"no smallest memory limit .* ended as (ok|killed)"):
        minimum_memory(demo)


def test_what_weakens_the_load_without_a_limit_is_told(demo, monkeypatch):
    def measure(_, spec):
        return fake_load(
            outcome="ok" if (spec.memory_limit or 10**9) > 300 * MB else "killed", notes=("made at random",)
        )

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "run_load", measure)
    assert "! made at random" in str(minimum_memory(demo))


def specs_seen(monkeypatch, *names):
    """Have loads live above 300 MB; return what of their specs is seen, in turn."""
    seen = []

    def measure(_, spec):
        seen.append(tuple(getattr(spec, name) for name in names))
        return fake_load(outcome="ok" if (spec.memory_limit or 10**9) > 300 * MB else "killed")

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "run_load", measure)
    return seen


def test_options_go_with_every_load(demo, monkeypatch):
    seen = specs_seen(monkeypatch, "options", "loader")
    floor = minimum_memory(demo, options={"trust_remote_code": True}, loader=__file__)
    assert seen == [({"trust_remote_code": True}, __file__)] * (1 + len(floor.runs))


def test_a_budget_is_the_limit_of_each_load(demo, monkeypatch):
    seen = specs_seen(monkeypatch, "memory_limit", "max_memory")
    floor = minimum_memory(demo, within_budget=True)
    assert seen == [(None, None), *((run.limit_bytes, run.limit_bytes) for run in floor.runs)]


def test_model_without_a_first_token_is_not_said_to_need_memory_for_it(demo, monkeypatch):
    def measure(_, spec):
        run = fake_load(outcome="ok" if (spec.memory_limit or 10**9) > 300 * MB else "killed")
        return dataclasses.replace(run, phases=run.phases[:2])

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "run_load", measure)
    floor = minimum_memory(demo)
    assert not floor.has_first_token
    assert dict(floor.summary().facts)["to the first token"] == "not reached without a limit either"
    assert "from process start to its end" in str(floor)
