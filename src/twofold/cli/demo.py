"""`twofold demo`."""

import json as jsonlib
from pathlib import Path

from twofold.cli.flags import Folder, verb


@verb
def demo(*, out: Folder = Path("twofold-demo"), json: bool = False) -> None:
    """The main job on shipped data: 4,495 emoji and their names come to share a space, and are searched.

    Offline, about two minutes the first time. Ctrl-C at any point; the next call goes on from there.

    examples:
      twofold demo
      twofold demo --json > figures.json

    Args:
        out: where the model and the index go
        json: print one JSON object with every figure
    """
    from twofold.demo import demo

    figures = demo(out, quiet=json)
    if json:
        print(jsonlib.dumps(figures, ensure_ascii=False))
