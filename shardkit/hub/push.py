"""Put a folder on the Hub: only what differs, in one commit, so that nobody ever sees half a model there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from shardkit.checkpoint import Checkpoint
from shardkit.errors import CheckpointError
from shardkit.files import LocalFiles
from shardkit.hub.access import quiet
from shardkit.hub.card import CARD, Story, has_section, model_card
from shardkit.hub.remote import RemoteFile
from shardkit.hub.source import needed_files
from shardkit.hub.target import Target, Tree, digest_bytes, digest_file, is_same
from shardkit.layout import CONFIG_FILES, read_made
from shardkit.record import listed, plural
from shardkit.run import ProgressCallback, ProgressCount, run_all
from shardkit.write import ShardReport

_SMALL_BYTES = 100_000


def push_checkpoint(
    folder: str | os.PathLike[str] | ShardReport,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """Push a checkpoint to the Hub: weights, index, config, tokenizer and a model card, in one commit.

    What the repository has already is not sent again, so an interrupted push goes on when it is repeated.
    Weights and indexes of an earlier model that a load could take for these go in the same commit.

    Parameters
    ----------
    folder
        A folder of safetensors with their config; or the report of the run that has written it, which lets
        the model card tell the tensors' digests as well.
    repo_id
        ``owner/name``; made where it is not there.
    private
        Of a repository that is made. One that is there and public is refused, unless this is False.
    token
        One that may write; by default that of the environment, or of the Hub's client.
    progress
        Called with a `Progress` (stages "hash" and "upload"); returning False stops.

    Returns
    -------
    The URL of the commit; where nothing differs there is none, and it is that of the head.

    Raises
    ------
    CheckpointError
        If the folder holds no whole checkpoint in safetensors, with its config.
    DestinationError
        If the repository cannot be written, is public unasked, or was changed by somebody else meanwhile.
    VerificationError
        If the Hub lists other content than was sent.
    Cancelled
        If `progress` returned False.
    """
    report = folder if isinstance(folder, ShardReport) else None
    checkpoint = _open(folder.destination if isinstance(folder, ShardReport) else os.fspath(folder))
    target = Target(repo_id, token)
    with quiet():
        target.create(private)
        head = target.head()
        tree = target.files(head) if head else {}
        files = {n: Path(checkpoint.path(n)) for n in needed_files(LocalFiles(checkpoint.folder))}
        base = card_to_keep(target, tree, head, files.pop(CARD, None))
        contents = _digest(files, progress)
        shards = {name: contents[name] for name in checkpoint.files}
        card = model_card(base, target.repo_id, checkpoint, shards, _story(checkpoint, report)).encode()
        contents[CARD] = digest_bytes(card)
        changed = {n: c for n, c in contents.items() if not is_same(tree.get(n), c)}
        added = _upload(target, files, changed, progress)
        added[CARD] = CommitOperationAdd(CARD, card)
        sha = target.publish(head, tree, contents, added, f"Push {plural(len(shards), 'weight file')}")
    return target.commit_url(sha)


def _open(folder: str) -> Checkpoint:
    """Open what is to be pushed, and refuse what could not be loaded from the Hub."""
    if not os.path.isdir(os.path.expanduser(folder)):
        raise CheckpointError("is no folder on this machine", file=folder)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.format == "pickle":
        raise CheckpointError(
            "holds pickles: shard it first, which makes them safetensors", file=checkpoint.source
        )
    if checkpoint.config is None:
        raise CheckpointError(
            f"has no {listed(CONFIG_FILES)}, without which nobody can load it", file=checkpoint.source
        )
    weights = needed_files(LocalFiles(checkpoint.folder))[0]
    if not weights.startswith(f"{checkpoint.stem}.safetensors"):
        raise CheckpointError(
            f"is called {weights}, which a plain load does not find: shard it first, which names it "
            f"{checkpoint.stem}.safetensors",
            file=checkpoint.source,
        )
    return checkpoint


def _story(checkpoint: Checkpoint, report: ShardReport | None) -> Story:
    """Tell what the index has recorded, and what the run that wrote it says."""
    index = f"{checkpoint.stem}.safetensors.index.json"
    files = LocalFiles(checkpoint.folder)
    story = Story.of(read_made(files, index)) if index in files.names() else Story()
    if report is None:
        return story
    digests = report.verification.digests if report.verification else None
    return replace(story, source=report.source, dtype=report.dtype, digests=digests)


def card_to_keep(target: Target, tree: Tree, head: str | None, own: Path | None) -> str | None:
    """Return the card to add to: the target's if it has our section, or the source's, or the target's."""
    shown = target.read(CARD, head, tree).decode() if head and CARD in tree else None
    if own is None or (shown is not None and has_section(shown)):
        return shown
    return own.read_text(encoding="utf-8")


def _digest(files: Mapping[str, Path], progress: ProgressCallback | None) -> dict[str, RemoteFile]:
    count = ProgressCount(progress, "hash", sum(path.stat().st_size for path in files.values()))
    with run_all(lambda name: digest_file(files[name], count.add), files) as results:
        return dict(results)


def _upload(
    target: Target,
    files: Mapping[str, Path],
    changed: Mapping[str, RemoteFile],
    progress: ProgressCallback | None,
) -> dict[str, CommitOperationAdd]:
    """Send what differs, large files a few at once; small ones go into the commit itself."""
    count = ProgressCount(progress, "upload", sum(content.size for content in changed.values()))
    added = {n: CommitOperationAdd(n, str(files[n])) for n in changed if n in files}
    large = [name for name in added if changed[name].size > _SMALL_BYTES]
    with run_all(lambda name: target.upload(name, files[name], changed[name]), large) as results:
        for name, operation in results:
            added[name] = operation
            count.add(changed[name].size)
    return added
