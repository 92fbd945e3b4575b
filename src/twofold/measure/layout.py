"""A collection as a plane: items that are alike lie near each other, as well as two dimensions can say."""

import numpy as np
from jaxtyping import Float

LANDMARKS = 1500  # items that t-SNE places; the others go to where the landmarks most like them are
NEAREST = 3
BLOCK = 4096


def layout(vectors: Float[np.ndarray, "n d"], *, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Coordinates in 0..1 of unit vectors: t-SNE (van der Maaten and Hinton 2008) of a sample, the rest beside it.

    Neighbourhoods mean something; distances between far groups and the axes mean nothing. Fewer than 5 make a line.
    """
    n = len(vectors)
    if n < 5:
        return np.stack([np.linspace(0, 1, n) if n > 1 else np.full(n, 0.5), np.full(n, 0.5)], axis=1)
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    sample = np.sort(np.random.default_rng(seed).permutation(n)[:LANDMARKS])
    landmarks = np.asarray(vectors[sample], np.float32)
    few = min(50, *landmarks.shape)
    reduced = PCA(few, random_state=seed).fit_transform(landmarks)
    perplexity = min(30.0, (len(sample) - 1) / 3)
    placed = TSNE(perplexity=perplexity, init="pca", max_iter=600, random_state=seed).fit_transform(reduced)
    plane = np.empty((n, 2))
    for start in range(0, n, BLOCK):
        cosine = np.asarray(vectors[start : start + BLOCK], np.float32) @ landmarks.T
        near = np.argpartition(-cosine, NEAREST, axis=1)[:, :NEAREST]
        weights = np.exp(20 * (np.take_along_axis(cosine, near, 1) - cosine.max(1, keepdims=True)))
        plane[start : start + BLOCK] = (weights[:, :, None] * placed[near]).sum(1) / weights.sum(1, keepdims=True)
    plane[sample] = placed
    low, high = np.quantile(plane, (0.001, 0.999), axis=0)
    return ((plane - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
