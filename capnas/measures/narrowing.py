"""Which channels of a layer can go, what that costs, and how the layers that read them make up for it.

Shenk et al. (arXiv 2006.08679) say how many directions a layer's outputs need; channels are not directions, so a subset of columns must
span that space. The selection here is our construction: backward elimination with the exact least-squares update of optimal brain surgeon
(Hassibi and Stork, 1993) on blocks of columns, each reader's errors weighed by the curvature of the loss at its outputs (the Kronecker
factors of Martens and Grosse, 2015), so that losses of different layers compare.

Letters: U units (what is removed as one), b columns of a unit, D columns in all (features times kernel positions), O outputs of a reader,
S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capnas.errors import UsageError
from capnas.measures.saturation import leading_eigenvectors
from capnas.measures.singular import EXACT_EIGENVALUES

_LEAST = 1e-12  # added to a ridge against covariances that are singular to rounding; the whole of it where all inputs are dead


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A linear map that reads the units of a group.

    Attributes:
        weight: (O, D).
        covariance: (D, D) of its inputs, centred (a bias or the norm behind takes up means).
        columns: (U, b) columns of each unit.
        curvature: (O, O) second moment of the loss's gradient at its outputs, summed over positions; None for the identity.
    """

    weight: Tensor
    covariance: Tensor
    columns: Tensor
    curvature: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RemovalPath:
    """Units in the order in which they are best removed.

    Attributes:
        order: units, the first to go first; the last one is never removed.
        losses: (U,) ``losses[n]`` is the increase of the loss, to second order, with the first n units of the order removed and the readers
            refitted; ``losses[0]`` is 0 and it never falls.
    """

    order: tuple[int, ...]
    losses: Tensor

    def kept(self, units: int) -> list[int]:
        """The units that stay when so many stay, ascending."""
        return sorted(self.order[len(self.order) - units :])


