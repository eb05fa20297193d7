"""The app without a browser: what its widgets say, what its threads do, what it refuses."""

import json
import re
import shutil
import sys
import threading
import time
from base64 import b64decode
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median

import psutil
import pytest

import shardkit
from shardkit import ShardApp
from shardkit.app import compare_step, page
from shardkit.app.job_thread import Worker
from shardkit.app.plan_step import shard_sizes
from shardkit.base.errors import CheckpointError, DestinationError, ShardkitError, SizeError
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare import experiment as compare
from shardkit.demo import demo_shape
from shardkit.formats.tensor import TensorInfo
from shardkit.measure.launch import UNTRUSTED
from shardkit.shard import engine as write
from shardkit.sources.local import LocalFiles
from tests.fake_loads import fake_interpreter, fake_load
from tests.support import Tensor, write_checkpoint

PATIENCE = 60


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    Worker.to_stop.set()
    assert not [t for t in threading.enumerate() if t.name == "shardkit-app" and not _ends(t)]


def _ends(thread):
    thread.join(PATIENCE)
    return not thread.is_alive()


@pytest.fixture
def demo():
    shardkit.make_demo_checkpoint("demo", size="6MB")
    return "demo"


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes a while for each range of a shard, and counts them."""
    written = []
    real = write.run_task

    def run_task(task):
        if task.path.endswith(".safetensors"):
            written.append(task.path)
            time.sleep(0.15)
        return real(task)

    monkeypatch.setattr(write, "run_task", run_task)
    return written


@pytest.fixture
def instant_loads(monkeypatch):
    """Loads that never happened, and what was asked of them."""
    asked = []
    monkeypatch.setattr(compare, "run_load", lambda _, spec, **__: asked.append(spec) or fake_load())
    return asked


def opened(source, **settings):
    app = ShardApp(source, **settings)
    assert app.wait(PATIENCE)
    return app


def button(app, text):
    found = [w for w in everything(app.widget) if getattr(w, "_view_name", "") == "ButtonView"]
    return next(w for w in found if w.description == text)


def click(app, text):
    """Press a button, and wait for what it starts."""
    button(app, text).click()
    assert app.wait(PATIENCE)


def enter(app, source):
    """Type what is to be opened, and wait."""
    control(app, "Checkpoint").value = source
    assert app.wait(PATIENCE)


def works(found):
    """Whether a button looks as if it did something; none is disabled, which would take the focus from it."""
    assert not found.disabled
    return "sk-dim" not in found._dom_classes


def primary(app):
    return [w.description for w in everything(app.widget) if getattr(w, "button_style", "") == "primary"]


def unfolded(app):
    return [step.title for step in app._steps if step._body.layout.display != "none"]


def control(app, label):
    return next(w for w in everything(app.widget) if getattr(w, "description", None) == label)


def everything(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from everything(child)


def html(app):
    """All that the app says, without its styles."""
    said = "".join(w.value for w in everything(app.widget) if w._view_name == "HTMLView")
    return re.sub(r"<style.*?</style>", "", said, flags=re.DOTALL)


def words(app):
    """What a person reads of it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html(app)))


def alerts(app):
    return re.findall(r'role="alert".*?</div>', html(app), flags=re.DOTALL)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def mistral_7b():
    """The true shapes of Mistral-7B in two files, headers alone."""
    tensors, offset = {}, 0
    for name, shape in demo_shape("14.5GB").tensors():
        nbytes = 2 * prod(shape)
        tensors[name] = TensorInfo(name, "BF16", shape, f"{offset // 8 * 10**9}.safetensors", offset, nbytes)
        offset += nbytes
    return Checkpoint("/m", LocalFiles("/m"), "safetensors", "model", ("model.safetensors",), tensors)


