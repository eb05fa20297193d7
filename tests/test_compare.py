"""The experiment's order and guard, and what its statistics conclude from samples with a known truth."""

import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from shardkit.base.errors import Cancelled, CheckpointError, MeasurementError, ShardkitError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare import experiment as compare
from shardkit.compare.comparison import Comparison, merge_comparisons
from shardkit.compare.experiment import compare_loads
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.intervals import AT_ANY_TIME, STUDENT, Pairs, conclude, family_errors
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import QUANTITIES, Quantity, Ratio, ratios_of
from shardkit.measure.samples import Sample
from shardkit.shard.engine import shard_checkpoint
from shardkit.show.plots import plot_bars
from shardkit.show.progress import ProgressBar
from shardkit.show.report_page import CARRIED_IN
from tests.fake_loads import MB, VARIANTS, fake_comparison, fake_interpreter, fake_load, fake_variant


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    make_demo_checkpoint(folder / "original", size="5MB")
    shard_checkpoint(folder / "original", folder / "sharded", max_shard_size="1MB")
    return folder / "original", folder / "sharded"


class TestStatistics:
    tokens = tuple(Sample(variant, 0, fake_load(token=1.0, read=MB)) for variant in VARIANTS)

    def test_interval_holds_the_truth_in_95_of_100_cases(self):
        rng = np.random.default_rng(3)
        for count in (2, 3, 5, 10):
            held = 0
            for _ in range(1000):
                first, second = np.exp(rng.normal(0, 0.1, (2, count)))
                low, high = Pairs.of(first, 1.2 * second).interval()
                held += low <= 1.2 <= high
            assert 930 <= held <= 970, count

    def test_intervals_at_any_time_hold_the_truth_after_all_pairs_at_once_in_95_of_100_cases(self):
        logs, missed = np.random.default_rng(3).normal(0.2, 0.1, (600, 20)), {STUDENT: 0, AT_ANY_TIME: 0}
        for ratios in np.exp(logs):
            for law in missed:
                looks = (Pairs.of([1.0] * n, ratios[:n], law).interval() for n in range(4, 21))
                missed[law] += any(not low <= math.exp(0.2) <= high for low, high in looks)
        assert missed[AT_ANY_TIME] <= 600 * 0.05
        assert missed[STUDENT] > 600 * 0.15  # who looks as often at these

    def test_evidence_at_any_time_is_what_the_definition_has(self):
        """Likelihoods of the pairs up to their scale: that is integrated out, and so is the difference."""
        logs = np.array([0.1, 0.3, 0.2, 0.35])
        scales, effects = np.exp(np.linspace(-7, 6, 1500))[:, None], np.linspace(-12, 12, 1501)

        def likelihood(effects):
            squares = ((logs[:, None, None] / scales - effects) ** 2).sum(0)
            return np.trapezoid(np.exp(-squares / 2) * scales ** -len(logs), np.log(scales[:, 0]), axis=0)

        prior = math.sqrt(0.2 / 2 / math.pi) * np.exp(-0.2 * effects**2 / 2)
        evidence = np.trapezoid(prior * likelihood(effects), effects) / likelihood(np.zeros(1))[0]
        found = Pairs.of(np.ones(4), np.exp(logs), AT_ANY_TIME)
        assert found.p_value == pytest.approx(1 / evidence, rel=1e-3)
        assert found.interval(found.p_value)[0] == pytest.approx(1)
        assert Pairs.of(np.ones(3), np.exp(logs[:3]), AT_ANY_TIME).interval() is None
        assert Pairs.of(np.ones(5), np.ones(5), AT_ANY_TIME).interval() == (1, 1)

    def test_drift_common_to_a_pair_cancels(self):
        drift = np.exp(np.random.default_rng(0).normal(0, 1, 6))
        assert Pairs.of(drift, 0.5 * drift).interval() == pytest.approx((0.5, 0.5))

    def test_one_pair_has_a_ratio_but_no_interval(self):
        found = Pairs.of([2.0], [1.0])
        assert (math.exp(found.mean), found.interval(), found.p_value) == (pytest.approx(0.5), None, 1.0)

    @pytest.mark.parametrize(
        ("interval", "conclusion"),
        [
            ((0.97, 1.03), "same"),
            ((0.97, 0.99), "same"),
            ((0.5, 0.9), "less"),
            ((0.90, 0.97), "less"),
            ((1.1, 1.4), "more"),
            ((1.02, 1.30), "more"),
            ((0.8, 1.2), "inconclusive"),
            ((0.94, 1.0), "inconclusive"),
            (None, "inconclusive"),
        ],
    )
    def test_an_interval_without_1_is_a_difference_unless_too_small_to_matter(self, interval, conclusion):
        assert conclude(interval, 0.05) == conclusion

    def test_student_quantiles_are_those_of_the_tables(self):
        tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}
        assert {k: STUDENT.quantile(k + 1) for k in tables} == pytest.approx(tables, rel=0.001)
        assert [STUDENT.quantile(k + 1, 0.01) for k in (2, 5)] == pytest.approx([9.925, 4.032], rel=0.001)
        found = Pairs.of([1.0, 1.0, 1.0], [1.1, 1.3, 1.2])
        assert found.interval(found.p_value)[0] == pytest.approx(1)  # where it ends at 1, p is its error

    def test_errors_of_a_family_are_those_of_holm(self):
        assert family_errors([0.01, 0.5, 0.02]) == pytest.approx([0.05 / 3, 0.05, 0.05 / 2])
        assert family_errors([0.02, 0.02, 0.001]) == pytest.approx([0.05 / 2, 0.05, 0.05 / 3])
        # One that is not clear stops what follows, which is then judged as it was.
        assert family_errors([0.03, 0.02, 0.04]) == pytest.approx([0.05 / 3] * 3)
        assert family_errors([]) == []

    @pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
    def test_the_same_twice_is_called_different_in_5_of_100_comparisons_at_most(self, noise):
        """In any of five quantities, of which two go together; up to what chance does to 600 comparisons."""
        rng, main = np.random.default_rng(0), fake_comparison(samples=self.tokens, warm_ups=()).main
        assert len(main) == 5
        called = alone = 0
        for number in range(600):
            values = np.exp(rng.normal(0, noise, (5, 2, (3, 5, 10)[number % 3])))
            values[1] += values[0]  # the time to the first token has that of the load in it
            found = ratios_of(dict(zip(main, values, strict=True)), main, 0.05).values()
            called += any(ratio.conclusion in ("less", "more") for ratio in found)
            alone += any(Pairs.of(*both).p_value < 0.05 for both in values)
        assert called <= 600 * 0.05 + 2 * math.sqrt(600 * 0.05 * 0.95)
        assert alone > 600 * 0.15  # which is what each on its own would have come to

    @pytest.mark.parametrize("outliers", [0.0, 0.3])
    def test_nor_is_it_where_pairs_are_added_until_all_is_decided(self, outliers):
        """One in three loads may be 20 % off, as on shared cores; 1.3 x is found in fewer than ten pairs."""
        rng, main = np.random.default_rng(1), fake_comparison().main
        ends = {1.0: [], 1.3: []}
        for slower in (1.0,) * 200 + (1.3,) * 60:
            loads = rng.normal(0, 0.05, (2, 20)) + math.log(1.2) * (rng.random((2, 20)) < outliers)
            loads[1] += math.log(slower)
            values = np.exp([loads, loads + rng.normal(0, 0.05, (2, 20)), rng.normal(0, 0.002, (2, 20))])
            for count in range(4, 21):
                pairs = dict(zip(main, values[:, :, :count], strict=True))
                found = [ratio.conclusion for ratio in ratios_of(pairs, main, 0.05, AT_ANY_TIME).values()]
                if "inconclusive" not in found:
                    break
            ends[slower].append((count, found))
        assert sum(bool({"less", "more"} & {*found}) for _, found in ends[1.0]) <= 200 * 0.05
        assert sum(found[0] == "more" for _, found in ends[1.3]) >= 60 * 0.9
        assert np.median([count for count, _ in ends[1.3]]) < 10

    def test_forecast_of_pairs_is_about_right(self):
        rng = np.random.default_rng(5)
        needed = Pairs.of(*np.exp(rng.normal(0, 0.05, (2, 6)))).pairs_to_decide(0.05, 0.05)
        assert 6 < needed < 200
        decided = 0
        for _ in range(40):
            found = Pairs.of(*np.exp(rng.normal(0, 0.05, (2, 4 * needed))))
            decided += conclude(found.interval(), 0.05) != "inconclusive"
        assert decided > 30

    def test_noise_far_above_the_difference_is_not_forecast(self):
        assert Pairs.of([1.0, 1.0], [0.5, 2.0]).pairs_to_decide(0.05, 0.05) is None


