import dataclasses
import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save as save_arrays
from store import synthetic

from reprobe.errors import (
    ArtifactExists,
    ArtifactMissing,
    CorruptArtifact,
    IdentityMismatch,
    ReprobeError,
    SchemaMismatch,
    UnknownSite,
    UsageError,
)
from reprobe.model.sites import Site
from reprobe.probing.artifact import Artifact, to_bytes
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.store import ActivationStore

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
finite = st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3)
vectors = arrays(np.float64, st.integers(1, 9), elements=st.floats(-1e6, 1e6)).filter(lambda v: np.abs(v).max() > 1e-3)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
labels = st.booleans() | st.integers(-5, 5) | st.text(max_size=5)


@st.composite
def directions(draw, width=None):
    v = draw(vectors) if width is None else draw(arrays(np.float64, width, elements=finite))
    return dataclasses.replace(
        Direction.from_vector("resid.post@2", v, scale=abs(draw(finite)), offset=draw(finite)),
        sign=draw(st.text()),
        reader=draw(st.text()),
        params=draw(st.dictionaries(st.text(), plain, max_size=3)),
        metrics=draw(st.dictionaries(st.text(), plain, max_size=3)),
        provenance={"note": draw(plain)},
        classes=draw(st.none() | st.tuples(labels, labels)),
    )


@QUICK
@given(d=directions())
def test_a_direction_survives_a_file_bit_for_bit(d, tmp_path):
    back = Direction.load(d.save(tmp_path / "d.safetensors", overwrite=True))
    assert back == d
    assert back.vector.tobytes() == d.vector.tobytes()
    assert (back.offset, back.scale, back.classes, back.params) == (d.offset, d.scale, d.classes, d.params)
    assert [type(c) for c in back.classes or ()] == [type(c) for c in d.classes or ()]


def test_equal_directions_make_equal_files_and_unequal_ones_differ(tmp_path, identity):
    a = Direction.from_vector("resid.post@2", [3.0, 4.0], identity=identity)
    b = Direction.from_vector("resid.post@2", [3.0, 4.0], identity=identity)
    assert a.save(tmp_path / "a").read_bytes() == b.save(tmp_path / "b").read_bytes()
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest == b.digest
    assert a != a.at("resid.post@3")
    assert a != dataclasses.replace(a, metrics={"accuracy": 0.5})


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(data, tmp_path):
    d = Direction.from_vector("attn.heads@1.2", np.arange(1.0, 6.0))
    good = d.save(tmp_path / "good", overwrite=True).read_bytes()
    bad = bytearray(good)
    i = data.draw(st.integers(0, len(good) - 1))
    bad[i] ^= data.draw(st.integers(1, 255))
    (tmp_path / "bad").write_bytes(bytes(bad))
    try:
        loaded = Direction.load(tmp_path / "bad")
    except ReprobeError:
        return
    assert loaded == d, "only a change without meaning, such as another space, may pass"


def test_what_is_no_direction_is_refused_with_its_own_error(tmp_path):
    d = Direction.from_vector("resid.post@0", [1.0, 2.0])
    path = d.save(tmp_path / "sub" / "d.safetensors")
    with pytest.raises(ArtifactExists, match="overwrite=True"):
        d.save(path)
    with pytest.raises(ArtifactExists, match="folder"):
        d.save(tmp_path, overwrite=True)
    with pytest.raises(ArtifactMissing, match="no such direction"):
        Direction.load(tmp_path / "absent")
    with pytest.raises(ArtifactMissing, match="folder"):
        Direction.load(tmp_path)
    (tmp_path / "text").write_text("not safetensors at all")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-3])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "cut", "empty"):
        with pytest.raises(CorruptArtifact):
            Direction.load(tmp_path / name)
    (tmp_path / "grid").write_bytes(to_bytes("probe grid", Artifact({}, {"vector": d.vector})))
    with pytest.raises(UsageError, match="holds a probe grid, not a direction"):
        Direction.load(tmp_path / "grid")
    (tmp_path / "odd").write_bytes(to_bytes("direction", Artifact({"site": 3}, {"vector": d.vector})))
    with pytest.raises(CorruptArtifact):
        Direction.load(tmp_path / "odd")
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["d.safetensors"]  # no temporary files


