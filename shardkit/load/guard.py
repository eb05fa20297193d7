"""What a model that streams its weights refuses: passes that were not planned, and uses of all weights.

A pass in another thread waits for the one that runs: they would take each other's buffers.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch

from shardkit.base.errors import PlanError, ShardkitError
from shardkit.base.sizes import format_size
from shardkit.checkpoint.budget import SIZES, MemoryPlan

_MOVED = "can be neither moved nor cast: load it with the dtype it should have"
_TRAINED = "cannot be trained: load it without max_memory"
_LISTED = "cannot list or save its weights, for not all are in memory: use the files of its source"
_REFUSED = {
    **dict.fromkeys(("state_dict", "save_pretrained"), _LISTED),
    "load_state_dict": "reads its weights from their files: load it from other files instead",
    "resize_token_embeddings": "keeps the vocabulary of its files: load it without max_memory",
    "__reduce_ex__": "can be neither copied nor pickled: load it again instead",
}


def _refuse(why: str, *_: object, **_named: object) -> NoReturn:
    raise ShardkitError(f"a model loaded with max_memory {why}")


def guard(model: Any, plan: MemoryPlan) -> None:
    """Make a model refuse what was not planned, whether it is called itself or the decoder in it."""
    running, refused = threading.RLock(), {name: partial(_refuse, why) for name, why in _REFUSED.items()}
    for module in {model, model.base_model}:
        module.forward = _one_at_a_time(module, partial(_check_pass, model.config, plan), running)
    for module in model.modules():
        vars(module).update({**refused, **_allowed(weakref.ref(module), model.dtype)})


def _one_at_a_time(module: Any, check: Callable[[dict[str, Any], Any], None], running: Any) -> Any:
    """Return a module's forward that checks each pass, and lets one run at a time.

    Not by hooks: torch calls none after Ctrl-C, and the next thread would wait for ever.
    """
    itself, forward = weakref.ref(module), type(module).forward
    signature = inspect.signature(module.forward)

    def alone(*arguments: Any, **named: Any) -> Any:
        with running:
            check({**signature.bind_partial(*arguments).arguments, **named}, itself())
            return forward(itself(), *arguments, **named)

    vars(alone)["__signature__"] = signature  # which generation asks for
    return alone


def _check_pass(config: Any, plan: MemoryPlan, given: dict[str, Any], module: Any) -> None:
    """Refuse sequences longer than planned, and outputs that do not fit where activations were."""
    embedded, work = given.get("inputs_embeds"), plan.work
    tokens = embedded if given.get("input_ids") is None else given["input_ids"]
    if tokens is None:  # the model itself says so
        return
    if embedded is not None and embedded.requires_grad:
        _refuse(_TRAINED)
    before, cache = 0, given.get("past_key_values")
    with suppress(AttributeError, ValueError):  # no cache; or one of states alone, which has no length
        before = cache.get_seq_length()  # type: ignore[union-attr]
    batch, new = tokens.shape[:2]
    if batch > work.batch_size or new + before > work.context_tokens:
        more = f"batch_size={batch}" * (batch > work.batch_size)
        more = more or f"context_tokens={new + before}"
        raise PlanError(
            f"{batch} x {new + before} tokens need more memory than was planned for {work.batch_size} x "
            f"{work.context_tokens} (sequences or beams x length): load the model with {more} or more"
        )
    needed = batch * _output_bytes(config, given, new, module)
    if needed > plan.activation_bytes:
        raise PlanError(
            f"logits, loss or states of {batch} x {new} tokens need {format_size(needed)}, more than the "
            f"{format_size(plan.activation_bytes)} planned for a pass: pass fewer tokens at a time, or "
            "logits_to_keep=1 for the logits of the last one"
        )


def _output_bytes(config: Any, given: dict[str, Any], new: int, module: Any) -> int:
    """Return the bytes of what a pass over new tokens leaves behind."""
    text, kept = config.get_text_config(), given.get("logits_to_keep", 0)
    wants_states = given.get("output_hidden_states") or getattr(config, "output_hidden_states", False)
    states = bool(wants_states) * (getattr(text, SIZES[0], 0) + 1) * getattr(text, SIZES[2], 0)
    count = min(new, kept) or new if isinstance(kept, int) else len(kept)
    # Logits are there twice where they are scaled; a loss takes them, and their softmax, in float32.
    each = 2 * module.dtype.itemsize + 8 * (given.get("labels") is not None)
    has_logits = module.get_output_embeddings() is not None
    return int(
        count * has_logits * getattr(text, "vocab_size", 0) * each + states * new * module.dtype.itemsize
    )


def _allowed(itself: Callable[[], Any], dtype: Any) -> dict[str, Callable[..., Any]]:
    """Return what a module does if that is what it is already, moved or frozen, and refuses else."""
    sample = torch.empty(0, dtype=dtype)

    def unmoved(function: Any, *_: object, **_named: object) -> Any:
        found = function(sample)
        return itself() if (found.dtype, found.device.type) == (dtype, "cpu") else _refuse(_MOVED)

    def untrained(on: bool = True, **named: bool) -> Any:
        return _refuse(_TRAINED) if on and all(named.values()) else itself()

    return {"_apply": unmoved, "train": untrained, "requires_grad_": untrained}