class TestVerdict:
    def test_known_ratio_is_found_and_said(self):
        comparison = fake_comparison(ratio=0.5, noise=0.02)
        ratio = comparison.ratios["load_wall_seconds"]
        assert ratio.conclusion == "less"
        assert ratio.low < 0.5 < ratio.high
        assert ratio.ratio == pytest.approx(0.5, rel=0.05)
        assert re.fullmatch(r"[12]\.\d\dx faster \(1\.\d\dx to [2]\.\d*x\)", str(ratio))
        assert f"load time: {ratio}" in comparison.verdict

    def test_slowdown_of_30_percent_is_called(self):
        called = [fake_comparison(1.3, 0.05, seed=s).ratios["load_wall_seconds"] for s in range(20)]
        assert sum(ratio.conclusion == "more" and "slower" in str(ratio) for ratio in called) >= 18

    def test_quiet_same_is_no_difference_and_noisy_same_is_inconclusive(self):
        quiet = fake_comparison(1.0, 0.003).ratios["load_wall_seconds"]
        assert re.fullmatch(r"no difference beyond 5 % \(between .* slower and .* faster\)", str(quiet))
        noisy = fake_comparison(1.0, 0.1).ratios["load_wall_seconds"]
        said = r"inconclusive: between \S+ (% )?slower and \S+ (% )?faster; about \d+ pairs would decide"
        assert re.fullmatch(said, str(noisy))

    @pytest.mark.parametrize(
        ("ratio", "low", "high", "conclusion", "difference"),
        [
            (0.5, 0.4, 0.625, "less", "2x faster (1.6x to 2.5x)"),
            (1.3, 1.1, 1.5, "more", "1.3x slower (1.1x to 1.5x)"),
            (0.95, 0.9, 0.97, "less", "5 % faster (3 % to 10 %)"),
            (0.85, 0.75, 0.97, "less", "1.18x faster (1.03x to 1.33x)"),
            (0.83, 2 / 3, 1.03, "inconclusive", "1.2x faster (between 3 % slower and 1.5x faster)"),
            (0.98, 0.94, 1.0, "inconclusive", "2 % faster (between equal and 6 % faster)"),
            (1.0, 1.0, 1.0, "same", "equal"),
            (0.9996, 0.9996, 0.9996, "same", "equal"),
            (0.99, 0.98, 0.9999, "same", "1 % faster (0 % to 2 %)"),
        ],
    )
    def test_words_and_interval_agree(self, ratio, low, high, conclusion, difference):
        assert conclude((low, high), 0.05) == conclusion
        found = Ratio("load_wall_seconds", 1.0, ratio, ratio, low, high, 5, conclusion, 0.05, 31)
        assert found.difference == difference
        inner = difference.partition("(")[2].rstrip(")") or difference
        side = " faster" * (high < 1 and inner != "equal")
        assert str(found) == {
            "inconclusive": f"inconclusive: {inner}; about 31 pairs would decide",
            "same": f"no difference beyond 5 % ({inner}{side})",
        }.get(conclusion, difference)

    @pytest.mark.parametrize("pairs", [1, 2])
    def test_fewer_than_three_pairs_give_no_verdict_on_time(self, pairs):
        found = fake_comparison(0.25, 0.0001, repeats=pairs, anonymous=(4000 * MB, 400 * MB))
        times = [r for r in found.ratios.values() if QUANTITIES[r.quantity].unit == "seconds"]
        assert len(times) > 2
        for ratio in times:
            assert ratio.conclusion in ("inconclusive", None)
            assert (ratio.low, ratio.high) == (None, None)
        said = f"load time: 4x faster in {pairs} pair{'s' * (pairs > 1)}, too few for a verdict"
        assert found.verdict.startswith(said)
        assert found.ratios["peak_anonymous_bytes"].conclusion == ("less" if pairs == 2 else "inconclusive")

    def test_only_main_quantities_carry_verdicts_and_each_says_the_same_everywhere(self):
        found = fake_comparison(0.6, 0.05)
        rows = {row[0]: row[1:] for row in found.summary().tables[0].rows}
        for ratio in found.ratios.values():
            quantity = QUANTITIES[ratio.quantity]
            original, sharded, difference, verdict = rows[quantity.label]
            assert (original, sharded) == tuple(map(quantity.format, (ratio.original, ratio.other)))
            assert difference == ratio.difference
            assert (verdict == "-") == (quantity not in found.main) == (ratio.conclusion is None)
            assert (f"{quantity.label}: {ratio}" in found.verdict) == (quantity in found.main)
            assert found.to_dict()["ratios"]["sharded"][ratio.quantity]["words"] == str(ratio)

    def test_tokens_after_the_first_are_compared_too(self):
        runs = [
            Sample(v, pair, fake_load(token=by, read=int(by * 100 * MB)))
            for pair in range(4)
            for v, by in zip(VARIANTS, (2.0, 0.5), strict=True)
        ]
        found = fake_comparison(samples=tuple(runs), warm_ups=())
        assert "time per token: 4x faster;" in found.verdict
        assert found.findings()["sharded"]["read per token"] == "4x less"
        assert found.to_frame()["seconds_per_token"].notna().all()
        assert "time per token</th>" in found.to_html()
        none = fake_comparison(
            samples=tuple(
                replace(s, measurement=fake_load(token=1.0, read=100 * MB * (s.variant == "original")))
                for s in runs
            )
        )
        assert none.findings()["sharded"]["read per token"] == "zero, so no ratio"
        row = next(row for row in none.summary().tables[0].rows if row[0] == "read per token")
        assert row == ("read per token", "100 MB", "0 B", "-", "zero, so no ratio")
        assert "per token" not in str(fake_comparison())

    def test_memory_has_its_own_words(self):
        comparison = fake_comparison(anonymous=(4000 * MB, 400 * MB))
        words = str(comparison.ratios["peak_anonymous_bytes"])
        assert words.startswith("10x smaller")
        assert "peak anonymous: 10x smaller" in comparison.verdict

    @pytest.mark.parametrize("seed", range(5))
    def test_a_ratio_is_that_of_the_figures_beside_it(self, seed):
        comparison = fake_comparison(ratio=0.4, noise=0.5, seed=seed)
        for ratio in comparison.ratios.values():
            assert ratio.ratio == pytest.approx(ratio.other / ratio.original)
            assert comparison.mean("sharded", ratio.quantity) == pytest.approx(ratio.other)
        (row,) = (row for row in comparison.summary().tables[0].rows if row[0] == "load time")
        original, sharded, faster = (float(re.sub("[^0-9.].*", "", cell)) for cell in row[1:4])
        scale = [1000 if "ms" in cell else 1 for cell in row[1:3]]
        assert (original / scale[0]) / (sharded / scale[1]) == pytest.approx(faster, rel=0.01)
        assert "geometric mean" in str(comparison)
        assert "median" not in str(comparison)

    def test_figures_are_by_variant(self):
        comparison = fake_comparison(ratio=3.0, noise=0.0)
        ratio = comparison.ratios["load_wall_seconds"]
        assert (ratio.original, ratio.other) == pytest.approx((2.0, 6.0))

    def test_warm_ups_do_not_count(self):
        slow = tuple(Sample(variant, None, fake_load(wall=100.0)) for variant in ("original", "sharded"))
        changed = fake_comparison(warm_ups=slow)
        assert changed.ratios == fake_comparison().ratios
        assert changed.verdict == fake_comparison().verdict

    def test_variant_that_never_loads_is_the_verdict(self):
        samples = tuple(
            Sample(variant, pair, fake_load(outcome="killed" if variant == "original" else "ok"))
            for pair in range(3)
            for variant in ("original", "sharded")
        )
        comparison = fake_comparison(samples=samples)
        assert comparison.verdict == (
            "original does not load (killed: by SIGKILL during load); sharded loads"
        )
        assert comparison.ratios == {}
        assert "3 of 6 runs: original: killed" in str(comparison)

    def test_pair_with_a_failed_run_is_left_out_and_said(self):
        whole = fake_comparison(ratio=0.5, noise=0.0)
        broken = Sample("sharded", 0, fake_load(outcome="timeout"))
        samples = tuple(broken if (s.variant, s.pair) == ("sharded", 0) else s for s in whole.samples)
        comparison = fake_comparison(samples=samples)
        assert comparison.ratios["load_wall_seconds"].ratio == pytest.approx(0.5)
        assert "1 of 10 runs: sharded: timeout" in str(comparison)
        assert comparison.verdict.startswith("sharded: timeout in 1 of 5 runs, figures are from the others; ")

    def test_quantity_that_a_system_does_not_report_is_said_to_be_so(self):
        samples = tuple(
            Sample(variant, pair, fake_load(peak_anonymous_bytes=None, peak_total_bytes=None))
            for pair in range(2)
            for variant in ("original", "sharded")
        )
        found = fake_comparison(samples=samples)
        assert "peak_anonymous_bytes" not in found.ratios
        assert "load_wall_seconds" in found.ratios
        rows = {row[0]: row for row in found.summary().tables[0].rows}
        for quantity in ("peak anonymous", "peak total"):
            assert rows[quantity] == (quantity, "-", "-", "-", "not reported by this system")
        assert "peak anonymous: not reported by this system" in found.verdict
        assert found.findings()["sharded"]["peak anonymous"] == "not reported by this system"
        assert "4 of 4 runs: not reported by this system: peak anonymous, peak total" in str(found)

    def test_forward_pass_that_failed_is_a_row_too_but_none_that_nobody_wanted(self):
        def without_token(**changes):
            run = fake_load(**changes)
            return replace(run, phases=run.phases[:2])

        for generate, said in ((1, True), (0, False)):
            samples = tuple(
                Sample(variant, 0, without_token(generate=generate)) for variant in ("original", "sharded")
            )
            rows = fake_comparison(samples=samples).summary().tables[0].rows
            assert (("time to first token", "-", "-", "-", "not measured") in rows) == said
            assert "peak GPU" not in {row[0] for row in rows}

    def test_time_that_no_clock_can_see_is_a_row_too(self):
        run = fake_load()
        load = replace(run.phase("load"), user_seconds=0.0, system_seconds=0.0)
        quick = replace(run, phases=(run.phases[0], load, run.phases[2]))
        samples = tuple(Sample(variant, 0, quick) for variant in ("original", "sharded"))
        assert "load CPU time  0 ms  0 ms  -" in re.sub(" {2,}", "  ", str(fake_comparison(samples=samples)))
        assert "too small to be measured" in str(fake_comparison(samples=samples))

    def test_a_quantity_that_is_added_to_the_table_is_found_everywhere(self, monkeypatch):
        waited = Quantity("waited_seconds", "time waited", "seconds", plain="main", ahead="main")
        half = property(lambda run: 0.5 * run.load_wall_seconds)
        monkeypatch.setattr(LoadMeasurement, waited.name, half, raising=False)
        monkeypatch.setitem(QUANTITIES, waited.name, waited)
        found = fake_comparison(ratio=0.5, noise=0.0)
        assert "time waited: 2x less" in found.verdict
        assert found.findings()["sharded"]["time waited"].startswith("2x less")
        assert "time waited" in {row[0] for row in found.summary().tables[0].rows}
        assert found.to_dict()["ratios"]["sharded"]["waited_seconds"]["ratio"] == pytest.approx(0.5)
        assert found.to_frame()["waited_seconds"].notna().all()
        assert "time waited</th>" in found.to_html()
        times, _ = plot_bars(found)
        assert "time waited" in {text.get_text() for text in times.texts}


