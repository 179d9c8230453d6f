"""The ledger: which edits a network holds, and how each is taken out again, in any order.

Enters: a language model and `WeightEdit`s. Leaves: changed weights, and a record from which they come back. Does not
know how an edit was made.

Identity: an edit is made for a base, the model without any edit of the ledger, and perhaps after further edits. The
digest of the weights sees edits, so the ledger remembers the base's identity from before the first one; an edit is
refused whose base is another model, or which was made after edits that the network does not hold.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from reprobe.control.edits import Matrix, WeightEdit
from reprobe.errors import IdentityMismatch, UsageError
from reprobe.model.identity import ModelIdentity, digest_weights
from reprobe.model.language_model import LanguageModel

_LEDGERS: "weakref.WeakKeyDictionary[nn.Module, EditLedger]" = weakref.WeakKeyDictionary()


class EditLedger:
    """The edits in one network, in the order in which they were applied. Made by `ledger_of`.

    With `keep_originals` it holds a copy of each matrix that is being edited: weights are then the original plus the
    sum of the edits, rounded once, and reverting all gives the original bit for bit. Without, edits are added and
    subtracted, which leaves rounding errors.
    """

    def __init__(self, keep_originals: bool = True) -> None:
        self.keep_originals = keep_originals
        self.applied: tuple[WeightEdit, ...] = ()
        self._originals: dict[str, Tensor] = {}
        self._base: ModelIdentity | None = None
        self._weights = ""  # the digest that the last change left

    def base(self, lm: LanguageModel) -> ModelIdentity:
        """The identity of the model without the ledger's edits.

        Without originals it stays what it was also where subtracted edits left rounding errors. Raises
        `IdentityMismatch` if the weights were changed meanwhile by something else.
        """
        if self._base is not None and digest_weights(lm.net) == self._weights:
            return self._base
        if self.applied:
            raise IdentityMismatch(
                f"the weights of {lm.name} were changed outside the ledger since the last of its "
                f"{len(self.applied)} edits: what these edits are edits of is no longer known. Load the model again"
            )
        return lm.identity

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(edit.digest for edit in self.applied)

    def apply(self, lm: LanguageModel, edits: Iterable[WeightEdit], *, allow_mismatch: bool = False) -> None:
        """Put edits into the network, all or none.

        Raises `IdentityMismatch` for an edit of another model, or one that was made after edits which are not in the
        network (unless `allow_mismatch`), `UsageError` for one that is in it already or does not fit.
        """
        new = tuple(edits)
        base = self.base(lm)
        held = set(self.digests)
        for edit in new:
            edit.base.require_same(base, f"the edit of {edit.parameter}", allow_mismatch=allow_mismatch)
            if missing := [d for d in edit.after if d not in held and not allow_mismatch]:
                raise IdentityMismatch(
                    f"the edit of {edit.parameter} was made after {len(missing)} edits that {lm.name} does not hold "
                    f"({', '.join(d[:12] for d in missing)}): apply these first, or pass allow_mismatch=True"
                )
            if edit.digest in held:
                raise UsageError(f"{lm.name} holds the edit {edit.digest[:12]} of {edit.parameter} already")
            held.add(edit.digest)
        self._change(lm, base, add=new, remove=())

    def revert(self, lm: LanguageModel, edits: Iterable[WeightEdit | str] | None = None) -> None:
        """Take edits out again (values, digests or their first letters; None: all), in any order.

        Raises `UsageError` for one that is not in the network.
        """
        if not self.applied and edits is None:
            return
        gone = self.applied if edits is None else tuple(self.find(edit) for edit in edits)
        self._change(lm, self.base(lm), add=(), remove=gone)

    def find(self, edit: WeightEdit | str) -> WeightEdit:
        """The one applied edit that is meant. Raises `UsageError`."""
        text = edit if isinstance(edit, str) else edit.digest
        found = [e for e in self.applied if text and e.digest.startswith(text)]
        if len(found) != 1:
            there = ", ".join(d[:12] for d in self.digests) or "none"
            raise UsageError(
                f"{'several edits begin' if found else 'no edit'} with {text[:12]!r}; applied are: {there}"
            )
        return found[0]

    def restored(self, base: ModelIdentity, applied: Sequence[WeightEdit], originals: dict[str, Tensor]) -> None:
        """Take over what another process recorded of the weights that were loaded. For `edited_model` only."""
        self._base, self.applied, self._originals = base, tuple(applied), originals

    def noted(self, lm: LanguageModel) -> None:
        """Remember the weights as they are now."""
        self._weights = digest_weights(lm.net)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The kept originals of the matrices that are edited now, as the network stores them."""
        return dict(self._originals)

    def _change(
        self, lm: LanguageModel, base: ModelIdentity, *, add: Sequence[WeightEdit], remove: Sequence[WeightEdit]
    ) -> None:
        gone = {edit.digest for edit in remove}
        kept = (*(e for e in self.applied if e.digest not in gone), *add)
        matrices = [Matrix.of(lm, n) for n in dict.fromkeys(e.parameter for e in (*add, *remove))]
        # Everything that can be refused is computed before anything is written.
        new = [(m, self._values(m, [e for e in kept if e.parameter == m.name], add, remove)) for m in matrices]
        if self.keep_originals:
            for m in matrices:
                self._originals.setdefault(m.name, m.weight.detach().clone())
        self._base = base
        for matrix, values in new:
            if values is None:
                with torch.no_grad():
                    matrix.weight.copy_(self._originals[matrix.name])
            else:
                matrix.put(values)
        self.applied = kept
        edited = {e.parameter for e in kept}
        self._originals = {n: original for n, original in self._originals.items() if n in edited}
        self.noted(lm)

    def _values(
        self, matrix: Matrix, edits: Sequence[WeightEdit], add: Sequence[WeightEdit], remove: Sequence[WeightEdit]
    ) -> Tensor | None:
        """The matrix as it shall be; None: its original."""
        if not self.keep_originals:
            values = matrix.values
            for sign, some in ((1, add), (-1, remove)):
                if own := [e for e in some if e.parameter == matrix.name]:
                    values = values + sign * matrix.change(own)
            return values
        if not edits:
            return None
        original = self._originals.get(matrix.name, matrix.weight)
        return Matrix(matrix.name, original, matrix.inputs_first).values + matrix.change(edits)


