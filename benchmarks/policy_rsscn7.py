"""Does the policy that an audit proposes train at least as well as ImageNet's default, at an equal budget?

    python benchmarks/policy_rsscn7.py RSSCN7_FOLDER        # two seeds, some minutes a run on one core

The folder holds train.parquet and test.parquet: aerial scenes of seven kinds. The audit saw training pictures alone.
Interrupted, it goes on where it was.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from twofold.cli.show import plain
from twofold.data.sources import open_source
from twofold.measure.policy_audit import audit
from twofold.terminal import CONSOLE, comparison_table
from twofold.train.compare_policies import OPTIMIZER, SHORT, compare
from twofold.views import files, policies

RESULTS = Path(__file__).parent / "results" / "policy_rsscn7.json"
SEEN, SIZE = 64, 48  # pixels a side of a view: of the audit, and of the trainings, which two cores have to carry
SETTING = replace(SHORT, size=SIZE, epochs=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/policy_rsscn7"))
    arguments = parser.parse_args()
    data = open_source(arguments.data)
    proposed = arguments.runs / "proposed.toml"
    if not proposed.exists():
        arguments.runs.mkdir(parents=True, exist_ok=True)
        done = audit(policies("simclr"), data.split("train"), views=2, size=SEEN)
        print("\n".join(done.verdict), flush=True)
        files.write([policy.to_dict() for policy in dict.fromkeys(done.proposed)], proposed)
    result = compare(["simclr", str(proposed)], data, out=arguments.runs, setting=SETTING, seeds=arguments.seeds)
    CONSOLE.print(comparison_table(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "question": "kNN accuracy (k 20, T .07) on RSSCN7's test pictures after SimCLR under ImageNet's policy "
                "and under the one that an audit of the training pictures proposes, at equal steps",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
                "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
                "n": {"train": result.items, "test": result.held_out, "seeds": len(arguments.seeds)},
                "setting": {**asdict(SETTING), **asdict(OPTIMIZER), "temperature": 0.2},
                "change": policies("simclr")[0].diff(replace(policies(str(proposed))[0], size=224)),
                "results": plain(result),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
