"""The loopback Hub behaves towards the Hub's own client as the Hub does; else tests on it mean little."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.loopback_hub import TOKEN, LoopbackHub

WEIGHTS = os.urandom(300_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "deep").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(WEIGHTS)
    (made / "config.json").write_text("{}")
    (made / "deep" / "notes.txt").write_text("notes")
    return made


def test_what_is_stored_is_what_is_downloaded(hub: LoopbackHub, folder: Path) -> None:
    sha = hub.add_model("org/model", folder)
    snapshot = Path(snapshot_download("org/model"))
    assert snapshot.name == sha
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert (snapshot / "deep" / "notes.txt").read_text() == "notes"
    info = HfApi().model_info("org/model", files_metadata=False)
    assert (info.sha, info.private) == (sha, False)
    by_path = {file.path: file for file in HfApi().list_repo_tree("org/model", recursive=True)}
    assert by_path["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert by_path["deep/notes.txt"].lfs is None
    assert not any(request.token for request in hub.requests if request.host == "storage")


@pytest.mark.parametrize("at", [0, 1, 150_000])
def test_dropped_download_goes_on(hub: LoopbackHub, folder: Path, at: int) -> None:
    hub.add_model("org/model", folder)
    hub.fail("drop", "GET storage", at=at)
    assert Path(hf_hub_download("org/model", "model.safetensors")).read_bytes() == WEIGHTS


def test_gitignore_drops_files_from_a_commit(hub: LoopbackHub, folder: Path) -> None:
    (folder / ".gitignore").write_text("*.log\n")
    hub.add_model("me/model", folder)
    api = HfApi()
    api.create_repo("me/model", exist_ok=True)
    added = [CommitOperationAdd(name, b"a line") for name in ("train.log", "train.txt")]
    api.create_commit("me/model", added, commit_message="two files")
    assert hub.files("me/model").keys() & {"train.log", "train.txt"} == {"train.txt"}


def test_commits_are_atomic_and_keep_their_history(hub: LoopbackHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("me/model", private=True)
    assert hub.repo("me/model").private
    first = api.upload_folder(repo_id="me/model", folder_path=folder).oid
    assert hub.read("me/model", "model.safetensors") == WEIGHTS
    sent = hub.received("PUT storage")
    assert sent == len(WEIGHTS)
    api.create_branch("me/model", branch="draft")
    moved = [
        CommitOperationCopy("model.safetensors", "other.safetensors", src_revision="draft"),
        CommitOperationAdd("same.safetensors", WEIGHTS),
        CommitOperationDelete("model.safetensors"),
    ]
    second = api.create_commit("me/model", operations=moved, commit_message="move", parent_commit=first).oid
    assert hub.received("PUT storage") == sent, "held objects are not sent again"
    assert hub.files("me/model", second).keys() >= {"other.safetensors", "same.safetensors", "config.json"}
    assert "model.safetensors" not in hub.files("me/model")
    late = [CommitOperationDelete("config.json")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/model", operations=late, commit_message="late", parent_commit=first)
    assert [commit.sha for commit in hub.repo("me/model").history()][:2] == [second, first]
    assert [branch.name for branch in api.list_repo_refs("me/model").branches] == ["main", "draft"]
    api.delete_branch("me/model", branch="draft")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="draft")


@pytest.mark.parametrize("fault", [{"kind": "drop", "at": 1000}, {"kind": "status", "status": 503}])
def test_interrupted_upload_is_sent_again(hub: LoopbackHub, folder: Path, fault: dict[str, object]) -> None:
    HfApi().create_repo("me/model")
    hub.fail(where="PUT storage", **fault)
    HfApi().upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.read("me/model", "model.safetensors") == WEIGHTS


def test_nothing_is_stored_under_a_digest_that_is_not_its_own(hub: LoopbackHub) -> None:
    api = HfApi()
    api.create_repo("me/model")
    add = CommitOperationAdd("model.safetensors", WEIGHTS)
    add.upload_info.sha256 = bytes(32)
    with pytest.raises(Exception, match=r"uploading|400"):
        api.create_commit("me/model", operations=[add], commit_message="forged")
    assert "model.safetensors" not in hub.files("me/model")


def test_signed_urls_expire(hub: LoopbackHub, folder: Path) -> None:
    hub.add_model("org/model", folder)
    hub.url_seconds = -1
    with pytest.raises(HfHubHTTPError, match="403"):
        hf_hub_download("org/model", "model.safetensors")


@pytest.mark.usefixtures("stranger")
def test_strangers_see_neither_private_nor_missing_nor_what_is_behind_a_gate(
    hub: LoopbackHub, folder: Path
) -> None:
    hub.add_model("me/private", folder, private=True)
    hub.add_model("org/gated", folder, gated=True)
    for repo in ("me/private", "org/missing"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info(repo)
    assert HfApi().model_info("org/gated").gated == "auto"
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "model.safetensors")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "model.safetensors", token=TOKEN)
    assert HfApi().model_info("me/private", token=TOKEN).private
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("org/new", token=TOKEN)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami(token="hf_wrong")


def test_a_line_of_limited_speed_is_shared(hub: LoopbackHub, folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(WEIGHTS[::-1])
    hub.add_model("org/model", folder)
    hub.bytes_a_second = 1_000_000
    began = time.monotonic()
    snapshot = Path(snapshot_download("org/model"))
    assert time.monotonic() - began > 0.5  # of 600 kB
    assert (snapshot / "other.safetensors").read_bytes() == WEIGHTS[::-1]
