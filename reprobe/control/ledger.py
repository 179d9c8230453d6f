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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reprobe.control.edits import Matrix, WeightEdit
from reprobe.errors import IdentityMismatch, UsageError
from reprobe.model.identity import ModelIdentity, digest_weights
from reprobe.model.language_model import LanguageModel


@dataclass
class _State:
    """What is known of one network. Held weakly by the network, so it must not hold it."""

    keep_originals: bool = True
    applied: tuple[WeightEdit, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    base: ModelIdentity | None = None
    weights: str = ""  # the digest that the last change left


_STATES: "weakref.WeakKeyDictionary[nn.Module, _State]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class EditLedger:
    """The edits in one network, in the order in which they were applied. Made by `ledger_of`.

    With `keep_originals` it holds a copy of each matrix that is being edited: weights are then the original plus the
    sum of the edits, rounded once, and reverting all gives the original bit for bit. Without, edits are added and
    subtracted, which leaves rounding errors.
    """

    lm: LanguageModel
    _state: _State = field(repr=False)

    @property
    def keep_originals(self) -> bool:
        return self._state.keep_originals

    @property
    def applied(self) -> tuple[WeightEdit, ...]:
        return self._state.applied

    @property
    def base(self) -> ModelIdentity:
        """The identity of the model without the ledger's edits.

        Without originals it stays what it was also where subtracted edits left rounding errors. Raises
        `IdentityMismatch` if the weights were changed meanwhile by something else.
        """
        if self._state.base is not None and digest_weights(self.lm.net) == self._state.weights:
            return self._state.base
        if self.applied:
            raise IdentityMismatch(
                f"the weights of {self.lm.name} were changed outside the ledger since the last of its "
                f"{len(self.applied)} edits: what these edits are edits of is no longer known. Load the model again"
            )
        return self.lm.identity

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(edit.digest for edit in self.applied)

    def apply(self, edits: Iterable[WeightEdit], *, allow_mismatch: bool = False) -> None:
        """Put edits into the network, all or none.

        Raises `IdentityMismatch` for an edit of another model, or one that was made after edits which are not in the
        network (unless `allow_mismatch`), `UsageError` for one that is in it already or does not fit.
        """
        new = tuple(edits)
        base = self.base
        held = set(self.digests)
        for edit in new:
            edit.base.require_same(base, f"the edit of {edit.parameter}", allow_mismatch=allow_mismatch)
            if missing := [d for d in edit.after if d not in held and not allow_mismatch]:
                raise IdentityMismatch(
                    f"the edit of {edit.parameter} was made after {len(missing)} edits that {self.lm.name} does not "
                    f"hold ({', '.join(d[:12] for d in missing)}): apply these first, or pass allow_mismatch=True"
                )
            if edit.digest in held:
                raise UsageError(f"{self.lm.name} holds the edit {edit.digest[:12]} of {edit.parameter} already")
            held.add(edit.digest)
        self._change(base, add=new, remove=())

    def revert(self, edits: Iterable[WeightEdit | str] | None = None) -> None:
        """Take edits out again (values, digests or their first letters; None: all), in any order.

        Raises `UsageError` for one that is not in the network.
        """
        if not self.applied and edits is None:
            return
        gone = self.applied if edits is None else tuple(self.find(edit) for edit in edits)
        self._change(self.base, add=(), remove=gone)

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

    def restore(self, base: ModelIdentity, applied: Sequence[WeightEdit], originals: dict[str, Tensor]) -> None:
        """Take over what another process recorded of the weights that were loaded. For `load_edited` only."""
        state = self._state
        state.base, state.applied, state.originals = base, tuple(applied), originals
        state.weights = digest_weights(self.lm.net)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The kept originals of the matrices that are edited now, as the network stores them."""
        return dict(self._state.originals)

    def _change(self, base: ModelIdentity, *, add: Sequence[WeightEdit], remove: Sequence[WeightEdit]) -> None:
        gone = {edit.digest for edit in remove}
        kept = (*(e for e in self.applied if e.digest not in gone), *add)
        matrices = [Matrix.of(self.lm, n) for n in dict.fromkeys(e.parameter for e in (*add, *remove))]
        # Everything that can be refused is computed before anything is written.
        new = [(m, self._values(m, [e for e in kept if e.parameter == m.name], add, remove)) for m in matrices]
        if self.keep_originals:
            for m in matrices:
                self._state.originals.setdefault(m.name, m.weight.detach().clone())
        self._state.base = base
        for matrix, values in new:
            if values is None:
                with torch.no_grad():
                    matrix.weight.copy_(self._state.originals[matrix.name])
            else:
                matrix.put(values)
        self._state.applied = kept
        edited = {e.parameter for e in kept}
        self._state.originals = {n: original for n, original in self._state.originals.items() if n in edited}
        self._state.weights = digest_weights(self.lm.net)

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
        original = self._state.originals.get(matrix.name, matrix.weight)
        return Matrix(matrix.name, original, matrix.inputs_first).values + matrix.change(edits)


def ledger_of(lm: LanguageModel, *, keep_originals: bool | None = None) -> EditLedger:
    """The one ledger of a network. `keep_originals` (default: yes) can only be changed while it holds no edit."""
    state = _STATES.setdefault(lm.net, _State())
    if keep_originals is not None and keep_originals != state.keep_originals:
        if state.applied:
            raise UsageError("keep_originals is settled before the first edit: revert all edits first")
        state.keep_originals = keep_originals
    return EditLedger(lm, state)


def apply_edits(
    lm: LanguageModel, edits: WeightEdit | Iterable[WeightEdit], *, allow_mismatch: bool = False
) -> EditLedger:
    """Put edits into a network, to stay; the ledger takes them out. Errors are those of `EditLedger.apply`."""
    ledger = ledger_of(lm)
    ledger.apply([edits] if isinstance(edits, WeightEdit) else edits, allow_mismatch=allow_mismatch)
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
        ledger.revert([edit for edit in items if edit.digest in held])


@contextlib.contextmanager
def unedited(lm: LanguageModel) -> Iterator[None]:
    """The base inside the context: all edits out, and after any exit in again, in their order."""
    ledger = ledger_of(lm)
    held = ledger.applied
    ledger.revert()
    try:
        yield
    finally:
        if held:
            # They may have been made after edits that were reverted since: what was in the network goes back into it.
            ledger.apply(held, allow_mismatch=True)