class TestWords:
    def test_says_copied_or_mapped_and_what_was_read_late(self):
        comparison = fake_comparison(anonymous=(700 * MB, 210 * MB))
        assert "bfloat16 in 2 files, requested float16 on cpu: weights copied" in comparison.explain(
            "original"
        )
        assert "float16 in 9 files, requested float16 on cpu: weights stay mapped" in comparison.explain(
            "sharded"
        )
        hint = "requested as bfloat16, the stored dtype, they need no cast"
        assert hint in comparison.explain("original")
        assert "no cast" not in comparison.explain("sharded")
        late = fake_comparison(variants=(fake_variant("original", "BF16", nbytes=300 * MB),))
        assert "171 MB of file pages, including libraries, read for the first token" in late.explain(
            "original"
        )

    def test_variant_that_is_not_there_is_named_with_those_that_are(self):
        with pytest.raises(MeasurementError, match="'shraded': there are original, sharded"):
            fake_comparison().explain("shraded")

    def test_other_tokens_are_said_and_fewer_or_none_hide_no_difference_among_the_others(self):
        def said(*given):
            variants = ("original", "sharded")
            samples = (
                Sample(variants[n % 2], n // 2, fake_load(token_ids=ids)) for n, ids in enumerate(given)
            )
            return "generated different tokens" in str(fake_comparison(samples=tuple(samples)))

        assert said((7, 8), (9, 8), (), (7, 8))
        assert said((7, 8), (7, 9), (7,), ())
        assert not said((7, 8), (7,), (), (7, 8))
        assert not said((), (), (), ())

    def test_small_models_tell_nothing_of_the_kind(self):
        small = fake_comparison(variants=(fake_variant("original", "BF16", nbytes=5 * MB),))
        assert "mapped" not in small.explain("original")
        assert "copied" not in small.explain("original")

    def test_summary_has_time_lines_for_both_variants_and_every_quantity(self):
        text = str(fake_comparison())
        assert text.count("CPU times: user ") == 2
        assert text.count("Wall time: ") == 2
        for word in (
            "load time",
            "load CPU time",
            "first token from process start",
            "peak anonymous",
            "peak total",
        ):
            assert word in text

    def test_text_and_html_say_the_same_and_hostile_names_are_escaped(self):
        hostile = fake_variant("sharded", "F16", source="/m/<script>alert(1)</script>&")
        comparison = fake_comparison(variants=(fake_variant("original", "BF16"), hostile))
        html, text = comparison._repr_html_(), str(comparison)
        assert "<script>" not in html
        assert "<script>alert" not in comparison.to_html()
        from html import escape

        for table in comparison.summary().tables:
            for row in table.rows:
                assert all(cell in text and escape(cell) in html for cell in row)
        for _, value in comparison.summary().facts:
            assert value in text
            assert escape(value) in html

    def test_names_that_are_no_words_do_no_harm(self):
        odd = fake_variant("$^$\n", "F16")
        base = fake_comparison()
        samples = tuple(replace(s, variant=odd.name) if s.variant == "sharded" else s for s in base.samples)
        comparison = fake_comparison(variants=(base.variants[0], odd), samples=samples)
        assert "$^$\\n from" in str(comparison)
        assert comparison.to_html()


class TestPrefetched:
    """A variant that reads ahead works before its load begins: both sides count from process start."""

    @pytest.fixture
    def found(self):
        base = fake_comparison(noise=0.0)
        third = [
            Sample("ahead", s.pair, fake_load(wall=0.1, prefetch=True))
            for s in base.samples
            if s.variant == "sharded"
        ]
        variants = (*base.variants, fake_variant("ahead", "F16"))
        return fake_comparison(noise=0.0, variants=variants, samples=(*base.samples, *third))

    def test_quantities_count_from_process_start(self, found):
        ratios = found.ratios_of("ahead")
        assert list(ratios)[:3] == [
            "start_to_load_seconds",
            "start_to_first_token_seconds",
            "process_cpu_seconds",
        ]
        assert ratios["start_to_first_token_seconds"].ratio == pytest.approx(4.1 / 6)
        assert ratios["process_cpu_seconds"].ratio == pytest.approx((3.09 + 2.1) / (4.8 + 2.1))
        assert list(found.ratios) == list(ratios)

    def test_nothing_shown_counts_from_the_load(self, found):
        for text in (str(found), found.verdict, str(found.findings()), found.to_html()):
            shown = text.split(CARRIED_IN)[0]
            assert "from process start" in shown
            assert not re.search("load time|load CPU time|time to first token|Wall time:", shown)
        assert "ahead, a typical run" in str(found)
        assert "loaded after 3.1 s, first token after 4.1 s, CPU time 5.19 s" in str(found)

    def test_whoever_asks_one_load_is_told(self, found):
        assert "compare times from process start" in str(found.measurements("ahead")[0])
        assert "compare times" not in str(found.measurements("sharded")[0])

    def test_without_one_nothing_changes(self):
        found = fake_comparison()
        assert not found.reads_ahead
        assert list(found.ratios)[:2] == ["load_wall_seconds", "load_cpu_seconds"]
        assert "CPU time from process start" not in str(found)


class TestKeeping:
    def test_survives_saving_and_loading(self, tmp_path):
        comparison = fake_comparison(0.7, 0.03)
        comparison.save(tmp_path / "result.json")
        again = Comparison.load(tmp_path / "result.json")
        assert again == comparison
        assert again.ratios == comparison.ratios
        data = json.loads((tmp_path / "result.json").read_text())
        assert data["verdict"] == comparison.verdict
        told, known = data["ratios"]["sharded"]["load_wall_seconds"], comparison.ratios["load_wall_seconds"]
        assert (told["ratio"], told["conclusion"]) == (known.ratio, known.conclusion)
        assert data["schema"] == "shardkit/Comparison/2"

    def test_card_needs_no_other_file_and_carries_the_result(self, tmp_path):
        comparison = fake_comparison(0.7, notes=("a note with </script> in it",))
        comparison.save(tmp_path / "card.html")
        card = (tmp_path / "card.html").read_text()
        assert Comparison.load(tmp_path / "card.html") == comparison
        assert comparison.verdict.split("; ")[0] in card
        assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', card) == []
        assert 'alt="Wall times and peaks' in card
        assert card.count("warm-up</td>") == 2

    def test_results_merge_into_one_frame_that_names_the_files(self, tmp_path):
        fake_comparison(repeats=3).save(tmp_path / "a.json")
        fake_comparison(repeats=2).save(tmp_path / "b.html")
        frame = merge_comparisons([tmp_path / "a.json", tmp_path / "b.html"])
        assert frame["file"].value_counts().to_dict() == {
            str(tmp_path / "a.json"): 2 + 6,
            str(tmp_path / "b.html"): 2 + 4,
        }
        assert set(frame["stored_dtype"]) == {"bfloat16", "float16"}
        assert (frame["transformers"] == "5.0").all()
        with pytest.raises(MeasurementError, match="no results to merge"):
            merge_comparisons([])

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "shardkit/ShardPlan/1"}'])
    def test_other_files_are_refused(self, tmp_path, content):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ShardkitError):
            Comparison.load(tmp_path / "result.json")

    @pytest.mark.parametrize("figure", [-1, 10**400, "NaN", "Infinity"])
    @pytest.mark.parametrize("name", ["wall_seconds", "peak_total_bytes"])
    def test_figures_that_make_no_sense_are_refused(self, tmp_path, name, figure):
        fake_comparison(repeats=2).save(tmp_path / "result.json")
        saved, count = re.subn(
            rf'("{name}": )[\d.]+', rf"\g<1>{figure}", (tmp_path / "result.json").read_text()
        )
        assert count > 3
        (tmp_path / "result.json").write_text(saved)
        with pytest.raises(ShardkitError, match=r"result\.json: .*(make no sense|not readable)"):
            Comparison.load(tmp_path / "result.json")

    def test_frame_has_a_row_for_each_raw_sample(self):
        comparison = fake_comparison(repeats=4)
        frame = comparison.to_frame()
        assert len(frame) == 2 + 8
        assert frame["pair"].isna().sum() == 2
        counted = frame[frame["pair"].notna()]
        walls = counted.loc[counted["variant"] == "sharded", "load_wall_seconds"]
        assert list(walls) == [m.load_wall_seconds for m in comparison.measurements("sharded")]
        assert frame["first_token_wall_seconds"].notna().all()