class TestChoose:
    def test_opening_shows_what_it_holds_and_where_it_fits(self, demo):
        app = opened(demo, dtype="float16")
        said = words(app)
        assert "MistralForCausalLM" in said
        columns = ("original as stored, in bfloat16", "original in float16, as the shards")
        assert " ".join((*columns, "these shards, in float16")) in said
        for host in ("this machine", "Colab", "Kaggle", "Binder"):
            assert host in said
        assert re.search(r"Colab T4 16.1 GB fits: .* in float16 .* Colab 81.9 GB download and shards", said)
        assert not alerts(app)

    def test_the_original_is_estimated_once_for_each_dtype(self, demo, monkeypatch):
        estimated, real = [], Checkpoint.estimate
        monkeypatch.setattr(Checkpoint, "estimate", lambda *of: estimated.append(of[1]) or real(*of))
        app = opened(demo)
        for size in ("2 MB", "3 MB", "4 MB"):
            control(app, "Max shard size").value = size
        control(app, "Dtype of shards").value = "float16"
        assert sorted(map(str, estimated)) == ["None", "bfloat16", "float16"]

    def test_shards_get_no_credit_for_what_the_original_has_as_stored(self, monkeypatch):
        monkeypatch.setattr(Checkpoint, "open", lambda _: mistral_7b())
        app = opened("mistral-7b")
        already = "Loaded in bfloat16, as stored, the original needs about 271 MB already"
        assert f"{already}: for memory you need no shards. They help to copy" in words(app)
        control(app, "Dtype of shards").value = "float16"
        said = words(app)
        assert f"{already}: for memory you need no shards. Write float16 only where you must run" in said
        assert "there the original needs about 14.8 GB of RAM, these shards about 271 MB" in said
        needed = re.search(r"memory to load cannot be evicted (.*?) mapped", said)[1]
        assert needed == "about 271 MB about 14.8 GB about 271 MB"
        for size in range(len(control(app, "Strategy").options)):
            control(app, "Strategy").index = size
            assert already in words(app)
        verdicts = re.search(r"Colab 12.7 GB(.*?)Kaggle", said)[1]
        assert re.findall("[✓!✗]", verdicts) == ["!", "✗", "!"]

    def test_fewer_bits_are_credited_with_the_disk_they_save(self, tmp_path):
        write_checkpoint(tmp_path / "wide", [{"w": Tensor("F32", (2**20,), bytes(2**22))}])
        app = opened("wide", dtype="bfloat16")
        assert "Write bfloat16 if its precision is enough: 2.1 MB on disk instead of 4.19 MB" in words(app)
        control(app, "Dtype of shards").value = ""
        assert "for memory you need no shards. They help to copy" in words(app)

    def test_checkpoints_that_lie_here_and_in_the_cache_are_suggested(self, tmp_path, monkeypatch):
        shardkit.make_demo_checkpoint("demo", size="6MB")
        Path("empty").mkdir()
        snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        assert "org/name" not in control(ShardApp(), "Checkpoint").options
        (snapshot / "model.safetensors").touch()
        offered = control(ShardApp(), "Checkpoint").options
        assert offered[:2] == ("demo", "org/name")
        assert "empty" not in offered

    def test_quantized_weights_are_counted_and_said_to_be_quantized(self, tmp_path):
        write_checkpoint(tmp_path / "mxfp4", [{"blocks": Tensor("U8", (64,), bytes(64))}])
        config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
        (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(config))
        app = opened("mxfp4")
        assert app.plan is not None
        assert not alerts(app)
        assert "quantized (mxfp4)" in words(app)

    def test_demo_is_made_where_there_is_none(self, tmp_path):
        app = ShardApp()
        assert not (tmp_path / "mistral-demo-64MB").exists()
        click(app, "demo, 64 MB")
        assert app.checkpoint.source == str(tmp_path / "mistral-demo-64MB")

    def test_entered_text_is_opened(self, demo):
        app = ShardApp()
        enter(app, demo)
        assert app.checkpoint.total_bytes > 5_000_000

    def test_what_is_typed_while_another_opens_changes_nothing_of_it(self, demo, monkeypatch):
        typed, real = threading.Event(), Checkpoint.open
        monkeypatch.setattr(Checkpoint, "open", lambda source: typed.wait(PATIENCE) and real(source))
        app = ShardApp(demo)
        until(lambda: "Opening demo" in words(app))
        control(app, "Checkpoint").value = "other/place"
        typed.set()
        assert app.wait(PATIENCE)
        assert "demo is open" in words(app)
        assert control(app, "Destination folder").value == "demo-sharded"

    @pytest.mark.parametrize(
        ("source", "folder"),
        [
            (".", "../demo-sharded"),
            ("../demo/", "../demo-sharded"),
            ("../demo/model.safetensors.index.json", "../demo-sharded"),
            ("hf://org/name@main", "name-sharded"),
        ],
    )
    def test_shards_go_beside_a_source(self, demo, monkeypatch, source, folder):
        monkeypatch.chdir(demo)
        if source.startswith("hf:"):
            on_hub = replace(mistral_7b(), source=f"hf://org/name@{'0' * 40}")
            monkeypatch.setattr(Checkpoint, "open", lambda _: on_hub)
        app = opened(source)
        assert control(app, "Destination folder").value == folder
        click(app, "Shard")
        assert (app.report is None) == source.startswith("hf:")

    @pytest.mark.parametrize("wrong", ["no/such/folder", "", "<b>x</b>", "a\x1b[31mb"])
    def test_wrong_name_is_said_in_place_and_a_right_one_works_after(self, demo, wrong):
        app = ShardApp()
        start = button(app, "Open")
        control(app, "Checkpoint").value = wrong
        start.click()
        assert app.wait(PATIENCE)
        (said,) = alerts(app)
        assert "Traceback" not in html(app)
        assert "<b>x" not in said
        assert "\x1b" not in said
        assert not works(button(app, "Shard"))
        enter(app, demo)
        assert not alerts(app)
        assert works(button(app, "Shard"))

    def test_names_from_a_hostile_file_stay_text(self, tmp_path):
        name = "<img src=x onerror=alert(1)>\x1b[2J\u202e&amp;"
        write_checkpoint(tmp_path / "hostile", [{name: Tensor("F32", (1,), b"1234")}])
        said = html(opened("hostile"))
        assert "<img" not in said
        assert "\x1b" not in said
        assert "\u202e" not in said
        assert "&lt;img src=x onerror=alert(1)&gt;" in said

    def test_fault_of_ours_is_shown_too(self, demo, monkeypatch):
        app = opened(demo)
        monkeypatch.setattr(Checkpoint, "summary", lambda _: 1 / 0)
        click(app, "Open")
        assert any("ZeroDivisionError" in alert and "report" in alert for alert in alerts(app))
        assert works(button(app, "Open"))

    def test_another_checkpoint_forgets_what_belonged_to_the_first(self, demo, instant_loads):
        app = opened(demo, repeats=1)
        app.run_all()
        assert instant_loads
        assert app.report
        assert "ABBA" in words(app)
        shardkit.make_demo_checkpoint("other", size="5MB")
        enter(app, "other")
        assert (app.report, app.comparison) == (None, None)
        assert not any(left in html(app) for left in ("ABBA", "download="))
        assert not any(step._bar.value or step._bar.bar_style for step in (app._shard, app._compare))
        assert not works(button(app, "Compare"))
        button(app, "Compare").click()
        assert "shard first" in alerts(app)[0]

    def test_typing_error_keeps_what_is_open_and_what_was_found(self, demo, instant_loads):
        app = opened(demo, repeats=1)
        app.run_all()
        kept = app.checkpoint, app.plan, app.report, app.comparison
        enter(app, "no/such/folder")
        assert instant_loads
        assert (app.checkpoint, app.plan, app.report, app.comparison) == kept
        assert f"{demo} stays open." in words(app)
        assert "ABBA" in words(app)
        with pytest.raises(ShardkitError, match="no/such/folder"):
            app.run_all()
        enter(app, demo)
        assert not alerts(app)

    def test_another_checkpoint_gets_a_folder_of_its_own(self, demo):
        shardkit.make_demo_checkpoint("other", size="5MB")
        app = opened(demo, destination="mine")
        assert app._shard.folder == "mine"
        enter(app, "other")
        assert app._shard.folder == "other-sharded"

    def test_new_shards_forget_the_comparison_of_the_old(self, demo, instant_loads):
        app = opened(demo, repeats=1, overwrite=True)
        app.run_all()
        assert instant_loads
        assert "download=" in html(app)
        click(app, "Shard")
        assert app.comparison is None
        assert not any(left in html(app) for left in ("ABBA", "download=", "sk-tile"))
        assert app._compare._message.value == ""


