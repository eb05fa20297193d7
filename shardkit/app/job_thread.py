"""One job at a time, outside the kernel's main thread, so that the page never freezes."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread


class Worker:
    """Runs jobs in a thread of their own, one at a time in the whole process.

    Of the process, not of one app: whoever runs the app's cell again gets a second app, and a job of the
    first would spoil what the second measures. So either app can stop whatever runs.
    """

    _running = Lock()
    to_stop = Event()  # while it is set, the running job is to stop

    def __init__(self) -> None:
        self._thread: Thread | None = None

    @classmethod
    def until_free(cls, timeout: float) -> None:
        """Wait until no app of this process is at work, `timeout` seconds at most."""
        if cls._running.acquire(timeout=timeout):
            cls._running.release()

    def start(self, job: Callable[[], None], ended: Callable[[], None]) -> bool:
        """Start a job, then call `ended`; False if another is running. The job deals with its own errors."""
        if not self._running.acquire(blocking=False):
            return False
        self.to_stop.clear()

        def run() -> None:
            try:
                job()
            finally:
                self._running.release()
                ended()

        # A daemon: a kernel that is told to go must not wait for a copy that can be resumed.
        self._thread = Thread(target=run, name="shardkit-app", daemon=True)
        self._thread.start()
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether this app's job ended within `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()
