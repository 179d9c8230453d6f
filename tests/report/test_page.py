"""The page: each kind of result has its section, what is missing has none, nothing comes from elsewhere."""

import base64
import dataclasses
import hashlib
import html
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import pytest
from report import synthetic

from reprobe import report
from reprobe.errors import ArtifactExists, ArtifactMissing, CorruptArtifact
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report import (
    Run,
    probe_path,
    read_results,
    store_path,
    write_report,
    write_run,
    write_scan,
    write_steering,
)
from reprobe.report.style import FRAME, SERIES
from reprobe.store import ActivationStore

SECTIONS = [
    "overview",
    "layers",
    "readers",
    "heads",
    "geometry",
    "directions",
    "transfer",
    "scans",
    "steering",
    "costs",
    "choices",
    "traces",
    "edits",
    "dissections",
    "reproduce",
]


class Outline(HTMLParser):
    """Tags, ids, links, sources and text of a page; complains about tags that do not match."""

    VOID = ("meta", "link", "br", "img", "path", "use", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            {"id": self.ids, "href": self.links, "src": self.sources}.get(key, []).append(value or "")
            assert not key.startswith("on"), f"a handler in <{tag}>"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def sections_of(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


def test_a_full_folder_has_every_section_once_and_in_order(page: str):
    assert sections_of(page) == SECTIONS
    outline = Outline(page)
    assert [link for link in outline.links if link in {f"#{s}" for s in SECTIONS}] == [f"#{s}" for s in SECTIONS]
    assert outline.tags.count("h1") == 1
    assert outline.tags.count("h2") == len(SECTIONS)


def test_ids_are_unique_and_every_link_leads_somewhere_on_the_page_or_to_a_page_beside(page: str, drawn: Path):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    # Colour bars are images inside the page.
    links = [link for link in outline.links if not link.startswith("data:image/png;base64,")]
    assert {link.removeprefix("#") for link in links if link.startswith("#")} <= set(outline.ids)
    for link in links:
        file, _, place = link.partition("#")
        if file:
            browsable = (drawn.parent / unquote(file)).read_text()
            assert place == "browse" or place.partition("/")[0] in ("concept", "unit")
            assert 'id="browse"' in browsable
    assert any(not link.startswith("#") for link in links)


def test_nothing_is_loaded_from_elsewhere(page: str):
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not Outline(page).sources
    assert not re.search(r"@import|url\((?!#)", page)


def test_only_the_pages_own_script_may_run(page: str):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert html.unescape(policy).split("; ")[:3] == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{allowed}'",
    ]


def test_texts_of_data_and_models_are_shown_and_never_obeyed(tmp_path: Path):
    nasty = synthetic.NASTY
    scan, steering = synthetic.make_scan(nasty), synthetic.make_steering()
    write_scan(tmp_path, "x", scan)
    write_steering(tmp_path, "x", dataclasses.replace(steering, story=nasty, intervention=nasty, neutral=(nasty,)))
    write_run(tmp_path, Run(nasty, (), synthetic.IDENTITY, {nasty: nasty}, (nasty,), (nasty,)))
    page = write_report(tmp_path).read_text()
    outline = Outline(page)
    assert outline.tags.count("script") == 1
    assert "alert('x')" not in re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    assert outline.text.count(nasty) >= 7


def test_every_figure_is_valid_xml_with_a_number_and_a_caption(page: str):
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(figures) == 3 + 2 + 6 + 9 + 4 + 1 + 1 + 2 + 1 + 4 + 3 + 1
    for n, figure in enumerate(figures, 1):
        ET.fromstring(re.findall(r"<svg.*</svg>", figure, re.S)[0])
        caption = re.findall(r"<figcaption>(.*)</figcaption>", figure, re.S)[0]
        assert caption.startswith(f"<b>Figure {n}.</b> ")


def test_every_figure_says_which_model_and_which_data_it_is_of(full: Path, page: str):
    models = {synthetic.IDENTITY.weights, read_results(full).dissections["neurons"].identity.weights}
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S):
        (source,) = re.findall(r'<span class="source">(.*)</span>', caption, re.S)
        said = [re.sub("<.*?>", "", fact) for fact in re.findall(r"<span>(.*?)</span>", source)]
        digests = re.findall(r'(\w+) <code class="digest" title="([0-9a-f]{64})">', source)
        assert said[0].startswith("model "), source
        if said[0] == "model not recorded":  # CSV and Parquet tables say only what is in their columns
            assert "held-out" in caption or "edit-scores" in caption
            continue
        (_, weights), *data = digests
        assert weights in models
        assert data, source


