"""The command line: one short module a verb. It reads flags, calls the library and prints what comes back.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 something the message says how to mend,
2 wrong usage, 130 interrupted.
"""

import inspect
import sys

from twofold.cli.align import align
from twofold.cli.calibrate import calibrate
from twofold.cli.caption import caption
from twofold.cli.compare import compare
from twofold.cli.demo import demo
from twofold.cli.doctor import doctor
from twofold.cli.embed import embed
from twofold.cli.evaluate import evaluate
from twofold.cli.export import export
from twofold.cli.flags import Verb
from twofold.cli.index import index
from twofold.cli.interleave import interleave
from twofold.cli.methods import methods
from twofold.cli.mine import mine
from twofold.cli.pairs import pairs
from twofold.cli.score import score
from twofold.cli.search import search
from twofold.cli.serve import key, serve
from twofold.cli.train import train
from twofold.cli.views import views
from twofold.errors import TwofoldError, unknown

VERBS: dict[str, Verb] = {
    "demo": demo,
    "views": views,
    "train": train,
    "compare": compare,
    "doctor": doctor,
    "align": align,
    "interleave": interleave,
    "caption": caption,
    "score": score,
    "pairs": pairs,
    "mine": mine,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "embed": embed,
    "export": export,
    "index": index,
    "search": search,
    "serve": serve,
    "key": key,
    "methods": methods,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if verb in ("-h", "--help", "help"):
            print(_overview())
        elif verb == "--version":
            import twofold

            print(f"twofold {twofold.__version__}")
        elif verb not in VERBS:
            raise unknown("command", verb, VERBS)
        else:
            VERBS[verb](rest)
    except TwofoldError as error:
        print(f"twofold: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt as stopped:
        print(f"twofold: interrupted. {str(stopped) or 'The same command goes on from there.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `twofold … | head`
        sys.stderr.close()
    except SystemExit as exit:  # tyro has printed what was wrong, or the help
        return exit.code if isinstance(exit.code, int) else 2
    return 0


def _overview() -> str:
    lines = [f"  {name:<10} {(inspect.getdoc(verb) or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "twofold: train representations by comparing views, and search with them.",
            "",
            *lines,
            "",
            "twofold COMMAND --help says more; start with `twofold demo`.",
        ]
    )