class TestExperiment:
    def test_variants_take_turns_and_progress_counts_up_to_the_end(self, variants, monkeypatch):
        order, told = [], []

        def measure(folder, *_, **__):
            order.append("A" if folder == str(variants[0]) else "B")
            return fake_load()

        monkeypatch.setattr(compare, "run_load", measure)
        comparison = compare_loads(*variants, repeats=4, progress=lambda *now: told.append(now))
        assert "".join(order) == "AB" + "ABBA" * 2
        assert [now[0] for now in told] == list(range(11))
        assert {now[1] for now in told} == {10}
        assert told[0][2] == "original, warm-up"
        assert [s.pair for s in comparison.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(comparison.warm_ups) == 2

    @staticmethod
    def loads_of(variants, ratio, noise=0.02):
        """Return loads of which those of the sharded take another time."""
        rng = np.random.default_rng(0)

        def measure(folder, *_, **__):
            wall = 1.0 if folder == str(variants[0]) else ratio
            return fake_load(wall * float(np.exp(rng.normal(0, noise))))

        return measure

    def test_pairs_are_added_until_every_verdict_is_decided(self, variants, monkeypatch, tmp_path):
        monkeypatch.setattr(compare, "run_load", self.loads_of(variants, 1.3))
        said, partial = [], []
        found = compare_loads(
            *variants, repeats="auto", progress=lambda *now: said.append(now), on_sample=partial.append
        )
        pairs = len(found.samples) // 2
        assert 4 <= pairs < 20
        order = [s.variant[0] for s in found.samples]
        assert "".join(order) == ("osso" * pairs)[: 2 * pairs]
        assert {r.conclusion for r in found.ratios.values()} == {"more", "same", None}
        assert [p.is_decided for p in partial[3::2]] == [False] * (pairs - 1) + [True]
        assert said[8] == (8, 42, "sharded, pair 4 of at most 20")
        assert said[-1] == (2 + 2 * pairs, 2 + 2 * pairs, "done")
        assert f"{pairs} pairs (of at most 20; all is decided) in ABBA order" in str(found)
        # Everywhere with wider intervals than those of pairs whose number was fixed.
        fixed = replace(found, most=None)
        found.save(tmp_path / "result.json")
        again = Comparison.load(tmp_path / "result.json")
        assert (again, again.ratios) == (found, found.ratios)
        for name, ratio in found.ratios.items():
            assert ratio.low <= fixed.ratios[name].low <= fixed.ratios[name].high <= ratio.high
        wide, narrow = found.ratios["load_wall_seconds"], fixed.ratios["load_wall_seconds"]
        assert wide.difference != narrow.difference
        for shown in (str(found), found.to_html(), found.verdict, (tmp_path / "result.json").read_text()):
            assert wide.difference in shown
            assert narrow.difference not in shown
        bars = [
            max(np.ptp(line[:, 0]) for line in ax.containers[-1].lines[2][0].get_segments())
            for ax in (plot_bars(one)[0] for one in (found, fixed))
        ]
        assert bars[0] > bars[1]

    def test_what_is_not_decided_ends_with_the_pairs_or_the_time_for_it(self, variants, monkeypatch):
        monkeypatch.setattr(compare, "run_load", self.loads_of(variants, 1.0, noise=0.5))
        found = compare_loads(*variants, repeats="auto", most=6)
        assert len(found.samples) == 12
        assert "6 pairs (of at most 6; not all is decided)" in str(found)
        assert len(compare_loads(*variants, repeats="auto", most_seconds=0).samples) == 2
        assert len(compare_loads(*variants, repeats=3, most=2, most_seconds=0).samples) == 6

    def test_what_does_not_load_needs_no_verdict_and_what_failed_once_does(self, variants, monkeypatch):
        runs = []

        def measure(folder, *_, **__):
            runs.append(folder == str(variants[0]))
            failed = runs[-1] and (dead or runs.count(True) == 2)
            return fake_load(outcome="killed" if failed else "ok")

        monkeypatch.setattr(compare, "run_load", measure)
        dead = True
        found = compare_loads(*variants, repeats="auto")
        assert [s.pair for s in found.samples] == [0, 0]
        assert "original does not load" in found.verdict
        dead = False
        runs.clear()
        found = compare_loads(*variants, repeats="auto")
        assert found.is_decided
        assert len(found.measurements("original")) == 4

    def test_bar_ends_full_where_fewer_runs_were_needed(self):
        with io.StringIO() as text, ProgressBar(file=text, mininterval=0) as bar:
            for done, total in ((0, 42), (9, 42), (10, 10)):
                bar(done, total, "done")
            bar.close()
            assert re.search(r"done: 100%.* 10/10 ", text.getvalue().rpartition("\r")[2])

    def test_more_variants_are_each_compared_with_the_original(self, variants, monkeypatch):
        seen, partial = [], []

        def measure(_, spec, **__):
            seen.append(spec.prefetch)
            return fake_load(wall=1.0 if spec.prefetch else 2.0)

        monkeypatch.setattr(compare, "run_load", measure)
        others = {"prefetched": {"prefetch": True}}
        found = compare_loads(*variants, repeats=3, others=others, on_sample=partial.append)
        assert found.names == ("original", "sharded", "prefetched")
        assert seen == [False, False, True, *(False, False, True, True, False, False) * 1, False, False, True]
        ratios = found.ratios_of("prefetched")  # which worked before its load: 4 s against 5, not 1 against 2
        assert ratios["start_to_load_seconds"].ratio == pytest.approx(0.8)
        assert not {"load_wall_seconds", "time_to_first_token_seconds", "load_cpu_seconds"} & ratios.keys()
        assert found.ratios["start_to_load_seconds"].conclusion == "same"
        assert "prefetched, load from process start: 1.25x faster" in found.verdict
        assert [len(p.samples) for p in partial] == [0, 0, 0, *range(1, 10)]
        assert partial[-1] == found

    @pytest.mark.parametrize(
        ("others", "says"),
        [
            ({"x": {"colour": "red"}}, "variant 'x': colour is not an argument"),
            ({"x": {"dtype": "int7"}}, "variant 'x': dtype 'int7' is not one of"),
            ({"x": {"memory_limit": "bad"}}, "variant 'x': memory_limit: 'bad' is not a size"),
            ({"original": {"prefetch": True}}, "is named 'original'"),
            ({5: {}}, "is named 5"),
            ({"x": None}, "others: "),
            (["x"], "others: "),
        ],
    )
    def test_variants_that_make_no_sense_are_refused_before_any_load(
        self, variants, monkeypatch, others, says
    ):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: pytest.fail("a load was run"))
        with pytest.raises(MeasurementError, match=says):
            compare_loads(*variants, others=others)

    @pytest.mark.parametrize("same_size", [True, False])
    def test_files_that_changed_meanwhile_are_said(self, variants, monkeypatch, tmp_path, same_size):
        sharded = shutil.copytree(variants[1], tmp_path / "sharded")
        weights = max(sharded.glob("*.safetensors"))
        data = weights.read_bytes()

        def measure(*_, **__):
            weights.write_bytes(data if same_size else data + b"x")
            return fake_load()

        monkeypatch.setattr(compare, "run_load", measure)
        assert "the files of sharded changed" in str(compare_loads(variants[0], sharded, repeats=1))
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load())
        assert "changed" not in str(compare_loads(*variants, repeats=1))

    def test_variant_that_vanishes_keeps_what_was_measured_before(self, variants, monkeypatch):
        runs = [fake_load()] * 4

        def measure(folder, *_, **__):
            if not runs:
                raise CheckpointError("no weights", file=folder)
            return runs.pop()

        monkeypatch.setattr(compare, "run_load", measure)
        found = compare_loads(*variants, repeats=5)
        assert len(found.samples) == 2
        assert "ended early: " in str(found)

    def test_pairs_of_which_one_always_failed_give_no_figures_and_say_so(self):
        base = fake_comparison(repeats=2)
        dead = {("original", 0), ("sharded", 1)}
        samples = tuple(
            replace(s, measurement=fake_load(outcome="killed")) if (s.variant, s.pair) in dead else s
            for s in base.samples
        )
        assert "no pair in which both loaded" in fake_comparison(samples=samples).verdict

    def test_variant_that_loaded_in_its_warm_up_alone_is_not_said_to_have_failed_twice(self):
        base = fake_comparison(repeats=3)
        samples = tuple(
            replace(s, measurement=fake_load(outcome="failed")) if s.variant == "sharded" else s
            for s in base.samples
        )
        told = str(fake_comparison(samples=samples))
        assert "sharded loaded in its warm-up" in told
        assert "was not run again" not in told

    def test_other_weights_under_the_same_names_are_refused(self, variants, tmp_path, monkeypatch):
        make_demo_checkpoint(tmp_path / "other", size="5MB", seed=1)
        for most in (compare._COMPARED_BYTES, 300_000):  # lm_head sorts first, and is larger
            monkeypatch.setattr(compare, "_COMPARED_BYTES", most)
            with pytest.raises(ShardkitError, match="differ in their values"):
                compare_loads(variants[0], tmp_path / "other")
        monkeypatch.setattr(compare, "_COMPARED_BYTES", 1)
        assert len(compare._sample_of(Checkpoint.open(variants[0]))) == 1

    def test_verdict_on_the_way_knows_what_has_loaded(self, variants, monkeypatch):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load())
        verdicts = []
        compare_loads(*variants, repeats=2, on_sample=lambda found: verdicts.append(found.verdict))
        assert not any("does not load" in verdict for verdict in verdicts)

    def test_a_cast_is_the_same_model_whichever_comes_first(self, variants, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load())
        shard_checkpoint(variants[0], tmp_path / "cast", dtype="float16", allow_overflow=True)
        assert compare_loads(variants[0], tmp_path / "cast", repeats=1).samples
        assert compare_loads(tmp_path / "cast", variants[0], repeats=1).samples

    def test_progress_that_says_no_stops_it(self, variants, monkeypatch):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load())
        with pytest.raises(Cancelled, match="after 3 of 12 runs"):
            compare_loads(*variants, progress=lambda done, *_: done < 3)

    def test_other_model_is_refused_unless_told(self, variants, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load())
        make_demo_checkpoint(tmp_path / "other", size="7MB")
        with pytest.raises(ShardkitError, match=r"not the same model: \d+ tensors"):
            compare_loads(variants[0], tmp_path / "other")
        allowed = compare_loads(variants[0], tmp_path / "other", repeats=1, same_model=False)
        assert "not required to be the same model" in str(allowed)

    def test_what_neither_variant_loads_is_tried_once(self, variants, monkeypatch):
        monkeypatch.setattr(compare, "run_load", lambda *_, **__: fake_load(outcome="failed"))
        comparison = compare_loads(*variants)
        assert len(comparison.warm_ups) == 2
        assert comparison.samples == ()
        assert "original does not load" in comparison.verdict
        assert "sharded does not load" in comparison.verdict
        assert comparison.to_frame()["outcome"].tolist() == ["failed", "failed"]
        assert comparison._repr_html_()

    def test_a_variant_that_fails_twice_is_not_run_again(self, variants, monkeypatch):
        monkeypatch.setattr(
            compare,
            "run_load",
            lambda folder, *_, **__: fake_load(outcome="killed" if folder == str(variants[0]) else "ok"),
        )
        found = compare_loads(*variants, repeats=4)
        assert [
            s.measurement.outcome for s in (*found.warm_ups, *found.samples) if s.variant == "original"
        ] == [
            "killed",
            "killed",
        ]
        assert len(found.measurements("sharded")) == 4
        assert "original does not load (killed" in found.verdict
        assert "sharded loads" in found.verdict
        assert found.plot() is not None
        assert "original failed twice, and was not run again" in str(found)
        assert "load time 2 s, time to first token 3 s, peak anonymous 700 MB" in str(found)

    def test_where_the_original_dies_the_others_are_compared_with_the_first_that_lives(self):
        base = fake_comparison(ratio=0.5, noise=0.0)
        dead = [Sample("original", s.pair, fake_load(outcome="killed")) for s in base.samples[:2]]
        lives = [s for s in base.samples if s.variant == "sharded"]
        third = [Sample("prefetched", s.pair, fake_load(wall=0.25)) for s in lives]
        variants = (*base.variants, fake_variant("prefetched", "F16"))
        found = fake_comparison(variants=variants, samples=(*dead, *lives, *third), warm_ups=())
        assert found.reference == "sharded"
        assert "prefetched against sharded, load time: 4x faster" in found.verdict
        assert "original does not load" in found.verdict
        assert found.summary().tables[0].columns[:3] == ("geometric mean", "sharded", "prefetched")
        assert list(found.findings()) == ["original against sharded", "prefetched against sharded"]
        assert found.findings()["prefetched against sharded"]["load time"].startswith("4x faster")
        assert "does not load (killed" in found.findings()["original against sharded"]["load time"]

    def test_what_both_load_and_neither_told_is_not_measured(self):
        base = fake_comparison()
        samples = tuple(
            Sample(s.variant, s.pair, replace(s.measurement, phases=s.measurement.phases[:2]))
            for s in base.samples
        )
        told = fake_comparison(samples=samples).findings()["sharded"]
        assert told["time to first token"] == "not measured"
        assert told["load time"].startswith("no difference beyond 5 %")

    @pytest.mark.parametrize(
        "wrong",
        [
            *({"repeats": 0}, {"repeats": "3"}, {"most": 0}, {"most_seconds": math.nan}),
            *({"margin": 0}, {"margin": math.inf}, {"margin": "5%"}),
            *({"cache": "hot"}, {"generate": "3"}, {"timeout": math.nan}),
            *({"device": 0}, {"device": "gpu"}, {"device": "cuda:x"}, {"memory_limit": "bad"}),
        ],
        ids=str,
    )
    def test_wrong_numbers_are_refused(self, variants, wrong):
        with pytest.raises(MeasurementError):
            compare_loads(*variants, **wrong)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_real_processes_with_a_known_difference_are_told_apart(self, variants, tmp_path):
        script = """
            sharded = job["folder"].endswith("sharded")
            with reporter.phase("load"):
                held = bytearray(b"x") * (40_000_000 if sharded else 160_000_000)
                time.sleep(0.1 if sharded else 0.4)
            with reporter.phase("first token"):
                time.sleep(0.2)
            reporter.send("done")
        """
        comparison = compare_loads(*variants, repeats=4, python=fake_interpreter(tmp_path, script))
        ratios = comparison.ratios
        assert ratios["load_wall_seconds"].conclusion == "less", comparison
        assert ratios["time_to_first_token_seconds"].conclusion == "less", comparison
        assert ratios["peak_anonymous_bytes"].conclusion == "less", comparison
        assert math.isclose(ratios["peak_anonymous_bytes"].original, 165 * MB, rel_tol=0.1)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_the_same_twice_is_no_difference_and_a_slowdown_is_called(self, variants, tmp_path):
        """Of what is known here: sleeps and bytes. `make torture` does it with real loads, and counts."""
        load = """
            with reporter.phase("load"):
                held = bytearray(b"x") * 50_000_000
                time.sleep({seconds})
            with reporter.phase("first token"):
                pass
            reporter.send("done")
        """
        usual, slow = (
            fake_interpreter(tmp_path, load.format(seconds=seconds), f"python-{seconds}")
            for seconds in (1.2, 1.56)
        )
        others = {"slowed": {"source": variants[0], "python": slow}}
        found = compare_loads(variants[0], variants[0], repeats=6, python=usual, others=others)
        assert found.ratios["load_wall_seconds"].conclusion in ("same", "inconclusive"), found
        assert found.ratios["peak_anonymous_bytes"].conclusion == "same", found
        slowed = found.ratios_of("slowed")
        assert slowed["load_wall_seconds"].conclusion == "more", found
        assert slowed["peak_anonymous_bytes"].conclusion == "same", found
