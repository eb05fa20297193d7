"""One model in several processes: what each reads and holds, and files in which its part lies together."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shardkit import (
    Checkpoint,
    load_model,
    make_demo_checkpoint,
    measure_load,
    measure_parallel,
    plan_shards,
    push_checkpoint,
    shard_checkpoint,
    verify_checkpoint,
)
from shardkit.checkpoint.ranks import tensor_parallel_size
from shardkit.errors import Cancelled, CheckpointError, MeasurementError, PlanError
from shardkit.load import ranges
from shardkit.measure import launch, parallel
from tests.architectures import make_model
from tests.fake_loads import gone
from tests.support import read_checkpoint, read_file, weight_files

CUT = ("o_proj.weight", "down_proj.weight")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Mistral of two layers, with four heads, two of them for keys and values, in float32."""
    folder = tmp_path_factory.mktemp("parallel") / "tiny"
    make_model("MistralForCausalLM").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def for_two(tiny):
    shard_checkpoint(tiny, tiny.parent / "for_two", ranks=2, strategy="layer")
    return tiny.parent / "for_two"


class TestFilesForRanks:
    def test_columns_of_a_rank_lie_together_and_all_else_is_as_it_was(self, tiny, for_two):
        had = read_checkpoint(tiny)
        for name, tensor in (item for file in weight_files(for_two) for item in read_file(file).items()):
            if not name.endswith(CUT):
                assert tensor == had[name]
                continue
            rows, columns = had[name].shape
            assert tensor.shape == (2, rows, columns // 2)
            whole = torch.frombuffer(bytearray(had[name].data), dtype=torch.float32).view(rows, columns)
            assert tensor.data == b"".join(half.numpy().tobytes() for half in whole.chunk(2, dim=1))

    def test_they_are_opened_as_what_they_were_made_from_and_shard_to_that_again(
        self, tiny, for_two, tmp_path
    ):
        assert verify_checkpoint(tiny, for_two).equal
        opened = Checkpoint.open(for_two)
        assert {n: t.shape for n, t in opened.tensors.items()} == {
            n: t.shape for n, t in Checkpoint.open(tiny).tensors.items()
        }
        assert "blocks of columns" in str(opened)
        assert shard_checkpoint(for_two, tmp_path / "back", files=1).verification.equal
        assert read_checkpoint(tmp_path / "back") == read_checkpoint(tiny)
        plan = plan_shards(for_two, ranks=2, dtype="float16")
        assert shard_checkpoint(plan, tmp_path / "cast").verification.equal

    @pytest.mark.parametrize("columns", [(0, 16), (16, 32), (0, 32), (4, 9), (10, 20), (0, 0)])
    def test_any_columns_are_found(self, tiny, for_two, columns):
        name, part = "model.layers.1.self_attn.o_proj.weight", (slice(3, 20), slice(*columns))
        whole = load_file(weight_files(tiny)[0])[name]
        for folder in (tiny, for_two):
            opened = Checkpoint.open(folder)
            matrix = ranges._Sliced(opened.tensors[name], ranges.Ranges(opened).rows, pytest.fail)
            assert torch.equal(matrix[part], whole[part])
            assert torch.equal(matrix[...], whole)
            assert (matrix.get_shape(), matrix.get_dtype()) == ([32, 32], "F32")

    def test_their_source_can_be_freed_meanwhile(self, tiny, tmp_path):
        shutil.copytree(tiny, tmp_path / "model")
        report = shard_checkpoint(tmp_path / "model", tmp_path / "made", ranks=2, free_source=True)
        assert report.verification.equal
        assert report.freed
        assert verify_checkpoint(tiny, tmp_path / "made").equal

    @pytest.mark.parametrize("options", [{}, {"max_memory": "2GB"}])
    def test_load_model_reads_them_and_plain_from_pretrained_refuses(self, tiny, for_two, options):
        ids = torch.arange(8)[None]
        expected = load_model(tiny, **options)(ids).logits
        assert torch.equal(load_model(for_two, **options)(ids).logits, expected)
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
            AutoModelForCausalLM.from_pretrained(for_two)
        assert measure_load(for_two).ok

    def test_what_they_are_not_for_is_refused(self, tiny, for_two, tmp_path):
        with pytest.raises(CheckpointError, match="blocks of columns, which from_pretrained does not load"):
            push_checkpoint(for_two, "me/model")
        with pytest.raises(PlanError, match=r"3 processes cannot share the 4 attention heads .* 1, 2$"):
            plan_shards(tiny, ranks=3)
        config = json.loads((tiny / "config.json").read_text())
        odd = make_model("BertForMaskedLM")
        odd.save_pretrained(tmp_path / "bert")
        with pytest.raises(CheckpointError, match="cannot be divided among processes by transformers"):
            plan_shards(tmp_path / "bert", ranks=2)
        made = make_model("MistralForCausalLM")
        made.model.layers[0].extra = torch.nn.Module()
        made.model.layers[0].extra.register_parameter("kernel", torch.nn.Parameter(torch.zeros(2, 3, 3)))
        made.save_pretrained(tmp_path / "mistaken")
        assert config["num_key_value_heads"] == 2
        with pytest.raises(CheckpointError, match=r"extra\.kernel.*has shape \[2, 3, 3\], .* mistaken"):
            plan_shards(tmp_path / "mistaken", ranks=2)


SCRIPT = """
import os, sys, torch, shardkit
out, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    for size in ("tp_size", "pp_size"):
        model = shardkit.load_model(folder, dtype="float32", distributed_config={size: 2})
        with torch.inference_mode():
            torch.save(model(torch.arange(12)[None]).logits, f"{out}/{number}-{size}-{os.environ['RANK']}")
os._exit(0)  # a thread of torch's may not have ended, and Python's own end would be an abort
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_logits_of_one(tiny, for_two, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "script.py", tmp_path / "out", tiny, for_two]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()})
    with torch.inference_mode():
        expected = load_model(tiny)(torch.arange(12)[None]).logits
    found = sorted((tmp_path / "out").iterdir())
    assert len(found) == 8
    for path in found:
        assert (torch.load(path) - expected).abs().max() < 1e-3, path.name


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The demo of Mistral's shape with the fewest weights that two processes can share, by layer."""
    folder = tmp_path_factory.mktemp("shape")
    make_demo_checkpoint(folder / "demo", size="200MB")
    shard_checkpoint(folder / "demo", folder / "plain", strategy="layer")
    shard_checkpoint(folder / "demo", folder / "for_two", strategy="layer", ranks=2)
    return folder


def own(run):
    """What a load and its tokens need beside what the process held before."""
    before = next(phase for phase in reversed(run.phases) if phase.name in ("imports", "tokenizer"))
    return run.peak_anonymous_bytes - before.peak_anonymous_bytes


@pytest.mark.begun_first
def test_each_process_reads_and_holds_its_part(shape):
    how = {"dtype": "float32", "generate": 3, "prompt": "The quick brown fox"}
    one = measure_load(shape / "plain", **how)
    ordinary = measure_parallel(shape / "plain", 2, **how)
    mapped = measure_parallel(shape / "plain", 2, mapped=True, **how)
    together = measure_parallel(shape / "for_two", 2, **how)
    layers = measure_parallel(shape / "plain", 2, by="layer", **how)
    for run in (*mapped, *ordinary, *together, *layers):
        assert run.cache.proven, run.cache.why_not
        assert run.token_ids == one.token_ids
    for run in (*together, *layers):
        assert run.read_bytes < 0.6 * one.read_bytes
        assert own(run) < 0.6 * own(one)
    for run, other in zip(together, ordinary, strict=True):
        assert run.read_bytes < 0.8 * other.read_bytes
        assert own(run) < 1.05 * own(other)


class TestProcessesThatCannotDoIt:
    def test_heads_or_layers_that_they_cannot_share_are_refused_in_one_line(self, tiny, monkeypatch):
        for refused in (
            lambda: measure_parallel(tiny, 3),
            lambda: load_model(tiny, distributed_config={"tp_size": 3}),
            lambda: load_model(tiny, tp_plan="auto", tp_size=3),
        ):
            with pytest.raises(PlanError, match=r"3 processes cannot share the 4 attention heads .* 1, 2$"):
                refused()
        with pytest.raises(PlanError, match=r"4 processes cannot share the 2 key-value heads .* 1, 2$"):
            measure_parallel(tiny, 4)
        with pytest.raises(PlanError, match="3 processes cannot share the 2 layers"):
            measure_parallel(tiny, 3, by="layer")
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert tensor_parallel_size({"tp_plan": "auto"}) == 3

    @pytest.mark.parametrize(("given", "words"), [({"ranks": 0}, "ranks: 0"), ({"by": "row"}, "by: 'row'")])
    def test_other_arguments_are_refused(self, tiny, given, words):
        with pytest.raises(MeasurementError, match=words):
            measure_parallel(tiny, **given)

    def test_a_transformers_that_would_not_divide_is_refused(self, tiny, monkeypatch):
        monkeypatch.setattr(parallel.metadata, "version", lambda _: "5.15.0")
        with pytest.raises(MeasurementError, match=r"transformers 5\.23 or newer.* 5\.15\.0 is installed"):
            measure_parallel(tiny)

    def test_one_that_is_killed_ends_the_others(self, tiny, tmp_path, monkeypatch):
        """The other would wait for it: here for a minute, in torch for half an hour."""
        self.replace_worker(
            monkeypatch, tmp_path, "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)"
        )
        begun = time.monotonic()
        with pytest.raises(
            MeasurementError, match=r"^rank 1 of 2 killed: by SIGKILL.*; the other processes were"
        ):
            measure_parallel(tiny)
        assert time.monotonic() - begun < 20
        assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid*"))

    def test_errors_name_who_was_first_and_a_stop_ends_all(self, tiny, tmp_path, monkeypatch):
        self.replace_worker(monkeypatch, tmp_path, "time.sleep(60) if rank == '0' else sys.exit('no luck')")
        with pytest.raises(MeasurementError, match=r"^rank 1 of 2 failed: .*no luck"):
            measure_parallel(tiny)
        self.replace_worker(monkeypatch, tmp_path, "time.sleep(60)")
        with pytest.raises(Cancelled):
            measure_parallel(tiny, stop=lambda: len(list(tmp_path.glob("pid*"))) == 2)
        assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid*"))

    @staticmethod
    def replace_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, deed: str) -> None:
        script = folder / "worker.py"
        script.write_text(
            f"import os, sys, time\nrank = os.environ['RANK']\n"
            f"open({str(folder)!r} + '/pid' + rank, 'w').write(str(os.getpid()))\n{deed}\n"
        )
        monkeypatch.setattr(launch, "WORKER", script)
