"""Loads to a GPU: on a real one where there is one, and on stand-ins, which every machine can have."""

import dataclasses

import pytest
import torch

from shardkit import Checkpoint, compare_loads, measure_load, shard_checkpoint
from shardkit.show.plots import plot_bars
from tests.fake_loads import MB, fake_comparison, fake_interpreter

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


# The worker, with a GPU of which it may use a few megabytes.
LITTLE_ROOM = """
class Load(worker.Load):
    def imports(self):
        super().imports()
        _, total = self.torch.cuda.mem_get_info()
        self.torch.cuda.set_per_process_memory_fraction(5e6 / total)
worker.Load = Load
sys.exit(worker.main())
"""


@pytest.fixture(scope="module", params=["cuda", "auto"])
def measured(request, demo):
    return measure_load(demo, dtype="float16", device=request.param, generate=3)


@on_gpu
class TestOnGpu:
    def test_load_and_tokens_are_clocked(self, measured):
        assert measured.ok, measured
        names = [phase.name for phase in measured.phases]
        assert names == ["imports", "tokenizer", "load", "first token", "further tokens"]
        assert len(measured.token_ids) == 3

    def test_memory_of_the_gpu_is_told(self, measured, demo):
        weights = Checkpoint.open(demo).total_bytes
        assert weights <= measured.peak_device_bytes < 1.5 * weights + 200e6
        assert "NVIDIA" in measured.environment.gpu or "AMD" in measured.environment.gpu
        assert "peak GPU" in str(measured)

    def test_gpu_that_is_not_there_is_a_failed_load(self, demo):
        found = measure_load(demo, device="cuda:99", generate=0)
        assert found.outcome == "failed"
        assert "CUDA" in found.reason

    def test_gpu_with_too_little_room_is_a_failed_load_with_its_peak(self, demo, tmp_path):
        python = fake_interpreter(tmp_path, LITTLE_ROOM)
        found = measure_load(demo, dtype="float16", device="cuda", generate=0, python=python)
        assert found.outcome == "failed"
        assert "out of memory" in found.reason
        assert found.peak_device_bytes is not None

    def test_shards_take_as_much_of_the_gpu(self, demo, tmp_path):
        shard_checkpoint(demo, tmp_path / "shards", max_shard_size="20MB", dtype="float16")
        found = compare_loads(demo, tmp_path / "shards", dtype="float16", device="cuda", repeats=3)
        assert found.ratios["peak_device_bytes"].conclusion == "same"
        assert "peak GPU" in str(found)
        assert "peak GPU" in [text.get_text() for text in found.plot()[1].texts]


# A load in which all is real but the two GPUs, and `from_pretrained`, which does `{does}`.
TWO_GPUS = """
from types import SimpleNamespace
waited_for = []
cuda = SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 2, synchronize=waited_for.append,
    max_memory_allocated=lambda gpu: 100 * (gpu + 1), get_device_name=lambda gpu: f"GPU {{gpu}}",
)
class Load(worker.Load):
    def imports(self):
        self.torch = SimpleNamespace(cuda=cuda, get_num_threads=lambda: 1, __version__="2.13.0")
        self.loader, self.own_load = SimpleNamespace(from_pretrained=self.from_pretrained), None
    def prompt_ids(self):
        pass
    def load_tokenizer(self):
        pass
    def from_pretrained(self, folder, **options):
        {does}
    def run(self):
        super().run()
        reporter.send("note", text=f"waited for {{waited_for}}")
worker.Load = Load
sys.exit(worker.main())
"""


class TestOnStandIns:
    @pytest.mark.parametrize(
        ("device", "peak", "names", "waited_for"),
        [
            ("cpu", None, None, "[]"),
            ("cuda", 100, "GPU 0", "[0]"),
            ("cuda:1", 200, "GPU 1", "[1]"),
            ("auto", 300, "GPU 0 + GPU 1", "[0, 1]"),
        ],
    )
    def test_gpus_that_the_load_uses_are_waited_for_and_read(
        self, demo, tmp_path, device, peak, names, waited_for
    ):
        python = fake_interpreter(
            tmp_path, TWO_GPUS.format(does=f"assert options.get('device_map', 'cpu') == {device!r}")
        )
        found = measure_load(demo, device=device, generate=0, python=python)
        assert found.ok, found
        assert found.peak_device_bytes == peak
        assert found.environment.gpu == names
        assert f"waited for {waited_for}" in found.notes
        assert ("peak GPU" in str(found)) == (device != "cpu")

    def test_gpus_that_an_option_names_are_waited_for_too(self, demo, tmp_path):
        python = fake_interpreter(tmp_path, TWO_GPUS.format(does="pass"))
        found = measure_load(demo, generate=0, python=python, options={"device_map": {"": 1}})
        assert found.ok, found
        assert found.peak_device_bytes == 300
        assert "waited for [0, 1]" in found.notes

    def test_peak_is_told_of_a_load_that_fails(self, demo, tmp_path):
        python = fake_interpreter(tmp_path, TWO_GPUS.format(does="raise MemoryError('CUDA out of memory')"))
        found = measure_load(demo, device="cuda", generate=0, python=python)
        assert found.outcome == "failed"
        assert found.reason == "MemoryError: CUDA out of memory during load"
        assert found.peak_device_bytes == 100


def test_auto_without_gpu_loads_to_the_cpu(demo, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = measure_load(demo, dtype="float16", device="auto", cache="warm", generate=2)
    assert found.ok, found
    assert len(found.token_ids) == 2
    assert found.peak_device_bytes is None


def test_weights_offloaded_to_disk_give_tokens(demo, tmp_path):
    options = {"max_memory": {"cpu": "1MB"}, "offload_folder": str(tmp_path / "offload")}
    found = measure_load(demo, dtype="float16", device="auto", cache="warm", generate=2, options=options)
    assert found.ok, found
    assert len(found.token_ids) == 2


def test_comparison_on_gpus_says_what_they_hold():
    found = fake_comparison(anonymous=(250 * MB, 250 * MB))
    samples = tuple(
        dataclasses.replace(s, measurement=dataclasses.replace(s.measurement, peak_device_bytes=500 * MB))
        for s in found.samples
    )
    found = dataclasses.replace(found, samples=samples)
    assert str(found.ratios["peak_device_bytes"]) == "no difference beyond 5 % (equal)"
    assert "weights go to the GPU" in found.explain("original")
    assert "peak GPU" in [text.get_text() for text in plot_bars(found)[1].texts]