def removal_path(readers: Sequence[Reader], *, ridge: float = 1e-3, steps: int = 128) -> RemovalPath:
    """Remove the units of a group one after another, each time those that the readers miss least once they are refitted. Ours.

    For one reader with weights W, input covariance A and curvature G the loss is 1/2 tr(G dW A dW^T). Removing the columns u and refitting
    the rest changes it by 1/2 tr(G W_u (A^-1_uu)^-1 W_u^T), and W and A^-1 have closed updates: the elimination is exact for the subset it
    arrives at, greedy in the choice. Losses of several readers add up.

    Args:
        readers: all that read the group; their units in the same order.
        ridge: added to each covariance, relative to its mean diagonal.
        steps: at most so many eliminations; a group of more units loses several at a time.

    Raises:
        UsageError: no readers, or readers of different numbers of units.

    >>> a = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two inputs are one
    >>> path = removal_path([Reader(weight=torch.ones(1, 3), covariance=a, columns=torch.arange(3)[:, None])], ridge=1e-9)
    >>> path.order[0] in (0, 1), [round(x, 3) for x in path.losses.tolist()]
    (True, [0.0, 0.0, 0.5])
    """
    if not readers or len({len(r.columns) for r in readers}) != 1:
        raise UsageError(f"readers must be given and agree on their units, got {[len(r.columns) for r in readers]}.")
    n_units = len(readers[0].columns)
    states = [_Elimination(r, ridge) for r in readers]
    alive = torch.ones(n_units, dtype=torch.bool)
    order: list[int] = []
    losses = [0.0]
    at_once = -(-n_units // steps)
    while len(order) < n_units - 1:
        scores = torch.stack([s.scores() for s in states]).sum(0).cpu()
        scores[~alive] = float("inf")
        going = scores.topk(min(at_once, n_units - 1 - len(order)), largest=False).indices
        spent = sum(s.remove(going) for s in states)
        alive[going] = False
        share = scores[going] / scores[going].sum().clamp_min(1e-300)
        for unit, part in zip(going.tolist(), share.tolist()):
            order.append(unit)
            losses.append(losses[-1] + max(spent, 0.0) * part)
    order.append(int(alive.nonzero()[0]))
    return RemovalPath(order=tuple(order), losses=torch.tensor(losses, dtype=torch.float64))


class _Elimination:
    """One reader's weights and inverse covariance while columns leave."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        cov = reader.covariance.double()
        damp = _damp(cov, ridge + _LEAST)
        self.inverse = torch.linalg.inv((cov + cov.T) / 2 + damp * torch.eye(len(cov), dtype=cov.dtype, device=cov.device))
        weight = reader.weight.double()
        weight = weight if reader.curvature is None else factor(reader.curvature) @ weight
        # losses depend on W^T W alone, so that more outputs than inputs can be turned into as many as inputs
        self.weight = factor(weight.T @ weight) if len(weight) > weight.shape[1] else weight
        self.columns = reader.columns.to(cov.device)

    def scores(self) -> Tensor:
        """(U,) what removing each unit would cost; meaningless for units that are gone."""
        cols = self.columns
        if cols.shape[1] == 1:
            single = cols[:, 0]
            return 0.5 * self.weight[:, single].square().sum(0) / self.inverse[single, single]
        blocks = self.inverse[cols[:, :, None], cols[:, None, :]]  # (U, b, b)
        weights = self.weight[:, cols].permute(1, 2, 0)  # (U, b, O)
        return 0.5 * (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def remove(self, units: Tensor) -> float:
        cols = self.columns[units].flatten()
        block = self.inverse[cols][:, cols]
        weights = self.weight[:, cols].T  # (n, O)
        gain = torch.linalg.solve(block, torch.cat([weights, self.inverse[cols]], 1))
        spent = 0.5 * float((weights * gain[:, : weights.shape[1]]).sum())
        step = gain[:, weights.shape[1] :]
        self.weight = self.weight - weights.T @ step
        self.inverse = self.inverse - self.inverse[:, cols] @ step
        self.weight[:, cols] = 0
        self.inverse[cols], self.inverse[:, cols] = 0, 0
        self.inverse[cols, cols] = 1
        return spent


def _damp(cov: Tensor, ridge: float) -> float:
    """A ridge relative to the mean diagonal, so that the scale of the inputs has no say; next to nothing where all inputs are dead."""
    level = float(cov.diagonal().mean())
    return ridge * level if level > 0 else _LEAST


def factor(matrix: Tensor) -> Tensor:
    """Some S (D, D) with S^T S equal to a positive semi-definite matrix (D, D), in float64. Textbook.

    Cholesky's where it exists, else the symmetric root, which costs more: a matrix wider than 2,048 is rather lifted to where it exists,
    by at most 1e-4 of its mean diagonal.

    >>> factor(torch.diag(torch.tensor([4.0, 1.0]))).round(decimals=6).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    even = (matrix + matrix.T).double() / 2
    identity = torch.eye(len(even), dtype=even.dtype, device=even.device)
    for lift in (1e-10,) if len(even) <= EXACT_EIGENVALUES else (1e-10, 1e-8, 1e-6, 1e-4):
        lower, info = torch.linalg.cholesky_ex(even + lift * float(even.diagonal().mean()) * identity)
        if not int(info):
            return lower.T.contiguous()
    return root(even)


def root(matrix: Tensor) -> Tensor:
    """The (textbook) symmetric square root (D, D) of a positive semi-definite matrix, in float64; above 2,048 that of its leading part.

    >>> root(torch.diag(torch.tensor([4.0, 0.0]))).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    values, vectors = leading_eigenvectors((matrix + matrix.T).double() / 2)
    return (vectors * values.sqrt()) @ vectors.T


def refit(inputs: Tensor, targets: Tensor, prior: Tensor, *, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weights and bias that map a reader's actual inputs to the outputs it should have, by least squares. Ours.

    Minimizes mean |W x + c - y|^2 + r |W - prior|^2 with r = ``ridge`` times the mean variance of the inputs.

    Args:
        inputs: (S, D).
        targets: (S, O).
        prior: (O, D) weights to stay close to where the samples do not decide.
        ridge: relative to the mean variance, above 0 where inputs may be dependent.

    Returns:
        W (O, D) and c (O,), float64.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> weight, bias = refit(x, 3 * x + 1, torch.zeros(1, 1), ridge=0.0)
    >>> round(weight.item(), 6), round(bias.item(), 6)
    (3.0, 1.0)
    """
    x_mean, y_mean = inputs.double().mean(0), targets.double().mean(0)
    x, y = inputs - x_mean.to(inputs), targets - y_mean.to(targets)
    cov, cross = gram(x) / len(x), gram(x, y) / len(x)
    damp = _damp(cov, ridge + _LEAST)
    right = cross - cov @ prior.double().T
    change = torch.linalg.solve(cov + damp * torch.eye(len(cov), dtype=cov.dtype, device=cov.device), right).T
    weight = prior.double() + change
    return weight, y_mean - weight @ x_mean


def principal_axes(covariance: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Axes T in which a stream's coordinates z = T x can be cut one by one, each at a cost of its own, and T^-1. Ours.

    Readers W with curvatures G lose 1/2 tr(M E) to second order when covariance E is missing, M = sum of W^T G W. With C = A^1/2 M A^1/2 =
    V diag(l) V^T and T = V^T A^-1/2 the coordinates have covariance one, and without some of them the loss is half the sum of their l: by
    Eckart and Young (1936) no other subspace of so many dimensions loses less than the first of these, and no subset of channels does.

    Args:
        covariance: A (D, D) of the stream; a millionth of its mean diagonal is added.
        importance: M (D, D), positive semi-definite.

    Returns:
        T (D, D), the rows that matter most first, and its inverse, float64.

    >>> line = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two channels that are one
    >>> axes, back = principal_axes(line, torch.eye(2))
    >>> [round(abs(x), 3) for x in (axes @ torch.ones(2).double()).tolist()], torch.allclose(axes @ back, torch.eye(2).double())
    ([1.0, 0.0], True)
    """
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    values, vectors = torch.linalg.eigh((covariance + covariance.T).double() / 2 + _damp(covariance, 1e-6) * identity)
    spread = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    root, inverse = (vectors * spread) @ vectors.T, (vectors / spread) @ vectors.T
    seen = root @ importance.double() @ root
    turn = torch.linalg.eigh((seen + seen.T) / 2).eigenvectors.flip(1)
    return turn.T @ inverse, root @ turn


def turned_reader(reader: Reader, axes: Tensor, back: Tensor) -> Reader:
    """The same map, reading T x in place of the units x at each kernel position, so that it puts out the same. Textbook.

    Args:
        reader: its columns (U, b).
        axes: T (U, U).
        back: its inverse.

    >>> one, two = Reader(weight=torch.ones(1, 2), covariance=torch.eye(2), columns=torch.arange(2)[:, None]), torch.eye(2) * 2
    >>> turned = turned_reader(one, two, two.inverse())
    >>> turned.weight.tolist(), turned.covariance.tolist()
    ([[0.5, 0.5]], [[4.0, 0.0], [0.0, 4.0]])
    """
    weight, covariance = reader.weight.double().clone(), reader.covariance.double().clone()
    for place in reader.columns.T:
        weight[:, place] = weight[:, place] @ back.double()
        covariance[place] = axes.double() @ covariance[place]
        covariance[:, place] = covariance[:, place] @ axes.double().T
    return Reader(weight=weight, covariance=covariance, columns=reader.columns, curvature=reader.curvature)


def moved_norm(
    running: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], *, eps: float = 1e-5, most: float = 16.0
) -> tuple[Tensor, Tensor]:
    """The running mean and variance with which a batch norm puts out what it did, though its inputs have changed. Ours.

    Over the same images, outputs have the mean and the variance that they had: v' + eps = (v + eps) * now / before for the variance, and
    for the mean m' = now - s (before - m) with s the ratio of the new standard deviation to the old. Inputs that did not change leave both
    as they were, however far the images are from what training had gathered.

    Args:
        running: mean and variance (C,) and (C,) of the norm.
        before: of its inputs on some images, in the network as it was.
        now: of its inputs on the same images.
        eps: of the norm.
        most: v + eps changes by this factor at most; v' is at least 0.

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> [round(v.item(), 3) for v in moved_norm((one, one), (two, one), (two, 4 * one), eps=0.0)]  # twice the spread
    [0.0, 4.0]
    """
    (mean, variance), (old_mean, old), (new_mean, new) = running, before, now
    noise = 1e-6 * (variance + eps)  # inputs that vary less move the outputs by less than a thousandth
    moved = ((variance + eps) * ((new + noise) / (old + noise)).clamp(1 / most, most) - eps).clamp_min(0)
    stretch = ((moved + eps) / (variance + eps).clamp_min(1e-30)).sqrt()
    return new_mean + stretch * (mean - old_mean), moved


def mixture(second: Tensor, kept: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """What each channel is of the kept ones, by least squares: M (C, K) with x ~ M x_kept. Ours.

    Args:
        second: (C, C) second moments about zero.
        kept: (K,) channels.
        ridge: relative to the mean second moment.

    >>> mixture(torch.ones(2, 2), torch.tensor([0]), ridge=0.0).tolist()
    [[1.0], [1.0]]
    """
    a = second.double()
    inner = a[kept][:, kept]
    damp = _damp(a, ridge)
    found = torch.linalg.solve(inner + damp * torch.eye(len(inner), dtype=a.dtype, device=a.device), a[kept]).T
    found[kept] = torch.eye(len(kept), dtype=a.dtype, device=a.device)
    return found


def gram(x: Tensor, y: Tensor | None = None, *, chunk: int = 4096) -> Tensor:
    """x^T y (or x^T x) in float64 for rows (S, D) and (S, O), without a float64 copy of all rows. Textbook.

    >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    parts = zip(x.split(chunk), (x if y is None else y).split(chunk))
    total = torch.zeros(x.shape[1], (x if y is None else y).shape[1], dtype=torch.float64, device=x.device)
    for left, right in parts:
        total += left.double().T @ right.double()
    return total
