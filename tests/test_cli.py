"""The command line, run as a user runs it: a process, its output, its exit status."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardkit
from shardkit import Checkpoint, Comparison, cli, plan_shards
from shardkit.base.jobs import resumable
from shardkit.base.sizes import format_size
from shardkit.cli import arguments, commands
from shardkit.compare import experiment
from shardkit.demo import make_demo_checkpoint
from shardkit.errors import Interrupted, ShardkitError
from shardkit.load import generate as generating
from shardkit.measure.limit import why_unlimited
from shardkit.shard.destination import default_destination, leftovers
from tests.fake_loads import fake_load
from tests.unasked import COMMAND, run

ASKING = (sys.executable, "-c", "from shardkit.__main__ import main; main()")


def test_the_whole_job_from_demo_to_verified_shards(tmp_path):
    source, target = tmp_path / "demo", tmp_path / "sharded"
    assert run("demo", "--output", source, "--size", "10M").returncode == 0
    assert "MistralForCausalLM" in run("inspect", source).stdout
    planned = run("plan", source, "--max-shard-size", "3MB", "--dtype", "float16").stdout
    assert "enough" in planned
    shards = "271 MB of anonymous memory (cannot be evicted) for the shards"
    assert f"{shards}, 281 MB for the source, both loaded in float16" in planned
    job = ("shard", source, target, "--max-shard-size", "3MB", "--dtype", "fp16")
    done = run(*job, command=ASKING)
    assert done.returncode == 0, done.stderr
    assert max(file.stat().st_size for file in target.glob("*.safetensors")) <= 3_000_000
    assert "equal" in done.stdout
    assert "MistralForCausalLM gets the same" in done.stdout
    assert done.stdout.endswith(f"\nnext: shardkit compare {source} {target} --dtype float16\n")
    verified = run("verify", source, target)
    assert verified.returncode == 0
    assert "computed again" in verified.stdout


def test_source_is_freed_and_merged_from_a_terminal(demo, tmp_path):
    source, target = shutil.copytree(demo, tmp_path / "demo"), tmp_path / "merged"
    done = run("shard", source, target, "--files", "1", "--free-source")
    assert done.returncode == 0, done.stderr
    assert "the source was freed: 2 files of weights" in done.stdout
    assert done.stdout.endswith(f"\nnext: shardkit inspect {target}\n")
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert list(source.glob("*.safetensors*")) == []
    assert shardkit.verify_checkpoint(demo, target).equal


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "shard"])
def test_json_is_one_object_and_nothing_else(command, demo, tmp_path):
    arguments = {"verify": [demo], "shard": [tmp_path / "out"]}.get(command, [])
    done = run(command, demo, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"].startswith("shardkit/")


def test_json_of_inspect_holds_the_estimate_in_the_dtype_to_load_in(demo):
    shown, as_float32 = (
        json.loads(run("inspect", demo, "--json", *more).stdout)["estimate"]
        for more in ([], ["--dtype", "float32"])
    )
    expected = Checkpoint.open(demo).estimate("float32")
    assert (as_float32["dtype"], as_float32["copied_bytes"]) == ("float32", expected.copied_bytes)
    assert as_float32["peak_anonymous_bytes"] == expected.peak_anonymous_bytes
    assert [host["name"] for host in as_float32["hosts"]] == ["this machine", "Colab", "Kaggle", "Binder"]
    assert (shown["dtype"], shown["copied_bytes"]) == ("bfloat16", 0)


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_json_holds_every_figure_of_the_text(command, demo):
    text, data = (run(command, demo, *more).stdout for more in ((), ("--json",)))
    found = set()

    def gather(value):
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            gather(part)
        if isinstance(value, (int, float, str)):
            found.update([str(value), format_size(value) if isinstance(value, int) else "", f"{value}"])

    gather(json.loads(data))
    free = re.compile(r"(?<=this machine \(free\))  +\S+ GB|\S+ GB free")  # changes from run to run
    sizes = re.findall(r"\d[\d.]* [KMG]?B\b", free.sub("", text))
    assert len(sizes) > 5
    assert set(sizes) - found == set()


def test_inspect_answers_what_a_budget_gives(demo):
    words = ("inspect", demo, "--max-memory", "338MB", "--context-tokens", "64", "--disk-rate", "1GB")
    found = json.loads(run(*words, "--json").stdout)["estimate"]["within"]
    assert found["plan"]["work"] == {"max_memory": 338_000_000, "context_tokens": 64, "batch_size": 1}
    assert found["seconds_per_token"] == found["plan"]["streamed_bytes"] / 1e9
    shown = run(*words).stdout
    assert "within a budget  338 MB (64 tokens, batch of 1)" in shown
    assert "read per token" in shown
    assert "--max-memory of 1 MB is too small" in run("inspect", demo, "--max-memory", "1MB").stdout


def test_json_of_plan_holds_the_disk_and_both_estimates(demo):
    planned = json.loads(run("plan", demo, "--dtype", "float16", "--json").stdout)
    assert planned["disk_bytes"] == plan_shards(demo, dtype="float16").disk_bytes
    assert planned["free_bytes"] > planned["disk_bytes"]
    before, after = planned["estimate"]["before"], planned["estimate"]["after"]
    assert before["dtype"] == after["dtype"] == "float16"
    assert before["copied_bytes"] == after["mapped_bytes"] > 0
    assert before["mapped_bytes"] == after["copied_bytes"] == 0
    assert before["tokenizer_bytes"] == after["tokenizer_bytes"] > 0


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_file_that_could_not_be_read_again_is_refused_before_any_load(option, demo, tmp_path):
    done = run("compare", demo, demo, option, tmp_path / "result.csv")
    assert done.returncode == 2
    assert "result.csv must end in ." in done.stderr


def test_a_difference_is_exit_status_one_and_names_the_tensor(demo, tmp_path):
    target = tmp_path / "sharded"
    assert run("shard", demo, target).returncode == 0
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    done = run("verify", demo, target)
    assert done.returncode == 1
    assert "lm_head.weight" in done.stdout
    assert json.loads(run("verify", demo, target, "--json").stdout)["equal"] is False
    assert json.loads(run("verify", demo, demo, "--json").stdout)["equal"] is True
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.endswith("do not use it: shard the source again, with --overwrite\n")
    other = make_demo_checkpoint(tmp_path / "other", size="30MB").source
    done = run("verify", demo, other)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{other} may be of another model; find out before you overwrite anything\n")


WRONG = {
    "source is no checkpoint": ("{folder}/file", "{folder}/out"),
    "source is damaged": ("{folder}/damaged.safetensors", "{folder}/out"),
    "destination is a file": ("{demo}", "{folder}/file"),
    "destination is below a file": ("{demo}", "{folder}/file/out"),
    "destination is the source": ("{demo}", "{demo}"),
    "destination is inside the source": ("{demo}", "{demo}/sharded"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_wrong_ends_in_one_line_and_status_one(case, demo, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 40)
    done = run("shard", *(word.format(demo=demo, folder=tmp_path) for word in WRONG[case]))
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("shard", "required: source"),
        ("shard a b --strategy blanced", "did you mean balanced"),
        ("shard a b --dtype float61", "did you mean float16"),
        ("shard a b --max-shard-size 2parsecs", '"500MB", "2GB"'),
        ("shard a b --max-shard-size 100", "type 100MB"),
        ("shard a b --output c", "not allowed with argument destination"),
        ("shard a b --public", "hf:// destinations"),
        ("shard a hf://me/b --overwrite", "only apply to folders"),
        ("shard a hf://me/b --free-source", "only apply to folders"),
        ("shard a b --strat size", "unrecognized arguments: --strat size; did you mean --strategy"),
        ("compare a b --repeat=3", "did you mean --repeats"),
        ("shard no/such/folder out", "not a local folder or file"),
        ("shard runs/exp--1 out", "not a Hub id"),
        ("verify a", "destination --output is required"),
        ("compare a b --repeats 0", "whole number above zero"),
        ("compare a b --repeats often", "whole number above zero, at most 1,000,000,000, or auto"),
        ("compare a b --most 9", "--most and --most-seconds only apply to --repeats auto"),
        ("compare a b --most-seconds -1", "'-1' is not a number of seconds"),
        ("inspect a --context-tokens x", "whole number above zero"),
        ("inspect a --context-tokens 2.5", "whole number above zero"),
        ("inspect a --batch-size -1", "whole number above zero"),
        ("inspect a --context-tokens 10000000000", "at most 1,000,000,000"),
        ("inspect a --max-memory much", "is not a size"),
        ("generate a --prompt x --max-memory 0", "is not above zero"),
        ("generate a --prompt x --max-new-tokens 0", "whole number above zero"),
        ("compare a b --device gpu", '"cuda:1"'),
        ("compare a b --memory-limit much", "is not a size"),
        ("demo never --size 1MB", "from 5,000,000"),
        ("shrad a", "did you mean shard"),
    ],
)
def test_a_value_that_is_none_is_status_two_and_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shardkit", *arguments.split()])
    monkeypatch.setattr(warnings, "showwarning", None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed, line = capsys.readouterr()
    assert (ended.value.code, printed) == (2, "")
    assert line.startswith("shardkit: ")
    assert said in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("folder", ["", "below/here/"])
def test_typo_in_the_name_of_a_folder_is_status_two_and_names_what_is_near(folder, demo, tmp_path):
    shutil.copytree(demo, tmp_path / folder / "mistral-demo")
    (tmp_path / folder / "mistral-dem.txt").write_text("neither a folder nor weights")
    done = run("verify", demo, f"{folder}mistral-dmo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"; did you mean {folder}mistral-demo?\n")


def test_a_pipe_gets_every_file_of_a_plan_and_a_terminal_a_screen_of_them(demo):
    words = ("plan", demo, "--max-shard-size", "1MB", "--strategy", "balanced")
    piped, seen = run(*words).stdout, in_a_terminal(*words)
    files = len(plan_shards(demo, max_shard_size="1MB", strategy="balanced").shards)
    assert files > 12
    assert len(re.findall(r"model-\d{5}-of", piped)) == files
    assert len(re.findall(r"model-\d{5}-of", seen)) == 11
    assert f"... {files - 11} more" in seen
    assert piped.endswith(f"\nnext: shardkit shard {demo} --max-shard-size 1MB --strategy balanced\n")


@resumable()
def interrupted_twice():
    try:
        raise KeyboardInterrupt
    finally:
        raise KeyboardInterrupt


def test_interrupt_while_one_is_dealt_with_does_not_claim_that_nothing_is_kept():
    with pytest.raises(Interrupted, match="run again to resume, if anything was finished"):
        interrupted_twice()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_nobody_opened_are_no_obstacle(demo, tmp_path, closed):
    words = shlex.join([*COMMAND, "shard", str(demo), "--output", str(tmp_path / "made"), "--no-verify"])
    assert subprocess.run(["sh", "-c", f"exec {words} {closed}"], check=False).returncode == 0
    assert (tmp_path / "made/model.safetensors").is_file()


def test_one_dtype_mistake_has_one_wording(demo):
    said = {run(command, demo, "--dtype", "fp61").stderr for command in ("inspect", "plan", "fit")}
    assert len({line.partition("; see")[0] for line in said}) == 1


def test_shards_go_beside_their_source_by_themselves(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "below" / "m.v1")
    for source, made in (("below/m.v1/", "below/m.v1-sharded"), (".", "../m.v1-sharded-twice")):
        options = {"cwd": tmp_path} if source != "." else {"cwd": tmp_path / "below" / "m.v1"}
        words = [] if source != "." else ["--output", made]
        done = run("shard", source, *words, "--no-verify", **options)
        assert done.returncode == 0, done.stderr
        assert (options["cwd"] / made / "model.safetensors").is_file()
    for on_hub in ("org/name@refs/pr/1", "https://huggingface.co/org/name/tree/main"):
        assert default_destination(on_hub) == "name-sharded"


def test_shards_are_not_named_after_a_version_nor_put_where_nothing_can_be_written(tmp_path, monkeypatch):
    for version in ("", "/2", "/2/"):
        assert default_destination(f"kaggle://owner/model/transformers/7b{version}") == "7b-sharded"
    attached = tmp_path / "input" / "7b" / "2"
    attached.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert default_destination(str(attached)) == "input/7b/7b-sharded"
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != attached.parent)
    assert default_destination(str(attached)) == "7b-sharded"


def test_help_of_every_command_has_examples_that_are_understood():
    for name, parser in arguments._COMMANDS.choices.items():
        lines = parser.format_help().partition("examples:\n")[2].split("\n")
        examples = [shlex.split(line)[1:] for line in lines if line]
        assert any(words[0] == name for words in examples)
        for words in examples:
            arguments.parse(words)


def test_overwriting_says_what_it_replaced_and_starting_over_says_so_first(demo, tmp_path):
    target, journal = tmp_path / "out", tmp_path / ".out.shardkit-journal"
    assert run("shard", demo, target).returncode == 0
    done = run("shard", demo, target, "--overwrite", "--no-verify")
    assert "replaced what was there before: 7 files, 20" in done.stdout
    (tmp_path / ".out.shardkit-staging").mkdir()
    journal.write_text('{"fingerprint": "another"}\n{"shard": "x"}\n')
    said = run("shard", demo, target, "--overwrite", "--no-verify")
    assert said.stderr == "shardkit: starting over: 1 finished shard of another source or plan discarded\n"


def test_demo_that_is_there_already_is_said_to_be(tmp_path):
    first, second = (run("demo", tmp_path / "demo", "--size", "5MB") for _ in range(2))
    assert first.stdout == second.stdout
    assert (first.stderr, "there already" in second.stderr) == ("", True)


def test_interrupt_leaves_no_destination_and_the_same_command_goes_on(tmp_path):
    source, target = tmp_path / "demo", tmp_path / "sharded"
    make_demo_checkpoint(source, size="600MB")
    command = [*COMMAND, "shard", str(source), str(target), "--max-shard-size", "20MB", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    staging, journal = (tmp_path / f".sharded.shardkit-{role}" for role in ("staging", "journal"))
    while not (journal.is_file() and journal.read_text().count('"shard"') > 2):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"finished shards kept in {staging}: run again to resume, or `shardkit clean" in errors
    assert not target.exists()
    assert "interrupted run" in run("inspect", target).stderr
    resumed = run(*command[len(COMMAND) :])
    assert resumed.returncode == 0, resumed.stderr
    assert "reused" in resumed.stdout
    assert not staging.exists()


def test_interrupt_does_not_wait_for_a_slow_disk(demo, tmp_path):
    slow = "import os, time; os.fsync = lambda _: time.sleep(60); from shardkit.cli import main; main()"
    command = [sys.executable, "-c", slow, "shard", demo, str(tmp_path / "out"), "--max-shard-size", "5MB"]
    journal = tmp_path / ".out.shardkit-journal"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (journal.is_file() and '"shard"' in journal.read_text()):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:  # Python drops an interrupt that meets a finaliser: press again
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert errors.startswith("shardkit: stopped; ")
    assert "kept in" in errors
    assert run("shard", demo, tmp_path / "out", "--max-shard-size", "5MB").returncode == 0


def test_clean_removes_what_an_interrupted_run_left(tmp_path):
    left = tmp_path / ".out.shardkit-staging"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    done = run("clean", tmp_path / "out")
    assert done.returncode == 0
    assert str(left) in done.stdout
    assert list(tmp_path.iterdir()) == []
    again = run("clean", tmp_path / "out")
    assert (again.returncode, "does not exist" in again.stderr) == (1, True)
    (tmp_path / "out").mkdir()
    assert "nothing to remove" in run("clean", "--output", tmp_path / "out").stdout


def test_clean_removes_nothing_of_another_name_and_puts_an_old_destination_back(tmp_path):
    for name in (".out.shardkit-x.shardkit-staging", ".out.shardkit-notes", ".out.shardkit-old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.shardkit-staging").write_text("planted")
    (tmp_path / ".out.shardkit-old" / "model.safetensors").write_text("old")
    done = run("clean", tmp_path / "out")
    assert done.stdout == f"removed {tmp_path / '.out.shardkit-staging'}\n"
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out.shardkit-x.shardkit-staging", ".out.shardkit-notes"}


def test_inspect_tells_of_leftovers_in_one_line(tmp_path):
    for role in ("staging", "journal"):
        (tmp_path / f".out.shardkit-{role}").mkdir()
    told = run("inspect", tmp_path / "out").stderr.splitlines()
    assert [line.count(".out.shardkit-") for line in told if "interrupted run" in line] == [2]


def test_error_says_in_its_line_what_is_kept_and_how_to_remove_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": torch.full((9,), 1e30)}, source / "model.safetensors")
    done = run("shard", source, tmp_path / "out", "--dtype", "float16")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"1 finished shard kept in {tmp_path / '.out.shardkit-staging'}" in done.stderr
    assert str(tmp_path / ".out.shardkit-staging") in run("clean", tmp_path / "out").stdout
    assert list(tmp_path.iterdir()) == [source]


def test_error_moves_no_cursor_and_makes_no_second_line(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.safetensors"
    path.write_bytes(b"garbage!")
    done = run("inspect", path)
    assert done.returncode == 1
    assert r"a\x1b[31m\nb.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_terminal_of_few_characters_is_no_error(tmp_path):
    made = make_demo_checkpoint(tmp_path / "größe 層", size="5MB")
    done = run("inspect", made.source, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert r"größe \u5c64" in done.stdout


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "shardkit", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout[0].isdigit()


SAID_EARLY = "shardkit: stopped before anything began\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_comparison_that_is_stopped_shows_and_saves_what_was_measured(
    as_json, demo, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "run_load", lambda source, *_, **__: fake_load(source=str(source)))
    stop_at, result, words = [5], tmp_path / "result.json", ["--json"] * as_json

    def stop(done, *_):
        if done == stop_at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show_run", stop)
    asked = ["compare", str(demo), str(demo), "--repeats", "9", *words, "--output"]
    with pytest.raises(Interrupted, match=rf"^stopped; .*{result.name} has what was measured$"):
        cli.run([*asked, str(result)])
    told = capsys.readouterr().out
    assert ("! stopped before its end" in told, "2 pairs in ABBA order" in told) == (not as_json,) * 2
    assert len(Comparison.load(result).samples) == 3
    stop_at[0] = 2  # of two warm-ups there is nothing to say
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        cli.run([*asked, str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
    assert capsys.readouterr().out == ""


def test_text_that_is_stopped_keeps_its_last_line(demo, monkeypatch, capsys):
    def speak(*_, on_text, **__):
        on_text("once upon")
        raise KeyboardInterrupt

    monkeypatch.setattr(generating, "generate_text", speak)
    with pytest.raises(Interrupted, match=r"^stopped$"):
        cli.run(["generate", str(demo), "--prompt", "x"])
    assert capsys.readouterr().out == "once upon\n"


def test_page_of_the_hub_is_no_folder_that_a_run_may_have_left():
    assert leftovers("https://huggingface.co/org/name/tree/main") == []
    asked = run("inspect", "https://huggingface.co/org/name", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert asked.stderr.startswith("shardkit: hf://org/name@main is not in the local cache"), asked.stderr


def test_empty_name_is_no_source(demo):
    asked = run("inspect", "", cwd=demo)
    assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
    assert "an empty name is no checkpoint" in asked.stderr


@pytest.mark.parametrize(("budget", "given"), [("600MB", "--max-memory 600MB"), ("2GB", ""), ("300MB", None)])
def test_budget_that_does_leads_to_text_and_none_is_given_where_all_fits(budget, given, tmp_path):
    model = make_demo_checkpoint(tmp_path / "model", size="300MB").source
    last = run("inspect", model, "--max-memory", budget).stdout.splitlines()[-1]
    asked = f"next: shardkit generate {model} --prompt ..."
    assert last == f"{asked} {given}".rstrip() if given is not None else not last.startswith(asked)


def test_interrupt_while_python_imports_is_one_line(tmp_path):
    (tmp_path / "filelock.py").write_text("raise KeyboardInterrupt")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-m", "shardkit"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", SAID_EARLY)


def test_working_folder_that_is_gone_is_no_error(demo, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    main = "import os; from shardkit.cli import main; os.rmdir(os.getcwd()); main()"
    command = [sys.executable, "-c", main, "shard", demo, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gone)
    assert (done.returncode, done.stderr) == (0, "")


def in_a_terminal(*arguments, **environment):
    """Return what a terminal of 60 columns shows of a command."""
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "60", "TERM": "xterm", **environment}
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    seen = b""
    with suppress(OSError):  # which is how Linux says that nobody writes any more
        while chunk := os.read(leader, 1 << 16):
            seen += chunk
    os.close(leader)
    process.wait()
    return seen.decode()


def test_a_terminal_gets_color_and_lines_that_fit_and_a_pipe_plain_text(demo):
    plain = run("inspect", demo).stdout
    assert "\x1b" not in plain
    colored = in_a_terminal("inspect", demo)
    assert "\x1b[1mCheckpoint\x1b[0m" in colored
    assert "\x1b[32mfits\x1b[0m" in colored
    uncolored = in_a_terminal("inspect", demo, NO_COLOR="1")
    assert "\x1b" not in uncolored
    free = re.compile(r"this machine.*")  # changes from run to run
    assert free.sub("", re.sub(r"\x1b\[\d*m", "", colored)) == free.sub("", uncolored)
    width = max(len(line) for line in uncolored.splitlines() if str(demo) not in line)  # a path is never cut
    assert width <= 60 < max(map(len, plain.splitlines()))
    assert "\x1b[1;31mshardkit:\x1b[0m" in in_a_terminal("inspect", "no/such/model/here")


def test_a_terminal_sees_progress_and_a_pipe_does_not(demo, tmp_path):
    seen = in_a_terminal("shard", demo, tmp_path / "seen")
    assert "writing shards: 100%" in seen
    assert "B/s" in seen
    assert "asking transformers" in seen
    assert run("shard", demo, tmp_path / "piped").stderr == ""


@pytest.mark.skipif(why_unlimited() is not None, reason=f"memory cannot be limited here: {why_unlimited()}")
def test_comparison_under_a_limit_with_prefetch_leaves_a_card_and_a_picture(demo, tmp_path):
    card, picture = tmp_path / "card.html", tmp_path / "picture.svg"
    words = ["--memory-limit", "900MB", "--prefetch", "--repeats", "1", "--output", card, "--plot", picture]
    done = run("compare", demo, demo, *words)
    assert done.returncode == 0, done.stderr
    assert "prefetched, load from process start" in done.stdout
    assert "within 900 MB" in done.stdout
    assert "6/6 done" in done.stderr
    assert Comparison.load(card).names == ("original", "sharded", "prefetched")
    assert "<svg" in picture.read_text()


def test_that_nothing_loads_is_exit_status_one_with_its_reason(demo, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    (broken / "config.json").write_text('{"model_type": "no-such-model"}')
    done = run("compare", broken, broken)
    assert done.returncode == 1
    assert "no-such-model" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_checkpoint_is_trusted_by_name_alone(demo, monkeypatch, trusted):
    given = []

    def stand_in(*_, **asked):
        given.append(asked.get("options"))
        raise ShardkitError("no load")

    words = ["--trust-remote-code"] if trusted else []
    for function, command in (
        ("compare_loads", ["compare", str(demo), str(demo)]),
        ("minimum_memory", ["fit", str(demo)]),
    ):
        monkeypatch.setattr(shardkit, function, stand_in)
        with pytest.raises(ShardkitError, match="no load"):
            cli.run([*command, *words])
    assert given == [{"trust_remote_code": True} if trusted else None] * 2
