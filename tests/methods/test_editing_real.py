"""ROME and MEMIT on a real model: facts are written, generalise, spare their neighbours, and come out again."""

import pytest

import reprobe as rp
from reprobe.evaluation import editing as scores
from reprobe.methods import editing, memit, moments, rome
from reprobe.methods.editing import Search
from reprobe.methods.moments import Corpus, second_moments
from reprobe.prompts import facts_of

pytestmark = pytest.mark.models
SUBJECTS = ("Eiffel Tower", "South Korea")


@pytest.fixture(scope="module")
def setting(real_lm, tmp_path_factory):
    """The model, two facts, and second moments of a short text: about three times as many tokens as directions."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        for module in (moments, editing):  # not REPROBE_CACHE: the weights stay where they are
            patch.setattr(module, "cache_folder", lambda: folder)
        lm = real_lm("smollm2-135m")
        facts = [next(f for f in facts_of("facts") if f.subject == s) for s in SUBJECTS]
        text = Corpus.load(rp.PromptSet.load("emotions"), tokens=4500)
        yield lm, facts, second_moments(lm, [6, 7], text)


def test_rome_writes_facts_that_generalise_and_come_out_again(setting):
    lm, facts, found = setting
    before = lm.identity
    settings = rome.Settings(search=Search(steps=12), prefixes=6, searched=3)
    result = scores.evaluate(lm, facts, lambda f: rome.edit(lm, f, layer=6, moment=found[6], settings=settings))
    assert result.before.shares["efficacy"].mean == 0
    assert result.after.shares["efficacy"].mean == 1
    assert result.after.shares["paraphrase"].mean == 1
    assert result.after.shares["neighbourhood"].mean >= result.before.shares["neighbourhood"].mean - 0.13
    assert lm.identity == before


def test_memit_writes_them_together(setting):
    lm, facts, found = setting
    settings = memit.Settings(search=Search(steps=12, clamp=0.75), prefixes=2)
    edits = memit.edit(lm, facts, layers=[6, 7], moments=found, settings=settings)
    result = scores.evaluate_together(lm, facts, edits)
    assert all(e.found for e in edits[0].effects)
    assert result.after.shares["efficacy"].mean == 1
