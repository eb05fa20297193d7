"""Reshard any Hugging Face checkpoint without loading it, and measure what that does to its load.

    import shardkit

    checkpoint = shardkit.Checkpoint.open("org/name")  # or a folder; or make_demo_checkpoint("mistral-demo")
    print(checkpoint.estimate("float16"))  # the memory that a load takes, and where it fits
    plan = shardkit.plan_shards(checkpoint, max_shard_size="2GB", dtype="float16")
    report = shardkit.shard_checkpoint(plan, "sharded")  # written, verified, renamed into place
    comparison = shardkit.compare_loads(checkpoint, report, dtype="float16")
    print(comparison.verdict)
    model = shardkit.load_model(report)

`help(shardkit.plan_shards)` explains one name; `__init__.pyi` lists them. What they raise is in
`shardkit.errors`. Names are imported when they are first used: `import shardkit` brings in neither torch nor
transformers, matplotlib or ipywidgets.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