class TestSteps:
    def test_unfold_when_they_can_be_reached_and_one_button_is_next(self, demo, instant_loads):
        app = ShardApp(repeats=1)
        assert (unfolded(app), primary(app)) == (["Choose"], ["Open"])
        enter(app, demo)
        assert (unfolded(app), primary(app)) == (["Choose", "Plan", "Shard"], ["Shard"])
        assert html(app).count('aria-label="done"') == 2
        click(app, "Shard")
        assert (len(unfolded(app)), primary(app)) == (4, ["Compare"])
        click(app, "Compare")
        assert instant_loads
        assert primary(app) == []
        assert html(app).count('aria-label="done"') == 4
        control(app, "Dtype of shards").value = "float16"
        assert primary(app) == ["Shard"]


class TestPlan:
    def test_every_control_changes_the_plan_at_once(self, demo):
        app = opened(demo)
        size, text = app._plan.slider, control(app, "Max shard size")
        counts = []
        for place in range(len(size.options)):
            size.index = place
            counts.append(len(app.plan.shards))
            assert app.plan.max_shard_size == size.value == parse_size(text.value)
            assert f"planned: {counts[-1]} file" in words(app)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 1
        control(app, "Strategy").value = "layer"
        assert app.plan.strategy == "layer"
        control(app, "Dtype of shards").value = "float16"
        assert app.plan.dtype == control(app, "Load dtype").value == "float16"

    def test_size_can_be_typed_and_the_slider_follows(self, demo):
        app = opened(demo, max_shard_size=1_234_567)
        assert app.plan.max_shard_size == 1_234_567
        text = control(app, "Max shard size")
        text.value = "1.5 MiB"
        assert app.plan.max_shard_size == 3 * 2**19
        assert app._plan.slider.value == 1_600_000
        assert text.value == "1.5 MiB"
        text.value = "much"
        assert "is not a size" in alerts(app)[0]
        assert app.plan is None
        text.value = "2GB"
        assert not alerts(app)
        assert len(app.plan.shards) == 1
        assert "for more files, choose a smaller shard size" in words(app)

    def test_size_to_begin_with_gives_several_files_and_leaves_no_tensor_too_large(self, demo):
        app = opened(demo)
        assert 4 <= len(app.plan.shards) <= 9
        assert app.plan.oversized == ()

    def test_boxes_are_the_files_and_as_wide_as_their_bytes(self, demo):
        app = opened(demo, max_shard_size="1MB")
        now, planned = re.findall(
            r'sk-strip.*?style="width:([\d.]+)%">(.*?)(?=<div class="sk-label|$)', html(app)
        )
        widths = [int(width) for width in re.findall(r"flex-grow:(\d+)", planned[1])]
        assert widths[: len(app.plan.shards)] == [shard.nbytes for shard in app.plan.shards]
        assert len(re.findall("sk-box", now[1])) == 2

    @pytest.mark.parametrize("dtype", [None, "float16"])
    def test_sliding_takes_less_than_a_tenth_of_a_second_for_7b(self, monkeypatch, dtype):
        monkeypatch.setattr(Checkpoint, "open", lambda _: mistral_7b())
        app = opened("mistral-7b", dtype=dtype)
        assert len(app.checkpoint.tensors) == 291
        size, took = app._plan.slider, []
        for strategy in ("size", "layer", "balanced"):
            control(app, "Strategy").value = strategy
            for place in range(len(size.options)):
                begin = time.thread_time()  # not the wall's, which others on the machine share
                size.index = place
                took.append(time.thread_time() - begin)
        assert median(took) < 0.05
        assert sorted(took)[-3] < 0.1, "a few may fall into a collector's pause"

    def test_cast_of_quantized_weights_is_refused_in_place(self, tmp_path):
        write_checkpoint(tmp_path / "q", [{"w": Tensor("F8_E4M3", (4,), b"1234")}])
        app = opened("q")
        assert works(button(app, "Shard"))
        control(app, "Dtype of shards").value = "float16"
        button(app, "Shard").click()
        refused, missing = alerts(app)
        assert "quantized" in refused
        assert "&quot;as stored&quot;" in refused
        assert "cannot be made (step 2)" in missing
        assert not works(button(app, "Shard"))
        control(app, "Dtype of shards").value = ""
        assert not alerts(app)
        assert works(button(app, "Shard"))

    @pytest.mark.parametrize(
        ("total", "asked"), [(0, None), (5, 3), (64 * 10**6, None), (145 * 10**8, 2**31)]
    )
    def test_sizes_go_from_many_files_to_one(self, total, asked):
        sizes = shard_sizes(total, asked)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] > total
        assert asked is None or asked in sizes
        assert 1 <= len(sizes) < 40

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["model.embed_tokens.weight"], "embed_tokens"),
            (["model.layers.3.a", "model.layers.4.a", "model.layers.4.b"], "blocks 3–4"),
            (["h.0.a", "h.2.a", "lm_head.weight"], "lm_head, blocks 0, 2"),
            (["layers.7.a"], "block 7"),
            (["plain"], "plain"),
            ([f"x.{'9' * 5000}.y"], f"{'9' * 5000}"),
            ([], ""),
        ],
    )
    def test_contents_name_blocks_and_what_lies_beside(self, names, said):
        assert page.contents(names) == said


