"""Put a folder on the Hub: only what differs, in one commit, so that nobody ever sees half a model there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, constants

from shardkit.base.errors import CheckpointError, DestinationError
from shardkit.base.jobs import ProgressCallback, ProgressCount, resumable, run_all
from shardkit.base.record import listed, plural
from shardkit.checkpoint.belonging import needed_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import CONFIG_FILES
from shardkit.shard.hub_target import GIT_BYTES, Target, digest_bytes, digest_file, is_same
from shardkit.shard.model_card import CARD, Story, model_card
from shardkit.shard.report import ShardReport
from shardkit.sources.hub import RemoteFile, Repository, name_problem
from shardkit.sources.hub_client import quiet
from shardkit.sources.local import file_state
from shardkit.sources.resolve import is_on_hub


class _LocalFile(NamedTuple):
    """A file as it was read: how the Hub will list it, its bytes if they are few, its state then."""

    path: Path
    content: RemoteFile
    data: bytes | None
    state: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, is_weights: bool, seen: Callable[[int], object]) -> _LocalFile:
        """Read a file once; keep its bytes, unless they are weights or too many for a commit."""
        try:
            state = file_state(path.stat())
            if is_weights or state[0] > GIT_BYTES:
                return cls(path, digest_file(path, seen), None, state)
            data = path.read_bytes()
        except FileNotFoundError:
            raise _changed(path) from None
        seen(len(data))
        return cls(path, digest_bytes(data), data, state)

    def check_still(self) -> None:
        """Refuse to go on with a file that is no longer the one that was read."""
        try:
            is_still = file_state(self.path.stat()) == self.state
        except OSError:
            is_still = False
        if not is_still:
            raise _changed(self.path)


@resumable()
def push_checkpoint(
    folder: str | os.PathLike[str] | ShardReport,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """Push a checkpoint to the Hub: weights, index, config, tokenizer and a model card, in one commit.

    Files that the repository already has are not sent again, so an interrupted push resumes when it is
    repeated. Weights and indexes of a previous model that a load could mistake for these are deleted in the
    same commit.

    Parameters
    ----------
    folder
        A folder of safetensors with their config; or the report of the run that wrote it, which adds the
        tensors' digests to the model card.
    repo_id
        ``owner/name``; created if it does not exist.
    private
        Visibility of a new repository. An existing public one is refused, unless this is False.
    token
        A token with write access (default: from the environment or the Hub's client).
    progress
        Called with a `Progress` (stages "hash" and "upload"); returning False stops.

    Returns
    -------
    The URL of the commit; of the current head if nothing differs.

    Raises
    ------
    CheckpointError
        If the folder is not a complete safetensors checkpoint with its config, or changes meanwhile.
    DestinationError
        If the repository cannot be written, is public unasked, or was changed by somebody else meanwhile.
    VerificationError
        If the Hub lists other content than was sent.
    Cancelled
        If `progress` returned False.
    """
    report = folder if isinstance(folder, ShardReport) else None
    checkpoint = _open(folder.destination if isinstance(folder, ShardReport) else os.fspath(folder))
    story, own = _story(checkpoint, report), own_readme(checkpoint)
    names = {*needed_files(checkpoint.place), *checkpoint.files} - {CARD}
    target = Target(repo_id, token)
    with quiet():
        target.create(private)
        head = target.commit_at(target.head())
        shown = shown_card(head, own)
        files = _read(checkpoint, names, progress)
        contents = {name: file.content for name, file in files.items()}
        shards = {name: contents[name] for name in checkpoint.files}
        card = model_card(shown, own, target.repo_id, checkpoint, shards, story).encode()
        contents[CARD] = digest_bytes(card)
        changed = {n: f for n, f in files.items() if not is_same(head.listing.get(n), f.content)}
        operations = _upload(target, changed, progress)
        operations[CARD] = CommitOperationAdd(CARD, card)
        for file in files.values():
            file.check_still()
        sha = target.publish(head, contents, operations, f"Push {plural(len(shards), 'weight file')}")
    return f"{constants.ENDPOINT}/{target.repo_id}/commit/{sha}"


def _open(folder: str) -> Checkpoint:
    """Open what is to be pushed, and refuse what could not be loaded from the Hub."""
    if not os.path.isdir(os.path.expanduser(folder)):
        raise CheckpointError("is not a local folder", file=folder)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.format == "pickle":
        raise CheckpointError(
            "contains pickles: shard it first to convert them to safetensors", file=checkpoint.source
        )
    check_loadable(checkpoint)
    weights = needed_files(checkpoint.place)[0]
    if not weights.startswith(f"{checkpoint.stem}.safetensors"):
        raise CheckpointError(
            f"has weights named {weights}, which from_pretrained does not find: shard it first, to get "
            f"{checkpoint.stem}.safetensors",
            file=checkpoint.source,
        )
    return checkpoint


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuse what nobody could load from the Hub: without a config, or with names that it would not give."""
    if checkpoint.config is None:
        raise CheckpointError(
            f"has no {listed(CONFIG_FILES)}, so it cannot be loaded", file=checkpoint.source
        )
    for name in (*checkpoint.files, *checkpoint.side_files):
        if name_problem(name):
            raise CheckpointError(
                f"has a file {name!a}, which cannot be read back from the Hub: rename or remove it",
                file=checkpoint.source,
            )


def _story(checkpoint: Checkpoint, report: ShardReport | None) -> Story:
    """Tell what the index has recorded, and what the run that wrote it says."""
    made = checkpoint.made
    if report is None:
        return Story.of(made)
    sizes = {name: state[0] for name, state in checkpoint.seen.items()}
    told = (report.source if is_on_hub(report.source) else None, report.dtype)
    is_other = bool(made) and (made.get("source"), made.get("cast_to")) != told
    if is_other or (sizes, len(checkpoint.tensors)) != (report.files, report.tensors):
        raise CheckpointError("no longer matches the report: push the folder itself", file=checkpoint.source)
    digests = report.verification.digests if report.verification else None
    return replace(Story.of(made), source=report.source, dtype=report.dtype, digests=digests)


def own_readme(checkpoint: Checkpoint) -> str | None:
    """Return the text of a model's README, just as it is; None where there is none.

    Raises
    ------
    CheckpointError
        If it is not in UTF-8.
    """
    if CARD not in checkpoint.side_files:
        return None
    try:
        return checkpoint.place.content(CARD).decode()
    except UnicodeDecodeError:
        raise CheckpointError("is not valid UTF-8: save it as UTF-8", file=checkpoint.path(CARD)) from None


def shown_card(head: Repository, own: str | None) -> str | None:
    """Return the card that a commit shows; None where there is none, or none that can be kept.

    Raises
    ------
    DestinationError
        If it is not in UTF-8, and there is no `own` README to put in its place.
    """
    if not head.is_file(CARD):
        return None
    try:
        return head.read_bytes(CARD).decode()
    except UnicodeDecodeError:
        if own is None:
            raise DestinationError(
                f"{head.where(CARD)}: is not valid UTF-8: save it as UTF-8, or delete it"
            ) from None
        return None


def _read(
    checkpoint: Checkpoint, names: Iterable[str], progress: ProgressCallback | None
) -> dict[str, _LocalFile]:
    paths = {name: Path(checkpoint.path(name)) for name in names}
    weights = set(checkpoint.files)
    count = ProgressCount(
        progress, "hash", sum(path.stat().st_size for path in paths.values() if path.exists())
    )
    with run_all(lambda name: _LocalFile.read(paths[name], name in weights, count.add), paths) as results:
        files = dict(results)
    for name, state in checkpoint.seen.items():
        if files[name].state != state:
            raise _changed(paths[name])
    return files


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        "changed while being pushed, so nothing was published: make sure nothing writes to it, and push "
        "again",
        file=str(path),
    )


def _upload(
    target: Target, changed: Mapping[str, _LocalFile], progress: ProgressCallback | None
) -> dict[str, CommitOperationAdd]:
    """Send what differs, large files a few at once; small ones go into the commit itself."""
    small = {name: file.data for name, file in changed.items() if file.data is not None}
    large = changed.keys() - small.keys()
    count = ProgressCount(progress, "upload", sum(changed[name].content.size for name in large))

    def send(name: str) -> CommitOperationAdd:
        file = changed[name]
        file.check_still()
        return target.upload(name, file.path, file.content)

    operations = {name: CommitOperationAdd(name, data) for name, data in small.items()}
    with run_all(send, large) as results:
        for name, operation in results:
            operations[name] = operation
            count.add(changed[name].content.size)
    return operations
