"""`twofold methods`."""

import inspect
import sys

from twofold.cli.flags import verb
from twofold.cli.show import (
    print_json,
)


@verb
def methods(*, json: bool = False) -> None:
    """List the methods that `twofold train` knows, with the paper of each and what it learns from.

    examples:
      twofold methods

    Args:
        json: print the result as JSON
    """
    from twofold.methods import METHODS

    docs = {name: inspect.getdoc(sys.modules[method.__module__]) or "" for name, method in METHODS.items()}
    papers = {name: " ".join(doc.split("\n\n")[0].split()) for name, doc in docs.items()}
    if json:
        print_json({name: {"paper": paper, "needs": METHODS[name].needs} for name, paper in papers.items()})
        return
    words = {"image": "pictures", "label": "labels", "text": "captions", "video": "videos"}
    for needs in dict.fromkeys(tuple(method.needs) for method in METHODS.values()):
        print(f"\n  from {' and '.join(words[need] for need in needs)}")
        for name, paper in papers.items():
            if tuple(METHODS[name].needs) == needs:
                print(f"    {name:<8} {paper}")