class TestShard:
    def test_writes_what_was_planned_and_proves_it(self, demo):
        app = opened(demo, max_shard_size="1MB", dtype="float16")
        click(app, "Shard")
        assert shardkit.verify_checkpoint(demo, "demo-sharded").equal
        assert sorted(app.report.files) == [shard.file for shard in app.plan.shards]
        assert "verified: all" in words(app)
        assert "from_pretrained(&#x27;demo-sharded&#x27;" in html(app)
        assert works(button(app, "Compare"))

    def test_frees_the_source_where_that_is_checked_and_has_nothing_to_compare_then(self, demo):
        source = shutil.copytree(demo, "to-be-freed")
        app = opened(str(source), max_shard_size="1MB")
        free = control(app, "Free the source's disk space meanwhile")
        assert free.value is False
        free.value = True
        assert "It cannot be undone" in words(app)
        button(app, "Shard").click()
        assert app.wait(PATIENCE)
        assert shardkit.verify_checkpoint(demo, "to-be-freed-sharded").equal
        assert not list(Path(source).glob("*.safetensors"))
        assert "the source was freed" in words(app)
        button(app, "Compare").click()
        assert "nothing to compare the shards with" in words(app)

    def test_does_not_hold_up_the_kernel_and_starts_once(self, demo, slow_disk):
        app = opened(demo, max_shard_size="1MB")
        start = button(app, "Shard")
        began = time.perf_counter()
        start.click()
        assert time.perf_counter() - began < 0.1
        assert start.description == "Sharding…"
        for _ in range(5):
            start.click()  # as programs can, disabled or not
            button(app, "Open").click()
            button(app, "Compare").click()
        assert control(app, "Max shard size").disabled
        assert app.wait(PATIENCE)
        assert len(slow_disk) == len(app.plan.shards)
        assert app.report

    def test_progress_counts_up_in_bytes_with_rate_and_time_left(self, demo, slow_disk):
        app = opened(demo, max_shard_size="1MB")
        bar = next(w for w in everything(app._shard.box) if w._view_name == "ProgressView")
        seen, lines = [], []
        bar.observe(lambda change: seen.append(change["new"]), "value")
        app._shard._message.observe(lambda change: lines.append(change["new"]), "value")
        click(app, "Shard")
        assert slow_disk
        assert all(0 <= value <= 1 for value in seen)
        assert any(
            re.search(r"Writing shards: [\d.]+ MB of 6\S* MB, .*B/s, .*s left", line) for line in lines
        )
        assert (bar.value, bar.bar_style) == (1, "success")

    def test_cancel_stops_within_a_second_and_the_next_run_goes_on(self, demo, slow_disk):
        app = opened(demo, max_shard_size="500KB")
        button(app, "Shard").click()
        until(lambda: len(slow_disk) > 6)
        began = time.perf_counter()
        next(w for w in everything(app._shard.box) if getattr(w, "description", "") == "Cancel").click()
        assert app.wait(PATIENCE)
        assert time.perf_counter() - began < 1
        assert "Stopped." in words(app)
        assert not alerts(app)
        assert not Path("demo-sharded").exists()
        written = len(slow_disk)
        click(app, "Shard")
        assert app.report.reused
        assert "interrupted run checked and kept" in words(app)
        assert len(slow_disk) - written == len(app.plan.shards) - len(app.report.reused)

    def test_new_app_says_that_a_run_was_interrupted(self, demo, slow_disk):
        app = opened(demo, max_shard_size="500KB")
        button(app, "Shard").click()
        until(lambda: len(slow_disk) > 6)
        app._shard.cancel.click()
        assert app.wait(PATIENCE)
        again = opened(demo, max_shard_size="500KB")
        assert "A run was interrupted here" in words(again)

    def test_destination_that_is_taken_is_refused_until_told(self, demo):
        app = opened(demo)
        for _ in range(2):
            click(app, "Shard")
        assert not alerts(app)
        assert "demo-sharded holds these files already: compare them in step 4. To write" in words(app)
        control(app, "Dtype of shards").value = "float16"
        click(app, "Shard")
        assert "already exists" in alerts(app)[0]
        assert "check &quot;Replace an existing checkpoint" in alerts(app)[0]
        control(app, "Replace an existing checkpoint").value = True
        click(app, "Shard")
        assert not alerts(app)

    def test_what_lies_there_is_said_before_the_click_and_beside_compare(self, demo):
        app = opened(demo, max_shard_size="2MB")
        assert "demo-sharded" not in words(app)
        click(app, "Shard")
        files = len(app.report.files)
        assert "not the plan above" not in words(app)
        again = opened(demo, max_shard_size="2MB")
        assert "demo-sharded holds these files already" in words(again)
        assert primary(again) == ["Compare"]
        control(again, "Dtype of shards").value = "float16"
        there = f"demo-sharded holds {files} files (bfloat16), not the plan above, {files} files (float16)"
        assert f"{there}. Check &quot;Replace an existing checkpoint" in words(again)
        assert f"{there}: this is what would be compared" in words(again)
        control(again, "Replace an existing checkpoint").value = True
        assert f"{there}. Shard replaces it" in words(again)
        Path("notes").mkdir()
        Path("notes", "kept.txt").touch()
        control(again, "Destination folder").value = "notes"
        assert "is not a checkpoint, so it is not overwritten" in words(again)
        assert "Compare" not in unfolded(again)
        assert not alerts(again)

    @pytest.mark.parametrize("wrong", ["a\0b", "a\ud800"])
    def test_folder_that_cannot_be_is_said_in_place(self, demo, wrong):
        app = opened(demo)
        folder = control(app, "Destination folder")
        folder.value = wrong
        assert "is not a valid folder name" in alerts(app)[0]
        click(app, "Shard")
        assert "is not a valid folder name" in alerts(app)[0]
        folder.value = "right"
        click(app, "Shard")
        assert not alerts(app)

    def test_second_app_waits_its_turn_and_can_stop_the_first(self, demo, slow_disk):
        first, second = opened(demo, max_shard_size="500KB"), opened(demo, destination="other")
        button(first, "Shard").click()
        until(lambda: slow_disk)
        button(second, "Shard").click()
        assert "Another app" in alerts(second)[0]
        second._shard.cancel.click()
        assert first.wait(PATIENCE)
        assert "Stopped." in words(first)
        assert not alerts(second)
        assert second._shard.cancel.description == "Cancel"
        assert not works(second._shard.cancel)
        click(second, "Shard")
        assert second.report


