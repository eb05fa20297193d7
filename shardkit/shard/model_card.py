"""The model card of what is pushed: where the weights come from, what was done to them, how to check that.

Nothing is stated that is not known. The model's README stays as it is; ours is a section of its own, which
the next push replaces. The section records which README it was added to: what people then write on the Hub
stays until that README changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash
import yaml  # type: ignore[import-untyped]
from huggingface_hub import constants

import shardkit
from shardkit.base.errors import CheckpointError, DestinationError
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import CAST_DTYPES, DTYPE_NAMES
from shardkit.plan.packing import STRATEGIES
from shardkit.sources.hub import RemoteFile, Repository
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


def model_card(
    head: Repository,
    own: str | None,
    checkpoint: Checkpoint,
    shards: Mapping[str, RemoteFile],
    made: Mapping[str, str],
    digests: Mapping[str, str],
) -> bytes:
    """Return a README with our section, new or replaced.

    The card that `head` shows is kept where our section in it was added to `own`, the model's README.
    `checkpoint` is what is pushed, or what it was made from; `made` what an index says of that, believed as
    far as it can be true: anybody may write one. `digests` are of all tensors, where they were verified.
    """
    size, source = sum(file.size for file in shards.values()), made.get("source", "")
    lines = [
        _BEGIN,
        *([] if own is None else [f"<!-- README: XXH3-128 {_digest(own)} -->"]),
        "## How these files were made",
        "",
        f"{plural(len(shards), 'file')}, {format_size(size)}, pushed by shardkit {shardkit.__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in _facts(own, checkpoint, made, digests)),
        "",
        "| file | bytes | SHA-256 |",
        "|---|---:|---|",
        *(f"| {_cell(name)} | {file.size:,} | `{file.sha256}` |" for name, file in shards.items()),
        "",
    ]
    if snippet := _loading(head.repo_id, checkpoint):
        lines += ["To load it:", "", "```python", *snippet, "```", ""]
    if commit_of(source):
        check = f"shardkit verify {source} {hub_name(head.repo_id)}"
        lines += [f"To compare every tensor with the source: `{check}`.", ""]
    section = "\n".join([*lines, _END, ""])
    if (base := _base(shown_card(head, own), own)) is None:
        is_known = "architectures" in (checkpoint.config or {})
        front = "---\nlibrary_name: transformers\n---\n\n" if is_known else ""
        base = f"{front}# {head.repo_id.partition('/')[2]}"
    if _SECTION.search(base):
        return _SECTION.sub(lambda _: section, base, count=1).encode()
    return f"{base.rstrip()}\n\n{section}".encode()


def own_readme(checkpoint: Checkpoint) -> str | None:
    """Return the text of a model's README, just as it is; None where there is none."""
    if CARD not in checkpoint.side_files:
        return None
    try:
        return checkpoint.place.content(CARD).decode()
    except UnicodeDecodeError:
        raise CheckpointError("is not valid UTF-8: save it as UTF-8", file=checkpoint.path(CARD)) from None


def shown_card(head: Repository, own: str | None) -> str | None:
    """Return the card that a commit shows; None where there is none, or none that `own` may not replace."""
    try:
        return head.read_bytes(CARD).decode() if head.is_file(CARD) else None
    except UnicodeDecodeError:
        if own is not None:
            return None
        raise DestinationError(
            f"{head.where(CARD)} is not valid UTF-8: save it as UTF-8, or delete it"
        ) from None


def _base(shown: str | None, own: str | None) -> str | None:
    found = _SECTION.search(shown or "")
    if found is None:
        return shown if own is None else own
    recorded = _ADDED_TO.search(found[0])
    return shown if (recorded and recorded[1]) == _digest(own) else own


def _digest(own: str | None) -> str | None:
    return None if own is None else xxhash.xxh3_128_hexdigest(own.encode())


def _facts(
    own: str | None, checkpoint: Checkpoint, made: Mapping[str, str], digests: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    if origin := commit_of(made.get("source", "")):
        source_id, sha = origin
        yield "source", f"[{source_id}]({constants.ENDPOINT}/{source_id})"
        yield "revision", f"`{sha}`"
    if license_id := _license(own):
        yield "license", _cell(license_id)
    strategy, size, dtype = (made.get(name, "") for name in ("strategy", "max_shard_size", "cast_to"))
    if strategy in STRATEGIES and re.fullmatch(r"[0-9]{1,18}", size):
        yield "plan", f"strategy {strategy}, at most {format_size(int(size))} a file"
    stored = ", ".join(DTYPE_NAMES[dtype] for dtype in checkpoint.dtypes)
    yield "dtype", f"cast to {dtype}" if dtype in CAST_DTYPES else stored
    yield "tensors", f"{len(checkpoint.tensors):,}"
    if digests:
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
        digest = xxhash.xxh3_128_hexdigest(lines.encode())
        yield "digest of the tensors", f"`{digest}` (XXH3-128 of the sorted lines `name XXH3-128`)"


def _license(own: str | None) -> str | None:
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
