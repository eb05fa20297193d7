"""The commands that make what a comparison is tried with: a model, and the loader of 2024."""

from __future__ import annotations

import os
from typing import get_args

import shardkit
from shardkit.cli.arguments import JSON, SIZE, argument, command, switch
from shardkit.cli.terminal import next_step, progress_bar, say, show
from shardkit.demo.shapes import Architecture
from shardkit.measure.article_stack import remove_article_stack


@command(
    argument("--size", "Size of the weights, 5MB to 14.5GB.", default="512MB", **SIZE),
    argument("--architecture", "falcon has .bin files.", choices=get_args(Architecture), default="mistral"),
    JSON,
    destination="A new or empty folder (default: mistral-demo, falcon-demo).",
    is_required=False,
    examples="demo\ndemo tiny --size 20MB\ndemo --architecture falcon",
)
def demo(
    size: str, architecture: Architecture, destination: str | None = None, as_json: bool = False
) -> None:
    """Make a small checkpoint with random weights and a tokenizer, to try things out."""
    folder = destination or f"{architecture}-demo"
    was_there = os.path.isdir(folder) and bool(os.listdir(folder))
    with progress_bar() as bar:
        made = shardkit.make_demo_checkpoint(folder, size=size, architecture=architecture, progress=bar)
    if was_there:
        say(f"{folder} was there already, complete and the same; nothing was written")
    show(made, as_json=as_json, following=next_step("shard", folder, dtype="fp16"))


@command(
    argument("--folder", "Where it is (default: the assets of the Hub's cache).", metavar="FOLDER"),
    switch("--remove", "Remove it."),
    examples="""stack
        stack --remove
        compare mistral-demo sharded --dtype fp16 --python "$(shardkit stack)\"""",
)
def stack(folder: str | None = None, remove: bool = False) -> None:
    """Make an environment with transformers 4.37 of 2024, as the article used, and print its Python.

    It is made once, beside the torch that is installed: a minute, and 250 MB.
    """
    if not remove:
        print(shardkit.article_stack(folder))
    elif removed := remove_article_stack(folder):
        print(f"removed {removed}")
    else:
        print("nothing to remove")