class TestCompare:
    def test_fills_in_run_by_run_and_can_be_downloaded(self, demo, instant_loads):
        app = opened(demo, repeats=2, cache="warm", dtype="float16", memory_limit="12.7GB")
        seen = []
        app._compare._details.observe(lambda change: seen.append(change["new"]), "value")
        comparison = app.run_all()
        assert len(instant_loads) == 6
        assert {(how.cache, how.dtype, how.generate) for how in instant_loads} == {("warm", "float16", 1)}
        assert len([shown for shown in seen if "<img" in shown]) >= 4
        said = html(app)
        assert comparison.verdict in said
        found = re.findall(r'download="(.*?)" href="data:(.*?);base64,(.*?)"', said)
        held = {name: b64decode(data) for name, _, data in found}
        Path("saved.json").write_bytes(held["comparison.json"])
        assert shardkit.Comparison.load("saved.json") == comparison
        assert held["comparison.png"].startswith(b"\x89PNG")
        assert b"<html" in held["comparison.html"]

    def test_says_how_long_it_takes_before_and_while_it_runs(self, demo, instant_loads):
        app = opened(demo, repeats=2)
        before = re.search(r"about (\d+ s|1 min \d+ s) for 2 pairs", words(app))[1]
        control(app, "Pairs of loads").value = 4
        assert f"about {before} for" not in words(app)
        control(app, "Pairs of loads").value = 2
        shown = []
        for widget in (app._compare._message, app._compare._tiles, app._compare._details):
            widget.observe(lambda change: shown.append(change["new"]), "value")
        app.run_all()
        assert len(instant_loads) == 6
        lines = [line for line in shown if "Run " in line]
        assert re.search(r"Run 1 of 6: original, warm-up, about (\d+ min )?\d+ s left", lines[0])
        assert all(re.search(r"about (\d+ min )?\d+ s left", line) for line in lines)
        assert not [said for said in shown if "nothing was measured" in said]
        assert re.search(r"about \d s for 2 pairs", words(app)), "what it took is what it will take"

    def test_pairs_are_added_until_all_is_decided(self, demo, instant_loads):
        app = opened(demo, repeats="auto")
        assert control(app, "Pairs of loads").value == 20
        assert re.search(r"at most about [\d min]+ s for 20 pairs", words(app))
        lines = []
        app._compare._message.observe(lambda change: lines.append(change["new"]), "value")
        app.run_all()
        assert len(instant_loads) == 2 * (1 + 4)
        last = r"Run 10 of 42: original, pair 4 of at most 20, at most about [\d min]+ s left"
        assert re.search(last, str(lines))
        assert "4 pairs (of at most 20; all is decided)" in words(app)
        control(app, "Pairs of loads").value = 2
        for until, most in ((True, 2), (False, None)):
            app._compare.until.value = until
            assert ("at most" in app._compare._long.value) == until
            click(app, "Compare")
            assert app.comparison.most == most

    def test_estimate_counts_reading_at_the_rate_of_the_disk(self, demo, monkeypatch):
        shardkit.shard_checkpoint(demo, "demo-sharded", verify=False)

        def seconds(rate):
            monkeypatch.setattr(compare_step, "measured_rate", rate)
            said = re.search(r"about (?:(\d+) min )?(?:(\d+) s )?for 5 pairs, estimated", words(opened(demo)))
            return 60 * int(said[1] or 0) + int(said[2] or 0)

        def cannot(*_):
            raise CheckpointError("does not show the disk's rate")

        total = Checkpoint.open(demo).total_bytes
        unknown = seconds(cannot)
        assert seconds(lambda *_: total / 10) == pytest.approx(unknown + 12 * 10, abs=1)

    def test_three_tiles_say_it_and_all_else_is_folded(self, demo, instant_loads):
        app = opened(demo, repeats=3)
        app.run_all()
        assert instant_loads
        tiles, folded = app._compare._tiles.value, app._compare._details.value
        assert re.findall(r'"sk-tile"><span>(.*?)</span>', tiles) == ["Memory", "Load time", "First token"]
        assert "original to sharded" in tiles
        assert "<div>700 MB</div>" in tiles  # large only where they differ
        assert "no difference" in tiles
        assert folded.startswith("<details")
        assert all(part in folded for part in ("ABBA", "<img", "download="))

    def test_all_loads_but_those_in_a_budget_run_on_the_stack_of_2024_if_that_is_on(
        self, demo, instant_loads, monkeypatch
    ):
        monkeypatch.setattr(compare_step, "article_stack", lambda: sys.executable)
        app = opened(demo, repeats=1, max_memory="2GB")
        app.run_all()
        assert {how.python for how in instant_loads} == {None}
        instant_loads.clear()
        control(app, compare_step._IN_2024).value = True
        click(app, "Compare")
        found = {(how.python, how.max_memory) for how in instant_loads}
        assert found == {(sys.executable, None), (None, 2 * 10**9)}

    def test_budget_is_a_third_variant(self, demo, instant_loads):
        app = opened(demo, repeats=1, max_memory="100MB")
        comparison = app.run_all()
        assert comparison.names == ("original", "sharded", "within 100 MB")
        assert {how.max_memory_bytes for how in instant_loads} == {None, 100_000_000}
        assert "original to within 100 MB" in words(app)
        control(app, "Memory budget of a third variant").value = "little"
        click(app, "Compare")
        assert "is not a size" in alerts(app)[0]

    @pytest.mark.parametrize("trusted", [True, False])
    def test_code_of_the_checkpoint_runs_where_its_box_is_ticked(self, demo, instant_loads, trusted):
        ShardApp(demo, repeats=1, trust_remote_code=trusted).run_all()
        assert {str(how.options) for how in instant_loads} == {
            "{'trust_remote_code': True}" if trusted else "{}"
        }

    def test_code_that_is_not_trusted_is_said_in_words_of_the_app(self, demo, monkeypatch):
        monkeypatch.setattr(
            compare, "run_load", lambda *_, **__: fake_load(outcome="failed", reason=UNTRUSTED)
        )
        app = opened(demo, repeats=1)
        app.run_all()
        said = words(app)
        assert said.count("check &quot;Run custom code from the checkpoint") >= 2
        assert "trust_remote_code" not in said

    def test_another_model_is_refused_in_words_of_the_app(self, demo):
        shardkit.make_demo_checkpoint("other", size="5MB")
        app = opened(demo, destination="other")
        click(app, "Compare")
        assert "shard this one into another folder" in alerts(app)[0]

    def test_picture_has_words_that_stand_for_it(self, demo, instant_loads):
        app = opened(demo, repeats=1)
        comparison = app.run_all()
        assert instant_loads
        (alternative,) = re.findall(r'<img class="sk-picture" alt="(.*?)"', html(app))
        assert comparison.verdict in alternative

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_cancel_in_the_middle_of_a_load_ends_it_within_a_second(self, demo, tmp_path, monkeypatch):
        script = """
            with reporter.phase("load"):
                time.sleep(600)
        """
        monkeypatch.setattr(sys, "executable", str(fake_interpreter(tmp_path, script)))
        app = opened(demo)
        click(app, "Shard")
        before = set(psutil.Process().children(recursive=True))
        button(app, "Compare").click()
        until(lambda: set(psutil.Process().children(recursive=True)) - before)
        time.sleep(0.5)
        began = time.perf_counter()
        app._compare.cancel.click()
        assert app.wait(PATIENCE)
        assert time.perf_counter() - began < 1
        assert "No results yet" in words(app)
        assert set(psutil.Process().children(recursive=True)) <= before

    def test_cancel_between_runs_keeps_what_was_found(self, demo, monkeypatch):
        runs = []

        def measure(*_, **__):
            runs.append(1)
            time.sleep(0.05)
            return fake_load()

        monkeypatch.setattr(compare, "run_load", measure)
        app = opened(demo, repeats=20)
        click(app, "Shard")
        button(app, "Compare").click()
        until(lambda: len(runs) > 4)
        app._compare.cancel.click()
        assert app.wait(PATIENCE)
        assert len(runs) < 10
        assert "Stopped." in words(app)
        assert app.comparison.samples
        assert works(button(app, "Compare"))


