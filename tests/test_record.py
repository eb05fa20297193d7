"""Results say the same as text, as HTML and as JSON."""

import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit import Checkpoint, plan_shards, shard_checkpoint, verify_checkpoint
from shardkit.base.record import Record, Summary, Table
from shardkit.errors import PlanError, ShardkitError
from tests.support import Tensor, write_checkpoint

EVIL = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'
TAGS = {"style", "div", "h4", "table", "thead", "tbody", "tr", "th", "td", "p"}


class Page(HTMLParser):
    """Collects what a reader of a page sees, and which tags are in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.tags[-1] != "style":
            self.words += data.split()


def checkpoint(folder: Path, word: str = EVIL) -> Path:
    """A checkpoint with a hostile name wherever a name can be hostile."""
    write_checkpoint(folder, [{f"{word}{n}": Tensor("F32", (100,), b"\0\0\x80\x01" * 100) for n in range(3)}])
    (folder / "config.json").write_text(json.dumps({"architectures": [word], "dtype": word}))
    (folder / "tf <b>model.h5").write_bytes(b"")
    (folder / "side <b>file").write_bytes(b"")
    return folder


@pytest.fixture
def records(tmp_path: Path) -> dict[str, Record]:
    source = checkpoint(tmp_path / "<b>source")
    opened = Checkpoint.open(source)
    report = shard_checkpoint(source, tmp_path / "<i>out", max_shard_size=600, dtype="float16")
    other = write_checkpoint(tmp_path / "<i>other", [{f"{EVIL}0": Tensor("F32", (1,), bytes(4))}])
    assert report.lost
    return {
        "Checkpoint": opened,
        "ShardPlan": plan_shards(opened, max_shard_size=500, dtype="bfloat16"),
        "ShardReport": report,
        "Verification": verify_checkpoint(source, other),
        "Verification, equal": verify_checkpoint(source, tmp_path / "<i>out"),
    }


KINDS = ["Checkpoint", "ShardPlan", "ShardReport", "Verification", "Verification, equal"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_html_say_the_same(kind: str, records: dict[str, Record]) -> None:
    page = Page(records[kind]._repr_html_())
    assert [word.replace("⚠", "!") for word in page.words] == str(records[kind]).split()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_shown_and_not_obeyed(kind: str, records: dict[str, Record]) -> None:
    page = Page(records[kind]._repr_html_())
    assert set(page.tags) <= TAGS
    assert page.attributes <= {"class", "scope"}
    assert "<i>" in str(records[kind]) or "<b>" in str(records[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_record_survives_json_and_says_the_same_again(kind: str, records: dict[str, Record]) -> None:
    record = records[kind]
    data = json.loads(json.dumps(record.to_dict()))
    assert data["schema"] == f"shardkit/{type(record).__name__}/1"
    again = type(record).from_dict(data)
    assert again == record
    assert str(again) == str(record)
    assert again.to_dict() == data


@pytest.mark.parametrize("kind", KINDS)
def test_record_cannot_be_changed(kind: str, records: dict[str, Record]) -> None:
    with pytest.raises(AttributeError):
        records[kind].source = "elsewhere"  # type: ignore[attr-defined]


def test_other_schema_is_refused_by_name(records: dict[str, Record]) -> None:
    data = records["Checkpoint"].to_dict()
    with pytest.raises(ShardkitError, match=r"shardkit/Checkpoint/1.*not.*shardkit/ShardPlan/1"):
        type(records["ShardPlan"]).from_dict(data)
    with pytest.raises(ShardkitError, match="shardkit/Checkpoint/2"):
        Checkpoint.from_dict(data | {"schema": "shardkit/Checkpoint/2"})
    with pytest.raises(ShardkitError, match="None"):
        Checkpoint.from_dict({})


@pytest.mark.parametrize("field", ["files", "tensors", "source"])
def test_record_that_lacks_a_field_is_refused(field: str, records: dict[str, Record]) -> None:
    data = records["Checkpoint"].to_dict()
    del data[field]
    with pytest.raises(ShardkitError, match="not readable"):
        Checkpoint.from_dict(data)


WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    title=WORDS,
    facts=st.lists(st.tuples(WORDS, WORDS), max_size=4),
    rows=st.lists(st.tuples(WORDS, WORDS), max_size=3),
    notes=st.lists(WORDS, max_size=3),
)
def test_any_summary_says_the_same_twice(
    title: str, facts: list[tuple[str, str]], rows: list[tuple[str, str]], notes: list[str]
) -> None:
    summary = Summary(title, tuple(facts), (Table(("name", "value"), tuple(rows)),), tuple(notes))
    page = Page(summary.html())
    assert set(page.tags) <= TAGS
    marked = ["⚠" if word == "!" else word for word in summary.text().split()]
    assert ["⚠" if word == "!" else word for word in page.words] == marked


@pytest.mark.parametrize("key", ["architectures", "dtype"])
def test_word_of_a_config_cannot_break_out_of_its_line(key: str, tmp_path: Path) -> None:
    # Such a name in a header is refused; a config is data as well, and data of a stranger.
    write_checkpoint(tmp_path, [{"w": Tensor("F32", (1,), bytes(4))}])

    def shown(word: str) -> str:
        value = [word] if key == "architectures" else word
        (tmp_path / "config.json").write_text(json.dumps({key: value}))
        return str(Checkpoint.open(tmp_path))

    hostile = shown("Llama\n  ! all is well\x1b[2J")
    assert len(hostile.splitlines()) == len(shown("Llama").splitlines())
    assert "\x1b" not in hostile


@pytest.mark.parametrize("kind", KINDS)
def test_repr_is_the_short_table(kind: str, records: dict[str, Record]) -> None:
    assert repr(records[kind]) == str(records[kind])


def test_text_wraps_under_its_column_and_leaves_names_in_one_piece() -> None:
    path = f"/{'very/long/' * 5}path"
    rows = (("first", "1 GB", "a reason that has many words in it"), ("second", "20 GB", "another one"))
    summary = Summary(
        "Title",
        (("label", "many words " * 5), ("source", path)),
        (Table(("name", "size", "because"), rows),),
        ("a note that takes more than one line of this width",),
    )
    lines = summary.text(40).splitlines()
    assert [line for line in lines if len(line) > 40] == [f"  source  {path}"]
    assert lines[1:3] == ["  label   many words many words many", "          words many words many words"]
    assert lines[-5:] == [
        "  first    1 GB  a reason that has many",
        "                 words in it",
        "  second  20 GB  another one",
        "  ! a note that takes more than one line",
        "    of this width",
    ]
    assert " ".join(summary.text(40).split()) == " ".join(summary.text().split())


def test_records_are_understood_wherever_a_source_or_a_folder_is(tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint(tmp_path / "source", "t"))
    plan = plan_shards(opened, max_shard_size=600)
    report = shard_checkpoint(opened, tmp_path / "out")
    for record, place in ((opened, "source"), (plan, "source"), (report, "out")):
        assert os.fspath(record) == str(tmp_path / place)
        assert Checkpoint.open(record).source == str(tmp_path / place)
    assert verify_checkpoint(plan, report).equal


def test_a_plan_is_carried_out_as_it_is(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "t")
    planned = plan_shards(source, max_shard_size=1_000, dtype="half")
    # Its own files, which none of the strategies gives.
    plan = replace(planned, shards=(planned.shards[0], *reversed(planned.shards[1:])))
    assert shard_checkpoint(plan, tmp_path / "out").files == {s.file: s.nbytes for s in plan.shards}
    with pytest.raises(PlanError, match="are those of the plan: leave them out"):
        shard_checkpoint(plan, tmp_path / "other", dtype="float32")
    write_checkpoint(source, [{"t9": Tensor("F32", (1,), bytes(4))}])
    with pytest.raises(PlanError, match="has changed since it was planned"):
        shard_checkpoint(plan, tmp_path / "other")