def test_readers_are_compared_by_what_was_held_out(full: Path, page: str):
    comparison = read_results(full).comparisons["moods"]
    section = re.search(r'<section id="readers".*?</section>', page, re.S)[0]
    for line in comparison.choices.iter_rows(named=True):
        for metric in ("accuracy", "auroc", "recall", "ece"):
            assert f"{line[metric]:.3f} [{line[f'{metric}_low']:.3f}, {line[f'{metric}_high']:.3f}]" in section
        assert line["sites"].replace(" ×", "\u00a0×") in section
    (line,) = comparison.differences.iter_rows(named=True)
    value = f"{line['accuracy_difference']:+.3f} [".replace("-", "−") if line["accuracy_difference"] else "0 ["
    assert f"{line['reader']} less {line['other']}" in section
    assert value in section


def test_a_scan_is_of_the_grid_of_its_name_and_not_of_a_reader_in_a_comparison(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "comparisons")
    reader = next(iter(read_results(full).comparisons["moods"].grids))
    write_scan(folder, "x", dataclasses.replace(synthetic.make_scan("a text"), grid=reader))
    page = html.unescape(write_report(folder).read_text())
    assert f"read with the directions of {reader}. " in page


def test_a_store_that_lies_elsewhere_is_drawn_and_nothing_else_is_without_it(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "comparisons")
    without = write_report(folder).read_text()
    assert sections_of(without) == ["overview", "layers", "readers", "geometry", "directions", "reproduce"]
    assert "Principal components" not in without
    store = ActivationStore.open(full / "emotions.reprobe")
    drawn = write_report(folder, stores={"emotions": store}).read_text()
    assert "Principal components of emotions" not in drawn
    assert "Principal components of moods" in drawn


def test_values_under_the_pointer_equal_the_data(full: Path, page: str):
    titles = {html.unescape(t) for t in re.findall(r"<title>(.*?)</title>", page)}
    results = read_results(full)
    for name, grid in results.grids.items():
        reader = next(iter(grid.directions.values())).reader
        for row in grid.table.iter_rows(named=True):
            value = (
                f"{row['site']}: accuracy {row['accuracy']:.3f} "
                f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}], AUROC {row['auroc']:.3f}"
            )
            assert (value if row["head"] is not None else f"{reader}, {value}") in titles, name
    scan = results.scans["capitals"].scan
    for i, site in enumerate(scan.sites):
        for t, token in enumerate(scan.tokens):
            assert f"token {t} {token!r} at {site}: {scan.scores[i, t]:+.2f}" in titles


def test_the_tables_say_the_best_site_and_the_honest_number(full: Path, page: str):
    grid = ProbeGrid.load(probe_path(full, "cities-logistic"))
    blocks = [j for j, site in enumerate(grid.sites) if site.unit is None]
    best = grid.table[blocks].sort("accuracy", "layer", descending=[True, False]).row(0, named=True)
    layers = page[page.index('<section id="layers"') : page.index('<section id="heads"')]
    assert best["site"] in layers
    assert f"{best['accuracy']:.3f} [{best['accuracy_low']:.3f}, {best['accuracy_high']:.3f}]" in layers
    # Among blocks alone: by fold, the first of the best on the other folds, pooled.
    correct = ((grid.oof > 0) == grid.positive[:, None])[:, blocks]
    right = sum(int(correct[grid.fold == k, grid.inner[k, blocks].argmax()].sum()) for k in range(len(grid.inner)))
    assert f"{right / len(grid.rows):.3f} [" in layers


def test_heads_are_counted_and_the_caution_stands_beside_them(full: Path, page: str):
    heads = page[page.index('<section id="heads"') : page.index('<section id="geometry"')]
    assert "biased upward" in heads
    grid = ProbeGrid.load(probe_path(full, "cities-pca")).table
    single = grid.filter(grid["head"].is_not_null())
    above = single.filter(single["accuracy_low"] > single["chance"]).height
    assert f"{above} of {len(single)} heads" in heads


def test_digests_stand_in_full_where_things_are_reproduced(full: Path, page: str):
    reproduce = page[page.index('<section id="reproduce"') :]
    results = read_results(full)
    files = [probe_path(full, name) for name in results.grids]
    wanted = [store.manifest.digest for store in results.stores.values()]
    wanted += [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    wanted += [synthetic.IDENTITY.weights, synthetic.IDENTITY.tokenizer, "f6" * 32]
    assert not [d for d in wanted if f">{d}</code>" not in reproduce]


def _only(full: Path, to: Path, *names: str) -> Path:
    for name in names:
        source = full / name
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, to / name)
    return to


