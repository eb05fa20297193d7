"""Asking the Hub: with whose token, how patiently, and what a refusal means in plain words.

A token lives in request headers alone. Errors chain no client error, whose text has the URL: a signed one
opens the file to whoever reads the notebook.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from huggingface_hub import constants, errors, get_token, utils

from shardkit.base.errors import CheckpointError
from shardkit.base.machine import ResultT
from shardkit.base.record import plural

# What the client raises where the Hub refuses, fails, cannot be reached, or must not be asked.
CLIENT_ERRORS = (errors.HTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled)

TRIES = 6
_CONNECT_TRIES = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_LONGEST_WAIT = 300.0  # the Hub counts requests in windows of five minutes
_TOKEN = re.compile(r"[!-~]+")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def find_token(token: str | None = None) -> str | None:
    """Return the token to use: the argument, the environment's, the client's store's, Colab's, Kaggle's."""
    found = (token or get_token() or _kaggle_secret() or "").strip()  # get_token asks Colab, too
    if found and not _TOKEN.fullmatch(found):  # the client would quote it in an error
        raise CheckpointError("the Hub token contains invalid characters: copy it again")
    return found or None


def _kaggle_secret() -> str | None:
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        with suppress(Exception):  # no such secret, or not for this notebook: it raises what it likes
            from kaggle_secrets import UserSecretsClient  # type: ignore[import-not-found]

            secret: str | None = UserSecretsClient().get_secret("HF_TOKEN")
            return secret
    return None


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep the Hub's client from logging signed URLs when it tries again, and from showing its own bars."""
    level, hides = utils.logging.get_verbosity(), not (bars or utils.are_progress_bars_disabled())
    utils.logging.set_verbosity_error()
    if hides:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if level != utils.logging.ERROR:  # otherwise another thread has set it, whose it is to undo
            utils.logging.set_verbosity(level)
        if hides:
            utils.enable_progress_bars()


class UnreachableError(CheckpointError):
    """The Hub did not answer, or not as it should, again and again."""


class Patience:
    """Counts failures in a row of what is done with `what`, and waits longer after each."""

    def __init__(self, what: str) -> None:
        self._what, self._failures = what, 0

    def progressed(self) -> None:
        """Begin to count anew: something was received."""
        self._failures = 0

    def wait(self, reason: str, pause: float | None = None, tries: int = TRIES) -> None:
        """Wait before the next try, `pause` seconds where the server has said so."""
        self._failures += 1
        if self._failures > tries or (pause or 0) > _LONGEST_WAIT:
            asked = f", asking to wait {pause:.0f} s" if pause else ""
            raise UnreachableError(
                f"{reason}{asked}; gave up after {plural(self._failures, 'attempt')}: try again later",
                file=self._what,
            )
        time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._failures - 1)) if pause is None else pause)


def ask(call: Callable[[], ResultT], what: str, tries: int = TRIES, *, bars: bool = False) -> ResultT:
    """Return what a call of the Hub's client returns; try again after failures that may pass.

    `bars` lets the client show how far a download is.
    """
    patience = Patience(what)
    while True:
        try:
            with quiet(bars=bars):
                return call()
        except CLIENT_ERRORS as error:
            cause = root(error)
        if not may_pass(cause):
            raise explained(cause, what)
        if type(cause).__name__ == "ConnectError":  # of httpx or httpx2: no network, or no such Hub
            tries = min(tries, _CONNECT_TRIES)
        patience.wait(*happened(cause), tries)


def root(error: BaseException) -> BaseException:
    """Return what the client's "not in the cache, either" and "error while uploading" hide."""
    hiding = (errors.LocalEntryNotFoundError, RuntimeError)
    while isinstance(error, hiding) and isinstance(error.__cause__, CLIENT_ERRORS):
        error = error.__cause__
    return error


def may_pass(error: BaseException) -> bool:
    """Whether the same may succeed soon: the connection failed, or the server is busy or in trouble.

    Storage refuses what has expired, and the next try asks the Hub for another signed URL.
    """
    if not isinstance(error, errors.HfHubHTTPError):
        return not isinstance(error, (ValueError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled))
    status = error.response.status_code
    # A mirror may lead to the Hub, which gives a code; storage has none.
    is_by_hub = is_of_hub(error.response.request.url) or "X-Error-Code" in error.response.headers
    return status in (408, 425, 429) or status >= 500 or not is_by_hub


def is_of_hub(url: object) -> bool:
    """Whether a URL is the Hub's own, not that of its storage."""
    return str(url).startswith(f"{constants.ENDPOINT}/")


def happened(error: BaseException) -> tuple[str, float | None]:
    """Say what a failure was, and for how many seconds the server asks to be left alone, if it does."""
    if not isinstance(error, errors.HfHubHTTPError):
        # Queries of URLs are cut off: there lie the signatures.
        text = re.sub(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*", r"\1", str(error))[:200]
        return f"no connection to the Hub ({type(error).__name__}: {text})", None
    headers = error.response.headers
    asked = headers.get("Retry-After", "").strip()
    # The Hub's own: `RateLimit: "resolvers";r=0;t=54`.
    left = re.search(r"r=0\b.*\bt=(\d+)", headers.get("RateLimit", ""))
    pause = float(asked) if asked.isdecimal() else float(left[1]) if left else None
    return f"the Hub answered with status {error.response.status_code}", pause


def explained(error: BaseException, what: str) -> CheckpointError:
    """Return the error of the Hub's client in the words of somebody who wants the model.

    `what` is "hf://org/name", with revision or file where they matter.
    """
    page = f"{constants.ENDPOINT}/{what.removeprefix('hf://').partition('@')[0]}"
    if isinstance(error, errors.GatedRepoError):
        message = f"the repository is gated: request access or accept its license at {page}, then {LOG_IN}"
    elif isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        message = (
            "is not in the local cache, and HF_HUB_OFFLINE is set: unset it, "
            "or download the model while online"
        )
    elif isinstance(error, errors.DisabledRepoError):
        message = f"the repository is disabled: see {page}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"is not a local folder, and not a model on the Hub: check the name; if it is private, {LOG_IN}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"the repository has no such revision: see its branches and tags at {page}"
    else:
        message = refused(error, f"access denied: this token cannot read it; use one that can: {LOG_IN}")
    return CheckpointError(message, file=what)


def refused(error: Any, forbidden: str) -> str:
    """Say with what status the Hub refused: `forbidden`, where the token does not permit it."""
    status = error.response.status_code
    if status == 401:
        return f"the Hub rejected the token as invalid: {LOG_IN}"
    if status == 403:
        return forbidden
    said = " ".join((error.server_message or "").split())[:200]
    return f"the Hub answered with status {status}" + (f": {said}" if said else "")
