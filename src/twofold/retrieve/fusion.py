"""One answer of two: the items that words find by what they look like, and those that they find by their texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from twofold.measure.calibration import Calibration

K = 60  # of reciprocal rank fusion, as its authors have it


@dataclass(frozen=True)
class Fusion:
    """How two ordered answers become one; `weight` is the share of the texts, 0..1.

    "standard" is the weighted sum of scores that were made comparable: each less the mean of its answer, in standard
    deviations of it. "scores" is that of the scores themselves, with a weight that was fitted for them. In both, what
    one space did not find has the lowest score of its answer. "ranks" is reciprocal rank fusion (Cormack, Clarke and
    Büttcher 2009): the sum of (1 + K)/(rank + K), rank from 1; it knows nothing of the scores, and finds less.
    The default was chosen on validation splits of two collections (benchmarks/fusion.py).
    """

    kind: Literal["standard", "scores", "ranks"] = "standard"
    weight: float = 0.7
    calibration: Calibration | None = None  # of the scores that come out

    def scores(self, items: Sequence[tuple[str, float]], texts: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """Ids and scores of everything that either found (ids with scores, best first), best first."""
        sides = ((items, 1 - self.weight), (texts, self.weight))
        total = dict.fromkeys([id for side, _ in sides for id, _ in side], 0.0)
        for side, share in sides:
            if not side:
                continue
            if self.kind == "ranks":
                worth, missing = {id: (1 + K) / (rank + K) for rank, (id, _) in enumerate(side, 1)}, 0.0
            else:
                values = np.array([score for _, score in side])
                if self.kind == "standard":
                    values = (values - values.mean()) / max(values.std(), 1e-6)
                worth, missing = {id: float(v) for (id, _), v in zip(side, values, strict=True)}, float(values.min())
            for id in total:
                total[id] += share * worth.get(id, missing)
        rounded = [(id, round(score, 6)) for id, score in total.items()]
        return sorted(rounded, key=lambda one: (-one[1], one[0]))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        calibration = self.calibration and self.calibration.record()
        return {"kind": self.kind, "weight": self.weight, "calibration": calibration}

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Fusion":
        """What `record` wrote."""
        kept = record["calibration"]
        return cls(record["kind"], record["weight"], kept and Calibration.read(kept))


FUSION = Fusion()
