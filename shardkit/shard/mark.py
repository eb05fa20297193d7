"""What workers of an executor have to see before they write: a file that is there as long as a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from shardkit.base.errors import DestinationError
from shardkit.sources.fileset import FileSet


@dataclass(frozen=True, slots=True)
class Mark:
    """A file beside the shards of a run on `host`: whoever does not see it has another disk, or is late.

    Late is a task that an executor could not stop when its run was: what is there now may be of another run.
    """

    path: str
    host: str

    @classmethod
    def made(cls, folder: Path, source: FileSet, files: Sequence[str]) -> Mark:
        """Make the file; it has the size and time of the source's files, where they are on this machine."""
        path = folder / f".run.shardkit-{uuid4().hex}"
        here = files if source.folder is not None else ()
        states = {os.path.abspath(source.where(file)): source.state(file)[:2] for file in here}
        path.write_text(json.dumps(states), encoding="utf-8")
        return cls(str(path), platform.node())

    @property
    def is_elsewhere(self) -> bool:
        """Whether the run is on another machine than this one."""
        return self.host != platform.node()

    def check(self) -> None:
        """Refuse to work where the run's disk, or on another machine the source, is not seen."""
        try:
            states = Path(self.path).read_text(encoding="utf-8")
        except OSError as error:
            raise self.unseen(self.path) from error
        if self.is_elsewhere and (other := _other(states)):
            raise self.unseen(other)

    def unseen(self, path: str) -> DestinationError:
        """Return the error of a worker that does not see a file as the run does."""
        return DestinationError(
            f"the worker on {platform.node()} does not see {path} as {self.host} does: all workers need the "
            "same disk under the same path; from Hub to Hub, shard_on_hub needs none"
        )


@lru_cache(maxsize=4)
def _other(states: str) -> str | None:
    """Return a file that is not here what it is elsewhere; None where all are."""
    for path, state in json.loads(states).items():
        try:
            status = os.stat(path)
        except OSError:
            return str(path)
        if [status.st_size, status.st_mtime_ns] != state:
            return str(path)
    return None
