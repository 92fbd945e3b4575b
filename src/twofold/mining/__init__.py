"""What to learn from: triplets out of labelled embeddings, and hard negatives that are no right answers themselves."""

from twofold.mining.negatives import NAIVE, Example, Guards, Known, Mined, Removed, Search, hard_negatives
from twofold.mining.prints import perceptual_hashes
from twofold.mining.triplets import Triplets, batch_all, batch_hard, distance_weighted, semi_hard

__all__ = [
    "NAIVE",
    "Example",
    "Guards",
    "Known",
    "Mined",
    "Removed",
    "Search",
    "Triplets",
    "batch_all",
    "batch_hard",
    "distance_weighted",
    "hard_negatives",
    "perceptual_hashes",
    "semi_hard",
]