@pytest.mark.parametrize(("file", "library", "says"), [(2, 1, "a newer reprobe"), (2, 3, "an older reprobe")])
def test_a_file_of_another_schema_says_both_versions_and_what_to_do(file, library, says, tmp_path, monkeypatch):
    d = Direction.from_vector("resid.post@0", [1.0])
    monkeypatch.setattr("reprobe.probing.artifact.SCHEMA", file)
    path = d.save(tmp_path / "d")
    monkeypatch.setattr("reprobe.probing.artifact.SCHEMA", library)
    for load in (Direction.load, ProbeGrid.load):
        with pytest.raises(SchemaMismatch, match=says) as caught:
            load(path)
        told = str(caught.value)
        assert str(path) in told
        assert f"it has schema version {file}" in told
        assert f"reprobe {version('reprobe-lm')} reads version {library}" in told
        assert ("Upgrade" in told) == (file > library)


def test_a_newer_schema_is_told_of_whatever_else_its_header_holds(tmp_path):
    envelope = {"schema": 2, "kind": ["of", "another", "form"]}
    path = tmp_path / "d"
    path.write_bytes(save_arrays({"anything": np.ones(2)}, metadata={"reprobe": json.dumps(envelope)}))
    with pytest.raises(SchemaMismatch, match="schema version 2"):
        Direction.load(path)
    for schema in ("2", None, 0, -1, True, 1.5):
        path.write_bytes(save_arrays({"vector": np.ones(2)}, metadata={"reprobe": json.dumps({"schema": schema})}))
        with pytest.raises(CorruptArtifact, match="schema"):
            Direction.load(path)


@pytest.mark.parametrize("rows", [(), (4,), (2, 3)])
def test_score_and_project_take_numpy_and_torch_and_return_the_same_kind(rows):
    rng = np.random.default_rng(0)
    d = Direction.from_vector("resid.post@0", rng.standard_normal(6), offset=0.7)
    h = rng.standard_normal((*rows, 6))
    expected = np.einsum("...d,d->...", h, d.vector)
    np.testing.assert_allclose(d.project(h), expected, atol=1e-12)
    np.testing.assert_allclose(d.score(h), expected - 0.7, atol=1e-12)
    for dtype, kept, tolerance in (
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 5e-2),
    ):
        out = d.score(torch.tensor(h, dtype=dtype))
        assert out.dtype == kept
        assert tuple(out.shape) == rows
        np.testing.assert_allclose(out.numpy(), expected - 0.7, atol=tolerance)


def test_a_store_is_scored_at_the_directions_own_site_or_not_at_all(tmp_path):
    with synthetic.create(tmp_path / "s", dtype="float16") as writer:
        synthetic.fill(writer)
    store = ActivationStore.open(tmp_path / "s")
    for name in ("resid.post@2", "attn.heads@1.3", "final"):
        h = store.read(name).double().numpy()
        v = np.random.default_rng(0).standard_normal(h.shape[1])
        d = Direction.from_vector(name, v, offset=0.7, identity=store.identity)
        with np.errstate(invalid="ignore", over="ignore"):
            np.testing.assert_allclose(d.score_rows(store), h @ d.vector - 0.7, rtol=1e-9)
            np.testing.assert_allclose(d.score_rows(store, [5, 2]), (h @ d.vector - 0.7)[[5, 2]], rtol=1e-9)
    assert d.score_rows(store, []).shape == (0,)
    with pytest.raises(UnknownSite, match=r"'resid\.post@1' is not in .*it has resid\.post@2"):
        d.at("resid.post@1").score_rows(store)
    with pytest.raises(UsageError, match="no site of its own"):
        Direction(None, d.vector).score_rows(store)
    with pytest.raises(UsageError, match=r"are they of final\?"):
        d.score(store.read("attn.heads@1.3"))
    other = dataclasses.replace(d, provenance={"identity": store.identity.to_json() | {"weights": "e" * 64}})
    with pytest.raises(IdentityMismatch, match="weights"):
        other.score_rows(store)
    assert len(other.score_rows(store, allow_mismatch=True)) == store.rows
    with pytest.raises(UsageError, match="width 3"):
        Direction.from_vector("final", np.ones(3)).score_rows(store)


