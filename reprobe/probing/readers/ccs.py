"""CCSReader: a direction that is consistent over contrast pairs, found without labels.

Enters: checked training rows with their pairs. Leaves: a boundary. Source and departures are in its docstring.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float

from reprobe.errors import UsageError
from reprobe.probing.reader import Plane, Reader, TrainingRows, above_zero, checked_again
from reprobe.probing.readers.pairing import sides as sides_of


class CCSReader(Reader):
    """Contrast-consistent search (Burns et al. 2022): of each pair, one side is true and the other is not.

    With p = σ(w·x̃ + b) of the two sides, minimises the mean of (p0 − (1 − p1))² + min(p0, p1)² by AdamW (weight
    decay 0.01, as the original), from `restarts` seeded starts at once, and keeps the lowest loss. x̃ is a row less
    the mean of its side in the training rows, so that what tells "yes" from "no" is gone, over the standard deviation
    of each feature about those means. (The original divides by one deviation per side, if at all; one for both
    makes one direction serve both.)

    `sides` in `fit` says which rows are on the second side (a "yes", say). It must not follow the labels: a side
    that is always the true one has the truth taken away with its mean. Without `sides`, the labels' two sides of each
    pair are put in random order, from `seed`; without `pairs`, rows of the two classes are matched at random. Both
    are said in the direction's sign rule.

    The loss does not know which of the two ends is true. Sign: the positive class has the higher mean, by the
    labels; or, with a `prior` (a vector of the rows' width), the end on the prior's side, and no label is used.
    Accuracies are therefore never the larger of a and 1 − a.

    `loss_` is the training loss (0.25 is what p = ½ everywhere has), `losses_` those of all restarts; `coef_` and
    `side_means_` (2, width) are in raw units: p = σ((h − side_means_[s])·coef_ + bias_). `decision_function` reads
    single rows, whose side it does not know, about the mean of the two side means; `pair_probability` reads pairs.
    """

    uses_pairs = True

    def __init__(
        self,
        *,
        restarts: int = 10,
        steps: int = 300,
        lr: float = 0.01,
        prior: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.restarts = restarts
        self.steps = steps
        self.lr = lr
        self.prior = prior
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None, sides: Any = None) -> Self:
        """As `Reader.fit`; `sides` (n,), bools or numbers, above 0 for the second side, needs `pairs`."""
        if sides is not None and pairs is None:
            raise UsageError("sides without pairs: CCS compares the two sides of a pair, so say which rows are one")
        rows = self._checked(X, y, groups, pairs)
        return self.fit_rows(
            rows if sides is None else dataclasses.replace(rows, side=above_zero(sides, "sides", len(rows.X)))
        )

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        for name in ("restarts", "steps"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name}={getattr(self, name)!r}; at least 1")
        if rows.side is not None:
            second, first, how = sides_of(rows.X, rows.side, rows.pairs, self.seed, name="side")
        else:
            second, first, how = sides_of(rows.X, rows.positive, rows.pairs, self.seed)
            swap = np.random.default_rng(self.seed).integers(0, 2, size=(len(first), 1)) == 1
            first, second = np.where(swap, second, first), np.where(swap, first, second)
            how += f", sides in random order (seed {self.seed})"
        self.side_means_ = np.stack([first.mean(axis=0), second.mean(axis=0)])
        centred = np.stack([first, second]) - self.side_means_[:, None]
        std = np.sqrt(np.mean(centred**2, axis=(0, 1)))
        varies = std > 16 * np.finfo(np.float64).eps * np.abs(rows.X).max()
        if not varies.any():
            raise UsageError("the pairs do not differ in any feature from the mean of their side")
        scale = np.where(varies, std, 1.0)
        w, b = self._search(np.where(varies, centred / scale, 0.0))
        self.coef_, self.bias_ = np.where(varies, w / scale, 0.0), b
        flipped, rule = self._is_flipped(rows)
        if flipped:
            self.coef_, self.bias_ = -self.coef_, -self.bias_
        level = float(self.coef_ @ self.side_means_.mean(axis=0)) - self.bias_
        return Plane(self.coef_, level, f"{rule}; pairs {how}")

    def _search(self, Z: Float[np.ndarray, "sides pairs width"]) -> tuple[Float[np.ndarray, " width"], float]:
        """The best of all restarts, which are columns of one problem."""
        generator = torch.Generator().manual_seed(self.seed)
        width = Z.shape[2]
        start = torch.rand(width + 1, self.restarts, generator=generator, dtype=torch.float64) * 2 - 1
        theta = (start / width**0.5).requires_grad_()  # as a linear layer is initialised
        x = torch.from_numpy(Z)
        optimizer = torch.optim.AdamW([theta], lr=self.lr, weight_decay=0.01)
        for _ in range(self.steps):
            optimizer.zero_grad()
            _losses(x, theta).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            self.losses_ = _losses(x, theta).numpy()
        best = int(np.argmin(self.losses_))
        self.loss_ = float(self.losses_[best])
        found = theta.detach().numpy()[:, best]
        return found[:-1], float(found[-1])

    def _is_flipped(self, rows: TrainingRows) -> tuple[bool, str]:
        if self.prior is not None:
            prior = np.asarray(self.prior, dtype=np.float64)
            if prior.shape != self.coef_.shape:
                raise UsageError(f"the prior has shape {prior.shape}, the rows have width {len(self.coef_)}")
            towards = float(self.coef_ @ prior)
            rule = "the end on the prior's side"
        else:
            # about the mean of their own side, where that is known: sides may hold unequal shares of a class
            centre = self.side_means_.mean(axis=0) if rows.side is None else self.side_means_[rows.side.astype(int)]
            scores = (rows.X - centre) @ self.coef_
            towards = float(scores[rows.positive].mean() - scores[~rows.positive].mean())
            rule = "by the labels: the positive class has the higher mean"
        if towards == 0:
            raise UsageError("the sign cannot be decided: the direction is at right angles to what should decide it")
        return towards < 0, rule

    def pair_probability(self, first: Any, second: Any) -> Float[np.ndarray, " pairs"]:
        """Probability that the second side of each pair is the positive one: ½(p1 + 1 − p0), (pairs, width) each."""
        probabilities = []
        for X, mean in ((first, 0), (second, 1)):
            rows = checked_again(self, "direction_", X)
            probabilities.append(1 / (1 + np.exp(-((rows - self.side_means_[mean]) @ self.coef_ + self.bias_))))
        found: np.ndarray = (probabilities[1] + 1 - probabilities[0]) / 2
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on rows that are no pairs
        return tags


def _losses(
    x: Float[torch.Tensor, "sides pairs width"], theta: Float[torch.Tensor, "width+1 restarts"]
) -> Float[torch.Tensor, " restarts"]:
    p = torch.sigmoid(x @ theta[:-1] + theta[-1])
    return ((p[0] + p[1] - 1) ** 2 + torch.minimum(p[0], p[1]) ** 2).mean(dim=0)
