"""Put a folder on the Hub: only what differs, in one commit, so that nobody ever sees half a model there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, constants

from shardkit.base.errors import CheckpointError
from shardkit.base.jobs import ProgressCallback, ProgressCount, resumable, run_all
from shardkit.base.record import listed, plural
from shardkit.checkpoint.belonging import needed_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import CONFIG_FILES
from shardkit.checkpoint.ranks import is_for_ranks
from shardkit.checkpoint.scan import refuse_gguf
from shardkit.shard.hub_target import GIT_BYTES, Target, described, is_same
from shardkit.shard.model_card import CARD, model_card, own_readme
from shardkit.shard.report import ShardReport
from shardkit.sources.hub import RemoteFile, name_problem
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
            data = None if is_weights or state[0] > GIT_BYTES else path.read_bytes()
            return cls(path, described(path if data is None else data, seen), data, state)
        except FileNotFoundError:
            raise _changed(path) from None

    def check_still(self) -> None:
        with suppress(OSError):
            if file_state(self.path.stat()) == self.state:
                return
        raise _changed(self.path)


@resumable("run it again to resume: what the Hub has is not sent again")
def push_checkpoint(
    folder: str | os.PathLike[str],
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

    Examples
    --------
    >>> push_checkpoint("sharded", "me/mistral-sharded")
    'http...me/mistral-sharded/commit/...'
    """
    report = folder if isinstance(folder, ShardReport) else None
    checkpoint = _open(os.fspath(folder))
    own = own_readme(checkpoint)
    made = checkpoint.made if report is None else _made(checkpoint, report)
    digests = report.verification.digests if report and report.verification else {}
    names = {*needed_files(checkpoint.place), *checkpoint.files} - {CARD}
    target = Target(repo_id, token)
    with quiet():
        target.create(private)
        head = target.head()
        files = _read(checkpoint, names, progress)
        contents = {name: file.content for name, file in files.items()}
        shards = {name: contents[name] for name in checkpoint.files}
        card = model_card(head, own, checkpoint, shards, made, digests)
        contents[CARD] = described(card)
        changed = {n: f for n, f in files.items() if not is_same(head.listing.get(n), f.content)}
        operations = _upload(target, changed, progress)
        operations[CARD] = CommitOperationAdd(CARD, card)
        for file in files.values():
            file.check_still()
        sha = target.publish(head, contents, operations, f"Push {plural(len(shards), 'weight file')}")
    return f"{constants.ENDPOINT}/{target.repo_id}/commit/{sha}"


def _open(folder: str) -> Checkpoint:
    if not os.path.isdir(os.path.expanduser(folder)):
        raise CheckpointError("is not a local folder", file=folder)
    checkpoint = Checkpoint.open(folder)
    refuse_gguf(checkpoint.format, checkpoint.source)
    check_loadable(checkpoint)
    weights, wanted = needed_files(checkpoint.place)[0], f"{checkpoint.stem}.safetensors"
    why = ""
    if checkpoint.format == "pickle":
        why = "contains pickles: shard it first to convert them to safetensors"
    elif is_for_ranks(checkpoint):
        why = "has matrices in blocks of columns, which from_pretrained does not load: shard it first"
    elif not weights.startswith(wanted):
        why = f"has weights named {weights}, which from_pretrained does not find: "
        why += f"shard it first, to get {wanted}"
    if why:
        raise CheckpointError(why, file=checkpoint.source)
    return checkpoint


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuse what could not be loaded from the Hub."""
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


def _made(checkpoint: Checkpoint, report: ShardReport) -> dict[str, str]:
    """Return how a folder came about, as the report of the run that wrote it says; refuse another's."""
    sizes = {name: state[0] for name, state in checkpoint.seen.items()}
    source, made = report.source if is_on_hub(report.source) else None, checkpoint.made
    is_other = made and (made.get("source"), made.get("cast_to")) != (source, report.dtype)
    if is_other or (sizes, len(checkpoint.tensors)) != (report.files, report.tensors):
        raise CheckpointError("no longer matches the report: push the folder itself", file=checkpoint.source)
    return made | {"source": report.source} | ({"cast_to": report.dtype} if report.dtype else {})


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
