"""Planning is pure: these tests need no file, and count bytes by themselves."""

import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardkit import Checkpoint, ShardPlan, TensorInfo, plan_shards
from shardkit.errors import PlanError, SizeError
from shardkit.formats.safetensors import MAX_HEADER_BYTES
from shardkit.plan import packing
from tests.support import bits, checkpoints, limits, union

STRATEGIES = tuple(packing.STRATEGIES)


def checkpoint(
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    config: dict[str, object] | None = None,
    stem: str = "model",
) -> Checkpoint:
    """A checkpoint of one file that nobody has to write, from names, dtypes and shapes."""
    made, offset = {}, 100
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * bits(dtype) // 8
        made[name] = TensorInfo(name, dtype, tuple(shape), "source.safetensors", offset, nbytes)
        offset += nbytes
    return Checkpoint("/source", "/source", "safetensors", stem, ("source.safetensors",), made, config=config)


def of_sizes(sizes: Iterable[int]) -> Checkpoint:
    return checkpoint((f"t{place}", "U8", (size,)) for place, size in enumerate(sizes))


def packed(plan: ShardPlan) -> list[list[str]]:
    return [[tensor.source.name for tensor in shard.tensors] for shard in plan.shards]


def file_bytes(tensors: Sequence[TensorInfo]) -> int:
    """Size of a file with these tensors, in this order, as the format's own description has it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / 8) * 8 + begin


def fewest_files(tensors: Sequence[TensorInfo], limit: int) -> int:
    """The true minimum, by trying every way to divide the tensors among files."""
    subsets = range(1, 1 << len(tensors))
    chosen = {s: [t for i, t in enumerate(tensors) if s >> i & 1] for s in subsets}
    legal = {s for s, part in chosen.items() if len(part) == 1 or file_bytes(part) <= limit}
    best = {0: 0}
    for whole in subsets:
        parts = (s for s in range(whole, 0, -1) if s & whole == s and s in legal)
        best[whole] = min(best[whole ^ part] + 1 for part in parts)
    return best[subsets[-1]]


def test_size_strategy_fills_one_file_after_the_other_in_source_order() -> None:
    mb = 1_000_000
    plan = plan_shards(
        of_sizes([6 * mb, 6 * mb, 2 * mb, 6 * mb, 2 * mb, 2 * mb]), max_shard_size=10 * mb + 1000
    )
    assert packed(plan) == [["t0"], ["t1", "t2"], ["t3", "t4", "t5"]]


def test_oversized_tensor_gets_a_shard_of_its_own() -> None:
    for strategy in STRATEGIES:
        plan = plan_shards(of_sizes([10, 0, 5000, 10, 0]), max_shard_size=1000, strategy=strategy)
        assert plan.oversized == ("t2",)
        assert ["t2"] in packed(plan)
        assert [shard for shard in plan.shards if shard.nbytes > 1000] == [plan.largest_file]
        assert "1 tensor larger than 1 KB" in str(plan)


def test_limit_bounds_the_file_with_its_header() -> None:
    data = 4000
    whole = file_bytes(list(of_sizes([data // 2] * 2).tensors.values()))
    assert len(plan_shards(of_sizes([data // 2] * 2), max_shard_size=whole).shards) == 1
    assert len(plan_shards(of_sizes([data // 2] * 2), max_shard_size=whole - 1).shards) == 2


@settings(max_examples=80)
@given(files=checkpoints(), data=st.data(), strategy=st.sampled_from(STRATEGIES))
def test_every_tensor_is_in_one_file_within_the_limit(
    files: list, data: st.DataObject, strategy: str
) -> None:
    made = union(files)
    source = checkpoint((name, t.dtype, t.shape) for name, t in made.items())
    limit = data.draw(limits(made))
    plan = plan_shards(source, max_shard_size=limit, strategy=strategy)
    assert sorted(itertools.chain(*packed(plan))) == sorted(made)
    assert plan.total_bytes == source.total_bytes
    for shard in plan.shards:
        assert shard.tensors
        assert shard.nbytes == file_bytes([tensor.source for tensor in shard.tensors])
        assert shard.nbytes <= limit or [t.source.name for t in shard.tensors] == [
            name for name in plan.oversized if name == shard.tensors[0].source.name
        ]
        assert shard.header_bytes % 8 == 0
        assert all(tensor.begin % max(1, bits(tensor.dtype) // 8) == 0 for tensor in shard.tensors)
    assert len(plan.oversized) == sum(shard.nbytes > limit for shard in plan.shards)


@settings(max_examples=80)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 60), st.integers(0, 3000)), min_size=1, max_size=60),
    limit=st.integers(1, 9000),
)
def test_size_strategy_starts_a_file_only_when_the_next_tensor_does_not_fit(
    sizes: list[int], limit: int
) -> None:
    source = of_sizes(sizes)
    plan = plan_shards(source, max_shard_size=limit)
    assert list(itertools.chain(*packed(plan))) == list(source.tensors)  # in source order
    for shard, following in itertools.pairwise(plan.shards):
        one_more = [*shard.tensors, following.tensors[0]]
        assert file_bytes([tensor.source for tensor in one_more]) > limit


@settings(max_examples=80)
@given(
    dtypes=st.lists(st.sampled_from(["U8", "F16", "F32", "F64", "BOOL"]), min_size=2, max_size=40),
    limit=st.integers(200, 4000),
)
def test_size_strategy_keeps_source_order_between_files_of_mixed_widths(
    dtypes: list[str], limit: int
) -> None:
    source = checkpoint((f"t{place}", dtype, (7 * place,)) for place, dtype in enumerate(dtypes))
    places = {name: place for place, name in enumerate(source.tensors)}
    files = [
        sorted(places[name] for name in names) for names in packed(plan_shards(source, max_shard_size=limit))
    ]
    assert list(itertools.chain(*files)) == list(range(len(dtypes)))


@pytest.mark.parametrize("scale", [1, 1000], ids=["headers matter", "headers are small"])
@settings(max_examples=80)
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=7), limit=st.integers(200, 900))
@example(sizes=[134, 179, 154, 44, 126, 182, 127], limit=482)  # two files of 478 and 468
def test_balanced_writes_the_fewest_files_there_can_be(sizes: list[int], limit: int, scale: int) -> None:
    source = of_sizes(size * scale for size in sizes)
    files = len(plan_shards(source, max_shard_size=limit * scale, strategy="balanced").shards)
    fewest = fewest_files(list(source.tensors.values()), limit * scale)
    assert files == fewest


@pytest.mark.parametrize("scale", [1, 1000], ids=["headers matter", "headers are small"])
@settings(max_examples=200)
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=40), limit=st.integers(200, 900))
@example(sizes=[184, 73, 82, 149, 6, 182, 66, 143, 131], limit=351)  # in order: 339, 337, 340
def test_balanced_never_has_more_files_than_size(sizes: list[int], limit: int, scale: int) -> None:
    source = of_sizes(size * scale for size in sizes)
    files = {
        strategy: len(plan_shards(source, max_shard_size=limit * scale, strategy=strategy).shards)
        for strategy in ("size", "balanced")
    }
    assert files["balanced"] <= files["size"]


@settings(max_examples=200)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=40), limit=st.integers(300, 1000))
@example(sizes=[52, 52, 52, 84, 84, 95, 92, 13, 1, 6, 147, 164, 300, 311, 311, 311, 395], limit=447)
def test_balanced_never_has_more_files_than_first_fit_decreasing(sizes: list[int], limit: int) -> None:
    source = of_sizes(size * 1000 for size in sizes)
    bins: list[list[TensorInfo]] = []
    for tensor in sorted(source.tensors.values(), key=lambda tensor: -tensor.nbytes):
        fitting = (held for held in bins if file_bytes([*held, tensor]) <= limit * 1000)
        if (first := next(fitting, None)) is None:
            bins.append([tensor])
        else:
            first.append(tensor)
    assert len(plan_shards(source, max_shard_size=limit * 1000, strategy="balanced").shards) <= len(bins)


@settings(max_examples=300)
@given(files=st.integers(2, 10), data=st.data())
def test_balanced_is_within_5_percent_of_the_most_equal_files_there_are(
    files: int, data: st.DataObject
) -> None:
    seed = random.Random(data.draw(st.integers(0, 2**32)))
    sizes, whole = [], 10_000_000
    for _ in range(files):  # each file cut into tensors: that these add up to equal files again is known
        cuts = sorted(seed.sample(range(1, whole), seed.randint(1, 9)))
        sizes += [end - begin for begin, end in itertools.pairwise([0, *cuts, whole])]
    seed.shuffle(sizes)
    plan = plan_shards(of_sizes(sizes), max_shard_size=int(1.09 * whole), strategy="balanced")
    assert len(plan.shards) == files
    assert plan.largest_file.nbytes < 1.05 * whole


def test_balanced_needs_hardly_more_files_than_the_bytes_take() -> None:
    sizes = random.Random(0).choices(range(1, 1_000_000), k=2000)
    plan = plan_shards(of_sizes(sizes), max_shard_size=1_300_000, strategy="balanced")
    assert len(plan.shards) < 1.01 * sum(sizes) / 1_300_000


def test_balanced_packs_what_greedy_order_wastes() -> None:
    sizes, mb = [7, 4, 6, 3, 5, 5], 1_000_000
    source = of_sizes(size * mb for size in sizes)
    limit = 10 * mb + 1000
    assert len(plan_shards(source, max_shard_size=limit).shards) == 4
    assert len(plan_shards(source, max_shard_size=limit, strategy="balanced").shards) == 3


@settings(max_examples=60)
@given(count=st.integers(1, 60), nbytes=st.integers(100_000, 200_000), fits=st.integers(1, 10))
def test_balanced_gives_equal_tensors_to_files_as_equal_as_can_be(count: int, nbytes: int, fits: int) -> None:
    limit = fits * nbytes + 1000
    plan = plan_shards(of_sizes([nbytes] * count), max_shard_size=limit, strategy="balanced")
    held = [len(shard.tensors) for shard in plan.shards]
    assert len(held) == math.ceil(count / fits)
    assert max(held) - min(held) <= 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("nbytes", [600_000, 2_000_000], ids=["one a file", "oversized"])
def test_balanced_plan_of_very_many_tensors_comes_to_an_end(nbytes: int) -> None:
    plan = plan_shards(of_sizes([nbytes] * 10_000), max_shard_size=1_000_000, strategy="balanced")
    assert len(plan.shards) == 10_000


@given(
    sizes=st.lists(st.integers(0, 100), max_size=60), data=st.data(), dtype=st.sampled_from(["F16", "F32"])
)
def test_files_divides_in_order_into_so_many_of_nearly_equal_size(
    sizes: list[int], data: st.DataObject, dtype: str
) -> None:
    source = checkpoint((f"t{place}", dtype, (size,)) for place, size in enumerate(sizes))
    count = data.draw(st.integers(1, max(1, len(sizes))))
    plan = plan_shards(source, files=count, dtype="float16")
    assert len(plan.shards) == count
    assert [name for shard in packed(plan) for name in shard] == list(source.tensors)
    assert max(shard.data_bytes for shard in plan.shards) <= 2 * (sum(sizes) / count + max(sizes, default=0))
    assert plan.max_shard_size == plan.largest_file.nbytes
    assert plan.oversized == ()


def test_files_of_equal_tensors_differ_by_one_at_most() -> None:
    for count in range(1, 33):
        lengths = {len(names) for names in packed(plan_shards(of_sizes([7] * 32), files=count))}
        assert max(lengths) - min(lengths) <= 1


def test_header_of_a_shard_stays_within_what_we_read_ourselves() -> None:
    source = checkpoint((f"{'x' * 2000}{place}", "U8", (1,)) for place in range(13_000))
    try:
        plan = plan_shards(source, max_shard_size="1GB")
    except PlanError:
        return  # to say so before the first byte is right as well
    assert max(shard.header_bytes for shard in plan.shards) <= MAX_HEADER_BYTES


LLAMA = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
LLAMA += [
    f"model.layers.{n}.{part}" for n in (0, 1, 2, 10) for part in ("mlp.up.weight", "input_norm.weight")
]
GPT2 = [
    "wte.weight",
    "wpe.weight",
    "ln_f.weight",
    "h.0.attn.c_attn.weight",
    "h.1.ln_1.bias",
    "h.0.mlp.c_fc.weight",
]
T5 = ["shared.weight", "encoder.block.0.layer.0.k.weight", "encoder.block.0.layer.1.wi.weight"]
T5 += ["decoder.block.0.layer.0.k.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
BERT = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    "bert.pooler.dense.weight",
]
BERT += [f"bert.encoder.layer.{n}.output.dense.weight" for n in range(11)] + ["cls.predictions.bias"]
MIXTRAL = ["model.embed_tokens.weight", "lm_head.weight"]
MIXTRAL += [f"model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight" for n in range(2) for e in range(3)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LLAMA, [LLAMA[:1], LLAMA[3:5], LLAMA[5:7], LLAMA[7:9], LLAMA[9:], LLAMA[1:3]]),
        (GPT2, [GPT2[:2], [GPT2[3], GPT2[5]], [GPT2[4]], [GPT2[2]]]),
        (T5, [T5[:1], [T5[3]], T5[1:3], T5[4:]]),
        (BERT, [BERT[:2], *([name] for name in BERT[3:14]), [BERT[2], BERT[14]]]),
        (MIXTRAL, [MIXTRAL[:1], MIXTRAL[2:5], MIXTRAL[5:], MIXTRAL[1:2]]),
    ],
    ids=["llama", "gpt2", "t5", "bert", "mixtral"],
)
def test_layer_strategy_gives_each_block_its_own_file(names: list[str], expected: list[list[str]]) -> None:
    source = checkpoint((name, "BF16", (4, 4)) for name in names)
    assert packed(plan_shards(source, max_shard_size="1GB", strategy="layer")) == expected


def test_layer_strategy_splits_a_block_above_the_limit() -> None:
    source = checkpoint((f"model.layers.{n}.w{i}", "U8", (4000,)) for n in range(2) for i in range(3))
    plan = plan_shards(source, max_shard_size=9000, strategy="layer")
    assert packed(plan) == [
        ["model.layers.0.w0", "model.layers.0.w1"],
        ["model.layers.0.w2"],
        ["model.layers.1.w0", "model.layers.1.w1"],
        ["model.layers.1.w2"],
    ]


@settings(max_examples=60)
@given(data=st.data(), blocks=st.integers(1, 12))
def test_no_file_of_the_layer_strategy_holds_two_blocks(data: st.DataObject, blocks: int) -> None:
    names = [f"model.layers.{n}.w{i}" for n in range(blocks) for i in range(3)]
    order = data.draw(st.permutations([*names, "model.embed_tokens.weight", "lm_head.weight"]))
    source = checkpoint((name, "F16", (data.draw(st.integers(0, 99)),)) for name in order)
    plan = plan_shards(source, max_shard_size=data.draw(st.integers(1, 1500)), strategy="layer")
    for names in packed(plan):
        assert len({name.rsplit(".", 1)[0] for name in names}) == 1


def test_layer_number_of_absurd_length_is_planned_or_refused() -> None:
    source = checkpoint([(f"model.layers.{'9' * 5000}.w", "U8", (2,)), ("b", "U8", (2,))])
    assert plan_shards(source, max_shard_size=400, strategy="layer").total_bytes == 4


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "adapter_model"])
def test_file_names_are_those_of_the_hub(stem: str) -> None:
    source = checkpoint([("a", "U8", (400,)), ("b", "U8", (400,))], stem=stem)
    split, merged = (plan_shards(source, max_shard_size=size) for size in (600, "1GB"))
    assert [s.file for s in split.shards] == [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert split.index_file == f"{stem}.safetensors.index.json"
    assert [s.file for s in merged.shards] == [f"{stem}.safetensors"]
    assert (merged.index_file, merged.index) == (None, None)


def test_index_lists_total_size_and_weight_map() -> None:
    plan = plan_shards(checkpoint([("b", "F32", (99,)), ("größe", "F32", (99,))]), max_shard_size=600)
    assert plan.index is not None
    assert json.loads(plan.index) == {
        "metadata": {"total_size": 792, "shardkit": {"strategy": "size", "max_shard_size": "600"}},
        "weight_map": {"b": "model-00001-of-00002.safetensors", "größe": "model-00002-of-00002.safetensors"},
    }


def test_cast_changes_sizes_of_floating_tensors_alone() -> None:
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "BOOL", "C64", "U8"]
    source = checkpoint((dtype, dtype, (100,)) for dtype in dtypes)
    plan = plan_shards(source, dtype="bfloat16")
    planned = {t.source.name: (t.dtype, t.nbytes, t.is_cast) for t in plan.shards[0].tensors}
    for dtype in ("F64", "F32", "F16"):
        assert planned[dtype] == ("BF16", 200, True)
    assert planned["BF16"] == ("BF16", 200, False)
    for dtype in ("I64", "BOOL", "C64", "U8"):
        assert planned[dtype] == (dtype, 100 * bits(dtype) // 8, False)
    begins = [(t.begin, bits(t.dtype) // 8) for t in plan.shards[0].tensors]
    assert all(begin % width == 0 for begin, width in begins)


def test_torch_dtype_is_as_good_as_its_name() -> None:
    import torch

    source = checkpoint([("w", "F32", (8,))])
    assert plan_shards(source, dtype=torch.float16) == plan_shards(source, dtype="float16")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strategy": "random"}, PlanError, ["'random'", "size, layer, balanced"]),
        ({"dtype": "int8"}, PlanError, ["'int8'", "float16, bfloat16, float32"]),
        ({"dtype": 16}, PlanError, ["'16'"]),
        ({"max_shard_size": "plenty"}, SizeError, ["'plenty'"]),
        ({"max_shard_size": 0}, SizeError, ["0"]),
        ({"files": 0}, PlanError, ["0", "between 1 and the 1"]),
        ({"files": 2}, PlanError, ["2", "between 1 and the 1"]),
        ({"files": "3"}, PlanError, ["'3'", "a whole number"]),
        ({"files": 1, "strategy": "layer"}, PlanError, ["leave out max_shard_size and strategy"]),
        ({"files": 1, "max_shard_size": 8}, PlanError, ["leave out max_shard_size and strategy"]),
    ],
)
def test_wrong_option_says_what_is_accepted(
    options: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        plan_shards(of_sizes([8]), **options)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(caught.value)] == []


def test_plan_of_an_empty_checkpoint_is_one_file_without_tensors() -> None:
    for strategy in STRATEGIES:
        plan = plan_shards(of_sizes([]), max_shard_size=10, strategy=strategy)
        assert packed(plan) == [[]]
        assert plan.oversized == ()


def test_adapter_in_several_files_is_pointed_out() -> None:
    source = checkpoint([("a", "U8", (400,)), ("b", "U8", (400,))], stem="adapter_model")
    assert "one file only" in str(plan_shards(source, max_shard_size=600))
    assert "one file only" not in str(plan_shards(source))


def test_summary_of_many_shards_keeps_the_first_and_the_last() -> None:
    shown = str(plan_shards(of_sizes([400] * 50), max_shard_size=600))
    assert "model-00001-of-00050" in shown
    assert "model-00050-of-00050" in shown
    assert len(shown.splitlines()) < 30


def test_plan_survives_json() -> None:
    plan = plan_shards(of_sizes([400, 9000, 3]), max_shard_size=600, strategy="layer", dtype="float16")
    assert ShardPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