def test_equal_results_are_equal_pages_whatever_matplotlib_is_set_to(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path / "r", "run.json", "scans", "steering", "probes/cities-pca.safetensors")
    page = write_report(folder).read_bytes()
    strange = {"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "axes.unicode_minus": False}
    with matplotlib.rc_context(strange):
        again = write_report(folder, tmp_path / "deep" / "again.html")
        assert matplotlib.rcParams["font.size"] == 30
    assert again.read_bytes() == page


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["run.json"], ["overview", "reproduce"]),
        (["cities.reprobe"], ["overview", "reproduce"]),
        (["probes/cities-pca.safetensors"], ["overview", "layers", "heads", "geometry", "directions", "reproduce"]),
        (["scans"], ["overview", "scans", "reproduce"]),
        (["steering"], ["overview", "steering", "reproduce"]),
        (["facts.trace"], ["overview", "traces", "reproduce"]),
        (["together"], ["overview", "edits", "reproduce"]),
        (["neurons.dissection"], ["overview", "dissections", "reproduce"]),
        (["price.json"], ["overview", "costs", "reproduce"]),
        (["held-out.csv"], ["overview", "steering", "reproduce"]),
    ],
)
def test_what_is_not_there_is_no_section(full: Path, tmp_path: Path, names: list[str], want: list[str]):
    page = write_report(_only(full, tmp_path, *names)).read_text()
    assert sections_of(page) == want
    Outline(page)


def test_grids_without_their_store_still_show_their_scores(full: Path, tmp_path: Path):
    names = ("probes/cities-pca.safetensors", "probes/cities-logistic.safetensors")
    page = write_report(_only(full, tmp_path, *names)).read_text()
    assert "Held-out accuracy at every block on cities: 120 rows in 60 groups" in page
    assert "principal components" not in page
    assert 'id="figure-scores-0"' in page


def test_a_store_that_is_not_complete_is_said_to_be(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "cities.reprobe", "probes/cities-pca.safetensors")
    next(store_path(folder, "cities").glob("commits/*.json")).unlink()
    assert not ActivationStore.open(store_path(folder, "cities")).complete
    page = write_report(folder).read_text()
    assert "The store of cities is not complete" in page
    assert "0 of 1 shards written" in page


def test_a_store_whose_rows_are_damaged_is_said_to_be_and_its_scores_are_drawn(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "cities.reprobe", "probes/cities-pca.safetensors")
    for chunk in (folder / "cities.reprobe" / "activations.zarr").glob("resid.post-*/c.*"):
        data = chunk.read_bytes()
        chunk.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    told: list[str] = []
    page = write_report(folder, say=told.append).read_text()
    assert "The rows of cities are damaged and not drawn" in page
    assert 'id="figure-scores-0"' in page
    assert 'id="figure-pca-0"' not in page
    assert len(told) == 1
    index = folder / "cities.reprobe" / "index.parquet"
    index.write_bytes(index.read_bytes()[:-1])
    told.clear()
    write_report(folder, say=told.append)
    assert told[0].startswith("cities.reprobe is damaged and not in the report")


def test_two_folds_leave_no_choice_and_the_report_says_so(tmp_path: Path):
    store = synthetic.make_store(store_path(tmp_path, "cities"), rows=24, layers=2)
    grid = synthetic.make_grid(store, "PCAReader", folds=2)
    dataclasses.replace(grid, inner=grid.inner[:0]).save(probe_path(tmp_path, "cities-pca"))
    assert "needs three folds" in write_report(tmp_path).read_text()


def test_results_of_two_models_are_cautioned_about(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "cities.reprobe")
    write_run(folder, Run("x", identity=dataclasses.replace(synthetic.IDENTITY, weights="99" * 32)))
    assert "of 2 different models" in write_report(folder).read_text()


def test_an_empty_folder_says_what_to_run_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(ArtifactMissing, match="reprobe demo"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_everything_is_damaged_there_is_no_report_and_the_old_one_stays(tmp_path: Path):
    write_run(tmp_path, Run("first"))
    page = write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CorruptArtifact, match=r"nothing in .* can be read: run\.json: "):
        write_report(tmp_path)
    assert "first" in page.read_text()


def test_what_is_damaged_or_unknown_is_named_on_the_page_and_told_and_the_rest_is_drawn(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "scans", "facts.trace", "run.json")
    trace = folder / "facts.trace"
    trace.write_bytes(trace.read_bytes()[:-8])
    (folder / "run.json").write_text("{")
    (folder / f"{'<i>'}.txt").write_text("mine")
    told: list[str] = []
    page = write_report(folder, say=told.append).read_text()
    assert sections_of(page) == ["overview", "scans", "reproduce", "left-out"]
    left_out = Outline(page[page.index('<section id="left-out"') : page.index("</main>")]).text
    assert "facts.trace" in left_out
    assert "run.json" in left_out
    assert "<i>.txt" in left_out
    assert str(tmp_path) not in page
    assert "2 files are damaged" in page
    assert [line.partition(" ")[0] for line in told] == ["facts.trace", "run.json", "not"]
    assert told[-1].endswith("<i>.txt")


