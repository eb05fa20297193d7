"""The model card of what is pushed: where the weights come from, what was done to them, how to check that.

Nothing is stated that is not known. The text and metadata of a card that is there stay as they are; ours is a
section of its own, which the next push replaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import xxhash
from huggingface_hub import ModelCard, ModelCardData, constants

import shardkit
from shardkit.checkpoint import Checkpoint
from shardkit.hub.remote import RemoteFile
from shardkit.plan import Strategy
from shardkit.record import plural
from shardkit.sizes import format_size
from shardkit.tensor import CAST_DTYPES, DTYPE_NAMES

CARD = "README.md"
_BEGIN, _END = "<!-- shardkit: begin -->", "<!-- shardkit: end -->"
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_CACHED = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?")
_REMOTE = re.compile(r"hf://((?:[\w.-]+/)?[\w.-]+)@([0-9a-f]{40})")
_HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


class Origin(NamedTuple):
    """A model on the Hub, and the commit it was read at."""

    repo_id: str
    sha: str

    @classmethod
    def of(cls, source: str | None) -> Origin | None:
        """Recognise one in what was opened: an id with its commit, or a snapshot in the client's cache."""
        if found := _REMOTE.fullmatch(source or ""):
            return cls(*found.groups())
        if found := _CACHED.fullmatch(source or ""):
            return cls(f"{found[1]}/{found[2]}", found[3])
        return None  # a local path is nobody else's business


@dataclass(frozen=True)
class Story:
    """What is known of how files came about.

    Attributes
    ----------
    source
        What they were made from, as a result names it; None where nobody has recorded it.
    strategy, max_shard_size, dtype
        Of the plan: the size in bytes, the dtype that floating-point tensors were cast to.
    digests
        XXH3-128 by tensor, where they were verified.
    """

    source: str | None = None
    strategy: str | None = None
    max_shard_size: int | None = None
    dtype: str | None = None
    digests: Mapping[str, str] | None = None

    @classmethod
    def of(cls, made: Mapping[str, object]) -> Story:
        """Take what an index says (`ShardPlan.made`), as far as it can be true: anybody may write one."""
        source, strategy, size, dtype = (
            str(made.get(name)) for name in ("source", "strategy", "max_shard_size", "cast_to")
        )
        return cls(
            source=source if Origin.of(source) else None,
            strategy=strategy if strategy in get_args(Strategy) else None,
            max_shard_size=int(size) if re.fullmatch(r"[0-9]{1,18}", size) else None,
            dtype=dtype if dtype in CAST_DTYPES else None,
        )


def has_section(text: str) -> bool:
    """Whether a card has a section of ours."""
    return _SECTION.search(text) is not None


def model_card(
    base: str | None, repo_id: str, checkpoint: Checkpoint, shards: Mapping[str, RemoteFile], story: Story
) -> str:
    """Return a model card: `base` with our section, new or replaced; where there is no base, a new card.

    Parameters
    ----------
    base
        The text of the card to keep.
    repo_id
        Where it will be shown.
    checkpoint
        What is pushed, or, where that is not on this disk, what it was made from.
    shards
        The weight files.
    """
    section = "\n".join([_BEGIN, *_section(base, repo_id, checkpoint, shards, story), _END, ""])
    if base is None:
        library = {"library_name": "transformers"} if "architectures" in (checkpoint.config or {}) else {}
        title = f"# {repo_id.partition('/')[2]}"
        head = ModelCard(f"---\n{ModelCardData(**library).to_yaml()}\n---\n\n{title}\n").content
        return f"{head}\n{section}"
    if has_section(base):
        return _SECTION.sub(lambda _: section, base, count=1)
    return f"{base.rstrip()}\n\n{section}"


def _section(
    base: str | None, repo_id: str, checkpoint: Checkpoint, shards: Mapping[str, RemoteFile], story: Story
) -> list[str]:
    size = sum(file.size for file in shards.values())
    lines = [
        "## How these files were made",
        "",
        f"{plural(len(shards), 'file')}, {format_size(size)}, pushed by shardkit {shardkit.__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in _facts(base, checkpoint, story)),
        "",
        "| file | bytes | SHA-256 |",
        "|---|---:|---|",
        *(f"| {name} | {file.size:,} | `{file.sha256}` |" for name, file in shards.items()),
        "",
    ]
    if snippet := _loading(repo_id, checkpoint.config or {}):
        lines += ["To load it:", "", "```python", *snippet, "```", ""]
    if origin := Origin.of(story.source):
        check = f"shardkit verify hf://{origin.repo_id}@{origin.sha} hf://{repo_id}"
        lines += [f"To hold every tensor against the source: `{check}`.", ""]
    return lines


def _facts(base: str | None, checkpoint: Checkpoint, story: Story) -> list[tuple[str, str]]:
    facts = []
    if origin := Origin.of(story.source):
        url = f"{constants.ENDPOINT}/{origin.repo_id}"
        facts += [("source", f"[{origin.repo_id}]({url})"), ("revision", f"`{origin.sha}`")]
    if licence := _licence(base):
        facts.append(("licence", licence))
    if story.strategy and story.max_shard_size:
        size = format_size(story.max_shard_size)
        facts.append(("plan", f"strategy {story.strategy}, at most {size} a file"))
    if story.dtype:
        facts.append(("dtype", f"cast to {story.dtype}"))
    else:
        facts.append(("dtype", ", ".join(DTYPE_NAMES[dtype] for dtype in checkpoint.dtypes)))
    facts.append(("tensors", f"{len(checkpoint.tensors):,}"))
    if story.digests:
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(story.digests.items()))
        digest = xxhash.xxh3_128_hexdigest(lines.encode())
        facts.append(("digest of the tensors", f"`{digest}` (XXH3-128 of the sorted lines `name XXH3-128`)"))
    return facts


def _licence(base: str | None) -> str | None:
    """Return what the source's card says of its licence."""
    if base is None:
        return None
    data: dict[str, Any] = ModelCard(base, ignore_metadata_errors=True).data.to_dict()
    said = data.get("license_name") or data.get("license")
    return str(said) if said else None


def _loading(repo_id: str, config: Mapping[str, Any]) -> list[str]:
    """Return the lines that load it with plain transformers; none for what transformers does not load."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return []
    name = str(named[0]).replace("LMHeadModel", "ForCausalLM")
    head = next((f"For{head}" for head in _HEADS if name.endswith(f"For{head}")), "")
    return [
        f"from transformers import AutoModel{head}, AutoTokenizer",
        "",
        f'model = AutoModel{head}.from_pretrained("{repo_id}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
    ]
