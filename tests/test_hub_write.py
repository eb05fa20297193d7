"""What is pushed to the Hub, and made there: whole or not at all, and loadable by everybody."""

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi

import shardkit
from shardkit.base.errors import Cancelled, CheckpointError, DestinationError
from shardkit.shard import sending, verify
from shardkit.shard.engine import shard_on_hub
from shardkit.shard.push import push_checkpoint
from tests.loopback_hub import LoopbackHub
from tests.support import Tensor, read_checkpoint, write_checkpoint
from tests.unasked import run

REPO = "me/sharded"
SENT = "PUT storage"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokenizer and a licence, in two files."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shardkit.make_demo_checkpoint(folder, size="5MB")
    card = "---\nlicense: apache-2.0\ntags:\n- a-tag\n---\n\n# The model\n\nWhat it is.\n"
    (folder / "README.md").write_text(card)
    return folder


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> shardkit.ShardReport:
    folder = tmp_path_factory.mktemp("hub") / "sharded"
    return shardkit.shard_checkpoint(model, folder, max_shard_size="400KB")


def index_of(hub: LoopbackHub, repo: str = REPO) -> dict[str, str]:
    return json.loads(hub.read(repo, "model.safetensors.index.json"))["weight_map"]


def snapshot(hub: LoopbackHub, repo: str, folder: Path) -> Path:
    """The files of a repository's head, read from the Hub's own storage."""
    for name in hub.files(repo):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.read(repo, name))
    return folder


