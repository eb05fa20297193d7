"""All that the engine does, from one end to the other, as `pip install shardkit` alone has to do it.

python -m tests.light_engine FOLDER    # FOLDER is made; needs shardkit, and nothing that an extra brings
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HEAVY = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "memory_profiler",
    "matplotlib", "ipywidgets", "IPython", "pandas",
)  # fmt: skip


def main(folder: Path) -> None:
    assert not [name for name in HEAVY if find_spec(name)], "this is not a light environment"
    folder.mkdir()
    from tests.loopback_hub import LoopbackHub

    with LoopbackHub(folder / "hub") as hub:
        os.environ.update(hub.environment(folder / "home"))  # before the Hub's client is imported
        from shardkit import (
            Checkpoint,
            ProgressBar,
            make_demo_checkpoint,
            plan_shards,
            push_checkpoint,
            shard_checkpoint,
            shard_on_hub,
            verify_checkpoint,
        )

        model = make_demo_checkpoint(folder / "model", size="8MB")
        print(model, model.estimate("float16"), plan_shards(model, max_shard_size="2MB"), sep="\n\n")
        with ProgressBar(file=sys.stdout) as bar:
            copy = shard_checkpoint(model.source, folder / "copy", max_shard_size="2MB", progress=bar)
        cast = shard_checkpoint(model.source, folder / "cast", strategy="layer", dtype="float16")
        print(copy, cast, sep="\n\n")
        for report in (copy, cast):
            found = verify_checkpoint(model.source, report.destination)
            print(found)
            assert found.equal

        print("pushed:", push_checkpoint(copy, "me/copy"))
        assert Checkpoint.open("me/copy").total_bytes == model.total_bytes
        options = {"max_shard_size": "2MB", "dtype": "float16", "strategy": "balanced"}
        streamed = shard_checkpoint("me/copy", folder / "streamed", stream=True, **options)
        through = shard_on_hub("me/copy", "me/through", **options)
        assert verify_checkpoint("me/copy", streamed.destination).equal
        assert verify_checkpoint(model.source, "me/through").equal
        assert streamed.files == through.files
        assert not hub.broken, hub.broken[0]
    assert not {*HEAVY} & {*sys.modules}
    print("the engine needs nothing else")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
