"""What each method asks of its user, as said in docs/methods: the facts that tables of methods show."""

from typing import NamedTuple


class Facts(NamedTuple):
    """What an embedding is pushed away from, if anything; whether a slow copy of the encoder makes targets; what to
    mind first."""

    negatives: str  # "" where the objective has none
    momentum: bool
    mind: str
    patches: bool = False  # hides patches, and so takes a plain vision transformer

    @property
    def views(self) -> bool:
        """Whether views of a picture are compared, so that a policy says what the encoder shall not see."""
        return not self.patches


FACTS: dict[str, Facts] = {
    "simclr": Facts("the batch", False, "a large batch; false negatives"),
    "dcl": Facts("the batch", False, "false negatives weigh more than in simclr"),
    "supcon": Facts("other classes", False, "labels; several of a class in a batch"),
    "moco": Facts("a queue", True, "a queue well below the number of pictures"),
    "mocov3": Facts("the batch", True, "a large batch; the momentum fits the steps"),
    "byol": Facts("", True, "a predictor, BatchNorm, and a momentum that fits the steps"),
    "simsiam": Facts("", False, "a predictor and a stop-gradient; watch the rank"),
    "barlow": Facts("", False, "a wide head; the loss depends on the batch"),
    "vicreg": Facts("", False, "a wide head; three weights"),
    "lejepa": Facts("", False, "one weight, of the isotropic Gaussian"),
    "mae": Facts("", False, "a vision transformer; fine-tuning rather than cosines", patches=True),
    "ijepa": Facts("", True, "a vision transformer; room for its blocks", patches=True),
    "vjepa": Facts("", True, "videos and a vision transformer", patches=True),
    "triplet": Facts("mined ones", False, "mining: the hardest collapse it from scratch"),
    "clip": Facts("the batch", False, "captions and a large batch"),
    "siglip": Facts("the batch", False, "captions; a bias that starts low"),
    "coca": Facts("the batch", False, "captions, and a decoder that learns to speak"),
    "vse": Facts("the hardest", False, "captions; a warm-up without the hardest"),
}
