"""The least memory for a load: the search by itself, and one for real."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import Cancelled, MeasurementError, measure_load, minimum_memory
from shardkit.fit import _bracket, _step
from shardkit.measure import limit
from shardkit.measure.limit import why_unlimited
from tests.test_limit import elsewhere  # noqa: F401 - a fixture

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
    with pytest.raises(MeasurementError, match=r"no memory limit.*takes about 26\d MB"):
        minimum_memory(demo)


def test_load_that_fails_anyway_is_refused(demo):
    with pytest.raises(MeasurementError, match="does not load without a limit either"):
        minimum_memory(demo, python="/bin/false")