def test_gradients_flow_through_a_score():
    d = Direction.from_vector("resid.post@0", [3.0, 4.0])
    h = torch.zeros(2, requires_grad=True)
    d.score(h).backward()
    np.testing.assert_allclose(h.grad.numpy(), [0.6, 0.8], rtol=1e-6)


@QUICK
@given(a=directions(width=5), b=directions(width=5), k=finite, h=arrays(np.float64, (3, 5), elements=finite))
def test_steps_and_scaled_scores_are_linear(a, b, k, h):
    size = a.scale + b.scale

    def worth(d):
        return d.scale * d.score(h)

    try:
        total = a + b
    except UsageError:
        assert np.linalg.norm(a.step + b.step) < 1e-9 * size
        return
    np.testing.assert_allclose(total.step, a.step + b.step, atol=1e-9 * size)
    magnitude = size * (np.abs(h).max() + abs(a.offset) + abs(b.offset))
    np.testing.assert_allclose(worth(total), worth(a) + worth(b), atol=1e-9 * magnitude)
    np.testing.assert_allclose((k * a).step, k * a.step, rtol=1e-12)
    np.testing.assert_allclose(worth(a * k), k * worth(a), rtol=1e-9, atol=1e-9 * abs(k) * magnitude)
    np.testing.assert_allclose(
        (a - b if a.cosine(b) < 0.99 else a + b).scale,
        np.linalg.norm(a.step - b.step if a.cosine(b) < 0.99 else a.step + b.step),
        rtol=1e-9,
    )


@QUICK
@given(d=directions())
def test_negation_turns_the_classes_round_and_twice_is_nothing(d):
    turned = -d
    assert -turned == d
    assert (-d).classes == (None if d.classes is None else d.classes[::-1])
    h = np.linspace(-1, 1, d.width)
    assert (-d).score(h) == -d.score(h)
    assert d.cosine(-d) == pytest.approx(-1, abs=1e-12)
    assert d * -1.0 == -d
    assert np.float64(2.0) * d == d * 2


def test_directions_of_other_sites_or_models_do_not_add_up(identity):
    d = Direction.from_vector("resid.post@1", [1.0, 0.0], identity=identity)
    other = dataclasses.replace(identity, weights="c" * 64)
    with pytest.raises(UsageError, match="one site only"):
        d + d.at("resid.post@2")
    with pytest.raises(IdentityMismatch, match="weights"):
        d + Direction.from_vector("resid.post@1", [1.0, 0.0], identity=other)
    with pytest.raises(IdentityMismatch, match="does not say"):
        d + Direction.from_vector("resid.post@1", [1.0, 0.0])
    with pytest.raises(UsageError, match="cancel"):
        d - d
    with pytest.raises(UsageError, match="nowhere"):
        0 * d
    with pytest.raises(TypeError):
        d + 1
    with pytest.raises(TypeError):
        d * "2"
    assert (d + d).identity == identity
    assert [t["site"] for t in (d + d).provenance["terms"]] == ["resid.post@1"] * 2


@QUICK
@given(data=st.data(), h=arrays(np.float64, (3, 5), elements=finite))
def test_what_is_left_stands_at_a_right_angle_and_its_score_is_what_is_left_of_the_score(data, h):
    d = data.draw(directions(width=5))
    against = data.draw(st.lists(directions(width=5), min_size=1, max_size=3))
    try:
        left = d.orthogonalise(*against)
    except UsageError:
        W = np.stack([a.vector for a in against])
        assert np.linalg.norm(d.vector - W.T @ np.linalg.lstsq(W.T, d.vector)[0]) < 1e-8
        return
    assert max(abs(left.cosine(a)) for a in against) < 1e-12
    # Least squares by another road: what of v the others explain, and what of the scores goes with it.
    W = np.stack([a.vector for a in against])
    c = np.linalg.pinv(W.T, rcond=1e-11) @ d.vector
    n = left.scale / d.scale
    np.testing.assert_allclose(n * left.vector, d.vector - c @ W, atol=1e-9)
    explained = sum(k * a.score(h) for k, a in zip(c, against, strict=True))
    size = np.abs(h).max() + abs(d.offset) + (np.abs(c) * [abs(a.offset) for a in against]).sum()
    np.testing.assert_allclose(n * left.score(h), d.score(h) - explained, atol=1e-8 * size * max(1, np.abs(c).max()))
    assert left.classes == d.classes
    assert left.metrics == {}


