"""What shardkit raises: one base class, a few children, messages that say what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# What begins with one says something of a file or tensor, whose name comes before it.
_VERB = re.compile(r"(is|was|has|cannot|changed|contains|declares|does|ends|mixes|names|spans|starts)\b")


class ShardkitError(Exception):
    """Base of every error that shardkit raises on purpose."""


class CheckpointError(ShardkitError):
    """A checkpoint, or a file of one, is missing, damaged or not what it claims to be.

    Attributes
    ----------
    file, tensor
        Where it was found, when known.
    message
        What is wrong with it.
    """

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        self.file, self.tensor, self.message = file, tensor, message
        clipped = tensor and (tensor if len(tensor) <= 200 else tensor[:197] + "...")
        where = ", ".join(filter(None, (file, None if tensor is None else f"tensor {clipped!r}")))
        super().__init__(f"{where}{' ' if _VERB.match(message) else ': '}{message}" if where else message)

    def of(self, tensor: str) -> CheckpointError:
        """Return the same error of a tensor; of none where its name is empty."""
        return type(self)(self.message, file=self.file, tensor=tensor) if tensor else self


@contextmanager
def reading(file: str | None = None, tensor: str | None = None) -> Iterator[None]:
    """Name the file of a checkpoint that the system will not let be read; by default, the one it names."""
    try:
        yield
    except OSError as error:
        why, where = error.strerror or error, file or error.filename
        raise CheckpointError(f"cannot be read: {why}", file=where, tensor=tensor) from error


def misspelled(what: str, value: object, choices: Iterable[str], short: Iterable[str] = ()) -> str:
    """Say that a value is none of the choices, and which of them, or of their short names, may be meant."""
    names = list(choices)
    near = meant(str(value).lower(), [*names, *short])
    return f"{what} {str(value)!r} is not one of {', '.join(names)}{near}"


def meant(value: str, choices: Iterable[str]) -> str:
    """Ask whether the choice that looks most like a value is meant; empty if none looks like it."""
    near = get_close_matches(value, list(choices), 1)
    return f"; did you mean {near[0]}?" if near else ""


class SourceError(CheckpointError, ValueError):
    """What was given as a checkpoint names neither a folder or file here nor a model on the Hub."""


class DownloadNeededError(CheckpointError):
    """A model on the Hub cannot be streamed: a large tensor of it is not contiguous, so download it first."""


class InOneLine:
    """An error that a notebook shows in one line: in frames whoever caused it would have to look for it."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class SizeError(InOneLine, ShardkitError, ValueError):
    """A size such as ``max_shard_size`` could not be understood."""


class PlanError(ShardkitError, ValueError):
    """A requested plan is not possible (unknown strategy or dtype, quantized weights)."""


class CastError(ShardkitError):
    """A cast would have turned finite values into infinities."""


class DestinationError(ShardkitError):
    """The destination exists, overlaps the source, or cannot be written."""


class InUseError(DestinationError):
    """Another run is writing the destination."""


class SpaceError(DestinationError):
    """The disk cannot hold the result."""


class VerificationError(ShardkitError):
    """The copy does not have the same tensors as its source."""


class Cancelled(InOneLine, ShardkitError):  # noqa: N818  the user asked for it: no error
    """The progress callback asked to stop."""


class Interrupted(InOneLine, KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button, in a job that can be resumed."""


class MissingPackageError(InOneLine, ShardkitError, ImportError):
    """A package that the work needs is not installed; the message names the extra that brings it."""


class MeasurementError(ShardkitError):
    """A load could not be measured at all (a load that fails is a result, not an error)."""
