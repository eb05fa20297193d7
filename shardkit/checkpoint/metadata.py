"""What of the files' ``__metadata__`` is the checkpoint's, and goes into every shard.

The rest describes a file that the shards replace: its number, its size, its checksum, another tool's notes on
how it was cut. Stamped on every shard, it would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

# Even where all files agree, or there is just one. kohya's ss_* describe the training, hashes included.
_OF_A_FILE = re.compile(
    r"(?!ss_).*(hash|sha\d|md5|crc\d|checksum|digest|shard|(data|saved)_offset)"
    r"|((total|file|data)_)?(size|bytes)$|file(_?name)?$|part(_|$)|etag|DCP_",
    re.IGNORECASE,
)


def is_of_a_file(key: str) -> bool:
    """Whether an entry describes one file, by its name alone."""
    return _OF_A_FILE.match(key) is not None


def of_checkpoint(
    files: Sequence[Mapping[str, str]], tensors: Container[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what holds for all files that say anything, and the names of the rest.

    An entry that names a tensor is kept wherever it stands: so the Hub's client notes names of tied tensors.
    """
    said = [file for file in files if file]
    entries = {key: value for file in reversed(said) for key, value in file.items()}
    kept = {
        key: value
        for key, value in entries.items()
        if value in tensors or (all(file.get(key) == value for file in said) and not is_of_a_file(key))
    }
    return kept, tuple(key for key in entries if key not in kept)
