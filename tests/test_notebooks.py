"""Notebooks as they are run: unattended with parameters, in a kernel that dies, and read without running."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from papermill import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

import shardkit
from shardkit import Checkpoint, Comparison, verify_checkpoint
from shardkit.checkpoint.hosts import memory_limits
from shardkit.compare import experiment
from shardkit.compare.parameters import check_values
from shardkit.errors import MeasurementError, ShardkitError
from shardkit.measure import launch, limit
from shardkit.measure.samples import SHARDED, Sample
from shardkit.notebook import (
    ParameterError,
    check_parameters,
    hub_user,
    load_within,
    made_folder,
    mean_figures,
    measure_sharding,
    read_results,
    scaled_limits,
)
from shardkit.plan.packing import STRATEGIES
from tests.fake_loads import MB, VARIANTS, fake_comparison, fake_load, fake_variant, no_load
from tests.test_limit import needs_groups

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
STORY = ROOT / "notebooks/01_shard_and_compare.ipynb"
HUB = ROOT / "notebooks/02_hub.ipynb"
FIT = ROOT / "notebooks/03_fit_in_less_ram.ipynb"
FACTORS = ROOT / "notebooks/04_what_actually_helps.ipynb"
PARALLEL = ROOT / "notebooks/05_parallel_inference.ipynb"
REPORT = ROOT / "notebooks/batch_report.ipynb"


def run_kernel(*command, **options):
    """Run what starts a kernel, and return how that ended.

    A kernel binds ports that were free when its client looked; where many processes open ports at once
    another may take one in between, and the kernel is never heard. Such a run is started once more.
    """
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if re.search("RuntimeError: Kernel (didn't respond|died before replying)", done.stdout + done.stderr):
        done = subprocess.run(command, capture_output=True, text=True, **options)
    return done


def papermill(notebook, folder, environment=None, **parameters):
    """Run a notebook with parameters in a folder, as a shell would."""
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = ["papermill", "--no-progress-bar", "--cwd", folder, notebook, folder / "out.ipynb", *given]
    return run_kernel(*command, env={**os.environ, **(environment or {})})


def run_here(notebook, **parameters):
    """Run a notebook's cells with parameters in this process, which has imported what a kernel has to.

    Return what it printed, and the data of what it showed.
    """
    cells = parameterize_notebook(load_notebook_node(str(notebook)), parameters).cells
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    printed, shown = io.StringIO(), []
    try:
        with (
            redirect_stdout(printed),
            pd.option_context("display.max_rows", None, "display.max_colwidth", None),
        ):
            for cell in (cell for cell in cells if cell.cell_type == "code"):
                result = shell.run_cell(cell.source, store_history=True)
                result.raise_error()
                if result.result is not None:
                    shown.append(shell.display_formatter.format(result.result)[0])
    finally:
        InteractiveShell.clear_instance()
    return printed.getvalue(), shown


@pytest.fixture
def quick_loads(monkeypatch):
    """Loads that never happened, in this process; and sharding that is not measured, which is seen below."""
    monkeypatch.setattr(experiment, "run_load", no_load)
    monkeypatch.setattr(launch, "run_load", no_load)
    monkeypatch.setattr(
        "shardkit.notebook.measure_sharding", lambda *_, **__: pd.DataFrame({"seconds": [1.0]})
    )


@pytest.fixture(scope="module")
def quick_kernels(tmp_path_factory):
    """What makes kernels show loads that never happened; all else is done, and done there."""
    home = tmp_path_factory.mktemp("ipython")
    startup = home / "profile_default/startup/quick.py"
    startup.parent.mkdir(parents=True)
    fakes = str(Path(__file__).with_name("fake_loads.py"))
    startup.write_text(
        f"fakes = __import__('runpy').run_path({fakes!r})\n"
        "fakes['ask_here'](), fakes['load_nothing']()\ndel fakes\n"
    )
    return {"IPYTHONDIR": str(home)}


def did_what_it_was_given(given, limit, made):
    """Whether what a run of the first notebook left behind is what its parameters say."""
    runs = Comparison.load(made / "comparison.json").to_frame()
    assert set(runs["outcome"]) == {"ok"}
    assert set(runs["pair"].dropna()) == set(range(given["repeats"]))
    assert set(runs["variant"]) == {"original", "sharded", "original as stored"}
    asked = runs[runs["variant"] != "original as stored"]
    assert set(asked["dtype"]) == {given.get("dtype", "float16")}
    assert set(runs["cache"]) == {given.get("cache", "cold")}
    shards = list((made / "sharded").glob("*.safetensors"))
    assert set(runs[runs["variant"] == "sharded"]["files"]) == {len(shards)}
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) <= limit
    assert (made / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick_loads")
@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        ({"demo_size": "5MB", "max_shard_size": "1MB", "dtype": "float16"}, 10**6),
        ({"demo_size": "5MB", "strategy": "layer", "dtype": "bfloat16", "cache": "warm"}, 10**8),
        ({"demo_size": "10MB", "strategy": "balanced", "max_shard_size": 6_000_000, "repeats": 2}, 6 * 10**6),
        ({"model": "all-MiniLM-L6-v2", "max_shard_size": "50MB", "dtype": "float32"}, 50 * 10**6),
    ],
    ids=["files_by_size", "files_by_layer", "balanced_files", "a_model_of_ones_own"],
)
def test_notebook_does_the_whole_job_that_its_parameters_say(parameters, limit, minilm, tmp_path):
    """How its loads go is seen below."""
    given = {"repeats": 1, "output_folder": str(tmp_path / "made"), **parameters}
    if "model" in given:
        given["model"] = str(minilm)
    run_here(STORY, **given)
    did_what_it_was_given(given, limit, tmp_path / "made")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Variables of an environment in which shardkit is installed from a wheel, and is of no clone."""
    folder = tmp_path_factory.mktemp("installed")
    where = [sys.executable, "-P", "-c", "import shardkit; print(shardkit.__file__)"]
    found = subprocess.run(where, cwd=folder, capture_output=True, text=True, check=True).stdout
    if "site-packages" in found:
        return {}
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo-output", "tests")
    tree, site = shutil.copytree(ROOT, folder / "tree", ignore=left_out), folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", site, tree], check=True, cwd=folder)
    return {"PYTHONPATH": str(site)}


