"""Model: a transformers network with named sites, an identity, and the only hooks in the house."""

from reprobe.model.hooks import capture, intervene, observe
from reprobe.model.identity import ModelIdentity
from reprobe.model.language_model import LanguageModel
from reprobe.model.monitor import Monitor, Reading
from reprobe.model.sites import Parts, Site, expand

__all__ = [
    "LanguageModel",
    "ModelIdentity",
    "Monitor",
    "Parts",
    "Reading",
    "Site",
    "capture",
    "expand",
    "intervene",
    "observe",
]
