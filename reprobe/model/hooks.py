"""The only hooks in the house: reading activations (`observe`, `follow`, `capture`, `visit`), changing (`intervene`).

Enters: a language model, sites, and objects that say what to do there. Leaves: tensors, and a network without a
trace of us after any exit. Does not know what an intervention means, which prompts run or where activations go.

How it works: each network that is being read or changed has one `Board`. It holds the forward hooks for every place
of the module tree (a `Tap`) that anybody needs: one that applies the interventions, in the order in which they were
entered, and one that shows the result to the observers. So an observer always sees what the rest of the network
sees, however the contexts are nested.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reprobe.errors import UnsupportedOperation
from reprobe.model.architectures import Tap
from reprobe.model.passes import PackedTokens, Pass, Prompts, Run, Tokens
from reprobe.model.sites import Site

if TYPE_CHECKING:
    from reprobe.model.language_model import LanguageModel

#: (module, side): a place in the module tree where a tensor passes.
_Place = tuple[nn.Module, str]


class Intervention(Protocol):
    """What `intervene` needs to know of an intervention."""

    @property
    def site(self) -> Site: ...

    @property
    def by_role(self) -> bool:
        """Whether it matters to it which tokens are prompt and which are generated."""
        ...

    @property
    def by_prompt(self) -> bool:
        """Whether what it does to a token depends on which prompt that belongs to, and not only on what precedes it."""
        ...

    def apply(self, h: Float[Tensor, "rows columns width"], tokens: Tokens) -> Float[Tensor, "rows columns width"]:
        """The new value at the site, or `h` itself. Must not change `h` in place, nor touch pads."""
        ...


#: Takes a site and its value (rows, columns, width); the tensor is only valid during the call.
Observer = Callable[[Site, Tensor], None]
#: Is told of each pass before its first site.
Follower = Callable[[Pass], None]


class _Stop(Exception):
    """Ends a forward pass after the last wanted site."""


class Board:
    """The hooks of one network. Made by `board_of`; use `observe`, `capture` and `intervene` instead."""

    def __init__(self, stack: nn.Module, locate: Callable[[Site], tuple[Tap, slice | None]]) -> None:
        # Weak: the table of boards must not keep a network alive through its own value.
        self._stack = weakref.ref(stack)
        self._locate = locate
        self._interventions: list[Intervention] = []
        self._observers: list[tuple[Site, Observer]] = []
        self._followers: list[Follower] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._run: Run | PackedTokens | None = None
        self._direct: Run | None = None  # the run of a network that is called directly
        self._fresh = True  # no pass of the present prompts has run yet
        self._tokens: Tokens | None = None
        self._pre: dict[int, Tensor] = {}  # resid.pre of blocks whose resid.mid is being written
        self._shape = (0, 0)  # rows and columns of the present pass

    @property
    def changed(self) -> bool:
        """Whether any intervention is active."""
        return bool(self._interventions)

    @property
    def followed(self) -> bool:
        """Whether anybody follows the passes."""
        return bool(self._followers)

    @property
    def by_prompt(self) -> bool:
        """Whether any intervention must be told which prompt a token belongs to."""
        return any(i.by_prompt for i in self._interventions)

    # -- contexts ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def entered(
        self,
        interventions: Sequence[Intervention] = (),
        observers: Sequence[tuple[Site, Observer]] = (),
        followers: Sequence[Follower] = (),
    ) -> Iterator[None]:
        try:
            self._interventions = [*self._interventions, *interventions]
            self._observers = [*self._observers, *observers]
            self._followers = [*self._followers, *followers]
            self._install()
            yield
        finally:
            # By identity, not by position: contexts may be left in another order than they were entered.
            self._interventions = _without(self._interventions, interventions)
            self._observers = _without(self._observers, observers)
            self._followers = _without(self._followers, followers)
            self._install()

    @contextlib.contextmanager
    def told(self, prompts: Prompts | PackedTokens) -> Iterator[None]:
        """Say which tokens run inside: `Prompts` with what is generated from them, or those of each scoring pass."""
        before = self._run
        self._run, self._fresh = Run(prompts) if isinstance(prompts, Prompts) else prompts, True
        try:
            yield
        finally:
            self._run, self._fresh = before, True

    @contextlib.contextmanager
    def standing(self, tokens: Tokens) -> Iterator[None]:
        """Say which tokens the blocks hold that are called one by one inside, without a pass of the network."""
        before = self._tokens, self._shape
        self._tokens, self._shape = tokens, (tokens.rows, tokens.now)
        try:
            yield
        finally:
            self._tokens, self._shape = before

    # -- hooks ------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        """Make the installed hooks exactly those that the present interventions and observers need."""
        self._clear()
        self._tokens = None
        if not (self._interventions or self._followers):
            self._direct = None  # passes are not noted any more
        self._pre.clear()
        try:
            self._register()
        except BaseException:  # half-way through: leave nothing behind
            self._clear()
            raise
        _eager_while_hooked(self, bool(self._handles))

    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _eager_while_hooked(self, False)

    def _register(self) -> None:
        # Changes go before everybody else's hooks on a module (transformers records output_hidden_states with hooks
        # of its own), observers after them: they see what the next module sees.
        changes: dict[_Place, tuple[Tap, list[Callable[[Tensor], Tensor]]]] = {}
        shows: dict[_Place, tuple[Tap, list[Callable[[Tensor], Tensor]]]] = {}

        def change(tap: Tap, step: Callable[[Tensor], Tensor]) -> None:
            changes.setdefault((tap.module, tap.side), (tap, []))[1].append(step)

        mids = [i for i in self._interventions if i.site.part == "resid.mid"]
        for item in self._interventions:
            if item.site.part != "resid.mid":
                tap, part = self._locate(item.site)
                change(tap, self._changer(item, tap, part))
        for layer in sorted({int(i.site.layer or 0) for i in mids}):
            # The stream's middle is no module's output: the block adds attn.out to resid.pre itself. So resid.mid is
            # written through attn.out, by the difference.
            here = [i for i in mids if i.site.layer == layer]
            change(self._locate(Site("resid.pre", layer))[0], self._keep_pre(layer))
            tap, _ = self._locate(Site("attn.out", layer))
            change(tap, self._mid_changer(layer, tap.scale, here))
        for site, observer in self._observers:
            tap, _ = self._locate(site)
            shows.setdefault((tap.module, tap.side), (tap, []))[1].append(self._shower(site, observer))
        stack = self._stack()
        if (changes or shows) and stack is not None:
            self._handles.append(stack.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        for places, first in ((changes, True), (shows, False)):
            for tap, steps in places.values():
                whole = self._flat(steps) if tap.flat else _chain(steps)
                if tap.side == "in":
                    hook = _input_hook(whole)
                    handle = tap.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
                else:
                    after = whole.hook() if isinstance(whole, _Whole) else _output_hook(whole)
                    handle = tap.module.register_forward_hook(after, prepend=first)
                self._handles.append(handle)

    def _flat(self, steps: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        change = _chain(steps)

        def step(raw: Tensor) -> Tensor:
            h = raw.view(*self._shape, raw.shape[-1])
            new = change(h)
            return raw if new is h else new.flatten(0, 1)

        return step

    def _changer(self, item: Intervention, tap: Tap, part: slice | None) -> Callable[[Tensor], Tensor]:
        def step(raw: Tensor) -> Tensor:
            h = raw * tap.scale
            new = _apply(item, h, part, self._here())
            return raw if new is h else new / tap.scale

        return _Whole(self, item) if part is None and tap.scale == 1.0 else step

    def _keep_pre(self, layer: int) -> Callable[[Tensor], Tensor]:
        def step(raw: Tensor) -> Tensor:
            self._pre[layer] = raw
            return raw

        return step

    def _mid_changer(self, layer: int, scale: float, items: Sequence[Intervention]) -> Callable[[Tensor], Tensor]:
        def step(raw: Tensor) -> Tensor:
            mid = self._pre.pop(layer) + raw * scale
            new = mid
            for item in items:
                new = item.apply(new, self._here())
            return raw if new is mid else raw + (new - mid) / scale

        return step

    def _shower(self, site: Site, observer: Observer) -> Callable[[Tensor], Tensor]:
        tap, part = self._locate(site)

        def step(raw: Tensor) -> Tensor:
            h = raw if part is None else raw[..., part]
            observer(site, h if tap.scale == 1.0 else h * tap.scale)
            return raw

        return step

    # -- which tokens -----------------------------------------------------------------------------------------

    def _here(self) -> Tokens:
        """The tokens of the present pass."""
        if self._tokens is None:
            raise UnsupportedOperation(
                "a block was called outside the network's own forward pass, so it is not known which tokens are "
                "pads; call the model as a whole"
            )
        return self._tokens

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass of the blocks: note its shape, and for interventions and followers its tokens."""
        first = kwargs.get("input_ids")
        if not isinstance(first, Tensor):
            given = (kwargs.get("inputs_embeds"), kwargs.get("hidden_states"), *args)
            first = next(value for value in given if isinstance(value, Tensor))
        rows, now = self._shape = int(first.shape[0]), int(first.shape[1])
        if not (self._interventions or self._followers):
            return
        if isinstance(self._run, PackedTokens):
            if self._followers:
                raise UnsupportedOperation(
                    "lm.logprobs computes beginnings that texts share once, so its rows are not the prompts and cannot "
                    "be monitored; use lm.logits(prompts) or lm.generate"
                )
            self._tokens = self._run
            return
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        told = self._run is not None
        run = self._run or self._called_directly(first, past, args, kwargs)
        ids = None if first.is_floating_point() else first
        if self._followers:
            fresh = self._fresh or (past == 0 and not told)
            for follower in self._followers:
                follower(Pass(run.prompts, fresh, past, rows, now, ids))
        self._fresh = False
        if self._interventions:
            self._tokens = Tokens(run, rows, past, now, ids)

    def _called_directly(self, ids: Tensor, past: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """The run of a pass that nobody told of: its prompts are what the first pass of its sequence held."""
        rows, columns = int(ids.shape[0]), past + int(ids.shape[1])
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if kwargs.get("use_cache") is False and (self._followers or any(i.by_role for i in self._interventions)):
            raise UnsupportedOperation(
                "the network was called directly and without a cache, so prompt and generated tokens cannot be told "
                "apart, and an active intervention or monitor depends on that; use lm.generate(…, use_cache=False) or "
                "lm.logits"
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UnsupportedOperation(
                "the network was called directly with a prepared attention mask, so it is not known which tokens "
                "are pads; use lm.generate or lm.logits while steering or monitoring, or pass the 2-D mask"
            )
        real = torch.ones(rows, columns, dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        if past == 0 or self._direct is None:  # the first pass of a sequence that we see is its prompt
            self._direct = Run(Prompts(real, columns, None))
        else:
            self._direct = Run(Prompts(real, self._direct.prompts.width, None), self._direct.memory)
        return self._direct


class _Whole:
    """One intervention on the whole tensor that passes.

    This runs at every block for every token, after weights have swept the caches: each Python frame and each attribute
    is felt, so that where it is alone it makes a hook of its own.
    """

    def __init__(self, board: Board, item: Intervention) -> None:
        self._board, self._apply = board, item.apply

    def __call__(self, raw: Tensor) -> Tensor:
        return self._apply(raw, self._board._here())

    def hook(self) -> Callable[[nn.Module, Any, Any], Any]:
        board, apply = self._board, self._apply

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return apply(output, board._tokens or board._here())
            return (apply(output[0], board._here()), *output[1:])

        return after


#: Boards with hooks, by id, and what keeps compiled code from running while there are any.
_HOOKED: set[int] = set()
_EAGER = contextlib.ExitStack()


def _eager_while_hooked(board: Board, hooked: bool) -> None:
    """Run networks without torch.compile's code while any has hooks of ours.

    Compiled code knows nothing of hooks that came after it, and what is compiled with hooks keeps them (torch does not
    guard on hooks, see `skip_nnmodule_hook_guards`): steering would silently do nothing, or never end.
    """
    before = bool(_HOOKED)
    (_HOOKED.add if hooked else _HOOKED.discard)(id(board))
    if _HOOKED and not before:
        _EAGER.enter_context(torch.compiler.set_stance("force_eager"))
    elif before and not _HOOKED:
        _EAGER.close()


def _apply(item: Intervention, h: Tensor, part: slice | None, tokens: Tokens) -> Tensor:
    if part is None:
        return item.apply(h, tokens)
    piece = h[..., part]
    new = item.apply(piece, tokens)
    return h if new is piece else torch.cat([h[..., : part.start], new, h[..., part.stop :]], -1)


def _chain(steps: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if len(steps) == 1:
        return steps[0]

    def change(h: Tensor) -> Tensor:
        for step in steps:
            h = step(h)
        return h

    return change


def _input_hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = change(args[0])
            return None if new is args[0] else ((new, *args[1:]), kwargs)
        new = change(kwargs["hidden_states"])  # blocks may get their input as a keyword
        return None if new is kwargs["hidden_states"] else (args, {**kwargs, "hidden_states": new})

    return hook


def _output_hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        new = change(output[0])
        return None if new is output[0] else (new, *output[1:])

    return hook


def _without(items: list[Any], gone: Sequence[Any]) -> list[Any]:
    ids = [id(g) for g in gone]
    kept = []
    for item in reversed(items):  # the last entered of equal objects is the one that leaves
        if id(item) in ids:
            ids.remove(id(item))
        else:
            kept.append(item)
    return kept[::-1]


_BOARDS: "weakref.WeakKeyDictionary[nn.Module, Board]" = weakref.WeakKeyDictionary()


def board_of(lm: "LanguageModel") -> Board:
    """The one board of a network."""
    board = _BOARDS.get(lm.net)
    if board is None:
        ref, architecture = weakref.ref(lm.net), lm.architecture

        def locate(site: Site) -> tuple[Tap, slice | None]:
            net = ref()
            assert net is not None  # the table drops the board together with its network
            tap = architecture.tap(net, site.whole)
            if site.unit is None:
                return tap, None
            width = architecture.width(net, site)
            return tap, slice(site.unit * width, (site.unit + 1) * width)

        board = _BOARDS[lm.net] = Board(architecture.stack(lm.net), locate)
    return board


@contextlib.contextmanager
def observe(
    lm: "LanguageModel",
    sites: Iterable[Site | str] | Site | str,
    select: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[Site, Tensor]]:
    """Read activations of whatever runs inside the context.

    Yields a dict that after each forward pass holds, per site, the activations of that pass: (rows, columns, width)
    in the network's dtype, on its device, detached copies; or what `select` maps them to. With interventions active it
    shows what the rest of the network sees. Raises `UnknownSite`.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, h: Tensor) -> None:
        # A copy: some families go on to change the tensor in place (`mlp_output += attention_output`).
        seen[site] = (h if select is None else select(h)).detach().clone()

    with board_of(lm).entered(observers=[(site, keep) for site in lm.sites(sites)]):
        yield seen


@contextlib.contextmanager
def follow(lm: "LanguageModel", sites: Mapping[Site, Observer], follower: Follower) -> Iterator[None]:
    """Show every pass inside the context: `follower` learns which tokens it holds, then each site's observer its value.

    For those who compute from activations as they pass, and need pads and generated tokens told apart. Where that is
    not known, or where rows are no prompts (`lm.logprobs`), passes are refused with `UnsupportedOperation`.
    """
    with board_of(lm).entered(observers=list(sites.items()), followers=[follower]):
        yield


@contextlib.contextmanager
def intervene(lm: "LanguageModel", interventions: Iterable[Intervention]) -> Iterator[None]:
    """Change activations of whatever runs inside the context, in the order given; contexts nest, outer first.

    Raises `UnknownSite` if the model lacks a site, `UnsupportedOperation` for encoders. After any exit the network
    has the hooks it had before.
    """
    items = list(interventions)
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.architecture.family} is an encoder: its sites can be read, not written")
    for item in items:
        lm.parts.require(item.site)
    with board_of(lm).entered(interventions=items):
        yield


@contextlib.contextmanager
def called(
    modules: Iterable[nn.Module], keep: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Tell `keep` of every call of these modules inside the context, with its arguments. Changes nothing of the run."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def computed(module: nn.Module, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `compute(x)` stand in for what `module` makes of x (rows, columns, width) inside the context.

    The module itself is called with none of the columns. Others' hooks that come before see x, those after the result.
    """
    given: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given[:] = args[:1]
        return (args[0][:, :0], *args[1:])

    def give(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        return compute(given.pop())

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(take).remove)
        stack.callback(module.register_forward_hook(give, prepend=True).remove)
        yield


def capture(
    lm: "LanguageModel",
    inputs: Mapping[str, Any],
    sites: Iterable[Site | str] | Site | str,
    select: Callable[[Tensor], Tensor] | None = None,
    *,
    gradients: bool = False,
) -> dict[Site, Tensor]:
    """Run the stack of blocks (no unembedding) on `inputs` only as far as the last wanted site, and read.

    `inputs` are the trunk's keyword arguments (input_ids, attention_mask, position_ids …). `select` maps a site's
    (rows, columns, width) to what should be kept of it and must return a new tensor; it runs on the device, so that
    unwanted tokens are never copied anywhere. Without it all is kept. Runs without gradients, unless they are wanted.
    Raises `UnknownSite`.
    """
    wanted = lm.sites(sites)
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, h: Tensor) -> None:
        seen[site] = h.clone() if select is None else select(h)

    visit(lm, inputs, wanted, keep, gradients=gradients)
    return {site: seen[site] for site in wanted}


def visit(
    lm: "LanguageModel",
    inputs: Mapping[str, Any],
    sites: Sequence[Site],
    observer: Observer,
    *,
    gradients: bool = False,
) -> None:
    """`capture` for those who compute from a site's value as it passes, while it is in the cache, and keep nothing."""
    seen: set[Site] = set()
    wanted = set(sites)

    def show(site: Site, h: Tensor) -> None:
        observer(site, h)
        seen.add(site)
        if len(seen) == len(wanted):
            raise _Stop

    board, mask = board_of(lm), inputs.get("attention_mask")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(board.entered(observers=[(site, show) for site in sites]))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            stack.enter_context(board.told(Prompts(mask.bool(), int(mask.shape[1]), {})))
        stack.enter_context(contextlib.suppress(_Stop))
        lm.architecture.trunk(lm.net)(**inputs, **lm.no_cache)