def run_as_stored(notebook, folder, *changes, environment=None):
    """Run a notebook in a folder, with its own parameters or others, and hold against it what is stored."""
    text = notebook.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / notebook.name).write_text(text)
    command = ["pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "1200"]
    command += ["--nbval-sanitize-with", ROOT / "notebooks/sanitize.cfg", "-p", "no:cacheprovider"]
    done = run_kernel(*command, notebook.name, cwd=folder, env={**os.environ, **(environment or {})})
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\b{len(cells)} passed", done.stdout), done.stdout


@pytest.fixture
def notebook_folder(tmp_path):
    """A folder for what notebooks write, which is much."""
    yield tmp_path
    shutil.rmtree(tmp_path / "demo-output", ignore_errors=True)


@pytest.mark.begun_first
@pytest.mark.timeout(1800)
def test_fresh_runs_of_story_and_report_show_what_is_stored(notebook_folder, installed):
    """Outside a clone, each load once; the report, which counts them, is given as many as by default."""
    made = notebook_folder / "demo-output"
    run_as_stored(STORY, notebook_folder, ("repeats: int = 5", "repeats: int = 1"), environment=installed)
    did_what_it_was_given({"repeats": 1}, 100 * 10**6, made)
    for name, repeats in (("comparison.json", 5), ("only_files_comparison.json", 3)):
        found = Comparison.load(made / name)
        pairs = [replace(sample, pair=pair) for pair in range(repeats) for sample in found.samples]
        replace(found, samples=tuple(pairs)).save(made / name)
    run_as_stored(REPORT, notebook_folder, environment=installed)


@pytest.mark.begun_first
@pytest.mark.timeout(1800)
def test_fresh_run_from_hub_to_hub_shows_what_is_stored(notebook_folder):
    run_as_stored(HUB, notebook_folder)


@pytest.mark.begun_first
@pytest.mark.timeout(1800)
@needs_groups
def test_fresh_run_in_less_memory_shows_what_is_stored(notebook_folder, installed):
    """Outside a clone; of fewer tokens, and the smallest memory by a coarser search."""
    changes = ("tokens: int = 16", "tokens: int = 3"), ("precision: int = 8", "precision: int = 40")
    run_as_stored(FIT, notebook_folder, *changes, environment=installed)
    found = pd.read_csv(notebook_folder / "demo-output/fit/ways.csv", index_col=0)
    assert list(found["outcome"]) == ["killed", "ok", "ok", "ok", "ok", "ok"]
    assert (notebook_folder / "demo-output/fit/ways.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.begun_first
@pytest.mark.timeout(1800)
def test_fresh_run_of_what_helps_shows_what_is_stored(notebook_folder):
    """Each load once."""
    run_as_stored(FACTORS, notebook_folder, ("repeats: int = 3", "repeats: int = 1"))
    made = notebook_folder / "demo-output/factors"
    assert (made / "effects.png").read_bytes().startswith(b"\x89PNG")
    today = Comparison.load(made / "today.json")
    assert len(today.names) == 6
    assert not today.failures


@pytest.mark.begun_first
def test_a_model_in_several_processes_is_measured_as_parameters_say(notebook_folder):
    given = {"demo_size": "200MB", "tokens": 3, "output_folder": "demo-output"}
    done = papermill(PARALLEL, notebook_folder, **given)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(notebook_folder / "demo-output/parallel/ranks.csv", index_col=0)
    ways = ("by tensor, mapped", "by tensor", "for ranks", "by layer")
    assert list(found.index) == ["one process", *(f"{way} {rank}" for way in ways for rank in (0, 1))]
    assert found.notna().all(axis=None)
    assert (notebook_folder / "demo-output/parallel/ranks.png").read_bytes().startswith(b"\x89PNG")
    shown = json.dumps(nbformat.read(notebook_folder / "out.ipynb", as_version=4))
    assert "9 processes gave the same text" in shown
    assert "9 processes cannot share the 8 attention heads" in shown


@pytest.fixture
def nothing_to_install(tmp_path, installed, quick_kernels):
    """Where pip finds nothing, nobody is logged in to the Hub, and loads never happen."""
    pip = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    return {**installed, **quick_kernels, **pip, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}


@pytest.mark.slow
def test_without_a_clone_or_a_stack_of_2024_what_helps_is_shown_for_today(nothing_to_install, tmp_path):
    done = papermill(FACTORS, tmp_path, nothing_to_install, demo_size="5MB")
    assert done.returncode == 0, done.stderr
    shown = json.dumps(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert "without the stack of 2024: the 2024 stack could not be installed" in shown
    assert "not shown: the local Hub is in a clone of shardkit" in shown
    found = (tmp_path / "demo-output/factors").glob("*.json")
    assert [path.name for path in sorted(found)] == ["today.json"]


@pytest.mark.slow
def test_without_a_clone_or_a_token_what_goes_to_the_hub_goes_to_a_folder(nothing_to_install, tmp_path):
    done = papermill(HUB, tmp_path, nothing_to_install)
    assert done.returncode == 0, done.stderr
    shown = json.dumps(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert "no model on the Hub, or no token for it: the shards go to a folder" in shown
    assert "not pushed: that takes a token with write access" in shown
    assert verify_checkpoint(tmp_path / "demo-output/hub/demo", tmp_path / "demo-output/hub/shards").equal


@pytest.mark.usefixtures("quick_loads")
def test_less_memory_is_shown_as_far_as_can_be_where_none_can_be_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(limit, "why_unlimited", lambda: "nobody may")
    given = {"demo_size": "5MB", "host": "Binder", "tokens": 4, "output_folder": str(tmp_path / "made")}
    printed, _ = run_here(FIT, **given)
    assert "no limit: nobody may" in printed
    found = pd.read_csv(tmp_path / "made/fit/ways.csv", index_col=0)
    assert list(found["outcome"]) == ["ok"] * 6
    assert set(found["smallest memory"]) == {"not measured"}


def test_wrong_parameter_ends_in_one_clear_line_of_a_batch_run(tmp_path):
    done = papermill(STORY, tmp_path, dtpye="float16")
    assert done.returncode != 0
    line = r"1 unknown parameter \(dtpye\): this notebook has model, demo_size, .*"
    assert re.fullmatch(f"ParameterError: {line}", done.stderr.strip().splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({"model": "no/such/model"}, r"parameter model: .*no/such/model.*"),
        ({"dtype": "float17"}, r"parameter dtype 'float17' is not one of .*; did you mean float16\?"),
        ({"repeats": "many"}, "parameter repeats: 'many' is not a whole number above zero, or 'auto'"),
    ],
)
def test_wrong_parameter_ends_in_one_clear_line_before_any_work(parameters, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError) as caught:
        run_here(STORY, **parameters)
    assert re.fullmatch(line, str(caught.value))
    assert not list(tmp_path.iterdir())


def test_batch_report_merges_what_lies_below_a_folder(tmp_path):
    for run, ratio in (("a", 0.5), ("b", 1.0)):
        (tmp_path / "runs" / run).mkdir(parents=True)
        fake_comparison(ratio=ratio).save(tmp_path / "runs" / run / "comparison.json")
    _, shown = run_here(REPORT, results=str(tmp_path / "runs"), output_folder=str(tmp_path / "runs"))
    figures = pd.read_csv(tmp_path / "runs/figures.csv").set_index(["result", "variant"])
    for run, ratio in (("a", 0.5), ("b", 1.0)):
        row, found = figures.loc[f"{run}/comparison.json", "sharded"], fake_comparison(ratio=ratio)
        assert row["load time (s)"] == pytest.approx(found.ratios["load_wall_seconds"].other)
        times = [load.load_wall_seconds for load in found.measurements("sharded")]
        spread = [row["lowest load time (s)"], row["highest load time (s)"]]
        assert spread == pytest.approx([min(times), max(times)])
        assert tuple(row[["model", "size", "dtype"]]) == ("models/original", "500 MB", "float16")
    assert (tmp_path / "runs/figures.png").read_bytes().startswith(b"\x89PNG")
    found = json.dumps([data["text/html"] for data in shown if "text/html" in data])
    assert "no difference beyond" in found
    assert "2x faster" in found


def test_times_beside_one_that_works_before_its_load_count_from_process_start(tmp_path):
    runs = [
        Sample(v, n, fake_load(prefetch=v == SHARDED, token=0.5, read=MB)) for n in range(3) for v in VARIANTS
    ]
    fake_comparison(samples=tuple(runs)).save(tmp_path / "ahead_comparison.json")
    fake_comparison().save(tmp_path / "comparison.json")
    figures = mean_figures(read_results(tmp_path)[1]).droplevel(["model", "size", "dtype"])
    assert figures.loc["ahead_comparison.json", "load time (s)"].isna().all()
    assert figures.loc["comparison.json", "load time (s)"].notna().all()
    assert figures["load from process start (s)"].notna().all()
    assert list(figures.loc["ahead_comparison.json", "time per token (s)"]) == [0.5, 0.5]


@pytest.mark.slow
def test_sharding_is_measured_as_articles_do_it_and_as_shardkit_does(tmp_path):
    shardkit.make_demo_checkpoint(tmp_path / "m", size="60MB")
    found = measure_sharding(tmp_path / "m", tmp_path, dtype="float16", max_shard_size="20MB")
    assert list(found["end"]) == ["ok", "ok"]
    assert (found["seconds"] > 0).all()
    article, ours = found["peak (MB)"]
    assert article > ours + 60
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "m/config.json").write_text('{"model_type": "mistral", "hidden_size": "wide"}')
    died, ours = measure_sharding(tmp_path / "m", tmp_path, dtype="float16", max_shard_size="20MB")["end"]
    assert "hidden_size" in died
    assert ours == "ok"


@needs_groups
def test_a_load_that_dies_of_its_limit_has_a_curve_too(tmp_path):
    source = shardkit.make_demo_checkpoint(tmp_path / "m", size="60MB").source
    seen = []
    runs = load_within(150 * MB, {"mine": source}, dtype="float16", progress=lambda *at: seen.append(at))
    assert runs.failures["mine"].startswith("killed")
    curve = runs.typical_runs["mine"].curve
    assert 50 * MB < max(curve.anonymous_bytes) <= 150 * MB
    assert seen == [(0, 1, "mine"), (1, 1, "done")]


@pytest.mark.parametrize("below", ["", "nothing loads"])
def test_batch_report_shows_what_does_not_load_or_was_not_measured(below, tmp_path):
    hostile = "<img src=x onerror=alert(1)>$x_"
    killed = tuple(Sample(variant, None, fake_load(outcome="killed")) for variant in VARIANTS)
    whole = fake_comparison()
    sharded = tuple(sample for sample in whole.samples if sample.variant == SHARDED)
    third = {"variants": (*whole.variants, fake_variant("mine", "F16"))}
    for name, found in {
        "nothing loads": fake_comparison(samples=(), warm_ups=killed),
        "original killed": fake_comparison(samples=sharded, warm_ups=killed[:1]),
        hostile: replace(
            whole, samples=(*whole.samples, *(replace(sample, variant="mine") for sample in sharded)), **third
        ),
    }.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        found.save(tmp_path / "runs" / name / "comparison.json")
    made = tmp_path / "made/here"
    _, shown = run_here(REPORT, results=str(tmp_path / "runs" / below), output_folder=str(made))
    run, found, _ = shown
    assert "killed" in run["text/html"]
    assert "original does not load (killed: by SIGKILL during load)" in found["text/html"]
    assert (made / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert not [data for data in shown if hostile in data["text/html"]]
    figures = pd.read_csv(made / "figures.csv")
    assert list(figures["variant"]) == ([] if below else ["original", "sharded", "mine", "sharded"])


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        (None, MeasurementError, "no results to merge"),
        ("{}", ShardkitError, r".*runs/comparison\.json: this is None, not 'shardkit/Comparison/\d+'"),
        (
            json.dumps(fake_comparison().to_dict() | {"variants": 3}),
            ShardkitError,
            r".*comparison\.json: .*not readable: .*variants",
        ),
    ],
    ids=["none", "another file", "damaged"],
)
def test_batch_report_names_what_it_cannot_merge(text, kind, line, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    if text is not None:
        (runs / "comparison.json").write_text(text)
    with pytest.raises(kind) as caught:
        run_here(REPORT, results=str(runs), output_folder=str(runs))
    assert re.match(line, str(caught.value))


def names(**values):
    """The namespace of a notebook behind its parameters and what papermill wrote."""
    cells = ["", 'cache: str = "cold"\nrepeats: int = 5', "%syntax of a shell", "other = 3"]
    cells.append("# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items()))
    return {"In": cells, "cache": "cold", "repeats": 5, "other": 3, **values}


def test_known_parameters_pass():
    check_parameters(names(cache="warm", repeats=1))
    check_parameters(names(repeats="auto"))
    check_parameters({"In": ["model: str = ''"], "model": ""})


def test_limits_are_to_a_model_what_the_hosts_memory_is_to_mistral(demo):
    checkpoint = Checkpoint.open(demo)
    assert scaled_limits(replace(checkpoint, tensors={})) == dict.fromkeys(memory_limits(), 320_000_000)
    limits = scaled_limits(checkpoint)
    shares = {host: (limit - 320e6) / checkpoint.total_bytes for host, limit in limits.items()}
    found = {host: 320e6 + share * 14_483_464_192 for host, share in shares.items()}
    assert found == pytest.approx(memory_limits())


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_repeats_is_a_whole_number_above_zero(value):
    with pytest.raises(ParameterError, match=r"parameter repeats: .* not a whole number above zero"):
        check_parameters(names(repeats=value))


def test_a_name_that_another_cell_assigned_is_no_parameter():
    with pytest.raises(
        ParameterError, match=r"unknown parameter \(other\): this notebook has cache, repeats"
    ):
        check_parameters(names(other=4))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_a_help_text_and_a_field_in_colabs_form(notebook):
    parameters = inspect_notebook(notebook)
    assert parameters
    fields = {"str": ("string",), "int": ("integer", "raw"), "bool": ("boolean",)}
    complete = {"strategy": list(STRATEGIES), "host": list(memory_limits())}
    for name, parameter in parameters.items():
        form = re.fullmatch(r'@param (?:(\[.*\])|\{type:"(\w+)"\}) # \S.+', parameter["help"])
        assert form, name
        default = json.loads(parameter["default"].lower() if form[2] == "boolean" else parameter["default"])
        if form[1]:
            assert default in json.loads(form[1])
            assert json.loads(form[1]) == complete.get(name, json.loads(form[1]))
            for choice in json.loads(form[1]):
                check_values({name: choice})
        else:
            assert form[2] in fields[parameter["inferred_type_name"]]


def test_a_folder_in_google_drive_is_mounted_and_its_cache_is_warned_of(tmp_path, monkeypatch, capsys):
    mounted = []
    colab = SimpleNamespace(drive=SimpleNamespace(mount=mounted.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr("shardkit.notebook._DRIVE", str(tmp_path / "drive"))
    assert made_folder(str(tmp_path / "elsewhere")).is_dir()
    assert (mounted, capsys.readouterr().out) == ([], "")
    assert made_folder(str(tmp_path / "drive/MyDrive/x")).is_dir()
    assert mounted == [str(tmp_path / "drive")]
    assert re.search(r"fills Colab's disk, until it is uploaded.*flush_and_unmount", capsys.readouterr().out)


def test_who_may_write_to_the_hub_is_known_where_there_is_a_token(hub, demo, monkeypatch):
    hub.add_model("org/model", demo)
    assert hub_user(Checkpoint.open("org/model")) == "me"
    assert hub_user(Checkpoint.open(demo)) is None
    monkeypatch.delenv("HF_TOKEN")
    assert hub_user(Checkpoint.open("org/model")) is None


class Kernel:
    """A real kernel that runs a notebook's cells in a folder."""

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=folder)

    def run(self, *cells):
        """Run cells to their end, and return what the last one shows."""
        shown = []
        for cell in cells:
            reply = self.client.execute_interactive(cell, output_hook=shown.append, timeout=120)
            assert reply["content"]["status"] == "ok", reply["content"].get("traceback")
        data = [message["content"].get("data", {}) for message in shown]
        return [texts["text/plain"] for texts in data if "text/plain" in texts][-1]

    def start(self, cell):
        """Run a cell, and do not wait."""
        self.client.execute(cell)

    def restart(self):
        """Kill the kernel where it stands, and start another, as the menu of a notebook does."""
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=60)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    made = Kernel(tmp_path)
    yield made
    made.close()


def test_running_again_after_the_kernel_died_in_the_middle_of_sharding_goes_on_there(kernel, tmp_path):
    cells = [cell.source for cell in nbformat.read(STORY, as_version=4).cells if cell.cell_type == "code"]
    sharding = next(place for place, cell in enumerate(cells) if "shard_checkpoint" in cell)
    before = [cell.replace('"100MB"', '"10MB"') for cell in cells[:sharding]]
    kernel.run(*before)
    kernel.start(cells[sharding])
    limit = time.monotonic() + 60
    while len(written := list(tmp_path.glob("demo-output/*sharded*/*.safetensors"))) < 20:
        assert time.monotonic() < limit, written
        time.sleep(0.002)
    kernel.restart()
    assert not (tmp_path / "demo-output/sharded").exists()
    shown = kernel.run(*before, cells[sharding])
    assert re.search(r"reused +\d+ of \d+ files: model-\d{5}-of-\d{5}\.safetensors", shown)
    assert re.search(r"verified +equal, 129 tensors", shown)


def test_every_picture_appears_under_its_cell(tmp_path):
    """The first plot of a kernel loads the backend of notebooks, and must not spoil it for the next."""
    fake_comparison().save(tmp_path / "comparison.json")
    cells = ["import shardkit; from shardkit.show.plots import plot_bars, plot_memory"]
    cells += ["found = shardkit.Comparison.load('comparison.json')"]
    cells += ["plot_bars(found);", "plot_memory(found);", "found.plot();"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [[output for output in cell.outputs if "image/png" in output.data] for cell in notebook.cells]
    assert [len(found) for found in pictures] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_can_be_read_without_running(notebook):
    stored = nbformat.read(notebook, as_version=4)
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    shown = {cell.id for cell in code for output in cell.outputs if "image/png" in output.get("data", {})}
    assert shown == {cell.id for cell in code if re.search(r"plots?(_\w+)?\(|ShardApp\(", cell.source)}
    assert not [output for output in outputs if output.output_type == "error"]
    text = json.dumps(stored)
    for foreign in ("widget-state", "widget-view", "/home/", "/tmp/", "/root/"):
        assert foreign not in text
    assert all(len(cell.source.splitlines()) <= 12 for cell in code)


def sweep(folder, environment, *words):
    command = [sys.executable, ROOT / "notebooks/sweep.py", folder / "runs", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_sweep_measures_its_grid_in_parts_and_merges_it(quick_kernels, tmp_path):
    grid = ("demo_size=5MB", "max_shard_size=1MB", "dtype=float16,bfloat16", "repeats=1")
    first = sweep(tmp_path, quick_kernels, *grid, "--part", "2/2")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "bfloat16: done\n"
    last = sweep(tmp_path, quick_kernels, *grid)
    assert last.returncode == 0, last.stderr
    assert set(last.stdout.splitlines()[:2]) == {"float16: done", "bfloat16: done"}
    figures = pd.read_csv(tmp_path / "runs/figures.csv")
    assert set(figures["dtype"]) == {"float16", "bfloat16"}
    assert len(set(figures["result"])) == 4  # two results of each notebook
    assert not [
        path
        for run in ("float16", "bfloat16")
        for path in (tmp_path / "runs" / run).iterdir()
        if path.is_dir()
    ]


def test_sweep_starts_again_what_had_no_kernel_and_reports_what_failed(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "notebooks"))
    import sweep as module

    endings = iter(
        ["RuntimeError: Kernel died before replying to kernel_info", "", "ParameterError: no such model"]
    )
    calls = []

    def run(command, **_):
        calls.append(command)
        Path(command[5]).write_text("{}")
        error = next(endings)
        return subprocess.CompletedProcess(command, bool(error), "", error)

    monkeypatch.setattr(module.subprocess, "run", run)
    good, bad = module.grid(tmp_path, ["model=a,b", "repeats=1"])
    assert module.measure(good) == ""
    assert len(calls) == 2
    assert module.measure(bad) == "ParameterError: no such model"
    assert module.measure(good) == ""  # it is finished
    assert len(calls) == 3
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.ipynb")) == [
        "a/notebook.ipynb",
        "b/failed.ipynb",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["demo_size"], "no grid of distinct values"),
        (["model=a/b,a-b"], "no grid of distinct values"),
        (["model=a", "--part", "3/2"], "there is no part 3 of 2"),
    ],
)
def test_wrong_grid_is_refused(words, line, tmp_path):
    done = sweep(tmp_path, {}, *words)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
