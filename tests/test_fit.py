"""The least memory for a load: the search by itself, and one for real."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import Cancelled, MeasurementError, fit, measure_load, minimum_memory
from shardkit.fit import _bracket, _step
from shardkit.measure import limit
from shardkit.measure.limit import why_unlimited
from tests.fake_loads import MB, fake_load
from tests.test_limit import elsewhere, needs_groups  # noqa: F401 - a fixture

GB = 10**9


@given(
    floor=st.integers(20 * 10**6, 2000 * GB),
    error=st.floats(0.2, 5),
    tolerance=st.sampled_from([0.01, 0.05, 0.2]),
)
def test_search_ends_close_above_the_floor_however_wrong_the_guess(floor, error, tolerance):
    tried = []
    while (size := _step(tried, int(floor * error), tolerance)) is not None:
        tried.append((size, size >= floor))
        assert len(tried) < 20
    failed, succeeded = _bracket(tried)
    assert failed < floor <= succeeded <= failed * (1 + tolerance)


def test_good_guess_takes_two_loads():
    tried = [(1000, False)]
    tried.append((_step(tried, 1000, 0.05), True))
    assert _step(tried, 1000, 0.05) is None


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


@pytest.mark.skipif(why_unlimited() is not None, reason=f"memory cannot be limited here: {why_unlimited()}")
def test_search_stops_when_asked(demo):
    with pytest.raises(Cancelled, match="after 1 limited load"):
        minimum_memory(demo, progress=lambda _: False)


@pytest.mark.usefixtures("elsewhere")
def test_without_limits_the_prediction_is_told(demo):
    assert limit.why_unlimited()
    with pytest.raises(MeasurementError, match=r"no memory limit.*takes about 27\d MB"):
        minimum_memory(demo)


@needs_groups
def test_load_that_fails_anyway_is_refused(demo):
    with pytest.raises(MeasurementError, match="does not load without a limit either"):
        minimum_memory(demo, python="/bin/false")


@pytest.mark.parametrize("tolerance", [0, -0.05, 1e-9, float("nan"), float("inf"), "x"])
def test_tolerance_that_nobody_can_reach_is_refused_before_any_load(demo, monkeypatch, tolerance):
    monkeypatch.setattr(fit, "measure_load", lambda *_, **__: pytest.fail("a load was run"))
    with pytest.raises(MeasurementError, match="tolerance is"):
        minimum_memory(demo, tolerance=tolerance)


@pytest.mark.parametrize("lives", [True, False])
def test_limit_that_decides_nothing_is_an_error_with_how_loads_ended(demo, monkeypatch, lives):
    def measure(*_, memory_limit=None, **__):
        return fake_load(outcome="ok" if lives or memory_limit is None else "killed")

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "measure_load", measure)
    with pytest.raises(MeasurementError, match=r"no least memory .* ended as (ok|killed)"):
        minimum_memory(demo)


def test_what_weakens_the_load_without_a_limit_is_told(demo, monkeypatch):
    def measure(*_, memory_limit=10**9, **__):
        return fake_load(outcome="ok" if memory_limit > 300 * MB else "killed", notes=("made at random",))

    monkeypatch.setattr(fit, "why_unlimited", lambda: None)
    monkeypatch.setattr(fit, "measure_load", measure)
    assert "! made at random" in str(minimum_memory(demo))
