"""What frozen embeddings know about labels: by a vote of neighbours, a linear classifier, one that looks at tokens, or
from few examples.

All take training and test embeddings apart, embedded without augmentation, and neither sees the test labels before
the end. Rows labelled −1 are predicted but neither learnt from nor counted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from twofold.errors import DataError, UsageError
from twofold.measure.metrics import (
    Interval,
    Matrix,
    accuracy,
    accuracy_chance,
    as_rows,
    bootstrap,
    nearest,
    row_blocks,
    unit_rows,
)
from twofold.runtime import generator

Labels = Int[np.ndarray, "n"]
Tokens = Float[Tensor, "n t d"] | Float[np.ndarray, "n t d"]

PROBE_BATCH, PROBE_RATE = 128, 1e-2  # of the attentive probe


class Probe(NamedTuple):
    """How well a probe reads the labels of test items."""

    accuracy: Interval  # share of labelled test items that are right, 0..1
    chance: float  # accuracy of the best constant answer
    predicted: Labels  # for every test row
    l2: float | None = None  # the penalty (of fine-tuning, the learning rate) that validation chose; None: without
    validation: dict[float, float] | None = None  # accuracy on validation by penalty or rate


def knn_probe(
    train_z: Matrix,
    train_y: Labels,
    test_z: Matrix,
    test_y: Labels,
    *,
    k: int = 20,
    temperature: float = 0.07,
    draw: torch.Generator | None = None,
) -> Probe:
    """The labels of the k nearest training rows by cosine, each vote weighing exp(cosine / temperature).

    Instance discrimination's protocol (arXiv 1805.01978, section 3.4). A training set smaller than k votes as a whole;
    among equal votes the smallest label wins.
    """
    if k < 1 or not temperature > 0:
        raise UsageError(f"knn_probe needs k ≥ 1 and temperature > 0; got {k} and {temperature}.")
    bank, queries = unit_rows(train_z), unit_rows(test_z)
    _check_set("test", queries, test_y, bank.shape[1])
    bank, y = _labelled("train", bank, train_y)
    classes, y = y.unique(return_inverse=True)
    found = nearest(queries, bank, k)
    predicted = []
    for block in row_blocks(len(queries), max(len(classes), k)):
        cosines = found.cosines[block]
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # relative to the nearest: cannot overflow
        votes = weights.new_zeros(len(weights), len(classes)).scatter_add_(1, y[found.rows[block]], weights)
        predicted.append(classes[votes.argmax(1)])
    answer = torch.cat(predicted).cpu().numpy()
    return Probe(accuracy(answer, test_y, draw=draw), accuracy_chance(test_y), answer)


def linear_probe(
    train_z: Matrix,
    train_y: Labels,
    test_z: Matrix,
    test_y: Labels,
    *,
    val: tuple[Matrix, Labels] | None = None,
    l2: Sequence[float] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5),
    draw: torch.Generator | None = None,
) -> Probe:
    """Multinomial logistic regression on standardised embeddings, its L2 penalty chosen on validation.

    Minimises mean cross-entropy + l2/2·‖W‖² (the bias goes free) by L-BFGS; scikit-learn's C is 1/(l2·n). Without
    `val`, a fifth of the training rows, drawn at random, chooses the penalty, and then all of them train with it.
    Where penalties validate equally well, the strongest wins.
    """
    if not l2 or not min(l2) > 0:
        raise UsageError(f"linear_probe needs at least one l2, all > 0; got {tuple(l2)}.")
    z, test = as_rows(train_z), as_rows(test_z)
    width = z.shape[1]
    _check_set("test", test, test_y, width)
    z, y = _labelled("train", z, train_y)
    classes, y = y.unique(return_inverse=True)
    penalties = sorted(l2, reverse=True)
    if val is None:
        kept, held = _hold_out(len(z), draw or generator("linear_probe"))
        fits = _regressions(z[kept], y[kept], len(classes), penalties)
        val_z, val_y = z[held], classes[y[held]]
    else:
        val_z = as_rows(val[0])
        _check_set("val", val_z, val[1], width)
        val_z, val_y = _labelled("val", val_z, val[1])
        fits = _regressions(z, y, len(classes), penalties)
    validation = {
        penalty: (classes[fit(val_z).argmax(1)] == val_y).double().mean().item()
        for penalty, fit in zip(penalties, fits, strict=True)
    }
    best = max(penalties, key=validation.__getitem__)  # the first of equals: the strongest
    if val is None:
        fits = _regressions(z, y, len(classes), penalties[: penalties.index(best) + 1])
    answer = classes[fits[penalties.index(best)](test).argmax(1)].cpu().numpy()
    return Probe(accuracy(answer, test_y, draw=draw), accuracy_chance(test_y), answer, best, validation)


def attentive_probe(
    train_tokens: Tokens,
    train_y: Labels,
    test_tokens: Tokens,
    test_y: Labels,
    *,
    val: tuple[Tokens, Labels] | None = None,
    heads: int = 4,
    epochs: int = 20,
    l2: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    draw: torch.Generator | None = None,
) -> Probe:
    """A linear classifier of what one learned query attends to among an item's standardised tokens [n, tokens, dim].

    The attentive probe of V-JEPA (arXiv 2404.08471, section 4.1), its cross-attention alone: without the block's MLP.
    A query that is the same for all items makes of each head's keys one vector, and of its values and the classifier
    one matrix, and so they are learned. It starts as a linear probe of the tokens' average. Adam over `epochs`, of
    which the last counts; the penalty of the matrix is chosen as `linear_probe` does.
    """
    if heads < 1 or epochs < 1 or not l2 or not min(l2) > 0:
        raise UsageError(f"attentive_probe needs a head, an epoch and l2 > 0; got {heads}, {epochs} and {tuple(l2)}.")
    draw = draw or generator("attentive_probe")
    x, test = _as_tokens("train", train_tokens), _as_tokens("test", test_tokens)
    _check_set("test", test.flatten(1), test_y, x[0].numel())
    x, y = _labelled("train", x, train_y)
    classes, y = y.unique(return_inverse=True)
    penalties = sorted(l2, reverse=True)
    if val is None:
        kept, held = _hold_out(len(x), draw)
        fit = _attention(x[kept], y[kept], len(classes), penalties, heads=heads, epochs=epochs, draw=draw)
        val_x, val_y = x[held], classes[y[held]]
    else:
        val_x = _as_tokens("val", val[0])
        _check_set("val", val_x.flatten(1), val[1], x[0].numel())
        val_x, val_y = _labelled("val", val_x, val[1])
        fit = _attention(x, y, len(classes), penalties, heads=heads, epochs=epochs, draw=draw)
    right = (classes[fit.answers(val_x)] == val_y).double().mean(1).tolist()
    validation = dict(zip(penalties, right, strict=True))
    best = max(penalties, key=validation.__getitem__)  # the first of equals: the strongest
    if val is None:
        fit = _attention(x, y, len(classes), penalties, heads=heads, epochs=epochs, draw=draw)
    answer = classes[fit.answers(test)[penalties.index(best)]].cpu().numpy()
    return Probe(accuracy(answer, test_y, draw=draw), accuracy_chance(test_y), answer, best, validation)


class FewShot(NamedTuple):
    """How well few labels read the others: by the number of examples a class, or by the share of labels kept."""

    accuracy: dict[float, Interval]  # over test items, of the mean over draws
    spread: dict[float, float]  # the standard deviation of a draw's accuracy: luck with the examples
    right: dict[float, Float[np.ndarray, "n"]]  # by labelled test item, the share of draws in which it is right
    chance: float


def few_shot(
    train_z: Matrix,
    train_y: Labels,
    test_z: Matrix,
    test_y: Labels,
    *,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 100,
    draw: torch.Generator | None = None,
) -> FewShot:
    """The nearest mean of `shots` training rows a class, centred and on the unit sphere, for many draws of them.

    SimpleShot's CL2N (arXiv 1911.04623, section 3), centred by all training rows, which takes no labels. The rows of
    five shots are among those of ten. A class that has fewer rows gives all of them.
    """
    if not shots or min(shots) < 1 or draws < 1:
        raise UsageError(f"few_shot needs shots and draws of 1 or more; got {tuple(shots)} and {draws}.")
    z, test = as_rows(train_z), as_rows(test_z)
    _check_set("test", test, test_y, z.shape[1])
    centre = z.mean(0)
    z, y = _labelled("train", z, train_y)
    test, answers = _labelled("test", test, test_y)
    z, test = F.normalize(z - centre, dim=1), F.normalize(test - centre, dim=1)
    classes, y = y.unique(return_inverse=True)
    draw = draw or generator("few_shot")
    members = [(y == place).nonzero().flatten() for place in range(len(classes))]
    orders = [torch.rand(draws, len(own), generator=draw).argsort(1).to(z.device) for own in members]
    right: dict[float, np.ndarray] = {}
    spread: dict[float, float] = {}
    for k in shots:
        means = torch.stack(
            [z[own[order[:, :k]]].mean(1) for own, order in zip(members, orders, strict=True)], 1
        )  # [draws, classes, d]
        # ‖x − m‖² without what all classes share.
        hits = torch.stack(
            [classes[torch.addmm(-each.square().sum(1) / 2, test, each.T).argmax(1)] == answers for each in means]
        ).double()
        right[k], spread[k] = hits.mean(0).cpu().numpy(), hits.mean(1).std(correction=0).item()
    return FewShot({k: bootstrap(each) for k, each in right.items()}, spread, right, accuracy_chance(test_y))


def few_labels(
    train_z: Matrix,
    train_y: Labels,
    test_z: Matrix,
    test_y: Labels,
    *,
    shares: Sequence[float] = (0.01, 0.1),
    draws: int = 10,
    l2: Sequence[float] = (1.0, 0.1, 1e-2, 1e-3),
    draw: torch.Generator | None = None,
) -> FewShot:
    """`linear_probe` of a share of the training labels, for many draws, each class in proportion and twice at least.

    The penalty is chosen anew in each draw, on a fifth of what was drawn. A share that leaves less than two labels a
    class is left out.
    """
    if not shares or not 0 < min(shares) <= max(shares) <= 1 or draws < 1:
        raise UsageError(f"few_labels needs shares in 0..1 and draws of 1 or more; got {tuple(shares)} and {draws}.")
    z, test = as_rows(train_z), as_rows(test_z)
    _check_set("test", test, test_y, z.shape[1])
    z, y = _labelled("train", z, train_y)
    test, answers = _labelled("test", test, test_y)
    draw = draw or generator("few_labels")
    members = [(y == name).nonzero().flatten() for name in y.unique()]
    shares = [share for share in shares if share * len(y) >= 2 * len(members)]
    own, asked = y.cpu().numpy(), answers.cpu().numpy()
    right: dict[float, np.ndarray] = {}
    spread: dict[float, float] = {}
    for share in shares:
        hits = []
        for _ in range(draws):
            some = [
                rows[torch.randperm(len(rows), generator=draw)[: max(2, round(share * len(rows)))].to(rows.device)]
                for rows in members
            ]
            kept = torch.cat(some)
            found = linear_probe(z[kept], own[kept.cpu().numpy()], test, asked, l2=l2, draw=draw)
            hits.append(found.predicted == asked)
        table = np.asarray(hits, float)
        right[share], spread[share] = table.mean(0), float(table.mean(1).std())
    return FewShot({k: bootstrap(each) for k, each in right.items()}, spread, right, accuracy_chance(test_y))


class _Attention(NamedTuple):
    """A probe for each of p penalties, side by side."""

    mean: Float[Tensor, "d"]
    scale: Float[Tensor, "d"]
    query: Float[Tensor, "p h d"]
    weight: Float[Tensor, "p hd c"]
    bias: Float[Tensor, "p 1 c"]

    def __call__(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "p n c"]:
        x = (x - self.mean) / self.scale
        looks = torch.einsum("ntd,phd->pnht", x, self.query).softmax(-1)
        seen = torch.einsum("pnht,ntd->pnhd", looks, x).flatten(2)
        return torch.baddbmm(self.bias, seen, self.weight)

    def answers(self, x: Float[Tensor, "n t d"]) -> Int[Tensor, "p n"]:
        """The class of highest score, by penalty and item."""
        with torch.no_grad():
            return torch.cat([self(rows).argmax(2) for rows in x.split(PROBE_BATCH)], 1)


def _attention(
    x: Float[Tensor, "n t d"],
    y: Int[Tensor, "n"],
    classes: int,
    penalties: Sequence[float],
    *,
    heads: int,
    epochs: int,
    draw: torch.Generator,
) -> _Attention:
    count, width = len(penalties), x.shape[2]
    scale, mean = torch.std_mean(x, (0, 1), correction=0)
    scale = scale.clamp_min(1e-6 * x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny))
    shapes = (count, heads, width), (count, heads * width, classes), (count, 1, classes)
    learned = [x.new_zeros(shape, requires_grad=True) for shape in shapes]
    learned[0].data += 0.02 * torch.randn(shapes[0], generator=draw).to(x)  # else all heads would stay the same one
    probe = _Attention(mean, scale, *learned)
    optimizer = torch.optim.Adam(learned, lr=PROBE_RATE)
    steps = epochs * math.ceil(len(x) / PROBE_BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    strength = x.new_tensor(penalties)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).to(x.device).split(PROBE_BATCH):
            with torch.enable_grad():
                scores = probe(x[rows])
                penalty = (strength / 2 * probe.weight.square().sum((1, 2))).sum()
                F.cross_entropy(scores.flatten(0, 1), y[rows].repeat(count)).mul(count).add(penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    return _Attention(mean, scale, *(part.detach() for part in learned))


def _as_tokens(name: str, x: Tokens) -> Float[Tensor, "n t d"]:
    """`x` as a float32 tensor on its own device."""
    if x.ndim != 3 or 0 in x.shape:
        raise DataError(
            f"Tokens are [n, tokens, dim] with one each at least; those of the {name} set are {[*x.shape]}."
        )
    return as_rows(x.reshape(len(x), -1)).view(x.shape)


class _Linear(NamedTuple):
    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, "c"]

    def __call__(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        return torch.addmm(self.bias, z, self.weight)


def _regressions(
    z: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, penalties: Sequence[float]
) -> list[_Linear]:
    """Logistic regression on standardised columns for each penalty, each starting where the last one ended."""
    mean = z.mean(0)
    # A column that is constant up to rounding must not be blown up to variance 1.
    scale = z.std(0, correction=0).clamp_min(1e-6 * z.abs().amax().clamp_min(torch.finfo(z.dtype).tiny))
    standard, axes = _own_axes((z - mean) / scale)
    weight = z.new_zeros(standard.shape[1], classes, requires_grad=True)
    bias = z.new_zeros(classes, requires_grad=True)
    fits = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def loss(optimizer=optimizer, penalty=penalty) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(torch.addmm(bias, standard, weight), y) + penalty / 2 * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        raw = (weight.detach() if axes is None else axes @ weight.detach()) / scale[:, None]
        fits.append(_Linear(raw, bias.detach() - mean @ raw))
    return fits


def _own_axes(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "d m"] | None]:
    """`x` in the axes that its rows span, where they are fewer than its columns: a penalty on the length of weights
    keeps them there, and no rotation changes it."""
    if len(x) >= x.shape[1]:
        return x, None
    axes = torch.linalg.qr(x.T).Q
    return x @ axes, axes


def _hold_out(n: int, draw: torch.Generator) -> tuple[Int[Tensor, "kept"], Int[Tensor, "held"]]:
    """Four fifths of the row numbers and the other fifth, at least one in each."""
    if n < 2:
        raise DataError("Validation needs a row of its own and training has only one; pass val=(embeddings, labels).")
    order = torch.randperm(n, generator=draw)
    held = max(1, n // 5)
    return order[held:], order[:held]


def _labelled(name: str, z: Float[Tensor, "n d"], labels: Labels) -> tuple[Float[Tensor, "m d"], Int[Tensor, "m"]]:
    """The rows that have a label, and their labels."""
    _check_set(name, z, labels, z.shape[1])
    y = torch.as_tensor(np.array(labels, dtype=np.int64), device=z.device)
    keep = y >= 0
    if not keep.any():
        raise DataError(f"No item of the {name} set has a label.")
    return (z, y) if keep.all() else (z[keep], y[keep])


def _check_set(name: str, z: Float[Tensor, "n d"], labels: Labels, width: int) -> None:
    if len(labels) != len(z):
        raise DataError(f"The {name} set has {len(z)} embeddings and {len(labels)} labels.")
    if z.shape[1] != width:
        raise DataError(f"The {name} embeddings are {z.shape[1]} wide and those of training {width}; use one encoder.")