def test_what_is_pushed_is_what_is_loaded_by_id(
    hub: LoopbackHub, model: Path, sharded: shardkit.ShardReport
) -> None:
    url = push_checkpoint(sharded.destination, REPO)
    head = hub.repo(REPO).branches["main"]
    assert url == f"{hub.url}/{REPO}/commit/{head}"
    assert hub.repo(REPO).private
    code = """if 1:
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        a, b = map(AutoModelForCausalLM.from_pretrained, sys.argv[1:])
        ta, tb = map(AutoTokenizer.from_pretrained, sys.argv[1:])
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
        text = "Sharding is"
        assert ta(text)["input_ids"] == tb(text)["input_ids"]
        tokens = ta(text, return_tensors="pt")
        out = [m.generate(**tokens, max_new_tokens=5, do_sample=False) for m in (a, b)]
        assert torch.equal(*out)
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), REPO], capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]
    assert hub.half_heads(REPO) == []


def test_second_push_of_the_same_sends_nothing_and_commits_nothing(
    hub: LoopbackHub, sharded: shardkit.ShardReport
) -> None:
    first = push_checkpoint(sharded, REPO)
    sent, commits = hub.received(SENT), len(hub.repo(REPO).commits)
    assert push_checkpoint(sharded, REPO) == first
    assert hub.received(SENT) == sent
    assert len(hub.repo(REPO).commits) == commits


def test_only_what_differs_is_sent(hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path) -> None:
    push_checkpoint(sharded.destination, REPO)
    changed = tmp_path / "changed"
    subprocess.run(["cp", "-r", sharded.destination, changed], check=True)
    first = sorted(sharded.files)[0]
    data = (changed / first).read_bytes()
    (changed / first).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    sent = hub.received(SENT)
    push_checkpoint(changed, REPO)
    assert hub.received(SENT) - sent == sharded.files[first]
    assert hub.read(REPO, first) == (changed / first).read_bytes()


def test_weights_of_an_earlier_model_go_in_the_same_commit(
    hub: LoopbackHub, model: Path, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    single = shardkit.shard_checkpoint(model, tmp_path / "single", max_shard_size="1GB")
    push_checkpoint(single, REPO)
    assert "model.safetensors" in hub.files(REPO)
    commits = len(hub.repo(REPO).commits)
    push_checkpoint(sharded, REPO)
    assert "model.safetensors" not in hub.files(REPO)
    assert set(index_of(hub).values()) == set(sharded.files)
    push_checkpoint(single, REPO)
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"]
    assert len(hub.repo(REPO).commits) == commits + 2
    assert hub.half_heads(REPO) == []


def test_files_of_others_stay(hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path) -> None:
    others = tmp_path / "others"
    (others / "onnx").mkdir(parents=True)
    for name in ("model.fp16.safetensors", "onnx/model.onnx", "notes.txt", "adapter_model.safetensors"):
        (others / name).write_bytes(b"others'")
    hub.add_model(REPO, others, private=True)
    push_checkpoint(sharded, REPO)
    assert hub.files(REPO).keys() >= {
        "model.fp16.safetensors", "onnx/model.onnx", "notes.txt", "adapter_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", ["*.safetensors", "*.json", "*.log"])
@pytest.mark.parametrize("how", ["push", "hub to hub"])
def test_gitignore_keeps_nothing_out(
    how: str, pattern: str, hub: LoopbackHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = shutil.copytree(model, tmp_path / "model"), tmp_path / "target"
    (source / "train.log").write_text("a line")
    target.mkdir()
    for folder in (source, target):
        (folder / ".gitignore").write_text(f"{pattern}\n")
    hub.add_model(REPO, target, private=True)
    hub.add_model("org/model", source)
    put = (
        (lambda: push_checkpoint(source, REPO)) if how == "push" else lambda: shard_on_hub("org/model", REPO)
    )
    monkeypatch.setattr("shardkit.shard.hub_target._NONE_IGNORED", f"{pattern}\n")
    with pytest.raises(DestinationError, match=r"\.gitignore excludes"):
        put()
    assert set(hub.files(REPO)) == {".gitattributes", ".gitignore"}
    monkeypatch.undo()
    put()
    assert hub.files(REPO).keys() >= {"train.log", "config.json", "README.md"}
    assert hub.half_heads(REPO) == []


def test_card_says_what_is_known_and_keeps_what_was_there(
    hub: LoopbackHub, model: Path, sharded: shardkit.ShardReport
) -> None:
    push_checkpoint(sharded, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert card.startswith((model / "README.md").read_text().rstrip())
    assert "| license | apache-2.0 |" in card
    assert str(model) not in card, "a path on this machine is nobody's business"
    for name in sharded.files:
        assert f"`{hub.files(REPO)[name].sha256}`" in card
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card
    edited = card.replace("What it is.", "What it really is.")
    (hub.store.folder.parent / "edited").mkdir()
    (hub.store.folder.parent / "edited" / "README.md").write_text(edited)
    hub.add_model(REPO, hub.store.folder.parent / "edited")
    push_checkpoint(sharded, REPO)
    assert hub.read(REPO, "README.md").decode() == edited, "what people write on the Hub stays"


def with_readme(model: Path, folder: Path, text: str | bytes | None) -> Path:
    """A copy of a model with another README, or none."""
    shutil.copytree(model, folder)
    (folder / "README.md").unlink()
    if text is not None:
        (folder / "README.md").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_card_is_that_of_the_model_that_is_there_now(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    texts = {"a": "---\nlicense: mit\n---\n# A", "b": "---\nlicense: cc-by-nc-4.0\n---\n# B", "none": None}
    for name, text in texts.items():
        hub.add_model(f"org/{name}", with_readme(model, tmp_path / name, text))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\n# What I wrote")
    hub.add_model("me/other", tmp_path / "own", private=True)
    shard_on_hub("org/a", REPO)
    shard_on_hub("org/b", REPO)
    card = hub.read(REPO, "README.md").decode()
    assert card.startswith(texts["b"])
    assert "| license | cc-by-nc-4.0 |" in card
    assert "# A" not in card
    for target, first in (
        (REPO, "---\nlibrary_name: transformers\n---\n\n# sharded"),
        ("me/other", "---\nlicense: mit"),
    ):
        shard_on_hub("org/none", target)
        card = hub.read(target, "README.md").decode()
        assert card.startswith(first)
        assert "| license |" not in card
    (tmp_path / "b" / "README.md").write_text("# B, edited")
    push_checkpoint(tmp_path / "b", REPO)
    assert hub.read(REPO, "README.md").decode().startswith("# B, edited\n")


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: foo: bar", None), ("license: !!python/name:os.system", None), ("- a\n- b", None),
        ("words", None), ("1: 2\nself: 3\nlicense: mit", "mit"), ("license: 2020-13-45", None),
        ("license: [mit, 'a|b']", r"mit, a\|b"), ("license: mit\r", "mit"),
    ],
)  # fmt: skip
def test_odd_readme_is_pushed_as_it_is(
    front: str, licence: str | None, hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    text = f"\ufeff---\n{front}\n---\r\n\r\n# Title"
    push_checkpoint(with_readme(model, tmp_path / "odd", text), REPO)
    card = hub.read(REPO, "README.md").decode()
    assert card.startswith(text)
    assert (f"| license | {licence} |" in card) is ("| license |" in card) is (licence is not None)


def test_readme_that_is_not_utf8_is_refused_at_once(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    folder = with_readme(model, tmp_path / "latin", b"caf\xe9")
    with pytest.raises(CheckpointError, match=r"README\.md is not valid UTF-8"):
        push_checkpoint(folder, REPO)
    assert hub.requests == []
    hub.add_model(SOURCE, folder)
    with pytest.raises(CheckpointError, match=r"README\.md is not valid UTF-8"):
        shard_on_hub(SOURCE, REPO)
    hub.add_model(REPO, folder, private=True)
    bare = with_readme(model, tmp_path / "bare", None)
    hub.add_model("org/bare", bare)
    for put in (lambda: push_checkpoint(bare, REPO), lambda: shard_on_hub("org/bare", REPO)):
        with pytest.raises(DestinationError, match=r"README\.md is not valid UTF-8"):
            put()
    assert hub.received(SENT) == 0
    push_checkpoint(model, REPO)
    assert "# The model" in hub.read(REPO, "README.md").decode()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["BertModel"]}, 'model = AutoModel.from_pretrained("me/sharded")'),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "AutoModelForSeq2SeqLM."),
        ({"architectures": ["XForCausalLM"], "auto_map": {}}, '("me/sharded", trust_remote_code=True)'),
        ({"architectures": ["QwenForConditionalGeneration"], "model_type": "qwen2_vl"}, None),
        ({"architectures": ["ViTForImageClassification"]}, None),
        ({"architectures": ["T5EncoderModel"]}, None),
        ({"architectures": "words"}, None),
    ],
)  # fmt: skip
def test_card_says_how_to_load_only_where_that_is_known(
    config: dict[str, object], line: str | None, hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "bare", [{"w": Tensor("F32", (2,), bytes(8))}])
    (folder / "config.json").write_text(json.dumps(config))
    push_checkpoint(folder, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert line in card if line else "from_pretrained" not in card
    assert "AutoTokenizer" not in card, "it has none"


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1b[2Jb"])
def test_name_that_nobody_could_open_again_is_refused(
    name: str, hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "図 é 1.txt").write_text("an ordinary name")
    (folder / name).write_text("x")
    with pytest.raises(CheckpointError, match="rename or remove it") as refused:
        push_checkpoint(folder, REPO)
    assert f"{name!a}" in str(refused.value)
    assert hub.requests == []
    (folder / name).unlink()
    push_checkpoint(folder, REPO)
    assert shardkit.Checkpoint.open(REPO).side_files["図 é 1.txt"] == 16


@pytest.mark.parametrize("again", ["another size", "another source", "another dtype"])
def test_report_of_what_was_written_over_is_refused(
    again: str, hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    hub.add_model(SOURCE, model)
    first = shardkit.shard_checkpoint(SOURCE, tmp_path / "out", max_shard_size="2MB")
    shardkit.shard_checkpoint(
        model if again == "another source" else SOURCE, tmp_path / "out", overwrite=True,
        max_shard_size="1MB" if again == "another size" else "2MB",
        dtype="float32" if again == "another dtype" else None,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="no longer matches the report"):
        push_checkpoint(first, REPO)


@pytest.mark.parametrize("what", ["config", "shard", "index", "all", "deleted"])
def test_folder_that_changes_while_it_is_pushed_is_not_shown(
    what: str, hub: LoopbackHub, model: Path, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    folder, calls = shutil.copytree(sharded.destination, tmp_path / "folder"), []
    changed = {
        "config": "config.json", "index": "model.safetensors.index.json", "shard": max(sharded.files)
    }  # fmt: skip

    def meanwhile(progress: shardkit.Progress) -> None:
        if progress.stage == "hash" and progress.done_bytes == progress.total_bytes and not calls:
            calls.append(progress)
            if what == "all":
                shardkit.shard_checkpoint(model, folder, max_shard_size="1MB", overwrite=True)
            elif what == "deleted":
                shutil.rmtree(folder)
            else:
                path = folder / changed[what]
                path.write_bytes(path.read_bytes()[:-1] + b" ")

    with pytest.raises(CheckpointError, match="changed while"):
        push_checkpoint(folder, REPO, progress=meanwhile)
    assert len(calls) == 1
    assert set(hub.files(REPO)) == {".gitattributes"}


@pytest.mark.parametrize("what", ["report", "folder"])
def test_source_is_named_by_what_the_hub_calls_it(
    what: str, hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    sha = hub.add_model("org/model", model)
    report = shardkit.shard_checkpoint("org/model", tmp_path / "out", max_shard_size="2MB", dtype="float16")
    push_checkpoint(report if what == "report" else tmp_path / "out", REPO)
    card = hub.read(REPO, "README.md").decode()
    assert f"[org/model]({hub.url}/org/model)" in card
    assert f"`{sha}`" in card
    assert "| plan | strategy size, at most 2 MB a file |" in card
    assert "| dtype | cast to float16 |" in card
    assert f"shardkit verify hf://org/model@{sha} hf://{REPO}" in card


def test_card_repeats_no_nonsense_of_an_index(
    hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded.destination, tmp_path / "forged")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    lies = dict.fromkeys(document["metadata"]["shardkit"] | {"source": "", "cast_to": ""}, "| <b>LIE</b> |")
    document["metadata"]["shardkit"] = lies
    index.write_text(json.dumps(document))
    push_checkpoint(folder, REPO)
    assert "LIE" not in hub.read(REPO, "README.md").decode()
    document["metadata"] = ["LIE"]
    index.write_text(json.dumps(document))
    push_checkpoint(folder, REPO)


@pytest.mark.parametrize("damage", ["no config", "no shard", "cut shard", "pickle", "no folder"])
def test_half_a_model_is_refused_before_the_hub_is_asked(
    damage: str, hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    subprocess.run(["cp", "-r", sharded.destination, folder], check=True)
    first = folder / sorted(sharded.files)[0]
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no shard":
        first.unlink()
    elif damage == "cut shard":
        os.truncate(first, first.stat().st_size - 1)
    elif damage == "pickle":
        for path in folder.glob("model*"):
            path.unlink()
        torch.save({"t": torch.zeros(2)}, folder / "pytorch_model.bin")
    else:
        folder = tmp_path / "absent"
    with pytest.raises(CheckpointError):
        push_checkpoint(folder, REPO)
    assert hub.requests == []


def test_public_repository_is_written_only_when_meant(
    hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    hub.add_model(REPO, tmp_path / "empty")
    with pytest.raises(DestinationError, match="public"):
        push_checkpoint(sharded, REPO)
    push_checkpoint(sharded, REPO, private=False)
    assert index_of(hub)


def test_others_repositories_and_strangers_are_told_what_to_do(
    hub: LoopbackHub, sharded: shardkit.ShardReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DestinationError, match="no write access"):
        push_checkpoint(sharded, "org/model")
    with pytest.raises(DestinationError, match="owner/name"):
        push_checkpoint(sharded, "model")
    with pytest.raises(DestinationError, match="rejected the token as invalid"):
        push_checkpoint(sharded, REPO, token="hf_wrong")
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DestinationError, match="HF_HUB_OFFLINE is set"):
            push_checkpoint(sharded, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DestinationError, match="HF_TOKEN"):
        push_checkpoint(sharded, REPO)
    assert hub.store.repos == {}


FAULTS = [
    {"kind": "drop", "where": SENT, "at": 300_000},
    {"kind": "status", "where": SENT, "status": 403},
    {"kind": "status", "where": r"POST hub .*/lfs/objects/batch", "status": 500},
    {"kind": "status", "where": r"POST hub .*/commit/", "status": 503},
    {"kind": "status", "where": r"POST hub .*/commit/", "status": 429, "headers": {"Retry-After": "0"}},
    {"kind": "drop", "where": r"POST hub .*/commit/", "at": 5},
    {"kind": "reset", "where": r"POST hub .*/preupload/"},
    {"kind": "status", "where": r"GET hub .*/tree/", "status": 502},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault.values())))
def test_passing_faults_are_borne(
    fault: dict[str, object], hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    hub.fail(**fault)
    push_checkpoint(sharded, REPO)
    assert read_checkpoint(snapshot(hub, REPO, tmp_path / "got")) == read_checkpoint(
        Path(sharded.destination)
    )
    titles = [commit.title for commit in hub.repo(REPO).history()]
    assert len(titles) == 2, titles


def test_expired_upload_urls_are_asked_for_again(
    hub: LoopbackHub, sharded: shardkit.ShardReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardkit.sources.hub_client._LONGEST_PAUSE", 0.1)
    hub.url_seconds = -1

    def later(progress: shardkit.Progress) -> None:
        if progress.stage == "upload":
            hub.url_seconds = 3600

    push_checkpoint(sharded, REPO, progress=later)
    assert hub.half_heads(REPO) == []
    hub.url_seconds = -1
    with pytest.raises(DestinationError, match="403"):
        push_checkpoint(sharded, "me/other")
    assert "model.safetensors.index.json" not in hub.files("me/other")


def test_interrupted_push_sends_the_rest_only(hub: LoopbackHub, sharded: shardkit.ShardReport) -> None:
    calls = []

    def stop(progress: shardkit.Progress) -> bool:
        calls.append(progress)
        return not (progress.stage == "upload" and progress.done_bytes > 1_500_000)

    with pytest.raises(Cancelled):
        push_checkpoint(sharded, REPO, progress=stop)
    assert set(hub.files(REPO)) == {".gitattributes"}, "nobody sees a part"
    sent = hub.received(SENT)
    assert 0 < sent < sum(sharded.files.values())
    push_checkpoint(sharded, REPO)
    assert hub.received(SENT) == sum(sharded.files.values())
    assert hub.half_heads(REPO) == []


def test_concurrent_push_fails_cleanly(
    hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    push_checkpoint(sharded, REPO)
    other = shardkit.shard_checkpoint(sharded.destination, tmp_path / "other", max_shard_size="3MB")

    def meanwhile(progress: shardkit.Progress) -> None:
        if progress.stage == "upload" and progress.done_bytes == 0:
            push_checkpoint(sharded.destination, REPO)
            (tmp_path / "note").mkdir(exist_ok=True)
            (tmp_path / "note" / "note.txt").write_text("somebody else")
            hub.add_model(REPO, tmp_path / "note")

    with pytest.raises(DestinationError, match="somebody else"):
        push_checkpoint(other, REPO, progress=meanwhile)
    assert set(index_of(hub).values()) == set(sharded.files)
    sent = hub.received(SENT)
    push_checkpoint(other, REPO)
    assert hub.received(SENT) == sent, "what was uploaded is not sent again"
    assert set(index_of(hub).values()) == set(other.files)
    assert hub.half_heads(REPO) == []


def test_what_the_hub_lists_after_the_commit_is_believed_only_if_it_is_right(
    hub: LoopbackHub, sharded: shardkit.ShardReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hub.store.blob

    def forged(name: str, sha256: str, lfs: bool | None = None) -> object:
        blob = real(name, sha256, lfs)
        return blob._replace(sha256="0" * 64) if name == sorted(sharded.files)[0] else blob

    monkeypatch.setattr(hub.store, "blob", forged)
    with pytest.raises(shardkit.errors.VerificationError, match="does not contain what was sent"):
        push_checkpoint(sharded, REPO)


def test_round_trips_with_faults_end_equal_or_in_a_clear_error(
    hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    dice = random.Random(7)
    original = read_checkpoint(Path(sharded.destination))
    for number in range(3):
        repo = f"me/trip-{number}"
        hub.chaos(dice, 0.1)
        with suppress(shardkit.errors.ShardkitError):
            push_checkpoint(sharded, repo)
        hub.chaos(dice, 0)
        push_checkpoint(sharded, repo)
        assert read_checkpoint(snapshot(hub, repo, tmp_path / str(number))) == original
        assert hub.half_heads(repo) == []


def test_adapter_is_pushed_and_replaces_adapters_only(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "adapter", [{"w": Tensor("F32", (2,), bytes(8))}], "adapter_model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"of the base")
    (tmp_path / "base" / "adapter_model.bin").write_bytes(b"stale")
    hub.add_model(REPO, tmp_path / "base", private=True)
    push_checkpoint(folder, REPO)
    weights = [name for name in hub.files(REPO) if "model" in name]
    assert sorted(weights) == ["adapter_model.safetensors", "model.safetensors"]


SOURCE = "org/model"
RECEIVED = "GET storage"


@pytest.fixture
def source(hub: LoopbackHub, model: Path) -> str:
    """The commit of a model on the Hub."""
    return hub.add_model(SOURCE, model)


def drafts(hub: LoopbackHub) -> list[str]:
    return [branch for branch in hub.repo(REPO).branches if branch != "main"]


def watched(folder: Path, seen: list[int]) -> Callable[[shardkit.Progress], None]:
    """A progress callback that notes how many bytes lie in a folder."""

    def look(_: shardkit.Progress) -> None:
        with suppress(FileNotFoundError):  # a shard was just dropped
            seen.append(sum(p.stat().st_blocks * 512 for p in folder.rglob("*.safetensors")))

    return look


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("strategy", ["size", "layer", "balanced"])
def test_from_hub_to_hub_is_what_sharding_makes(
    dtype: str | None, strategy: str, hub: LoopbackHub, source: str, tmp_path: Path
) -> None:
    options = {"max_shard_size": "600KB", "strategy": strategy, "dtype": dtype}
    here = shardkit.shard_checkpoint(SOURCE, tmp_path / "here", **options, stream=True)
    seen: list[int] = []
    report = shard_on_hub(
        SOURCE, REPO, **options, workers=2, work_folder=tmp_path / "work", progress=watched(tmp_path, seen)
    )
    got = snapshot(hub, REPO, tmp_path / "got")
    names = {path.name for path in Path(here.destination).iterdir()}
    assert {path.name for path in got.iterdir()} == names | {".gitattributes"}
    for name in names - {"README.md"}:
        assert (got / name).read_bytes() == (Path(here.destination) / name).read_bytes(), name
    assert report.source == f"hf://{SOURCE}@{source}"
    assert report.destination == f"hf://{REPO}@{hub.repo(REPO).branches['main']}"
    assert report.files == here.files
    assert report.verification.digests == here.verification.digests
    assert report.verification.received
    assert report.verification.files == len(report.files)
    assert report.lost == here.lost
    assert drafts(hub) == []
    assert hub.half_heads(REPO) == []
    assert list((tmp_path / "work").iterdir()) == []
    assert 0 < max(seen) - model_bytes(tmp_path) <= 3 * 600_000


def model_bytes(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in (folder / "here").rglob("*.safetensors"))


def test_card_of_a_resharded_model_tells_its_story(hub: LoopbackHub, source: str, model: Path) -> None:
    report = shard_on_hub(SOURCE, REPO, max_shard_size="2MB", dtype="float16")
    card = hub.read(REPO, "README.md").decode()
    assert card.startswith((model / "README.md").read_text().rstrip())
    for said in (
        f"[{SOURCE}]({hub.url}/{SOURCE})", f"`{source}`", "| license | apache-2.0 |",
        "strategy size, at most 2 MB a file", "cast to float16", "XXH3-128",
    ):  # fmt: skip
        assert said in card, said
    for name, size in report.files.items():
        assert f"| {name} | {size:,} | `{hub.files(REPO)[name].sha256}` |" in card
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal


def test_source_is_read_once_and_only_through_signed_urls(hub: LoopbackHub, source: str) -> None:
    total = sum(blob.size for name, blob in hub.files(SOURCE).items() if name.endswith(".safetensors"))
    report = shard_on_hub(SOURCE, REPO, max_shard_size="600KB")
    assert hub.sent(RECEIVED) < 1.1 * total
    assert hub.received(SENT) == sum(report.files.values())
    assert not any(request.token for request in hub.requests if request.host == "storage")
    assert source


def test_interrupted_job_goes_on_from_what_the_target_has(
    hub: LoopbackHub, source: str, tmp_path: Path
) -> None:
    def stop(progress: shardkit.Progress) -> bool:
        return progress.done_bytes < 0.7 * progress.total_bytes

    options = {"max_shard_size": "300KB", "workers": 1, "work_folder": tmp_path / "work"}
    with pytest.raises(Cancelled):
        shard_on_hub(SOURCE, REPO, **options, progress=stop)
    assert set(hub.files(REPO)) == {".gitattributes"}, "nobody sees a part"
    assert len(drafts(hub)) == 1
    assert list((tmp_path / "work").iterdir()) == []
    sent, received = hub.received(SENT), hub.sent(RECEIVED)
    report = shard_on_hub(SOURCE, REPO, **options)
    assert len(report.reused) >= 3
    left = sum(size for name, size in report.files.items() if name not in report.reused)
    assert hub.received(SENT) - sent <= left
    assert hub.sent(RECEIVED) - received < left + 300_000
    assert drafts(hub) == []
    verified = shardkit.verify_checkpoint(SOURCE, REPO)
    assert verified.equal
    assert verified.digests == report.verification.digests
    assert source


def test_draft_of_another_job_is_not_mistaken_for_this_one(hub: LoopbackHub, model: Path) -> None:
    hub.add_model(SOURCE, model)
    with pytest.raises(Cancelled):
        shard_on_hub(
            SOURCE, REPO, max_shard_size="300KB", progress=lambda p: p.done_bytes < 0.6 * p.total_bytes
        )
    report = shard_on_hub(SOURCE, REPO, max_shard_size="300KB", dtype="float16")
    assert report.reused == ()
    (draft,) = drafts(hub)
    assert draft in report.notes[-1]
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal


@pytest.mark.parametrize("damage", ["note", "shard"])
def test_draft_that_was_tampered_with_is_made_again(
    damage: str, hub: LoopbackHub, source: str, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        shard_on_hub(
            SOURCE, REPO, max_shard_size="300KB", workers=1,
            progress=lambda p: p.done_bytes < 0.7 * p.total_bytes,
        )  # fmt: skip
    (branch,) = drafts(hub)
    shards = sorted(name for name in hub.files(REPO, branch) if name.endswith(".safetensors"))
    forged = tmp_path / "forged"
    (forged / ".shardkit").mkdir(parents=True)
    name = f".shardkit/{shards[0]}.json" if damage == "note" else shards[0]
    data = bytearray(hub.read(REPO, name, branch))
    data[-1] ^= 1
    (forged / name).write_bytes(data)
    api = HfApi()
    add = CommitOperationAdd(name, forged / name)
    api.create_commit(REPO, [add], commit_message="tampered", revision=branch)
    report = shard_on_hub(SOURCE, REPO, max_shard_size="300KB")
    assert shards[0] not in report.reused
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal
    assert source


def test_stale_weights_of_the_target_go_with_the_one_commit(
    hub: LoopbackHub, source: str, sharded: shardkit.ShardReport
) -> None:
    push_checkpoint(sharded, REPO)
    commits = len(list(hub.repo(REPO).history()))
    shard_on_hub(SOURCE, REPO, max_shard_size="1GB")
    weights = [name for name in hub.files(REPO) if "safetensors" in name]
    assert weights == ["model.safetensors"]
    assert len(list(hub.repo(REPO).history())) == commits + 1
    assert hub.half_heads(REPO) == []
    assert source


@pytest.mark.parametrize(
    "fault",
    [
        *FAULTS,
        {"kind": "drop", "where": RECEIVED, "at": 100_000, "times": 3},
        {"kind": "status", "where": RECEIVED, "status": 403},
        {"kind": "status", "where": RECEIVED, "status": 503, "times": 2},
        {"kind": "reset", "where": r"POST hub .*/branch/"},
        {"kind": "drop", "where": r"DELETE hub", "at": 0},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_faults_on_the_way_from_hub_to_hub_are_borne(
    fault: dict[str, object], hub: LoopbackHub, source: str
) -> None:
    hub.fail(**fault)
    shard_on_hub(SOURCE, REPO, max_shard_size="1MB")
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal
    assert hub.half_heads(REPO) == []
    assert drafts(hub) == []
    assert source


def test_content_that_changes_on_the_way_is_never_published(hub: LoopbackHub, source: str) -> None:
    hub.fail("etag", "GET storage", skip=2)
    with pytest.raises(CheckpointError, match="changed"):
        shard_on_hub(SOURCE, REPO, max_shard_size="1MB")
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert source


def test_cast_that_overflows_is_refused_before_anything_is_sent(hub: LoopbackHub, tmp_path: Path) -> None:
    large = Tensor("F32", (2,), struct.pack("<2f", 1.0, 1e30))
    folder = write_checkpoint(tmp_path / "large", [{"w": large}])
    (folder / "config.json").write_text("{}")
    hub.add_model(SOURCE, folder)
    hub.fail("status", "DELETE hub", status=403)
    for left in (1, 0):
        with pytest.raises(shardkit.errors.CastError, match="w"):
            shard_on_hub(SOURCE, REPO, dtype="float16")
        assert len(drafts(hub)) == left
    assert hub.received(SENT) == 0
    report = shard_on_hub(SOURCE, REPO, dtype="float16", allow_overflow=True)
    assert [loss.overflowed for loss in report.lost] == [1]


def test_refused_overflow_keeps_the_shards_that_were_sent(hub: LoopbackHub, tmp_path: Path) -> None:
    tensors = {
        f"w{i}": Tensor("F32", (100,), struct.pack("<f", 1e30 if i == 3 else i) * 100) for i in range(4)
    }
    folder = write_checkpoint(tmp_path / "large", [tensors])
    (folder / "config.json").write_text("{}")
    hub.add_model(SOURCE, folder)
    options = {"dtype": "float16", "max_shard_size": 350, "workers": 1}
    with pytest.raises(shardkit.errors.CastError, match="w3") as caught:
        shard_on_hub(SOURCE, REPO, **options)
    (draft,) = drafts(hub)
    assert f"branch {draft}" in caught.value.__notes__[0]
    report = shard_on_hub(SOURCE, REPO, **options, allow_overflow=True)
    assert len(report.reused) >= 2
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal


@pytest.mark.parametrize("where", ["altered", "described"])
def test_disk_that_fails_keeps_the_shards_that_were_sent(
    where: str, hub: LoopbackHub, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = verify if where == "altered" else sending
    real, calls = getattr(room, where), iter(range(4))

    def fail(*args: object) -> object:
        if next(calls, None) is None:
            if where == "altered":
                return {file: ["t"] for file in args[1]}, {}
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    options = {"max_shard_size": "300KB", "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(room, where, fail)
        with pytest.raises((shardkit.errors.VerificationError, DestinationError)):
            shard_on_hub(SOURCE, REPO, **options)
    assert len(shard_on_hub(SOURCE, REPO, **options).reused) >= 3
    assert drafts(hub) == []
    assert shardkit.verify_checkpoint(SOURCE, REPO).equal
    assert source


def test_pickles_are_resharded_on_the_hub_as_safetensors_are(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    state = {f"t{n}": torch.randn(40_000) for n in range(20)} | {"turned": torch.randn(300, 200).t()}
    torch.save(state, folder / "pytorch_model.bin")
    hub.add_model("org/pickles", folder)
    report = shard_on_hub("org/pickles", REPO, max_shard_size="500KB", work_folder=tmp_path)
    assert report.tensors == len(state)
    assert shardkit.verify_checkpoint(folder, REPO).equal


def test_what_cannot_be_resharded_on_the_hub_is_said_at_once(
    hub: LoopbackHub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DestinationError, match="the same"):
        shard_on_hub(SOURCE, SOURCE)
    with pytest.raises(CheckpointError, match="check the name"):
        shard_on_hub("org/absent", REPO)
    bare = write_checkpoint(tmp_path / "bare", [{"w": Tensor("F32", (2,), bytes(8))}])
    hub.add_model("org/bare", bare)
    with pytest.raises(CheckpointError, match="config"):
        shard_on_hub("org/bare", REPO)
    far = tmp_path / "far"
    far.mkdir()
    (far / "config.json").write_text("{}")
    torch.save({"w": torch.ones(2000, 2500).t()}, far / "pytorch_model.bin")
    hub.add_model("org/pickles", far)
    with pytest.raises(CheckpointError, match=r"w is not contiguous.*shard it to a folder, then push that"):
        shard_on_hub("org/pickles", REPO)
    with pytest.raises(shardkit.errors.ShardkitError, match="workers is 0"):
        shard_on_hub(SOURCE, REPO, workers=0)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc"):
        with pytest.raises(DestinationError, match=r"work_folder|no access to the folder"):
            shard_on_hub(SOURCE, REPO, work_folder=folder)
    assert REPO not in hub.store.repos
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(shardkit.errors.SpaceError, match="lower max_shard_size"):
        shard_on_hub(SOURCE, REPO, max_shard_size="1MB")
    assert source


@pytest.mark.usefixtures("source")
def test_full_disk_under_side_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shardkit.shard.engine.write_side_files", full)
    with pytest.raises(shardkit.errors.SpaceError, match=rf"{tmp_path}: No space left .* work_folder"):
        shard_on_hub(SOURCE, REPO, work_folder=tmp_path)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyboardInterrupt, shardkit.base.errors.Interrupted), (ConnectionResetError, ConnectionResetError)],
)
@pytest.mark.parametrize("put", [push_checkpoint, shard_on_hub])
@pytest.mark.usefixtures("source")
def test_what_a_callback_raises_is_no_failure_of_the_disk(
    put: Callable[..., object],
    raised: type[BaseException],
    seen: type[BaseException],
    hub: LoopbackHub,
    model: Path,
) -> None:
    def fail(progress: shardkit.Progress) -> None:
        if progress.done_bytes:
            raise raised

    with pytest.raises(seen) as stopped:
        put(model if put is push_checkpoint else SOURCE, REPO, progress=fail)
    assert stopped.type is seen
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_draft_that_cannot_be_removed_is_told(hub: LoopbackHub, source: str) -> None:
    hub.fail("status", "DELETE hub", status=403)
    report = shard_on_hub(SOURCE, REPO)
    (draft,) = drafts(hub)
    assert f'delete_branch("{REPO}", branch="{draft}")' in report.notes[-1]
    assert source


def test_digest_on_the_card_is_of_all_tensors_or_not_there(hub: LoopbackHub, source: str) -> None:
    options = {"max_shard_size": "300KB", "workers": 1}
    with pytest.raises(Cancelled):
        shard_on_hub(SOURCE, REPO, **options, progress=lambda p: p.done_bytes < 0.7 * p.total_bytes)
    report = shard_on_hub(SOURCE, REPO, **options, verify=False)
    assert report.reused
    assert "digest of the tensors" not in hub.read(REPO, "README.md").decode()
    assert source


def test_what_killed_runs_left_is_cleaned_up_and_what_lives_is_left_alone(
    source: str, tmp_path: Path
) -> None:
    from shardkit.shard.destination import locked

    dead, alive = tmp_path / "shardkit-0123456789abcdef", tmp_path / "shardkit-fedcba9876543210"
    for job in (dead, alive):
        left = tmp_path / f".{job.name}.shardkit-staging"
        left.mkdir()
        (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with locked(alive):
        shard_on_hub(SOURCE, REPO, work_folder=tmp_path)
        assert (tmp_path / f".{alive.name}.shardkit-staging").exists()
    assert not (tmp_path / f".{dead.name}.shardkit-staging").exists()
    assert source


def test_command_line_pushes_and_goes_from_hub_to_hub(
    hub: LoopbackHub, source: str, sharded: shardkit.ShardReport
) -> None:
    pushed = run("push", sharded.destination, REPO)
    head = hub.repo(REPO).branches["main"]
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.url}/{REPO}/commit/{head}\n"), pushed.stderr
    assert hub.repo(REPO).private
    done = run("shard", f"hf://{SOURCE}", "hf://me/other", "--max-shard-size", "1MB", "--public", "--json")
    assert done.returncode == 0, done.stderr
    report = shardkit.ShardReport.from_dict(json.loads(done.stdout))
    assert report.source == f"hf://{SOURCE}@{source}"
    assert not hub.repo("me/other").private
    assert run("verify", REPO, "me/other").returncode == 0
    assert run("shard", SOURCE, "hf://me/other", "--overwrite").returncode == 2
    refused = run("shard", SOURCE, "hf://org/other")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    here = run("shard", sharded.destination, "hf://me/third")
    assert (here.returncode, "push that" in here.stderr) == (1, True)


SECRET = "hf_plantedInThisTestAlone"
JOBS = """
import json, logging, os, sys, tempfile
token = sys.stdin.readline().strip() or None
logging.basicConfig(level="DEBUG")
import shardkit
folder, = sys.argv[1:]
for number in range(2):
    try:
        report = shardkit.shard_on_hub("org/model", "me/other", token=token, max_shard_size="1MB")
        print(report, repr(report), json.dumps(report.to_dict()), report._repr_html_())
        print(shardkit.push_checkpoint(folder, "me/sharded", token=token))
    except shardkit.errors.ShardkitError as error:
        logging.exception("it failed")
        print(repr(error), error.__context__, error.__cause__)
