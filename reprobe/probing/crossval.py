"""Which fold each row is tested in. No other kind of split is offered: a group never has rows on two sides.

Enters: groups and labels of rows. Leaves: one fold number per row. Does not know activations or readers.
"""

from typing import Any

import numpy as np
from jaxtyping import Integer
from sklearn.model_selection import StratifiedGroupKFold

from reprobe.errors import UsageError


def group_folds(groups: Any, labels: Any, n_folds: int, seed: int) -> Integer[np.ndarray, " rows"]:
    """The fold, 0 … n_folds−1, in which each row is held out; every row of a group is in the same one.

    Each class is spread as evenly over the folds as whole groups allow (scikit-learn's StratifiedGroupKFold).
    The result depends on the groups' names, the labels in them and `seed`, not on the order of rows. Raises
    `UsageError` for fewer than two folds, fewer groups than folds, a class that fewer groups hold than there
    are folds, or folds of which one would lack a class.
    """
    groups, labels = np.asarray(groups), np.asarray(labels)
    if n_folds < 2:
        raise UsageError(f"{n_folds} folds: cross-validation needs at least 2")
    n_groups = len(np.unique(groups))
    if n_groups < n_folds:
        raise UsageError(f"{n_groups} groups cannot make {n_folds} folds: a group is never split; ask for fewer folds")
    classes = np.unique(labels)
    for c in classes:
        holding = len(np.unique(groups[labels == c]))
        if holding < n_folds:
            raise UsageError(
                f"only {holding} groups hold label {c.item()!r}: {n_folds} folds would leave one without it"
            )
    folds = np.full(len(groups), -1, dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for k, (_, test) in enumerate(splitter.split(np.zeros(len(groups)), labels, groups)):
        folds[test] = k
    for k in range(n_folds):
        lacking = set(classes.tolist()) - set(labels[folds == k].tolist())
        if lacking:
            raise UsageError(
                f"the groups are too uneven for {n_folds} folds: fold {k} would have no row labelled "
                f"{sorted(lacking)[0]!r}; ask for fewer folds, or try another seed"
            )
    return folds