@QUICK
@given(data=st.data())
def test_gram_schmidt_is_idempotent_and_free_of_the_order_and_the_signs(data):
    d, a, b = (data.draw(directions(width=5)) for _ in range(3))
    assume(abs(a.cosine(b)) <= 0.99)  # of nearly dependent ones, rounding decides
    assume(abs(np.linalg.det(np.corrcoef([d.vector, a.vector, b.vector]))) >= 1e-4)
    one = d.orthogonalise(a, b)
    for other in (d.orthogonalise(b, a), d.orthogonalise(-a, 3 * b), one.orthogonalise(a, b)):
        np.testing.assert_allclose(other.step, one.step, rtol=1e-6, atol=1e-9 * d.scale)
        size = abs(d.offset) + abs(a.offset) + abs(b.offset)
        assert other.offset == pytest.approx(one.offset, rel=1e-6, abs=1e-4 * size)


def test_orthogonal_directions_stay_as_they_are():
    d = Direction.from_vector("resid.post@1", [1.0, 0.0, 0.0], scale=2.0, offset=0.3)
    left = d.orthogonalise(Direction.from_vector("resid.post@1", [0.0, 5.0, 0.0], offset=9.0))
    assert (left.vector.tolist(), left.scale, left.offset) == ([1.0, 0.0, 0.0], 2.0, 0.3)
    # By hand: v = (0.6, 0.8), w = (1, 0): c = 0.6, n = 0.8; (o − c·o_w) / n = (1 − 0.6·2) / 0.8.
    w = Direction.from_vector("resid.post@1", [1.0, 0.0], offset=2.0)
    left = Direction.from_vector("resid.post@1", [3.0, 4.0], offset=1.0).orthogonalise(w, w)
    np.testing.assert_allclose(left.vector, [0.0, 1.0], atol=1e-15)
    assert left.scale == pytest.approx(4.0)
    assert left.offset == pytest.approx(-0.25)


def test_gram_schmidt_is_refused_where_it_has_no_meaning(identity):
    d = Direction.from_vector("resid.post@1", [1.0, 2.0])
    with pytest.raises(UsageError, match="nothing is left"):
        d.orthogonalise(-3 * d)
    with pytest.raises(UsageError, match="against what"):
        d.orthogonalise()
    with pytest.raises(UsageError, match="one site only"):
        d.orthogonalise(d.at("resid.post@2"))
    with pytest.raises(IdentityMismatch, match="does not say"):
        d.orthogonalise(Direction.from_vector("resid.post@1", [1.0, 0.0], identity=identity))


@QUICK
@given(data=st.data(), h=arrays(np.float64, (3, 5), elements=finite))
def test_a_mean_is_the_mean_of_steps_and_of_scaled_scores(data, h):
    terms = [dataclasses.replace(d, classes=None) for d in data.draw(st.lists(directions(width=5), min_size=1))]
    size = sum(d.scale for d in terms)
    try:
        mean = Direction.mean(terms)
    except UsageError:
        assert np.linalg.norm(sum(d.step for d in terms)) < 1e-9 * size
        return
    np.testing.assert_allclose(mean.step, np.mean([d.step for d in terms], axis=0), atol=1e-12 * size)
    worth = np.mean([d.scale * d.score(h) for d in terms], axis=0)
    magnitude = size * (np.abs(h).max() + max(abs(d.offset) for d in terms))
    np.testing.assert_allclose(mean.scale * mean.score(h), worth, atol=1e-9 * magnitude)
    if len(terms) == 2:
        half = 0.5 * (terms[0] + terms[1])
        np.testing.assert_allclose(half.step, mean.step, atol=1e-12 * size)
        assert half.offset == pytest.approx(mean.offset, rel=1e-9)