"""


def command_lines() -> str:
    """What `ps` shows of every process."""
    shown = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            shown.append(path.read_text(errors="replace"))
    return "\n".join(shown)


@pytest.mark.parametrize("planted", ["environment", "store", "argument"])
@pytest.mark.usefixtures("source")
def test_token_is_shown_to_the_hub_alone(
    planted: str, hub: LoopbackHub, sharded: shardkit.ShardReport, tmp_path: Path
) -> None:
    hub.users = {SECRET: "me"}
    home = tmp_path / "hub-home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    if planted == "environment":
        environment["HF_TOKEN"] = SECRET
    elif planted == "store":
        (home / "token").write_text(SECRET)
    hub.fail("status", r"POST hub /api/models/me/other/commit/main", status=403)
    hub.fail("drop", SENT, at=1000)
    with subprocess.Popen(
        [sys.executable, "-c", JOBS, sharded.destination], env=environment, cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        process.stdin.write(f"{SECRET if planted == 'argument' else ''}\n")
        process.stdin.flush()
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # the process is there before its arguments are
        seen_by_ps = command_lines()
        output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    assert "no write access" in output
    assert f"{hub.url}/me/sharded/commit/" in output
    assert {request.token for request in hub.requests if request.host == "hub"} >= {SECRET}
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}
    assert JOBS.strip()[:20] in seen_by_ps
    assert SECRET not in seen_by_ps + output
    (home / "token").unlink(missing_ok=True)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert left == []