class TestBatch:
    def test_does_all_four_steps(self, demo, instant_loads):
        comparison = ShardApp(demo, destination="out", max_shard_size="1MB", repeats=1).run_all()
        original, sharded = comparison.variants
        assert original.files == 2
        assert sharded.files == len(list(Path("out").glob("*.safetensors"))) > 2
        assert len(instant_loads) == 4

    def test_what_was_set_in_the_page_stays(self, demo, instant_loads):
        app = opened(demo, dtype="bfloat16")
        size, folder, dtype = (
            app._plan.slider,
            *(control(app, text) for text in ("Destination folder", "Load dtype")),
        )
        assert dtype.value == "bfloat16"
        size.index, folder.value, dtype.value = 1, "own", "float32"
        control(app, "Strategy").value = "balanced"
        button(app, "Open").click()
        app.run_all()
        assert (app.plan.max_shard_size, size.index) == (size.value, 1)
        assert app.report.destination.endswith("/own")
        assert {how.dtype for how in instant_loads} == {"float32"}

    def test_failing_step_raises(self, demo, instant_loads):
        Path("out").mkdir()
        Path("out", "kept").touch()
        with pytest.raises(DestinationError, match="already exists"):
            ShardApp(demo, destination="out").run_all()
        with pytest.raises(CheckpointError, match="no/such"):
            ShardApp("no/such/folder").run_all()
        assert not instant_loads

    @pytest.mark.parametrize(
        ("wrong", "raised"),
        [
            ({"max_shard_size": "much"}, SizeError),
            ({"memory_limit": "-1"}, SizeError),
            ({"max_memory": "-1"}, SizeError),
            ({"strategy": "best"}, ShardkitError),
            ({"dtype": "int3"}, ShardkitError),
            ({"cache": "hot"}, ShardkitError),
            *(({"repeats": wrong}, ShardkitError) for wrong in (0, "3", None, 2.5, True)),
            *(({name: 5}, ShardkitError) for name in ("source", "destination", "overwrite", "first_token")),
            ({"trust_remote_code": "yes"}, ShardkitError),
            ({"unknown": 1}, TypeError),
        ],
    )
    def test_wrong_setting_is_refused_at_once(self, wrong, raised):
        with pytest.raises(raised):
            ShardApp(**wrong)
