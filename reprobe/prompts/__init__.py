"""Prompts and how they become token rows.

Enters: data sets (bundled, files, public formats, Hugging Face). Leaves: a checked `PromptSet`, and with a
tokenizer and a `Position` its `TokenTable`. Does not know models.
"""

from reprobe.prompts.catalog import bundled
from reprobe.prompts.content import Format
from reprobe.prompts.fact import Fact, Neighbour, facts_of
from reprobe.prompts.facts import CounterFact, CounterFactFlat, KnownFacts, Relations
from reprobe.prompts.formats import FORMATS, Table
from reprobe.prompts.positions import Position
from reprobe.prompts.prompt_set import Description, PromptSet, Split, concat
from reprobe.prompts.statements import Emotions, Persona, Statements
from reprobe.prompts.tokens import PromptTokens, TokenTable, index_frame, token_frame, token_table, tokenize
from reprobe.prompts.truthfulqa import TruthfulQA, TruthfulQAChoices

__all__ = [
    "CounterFact",
    "CounterFactFlat",
    "Description",
    "Emotions",
    "FORMATS",
    "Fact",
    "Format",
    "KnownFacts",
    "Neighbour",
    "Persona",
    "Position",
    "PromptSet",
    "PromptTokens",
    "Relations",
    "Split",
    "Statements",
    "Table",
    "TokenTable",
    "TruthfulQA",
    "TruthfulQAChoices",
    "bundled",
    "concat",
    "facts_of",
    "index_frame",
    "token_frame",
    "token_table",
    "tokenize",
]
