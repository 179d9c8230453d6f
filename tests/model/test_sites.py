"""Sites and their patterns: what text names, what it expands to, and how errors help."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprobe.errors import ReprobeError, UnknownSite, UsageError
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS, UNIT_PARTS, Parts, Site, expand

QUICK = settings(deadline=None, max_examples=50)

DENSE = Parts("dense", (frozenset(LAYER_PARTS),) * 7, {"attn.heads": 5, "mlp.neurons": 23})
PARALLEL = Parts(
    "parallel",
    (frozenset(LAYER_PARTS) - {"resid.mid"},) * 3,
    {"attn.heads": 5, "mlp.neurons": 23},
    why_absent="blocks are parallel",
)
#: Only block 1 has neurons.
MIXED = Parts(
    "mixed",
    tuple(frozenset(LAYER_PARTS) - (set() if layer == 1 else {"mlp.neurons"}) for layer in range(3)),
    {"attn.heads": 5, "mlp.neurons": 4},
)
EXPERTS = Parts("experts", (frozenset(LAYER_PARTS) - {"mlp.neurons"},) * 3, {"attn.heads": 5})


def sites(parts: Parts = DENSE) -> st.SearchStrategy[Site]:
    layers = st.integers(0, parts.n_layers - 1)
    whole = st.builds(Site, st.sampled_from(LAYER_PARTS), layers)
    heads = st.builds(Site, st.just("attn.heads"), layers, st.integers(0, parts.units["attn.heads"] - 1))
    neurons = st.builds(Site, st.just("mlp.neurons"), layers, st.integers(0, parts.units["mlp.neurons"] - 1))
    return st.one_of(whole, heads, neurons, st.builds(Site, st.sampled_from(MODEL_PARTS)))


def names(found: tuple[Site, ...]) -> list[str]:
    return [str(site) for site in found]


# -- one site ------------------------------------------------------------------------------------------------


@QUICK
@given(sites())
def test_the_text_of_a_site_names_the_same_site(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert expand(str(site), DENSE) == (site,)
    assert expand(site, DENSE) == (site,)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid.post@12", Site("resid.post", 12)),
        ("attn.heads@12.3", Site("attn.heads", 12, 3)),
        ("mlp.neurons@7.1500", Site("mlp.neurons", 7, 1500)),
        (" embed ", Site("embed")),
        ("final", Site("final")),
    ],
)
def test_text_is_read_as_the_design_writes_it(text: str, site: Site) -> None:
    assert Site.parse(text) == site


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid.pots@3", r"unknown part 'resid\.pots'; did you mean 'resid\.post'"),
        ("hidden@3", "unknown part 'hidden'.*parts: embed, resid.pre, attn.heads"),
        ("resid.post", "needs a layer, e.g. 'resid.post@0'"),
        ("embed@0", "embed has no layer"),
        ("resid.post@3.1", "only attn.heads and mlp.neurons can be narrowed"),
        ("resid.post@*", "a pattern: expand it first"),
        ("resid.post@-1", "a pattern: expand it first"),
        ("resid.post@1.5.2", "not a site"),
        ("resid.post 3", "not a site"),
        ("", "not a site: ''"),
    ],
)
def test_text_that_names_no_site_is_an_error_that_helps(text: str, message: str) -> None:
    with pytest.raises(UnknownSite, match=message):
        Site.parse(text)


@pytest.mark.parametrize(("layer", "unit"), [(-1, None), (0, -2)])
def test_a_site_counts_from_zero(layer: int, unit: int | None) -> None:
    with pytest.raises(UnknownSite, match="count from 0"):
        Site("attn.heads", layer, unit)


@QUICK
@given(sites())
def test_the_whole_of_a_site_is_the_same_place_without_its_unit(site: Site) -> None:
    assert (site.whole.part, site.whole.layer, site.whole.unit) == (site.part, site.layer, None)
    assert site.whole.whole == site.whole


@QUICK
@given(st.lists(sites(), max_size=12))
def test_sites_can_be_sorted_and_narrowed_ones_follow_their_whole(some: list[Site]) -> None:
    wholes = [site.whole for site in some]
    ordered = sorted(some + wholes)
    assert sorted(wholes + some) == ordered
    for site in some:
        assert ordered.index(site.whole) <= ordered.index(site)


def test_the_error_is_a_usage_error_and_a_key_error_and_reads_plainly() -> None:
    with pytest.raises(UnknownSite) as info:
        Site.parse("resid.post")
    assert isinstance(info.value, ReprobeError | UsageError)
    assert isinstance(info.value, KeyError)
    assert str(info.value).startswith("'resid.post': ")


# -- patterns ------------------------------------------------------------------------------------------------


@QUICK
@given(
    st.sampled_from(LAYER_PARTS),
    st.none() | st.integers(-9, 9),
    st.none() | st.integers(-9, 9),
    st.none() | st.integers(-3, 3).filter(bool),
)
def test_a_slice_names_the_blocks_that_the_same_slice_of_python_does(
    part: str, start: int | None, stop: int | None, step: int | None
) -> None:
    short = ":".join("" if v is None else str(v) for v in (start, stop))
    layers = list(range(7))[start:stop:step]
    text = f"{part}@{short}" if step is None else f"{part}@{short}:{step}"
    if layers:
        assert expand(text, DENSE) == tuple(Site(part, layer) for layer in layers)
    else:
        with pytest.raises(UnknownSite, match="matches no block of dense"):
            expand(text, DENSE)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("resid.post@*", [f"resid.post@{i}" for i in range(7)]),
        ("resid.post@4:20:2", ["resid.post@4", "resid.post@6"]),
        ("resid.post@-1", ["resid.post@6"]),
        ("attn.heads@2.*", [f"attn.heads@2.{i}" for i in range(5)]),
        ("attn.heads@-2:.4", ["attn.heads@5.4", "attn.heads@6.4"]),
        ("mlp.neurons@0.22", ["mlp.neurons@0.22"]),
        ("embed, resid.mid@0 ,final,", ["embed", "resid.mid@0", "final"]),
        ("resid.post@4::, resid.post@3:6", [f"resid.post@{i}" for i in (4, 5, 6, 3)]),
    ],
)
def test_patterns_expand_in_the_order_written_and_name_no_site_twice(pattern: str, expected: list[str]) -> None:
    assert names(expand(pattern, DENSE)) == expected
    assert names(expand(pattern.split(","), DENSE)) == expected


def test_every_head_on_its_own_is_every_unit_of_every_block() -> None:
    found = expand("attn.heads@*.*", DENSE)
    assert len(found) == len(set(found)) == 7 * 5
    assert {site.layer for site in found} == set(range(7))
    assert {site.unit for site in found} == set(range(5))


@QUICK
@given(st.lists(sites(), min_size=1, max_size=8))
def test_expanding_sites_again_changes_nothing(some: list[Site]) -> None:
    once = expand(some, DENSE)
    assert expand(once, DENSE) == once == expand(",".join(str(site) for site in some), DENSE)


def test_a_star_takes_only_blocks_that_have_the_part() -> None:
    assert names(expand("mlp.neurons@*", MIXED)) == ["mlp.neurons@1"]
    assert names(expand("mlp.neurons@*.*", MIXED)) == [f"mlp.neurons@1.{i}" for i in range(4)]
    assert names(expand("mlp.neurons@1:", MIXED)) == ["mlp.neurons@1"]


@pytest.mark.parametrize(
    ("text", "parts", "message"),
    [
        ("mlp.out@32", DENSE, r"dense has blocks 0–6; parts: embed, .*, final\. Did you mean 'mlp\.out@6'\?"),
        ("mlp.out@-8", DENSE, "dense has blocks 0–6 .*-7 to -1"),
        ("attn.heads@0.5", DENSE, "attn.heads of dense has units 0–4"),
        ("attn.heads@*.5", DENSE, "attn.heads of dense has units 0–4"),
        ("resid.mid@1", PARALLEL, r"block 1 of parallel has no resid\.mid \(blocks are parallel\)"),
        ("resid.mid@*", PARALLEL, r"matches no block of parallel \(blocks are parallel\)"),
        ("resid.mid@9", PARALLEL, r"blocks 0–2; parts: (?!.*resid\.mid).*\.$"),
        ("mlp.neurons@0", MIXED, "block 0 of mixed has no mlp.neurons; parts there: embed, resid.pre"),
        ("mlp.neurons@0.*", MIXED, "block 0 of mixed has no mlp.neurons"),
        ("resid.post@0, mlp.neurons@0.*", EXPERTS, "block 0 of experts has no mlp.neurons"),
        ("resid.post@::0", DENSE, "step of a slice cannot be 0"),
        ("resid.post@-:2", DENSE, "not a site"),
        ("resid.post@*.0", DENSE, "can be narrowed"),
        ("embed@*", DENSE, "embed has no layer"),
        ("resid.pots@*", DENSE, "did you mean 'resid.post'"),
        (" , ", DENSE, "no site was named"),
        ("", DENSE, "no site was named"),
    ],
)
def test_a_pattern_that_names_nothing_in_the_model_is_an_error_that_says_what_exists(
    text: str, parts: Parts, message: str
) -> None:
    with pytest.raises(UnknownSite, match=message):
        expand(text, parts)


def test_no_sites_at_all_is_an_error() -> None:
    with pytest.raises(UnknownSite, match="no site was named"):
        expand([], DENSE)


@QUICK
@given(st.text(alphabet="residpostanheulm.@*:-0123456789, ", max_size=16))
def test_any_text_is_either_expanded_or_refused_in_our_own_words(text: str) -> None:
    try:
        found = expand(text, DENSE)
    except UnknownSite:
        return
    assert found
    assert all(DENSE.require(site) == site for site in found)


@QUICK
@given(sites())
def test_the_model_has_a_site_if_its_block_has_the_part_and_the_part_the_unit(site: Site) -> None:
    assert DENSE.require(site) == site
    assert site.unit is None or site.part in UNIT_PARTS
    has = site.layer is None or (site.layer < 3 and site.part in MIXED.of_layer[site.layer])
    has = has and (site.unit or 0) < MIXED.units.get(site.part, 1)
    if has:
        assert MIXED.require(site) == site
    else:
        with pytest.raises(UnknownSite):
            MIXED.require(site)
