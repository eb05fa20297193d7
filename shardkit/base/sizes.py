"""Sizes as users write them ("2GB", "1.5GiB") and as they like to read them."""

from __future__ import annotations

import re
from decimal import Decimal

from shardkit.base.errors import SizeError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTPE", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_MOST = 10**30  # beyond any disk, and what follows from it can still be shown
_ACCEPTED = 'a positive number of bytes, or text such as "500MB", "2GB" (decimal) or "1.5GiB" (binary)'


def parse_size(size: int | str) -> int:
    """Return `size` in bytes.

    Units are decimal (KB, MB, GB, TB, PB, EB) or binary (KiB, MiB, ...), in any letter case, and with or
    without their B; a fraction of a byte is dropped. The Hub writes sizes in decimal units, and so do we.

    Raises
    ------
    SizeError
        If `size` is not positive or not understood; the message says what is accepted.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)) and match[2].upper() in _UNITS:
        number = int(Decimal(match[1].replace("_", "")) * _UNITS[match[2].upper()])
    else:
        raise SizeError(f"{str(size)[:80]!r} is not a size: use {_ACCEPTED}")
    if number > _MOST:
        raise SizeError(f"a size above {_MOST:.0e} bytes is too large: use {_ACCEPTED}")
    if number <= 0:
        raise SizeError(f"{size!r} is not above zero: use {_ACCEPTED}")
    return number


def format_size(number: float) -> str:
    """Return a number of bytes as people read it, in decimal units: ``14.5 GB``."""
    for power, unit in reversed(list(enumerate(("KB", "MB", "GB", "TB", "PB", "EB"), start=1))):
        scale = 1000**power
        if abs(number) >= 0.9995 * scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
