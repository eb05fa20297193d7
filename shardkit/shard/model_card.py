"""The model card of what is pushed: where the weights come from, what was done to them, how to check that.

Nothing is stated that is not known. The model's README stays as it is; ours is a section of its own, which
the next push replaces. The section records which README it was added to: what people then write on the Hub
stays until that README changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash
import yaml  # type: ignore[import-untyped]
from huggingface_hub import constants

import shardkit
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import CAST_DTYPES, DTYPE_NAMES
from shardkit.plan.packing import STRATEGIES
from shardkit.sources.hub import RemoteFile
from shardkit.sources.resolve import commit_of, hub_name

CARD = "README.md"
_BEGIN, _END = "<!-- shardkit: begin -->", "<!-- shardkit: end -->"
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_ADDED_TO = re.compile(r"<!-- README: XXH3-128 ([0-9a-f]{32}) -->")
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
_HEADS = re.compile(
    r".*(For(?:CausalLM|MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering))"
)
_BARE = re.compile(r"(?!.*(?:For|Encoder|Decoder|Heads)).*Model")
_SEQ2SEQ = ("bart", "mbart", "mt5", "pegasus", "t5")
_TOKENIZERS = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
)


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
            source=source if commit_of(source or "") else None,
            strategy=strategy if strategy in STRATEGIES else None,
            max_shard_size=int(size) if re.fullmatch(r"[0-9]{1,18}", size) else None,
            dtype=dtype if dtype in CAST_DTYPES else None,
        )


def model_card(
    shown: str | None,
    own: str | None,
    repo_id: str,
    checkpoint: Checkpoint,
    shards: Mapping[str, RemoteFile],
    story: Story,
) -> str:
    """Return a model card: a README with our section, new or replaced.

    Parameters
    ----------
    shown
        The card that is there; kept where our section in it was added to `own`.
    own
        The model's own README.
    repo_id
        Where it will be shown.
    checkpoint
        What is pushed, or, where that is not on this disk, what it was made from.
    shards
        The weight files.
    """
    section = "\n".join([_BEGIN, *_section(own, repo_id, checkpoint, shards, story), _END, ""])
    base = _base(shown, own)
    if base is None:
        is_known = "architectures" in (checkpoint.config or {})
        head = "---\nlibrary_name: transformers\n---\n\n" if is_known else ""
        return f"{head}# {repo_id.partition('/')[2]}\n\n{section}"
    if _SECTION.search(base):
        return _SECTION.sub(lambda _: section, base, count=1)
    return f"{base.rstrip()}\n\n{section}"


def _base(shown: str | None, own: str | None) -> str | None:
    found = _SECTION.search(shown or "")
    if found is None:
        return shown if own is None else own
    recorded = _ADDED_TO.search(found[0])
    return shown if (recorded and recorded[1]) == _digest(own) else own


def _digest(own: str | None) -> str | None:
    return None if own is None else xxhash.xxh3_128_hexdigest(own.encode())


def _section(
    own: str | None, repo_id: str, checkpoint: Checkpoint, shards: Mapping[str, RemoteFile], story: Story
) -> list[str]:
    size = sum(file.size for file in shards.values())
    lines = [
        *([] if own is None else [f"<!-- README: XXH3-128 {_digest(own)} -->"]),
        "## How these files were made",
        "",
        f"{plural(len(shards), 'file')}, {format_size(size)}, pushed by shardkit {shardkit.__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in _facts(own, checkpoint, story)),
        "",
        "| file | bytes | SHA-256 |",
        "|---|---:|---|",
        *(f"| {_cell(name)} | {file.size:,} | `{file.sha256}` |" for name, file in shards.items()),
        "",
    ]
    if snippet := _loading(repo_id, checkpoint):
        lines += ["To load it:", "", "```python", *snippet, "```", ""]
    if commit_of(story.source or ""):
        check = f"shardkit verify {story.source} {hub_name(repo_id)}"
        lines += [f"To compare every tensor with the source: `{check}`.", ""]
    return lines


def _facts(own: str | None, checkpoint: Checkpoint, story: Story) -> list[tuple[str, str]]:
    facts = []
    if origin := commit_of(story.source or ""):
        source_id, sha = origin
        facts += [("source", f"[{source_id}]({constants.ENDPOINT}/{source_id})"), ("revision", f"`{sha}`")]
    if license_id := _license(own):
        facts.append(("license", _cell(license_id)))
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


def _license(own: str | None) -> str | None:
    """Return what the model's own README says of its license, if that can be read."""
    found = _FRONT_MATTER.match(own or "")
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    said = (data.get("license_name") or data.get("license")) if isinstance(data, dict) else None
    return ", ".join(map(str, said if isinstance(said, list) else [said])) if said else None


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _loading(repo_id: str, checkpoint: Checkpoint) -> list[str]:
    """Return the lines that load it with plain transformers; none where it is not known which do."""
    config = checkpoint.config or {}
    if not (loader := _auto_class(config)):
        return []
    trusted = ", trust_remote_code=True" if "auto_map" in config else ""
    wanted = {"model": loader}
    if not _TOKENIZERS.isdisjoint(checkpoint.side_files):
        wanted["tokenizer"] = "AutoTokenizer"
    calls = [f'{name} = {loads}.from_pretrained("{repo_id}"{trusted})' for name, loads in wanted.items()]
    return [f"from transformers import {', '.join(wanted.values())}", "", *calls]


def _auto_class(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if head := _HEADS.fullmatch(name.replace("LMHeadModel", "ForCausalLM")):
        return f"AutoModel{head[1]}"
    if name.endswith("ForConditionalGeneration") and config.get("model_type") in _SEQ2SEQ:
        return "AutoModelForSeq2SeqLM"
    return "AutoModel" if _BARE.fullmatch(name) else None
