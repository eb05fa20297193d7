"""One widget that takes a newcomer through the whole job: choose, plan, shard, compare.

    shardkit.ShardApp()                           # in a notebook cell
    shardkit.ShardApp("path/to/model", dtype="float16").run_all()   # the same without anybody clicking

Jobs run in a thread of their own and tell the page what happens by widget traits alone.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from shardkit.app import page
from shardkit.app.job_thread import Worker
from shardkit.base.errors import ShardkitError
from shardkit.base.extras import require
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare.comparison import Comparison
from shardkit.compare.parameters import check_values
from shardkit.formats.tensor import DtypeLike, dtype_name
from shardkit.measure.samples import Repeats
from shardkit.measure.spec import Cache
from shardkit.plan.plan import ShardPlan, Strategy
from shardkit.shard.destination import default_destination
from shardkit.shard.report import ShardReport

if TYPE_CHECKING:
    from shardkit.app.advice import Loads
    from shardkit.app.step import Step

__all__ = ["ShardApp"]

_PATIENCE_SECONDS = 60.0
_BUSY = "Another app in this notebook is running. Click Cancel to stop it, then start again."


class ShardApp:
    """Choose, plan, shard and compare, in a notebook.

    Parameters
    ----------
    source
        A folder, a weights file or a Hub id to start with; it is opened immediately.
    destination
        Where the shards go; None for a folder next to this notebook, named after the source.
    max_shard_size, strategy, dtype, overwrite
        As for `shard_checkpoint`; a `max_shard_size` of None suits the size of the model.
    repeats, cache, memory_limit
        As for `compare_loads`.
    max_memory
        A memory budget, as for `load_model`, within which the shards are loaded, too, as a third variant.
    first_token
        Whether a load is timed up to its first token.
    trust_remote_code
        Whether loads run custom code from the checkpoint.
    with_2024_stack
        Whether loads run on the stack of 2024, which `article_stack` makes; not those within a memory budget.

    Raises
    ------
    ShardkitError
        If a setting is invalid, or ipywidgets or matplotlib is not installed.

    Attributes
    ----------
    widget
        What is displayed, to be put into a layout of your own.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        destination: str | os.PathLike[str] | None = None,
        max_shard_size: int | str | None = None,
        strategy: Strategy = "size",
        dtype: DtypeLike | None = None,
        overwrite: bool = False,
        repeats: Repeats = 5,
        cache: Cache = "cold",
        first_token: bool = True,
        memory_limit: int | str | None = None,
        max_memory: int | str | None = None,
        trust_remote_code: bool = False,
        with_2024_stack: bool = False,
    ) -> None:
        require("notebook", "the app", "ipywidgets", "matplotlib")
        # Imported only here, the class is there without ipywidgets: for `from shardkit import *`, for one.
        import ipywidgets as widgets

        from shardkit.app.choose_step import Choose
        from shardkit.app.compare_step import Compare
        from shardkit.app.plan_step import Plan
        from shardkit.app.shard_step import Shard

        settings = {"strategy": strategy, "cache": cache, "repeats": repeats, "overwrite": overwrite}
        settings |= {"first_token": first_token, "trust_remote_code": trust_remote_code}
        settings |= {"with_2024_stack": with_2024_stack}
        check_values(settings if dtype is None else settings | {"dtype": dtype})
        dtype = None if dtype is None else dtype_name(dtype)
        size, limit, budget = (
            None if size is None else parse_size(size) for size in (max_shard_size, memory_limit, max_memory)
        )
        self._choose = Choose(_path("source", source))
        self._plan = Plan(self._choose, size, strategy, dtype)
        self._shard = Shard(self._choose, self._plan, _path("destination", destination), overwrite)
        self._compare = Compare(self._choose, self._shard, settings, limit, budget)
        self._steps = (self._choose, self._plan, self._shard, self._compare)
        self._source, self._worker = "", Worker()
        self._working: Step | None = None
        self.widget = widgets.VBox([widgets.HTML(page.stylesheet()), *(step.box for step in self._steps)])
        self.widget.add_class("sk-app")
        self._connect()
        self._refresh()
        if source is not None:
            self._begin(self._choose)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What was opened."""
        return self._choose.checkpoint

    @property
    def plan(self) -> ShardPlan | None:
        """What the controls of step 2 say."""
        return self._plan.plan

    @property
    def report(self) -> ShardReport | None:
        """What step 3 has written."""
        return self._shard.report

    @property
    def comparison(self) -> Comparison | None:
        """What step 4 has found; while it runs or when it was stopped, what it has found so far."""
        return self._compare.comparison

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether nothing is running any more, after `timeout` seconds at most."""
        try:
            return self._worker.wait(timeout)
        except KeyboardInterrupt:
            Worker.to_stop.set()
            raise

    def run_all(self) -> Comparison:
        """Run all four steps as they are set, without clicks, and return the comparison.

        Raises
        ------
        ShardkitError
            If a step fails, or another app in this process is running.
        """
        for step in self._steps:
            self.wait()
            if step is self._choose and self._choose.is_open:
                continue
            Worker.until_free(_PATIENCE_SECONDS)  # another app may just be opening its source
            if not self._begin(step):
                raise ShardkitError(step.missing or _BUSY)
            self.wait()
            if step.error is not None:
                raise step.error
        assert self._compare.comparison is not None  # noqa: S101 - or its step would have raised
        return self._compare.comparison

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)  # type: ignore[no-untyped-call]

    def _connect(self) -> None:
        from ipywidgets import dlink

        for step in (self._choose, self._shard, self._compare):
            step.start.on_click(partial(self._begin, step))
            step.cancel.on_click(self._cancelled)
        self._plan.changed = self._planned
        dlink((self._plan.dtype, "value"), (self._compare.dtype, "value"))
        self._shard.destination.observe(lambda _: self._refresh(), "value")
        self._shard.destination.observe(self._shard.look, "value")  # after what takes old refusals away
        self._choose.opened, self._shard.written = self._opened, self._compare.clear
        # Enter opens what was typed; a suggestion is only a suggestion until it is opened.
        self._choose.entered = partial(self._begin, self._choose)

    def _begin(self, step: Step, _: Any = None) -> bool:
        """Start a step's job, or say why not; a second click on a step that works is overlooked."""
        if self._working is not None:
            if self._working is not step:
                step.refuse(page.status("Another step is running. Wait for it, or cancel it."))
            return False
        if step.missing:
            step.refuse(page.error(step.missing))
            return False
        self._working = step
        self._refresh()
        if self._worker.start(step.attempt, self._ended):
            return True
        self._ended()
        step.refuse(page.error(_BUSY))
        for other in self._steps:
            other.let_cancel(True)
        return False

    def _ended(self) -> None:
        self._working = None
        self._refresh()

    def _cancelled(self, _: Any) -> None:
        if self._working is None:  # it was another app's job
            self._refresh()

    def _opened(self, checkpoint: Checkpoint) -> None:
        before, self._source = self._source, checkpoint.source
        if self._shard.folder == "" or before not in ("", checkpoint.source):
            self._shard.destination.value = default_destination(checkpoint.source, here=True)
        self._compare.clear()
        self._shard.clear()
        self._plan.open(checkpoint, is_other=before != checkpoint.source)

    def _planned(self, loads: Loads | None) -> None:
        self._choose.tell(loads)
        self._compare.loads = loads
        self._refresh()
        self._shard.look()

    def _refresh(self) -> None:
        """Let every button say what can be done now, and one of them what comes next."""
        working = self._working
        following = next((step for step in self._steps if not step.is_done), None)
        for step in self._steps:
            is_next = step is (working or following)
            step.show(working=step is working, busy=working is not None, is_next=is_next)


def _path(setting: str, value: str | os.PathLike[str] | None) -> str:
    try:
        return "" if value is None else os.fsdecode(value)
    except TypeError:
        raise ShardkitError(f"{setting} is {value!r}, but must be a path") from None