def test_a_mean_over_blocks_is_of_a_site_that_is_said_and_of_one_positive_class(identity):
    one = dataclasses.replace(
        Direction.from_vector("resid.post@1", [2.0, 0.0], offset=1.0, identity=identity), classes=("no", "yes")
    )
    other = dataclasses.replace(
        Direction.from_vector("resid.post@2", [0.0, -2.0], offset=3.0, identity=identity), classes=("yes", "no")
    )
    mean = Direction.mean([one, other], site="resid.post@2")
    assert str(mean.site) == "resid.post@2"
    assert mean.classes == ("no", "yes")
    assert mean.identity == identity
    np.testing.assert_allclose(mean.step, [1.0, 1.0])
    # (2·1 + 2·(−3)) / 2 over a step of length √2.
    assert mean.offset == pytest.approx(-2 / np.sqrt(2))
    assert [t["site"] for t in mean.provenance["terms"]] == ["resid.post@1", "resid.post@2"]
    with pytest.raises(UsageError, match=r"several sites \(resid\.post@1, resid\.post@2\)"):
        Direction.mean([one, other])
    with pytest.raises(UsageError, match="same two classes"):
        Direction.mean([one, dataclasses.replace(one, classes=("no", "perhaps"))])
    with pytest.raises(UsageError, match="same two classes"):
        Direction.mean([one, dataclasses.replace(one, classes=None)])
    with pytest.raises(UsageError, match="different widths"):
        Direction.mean([one, Direction.from_vector("resid.post@1", [1.0], identity=identity)])
    with pytest.raises(IdentityMismatch, match="weights"):
        Direction.mean(
            [
                one,
                Direction.from_vector("resid.post@1", [1.0, 0.0], identity=dataclasses.replace(identity, weights="e")),
            ]
        )
    with pytest.raises(UsageError, match="at least one"):
        Direction.mean([])
    with pytest.raises(UsageError, match="cancel"):
        Direction.mean([one, -dataclasses.replace(one, classes=("yes", "no"))])


def test_the_cosine_compares_across_sites_of_equal_width():
    a, b = (
        Direction.from_vector("resid.post@1", [1.0, 0.0]),
        Direction.from_vector("resid.post@2", [1.0, 1.0]),
    )
    assert a.cosine(b) == pytest.approx(np.sqrt(0.5))
    with pytest.raises(UsageError, match="widths 2"):
        a.cosine(Direction.from_vector("resid.post@2", [1.0]))


def test_from_vector_normalises_and_keeps_the_length_as_scale():
    d = Direction.from_vector(Site("resid.post", 1), torch.tensor([3.0, 4.0], dtype=torch.bfloat16))
    np.testing.assert_allclose(d.vector, [0.6, 0.8])
    assert d.scale == 5.0
    np.testing.assert_allclose(d.step, [3.0, 4.0])
    assert Direction.from_vector("resid.post@1", [3.0, 4.0], scale=2.0).scale == 2.0
    assert d.identity is None


def test_a_direction_cannot_be_changed(identity):
    d = Direction.from_vector("resid.post@1", [3.0, 4.0], identity=identity)
    with pytest.raises(ValueError, match="read-only"):
        d.vector[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        d.scale = 2.0
    source = np.array([0.6, 0.8])
    kept = Direction(None, source)
    source[0] = 9
    assert kept.vector[0] == 0.6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Direction.from_vector("resid.post@1", [0.0, 0.0]), "no direction"),
        (lambda: Direction.from_vector("resid.post@1", [np.nan, 0.0]), "no direction"),
        (lambda: Direction(None, np.array([3.0, 4.0])), "from_vector"),
        (lambda: Direction(None, np.ones((1, 1))), "one row"),
        (lambda: Direction(None, np.ones(1), scale=0.0), "positive scale"),
        (lambda: Direction(None, np.ones(1), offset=np.inf), "finite offset"),
        (lambda: Direction(None, np.ones(1), metrics={"x": np.nan}), "NaN"),
        (lambda: Direction(None, np.ones(1), params={"x": object()}), "plain JSON"),
        (lambda: Direction(None, np.ones(1)).score(np.zeros((3, 2))), "width 1"),
    ],
)
def test_impossible_directions_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()
    with pytest.raises(UnknownSite):
        Direction.from_vector("resid.past@1", [1.0])


def test_numpy_scalars_become_plain_json():
    d = Direction(
        None, np.ones(1), params={"C": np.float32(0.5), "n": np.int64(3), "on": np.bool_(True)},
        classes=(np.int64(0), np.int64(1)),
    )  # fmt: skip
    assert d.params == {"C": 0.5, "n": 3, "on": True}
    assert [type(c) for c in d.classes] == [int, int]
    json.dumps(d.to_json())
