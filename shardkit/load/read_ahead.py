"""Reading ahead: one thread reads what a model uses next, as long as it may hold so much."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

from shardkit.base.disk import own_memory
from shardkit.base.errors import ShardkitError

_PATIENCE_SECONDS = 5.0

# Reads an item into a buffer; before each part it asks whether it may hold so many bytes more, or must stop.
Read: TypeAlias = Callable[[Any, memoryview, Callable[[int], bool]], None]


class ReadAhead:
    """Reads items in their order, over and over again, into memory of their own.

    What is read of an item counts until nothing views it any more; all together never exceeds `capacity`
    bytes. An item that is taken out of order is read at once, and reading resumes after it; a pass over all
    of them in another order is that in which the next one is expected.

    Parameters
    ----------
    sizes
        Bytes of each item, in the order in which they are taken first; none is larger than `capacity`.
    read
        What reads one; what it raises is raised where the item is taken.
    """

    def __init__(self, sizes: Mapping[Hashable, int], capacity: int, read: Read) -> None:
        self._sizes, self._capacity, self._read = dict(sizes), capacity, read
        self._order, self._taken = list(sizes), dict[Hashable, None]()
        # A turn begins where reading moves to another place; what earlier turns read is dropped.
        self._next = self._turn = 0
        self._reading: Hashable = None
        self._is_starved = self._is_closed = False
        self._ready: dict[Hashable, memoryview | Exception] = {}
        self._changed = threading.Condition()
        # Where the last view ends, in any thread at any time, nothing may wait for a lock.
        self._held, self._given_back = 0, SimpleQueue[int]()
        self._thread = threading.Thread(target=self._work, name="shardkit-blocks", daemon=True)
        self._thread.start()

    def take(self, item: Hashable) -> memoryview:
        """Wait for an item, and return its bytes. One thread at a time may take.

        Raises
        ------
        CheckpointError
            If it could not be read.
        ShardkitError
            If what else is in use leaves no memory to read it into.
        """
        with self._changed:
            if self._learn(item) or not (item in self._ready or item is self._reading):
                self._seek(item)
            self._drop_before(item)
            is_collected = False
            while item not in self._ready:
                if not self._changed.wait(_PATIENCE_SECONDS):
                    if self._is_starved and not is_collected:
                        gc.collect()  # frames of an error that was raised keep views
                        is_collected = True
                    else:
                        self._check_progress()
            found = self._ready.pop(item)
            self._changed.notify_all()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """End the thread, and give up what was read."""
        with self._changed:
            self._is_closed = True
            self._seek(self._order[0])

    def _learn(self, item: Hashable) -> bool:
        """Notice a new pass; return whether the last one took all items in another order than expected."""
        if item not in self._taken:
            self._taken[item] = None
            return False
        taken, self._taken = list(self._taken), {item: None}
        if len(taken) < len(self._order) or taken == self._order:
            return False
        self._order = taken
        return True

    def _drop_before(self, item: Hashable) -> None:
        """Give up what was passed over: it would take the memory that an item needs."""
        for other in [*self._ready]:
            if other is item:
                break
            del self._ready[other]
        self._changed.notify_all()

    def _seek(self, item: Hashable) -> None:
        self._next, self._turn, self._reading = self._order.index(item), self._turn + 1, None
        self._ready.clear()
        self._given_back.put(0)
        self._changed.notify_all()

    def _check_progress(self) -> None:
        if not self._thread.is_alive():
            raise ShardkitError("the thread that reads weights is not in this process: load the model here")
        if self._is_starved:
            raise ShardkitError(
                f"the model uses too many of its streamed weights at once: {self._held:,} bytes of the "
                f"{self._capacity:,} for them are in use; raise max_memory"
            )

    def _work(self) -> None:
        while not self._is_closed:
            with self._changed:
                turn, item = self._turn, self._order[self._next]
                self._next = (self._next + 1) % len(self._order)
                self._changed.wait_for(partial(self._is_wanted, item, turn))
                self._reading = item if self._is_current(turn) else self._reading
            self._hand_out(item, turn)

    def _hand_out(self, item: Hashable, turn: int) -> None:
        """Read an item, and keep it, or why it could not be read, for whoever takes it."""
        counted = [0]
        buffer = memoryview(own_memory(self._sizes[item]))
        found: memoryview | Exception = buffer
        try:
            self._read(item, buffer, partial(self._may_hold, turn, counted))
        except Exception as error:
            found = error
        weakref.finalize(buffer, self._given_back.put, counted[0]).atexit = False
        with self._changed:
            if self._is_current(turn):
                self._reading, self._ready[item] = None, found
                self._changed.notify_all()
                if found is not buffer:  # a disk that fails is not asked again before somebody wants it
                    self._changed.wait_for(lambda: self._ready.get(item) is not found)

    def _may_hold(self, turn: int, counted: list[int], nbytes: int) -> bool:
        """Wait until there is room for more bytes; False if they are no longer needed."""
        while self._held + nbytes > self._capacity and self._is_current(turn):
            self._is_starved = True
            self._held -= self._given_back.get()
            self._is_starved = False
        self._held, counted[0] = self._held + nbytes, counted[0] + nbytes
        return self._is_current(turn)

    def _is_wanted(self, item: Hashable, turn: int) -> bool:
        """Whether an item has been taken since it was read last; or reading has moved elsewhere."""
        return item not in self._ready or not self._is_current(turn)

    def _is_current(self, turn: int) -> bool:
        return turn == self._turn and not self._is_closed