def test_without_a_listener_what_is_damaged_is_a_warning(full: Path, tmp_path: Path):
    folder = _only(full, tmp_path, "scans")
    (folder / "scans" / "bad.json").write_text("[")
    with pytest.warns(UserWarning, match=r"scans/bad\.json is damaged and not in the report"):
        write_report(folder)


def test_traces_edits_and_dissections_are_told_in_numbers(full: Path, page: str):
    results = read_results(full)
    titles = {html.unescape(t) for t in re.findall(r"<title>(.*?)</title>", page)}
    trace = results.traces["facts"].traces[1]
    value = f"{trace.effects[2, 1, 0]:+.4f}"
    assert f"mlp.out, block 1, token 0 {trace.tokens[0]!r}: {value}" in titles
    (edit,) = results.edits["tower"]
    assert f"Tower 1 → Rome: before {edit.effects[1].before:.3f}, after {edit.effects[1].after:.3f}" in titles
    edits = Outline(page[page.index('<section id="edits"') : page.index('<section id="dissections"')]).text
    assert f"{edit.norm:.4g}" in edits
    assert edits.count("together (MEMIT)") == 1, "edits that write the same facts are one"
    (found,) = results.dissections.values()
    told = Outline(page[page.index('<section id="dissections"') : page.index('<section id="reproduce"')]).text
    for line in found.concepts.iter_rows(named=True):
        assert line["concept"] in told
        assert f"{line['best_iou']:.3f}" in told


def test_prices_and_choices_are_told_with_their_intervals(full: Path, page: str):
    costs = Outline(page[page.index('<section id="costs"') : page.index('<section id="choices"')]).text
    assert "+2.750 [+1.900, +3.600]" in costs
    assert "−0.013" in costs
    assert "strength 3" in costs
    assert synthetic.NASTY in costs
    line = read_results(full).measured["misconceptions"].choices.row(1, named=True)
    choices = Outline(page[page.index('<section id="choices"') : page.index('<section id="traces"')]).text
    assert f"{line['unsteered']:.3f}" in choices
    assert f"{line['change']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]".replace("-", "−") in choices


def test_an_older_report_is_replaced_but_no_other_file(tmp_path: Path):
    write_run(tmp_path, Run("first"))
    assert write_report(tmp_path) == tmp_path / "report.html"
    write_run(tmp_path, Run("second"))
    assert "second" in write_report(tmp_path).read_text()
    thesis = tmp_path / "thesis.html"
    thesis.write_text("years of work")
    with pytest.raises(ArtifactExists, match="not a report"):
        write_report(tmp_path, thesis)
    assert thesis.read_text() == "years of work"
    with pytest.raises(ArtifactExists, match="is a folder"):
        write_report(tmp_path, tmp_path)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_page(page: str, theme: str):
    blocks = re.findall(r"--paper: [^}]+", page)
    values = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", blocks[0 if theme == "light" else 1]))
    for background in ("--paper", "--raised"):
        for text in ("--ink", "--muted", "--link"):
            assert contrast(values[text], values[background]) >= 4.5, (text, background)
        for text in re.findall(r"(?<![-\w])color: var\((--[a-z0-9-]+)\)", page):
            assert contrast(values[text], values[background]) >= 4.5, (text, background)
    for drawn in (*(values[f"--series-{i}"] for i in range(len(SERIES))), values["--link"], FRAME):
        assert contrast(drawn, values["--paper"]) >= 3, drawn
    browse = (Path(report.__file__).parent / "dissection.css").read_text()
    mixed = re.findall(r"color-mix\(in srgb, var\((--series-\d)\) (\d+)%", browse)
    assert len(mixed) == 2
    for series, share in mixed:  # behind marked text
        assert contrast(values["--ink"], mix(values[series], values["--paper"], int(share) / 100)) >= 4.5, series


def test_the_two_ways_to_a_dark_theme_have_the_same_colours(page: str):
    light, asked, preferred = re.findall(r"--paper: [^}]+", page)
    assert asked.split() == preferred.split()
    assert light.split() != asked.split()


def mix(a: str, b: str, share: float) -> str:
    pairs = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in pairs)


def contrast(a: str, b: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