def ledger_of(lm: LanguageModel, *, keep_originals: bool | None = None) -> EditLedger:
    """The one ledger of a network. `keep_originals` (default: yes) can only be changed while it holds no edit."""
    ledger = _LEDGERS.setdefault(lm.net, EditLedger())
    if keep_originals is not None and keep_originals != ledger.keep_originals:
        if ledger.applied:
            raise UsageError("keep_originals is settled before the first edit: revert all edits first")
        ledger.keep_originals = keep_originals
    return ledger


def apply_edits(
    lm: LanguageModel, edits: WeightEdit | Iterable[WeightEdit], *, allow_mismatch: bool = False
) -> EditLedger:
    """Put edits into a network, to stay; the ledger takes them out. Errors are those of `EditLedger.apply`."""
    ledger = ledger_of(lm)
    ledger.apply(lm, [edits] if isinstance(edits, WeightEdit) else edits, allow_mismatch=allow_mismatch)
    return ledger


@contextlib.contextmanager
def edited(
    lm: LanguageModel, edits: WeightEdit | Iterable[WeightEdit], *, allow_mismatch: bool = False
) -> Iterator[EditLedger]:
    """The model with edits inside the context, and without these edits after any exit. Contexts nest."""
    items = [edits] if isinstance(edits, WeightEdit) else list(edits)
    ledger = apply_edits(lm, items, allow_mismatch=allow_mismatch)
    try:
        yield ledger
    finally:
        held = set(ledger.digests)
        ledger.revert(lm, [edit for edit in items if edit.digest in held])


@contextlib.contextmanager
def unedited(lm: LanguageModel) -> Iterator[None]:
    """The base inside the context: all edits out, and after any exit in again, in their order."""
    ledger = ledger_of(lm)
    held = ledger.applied
    ledger.revert(lm)
    try:
        yield
    finally:
        if held:
            ledger.apply(lm, held)
