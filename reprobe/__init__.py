"""reprobe: extract hidden states once, probe them offline, control anywhere, and prove it is the same activation.

The way of the data, station by station:

    prompts     PromptSet: texts with labels, groups, pairs and spans
    model       LanguageModel, Site; observe and intervene, the only hooks
    extraction  extract: prompts → activations at sites, streamed into
                (import_vllm: from vLLM's files; replay: are they the model's?)
    store       ActivationStore: rows on disk with their provenance
    probing     probe: readers (MeanDifference, PCAReader, LogisticReader) at every site → ProbeGrid → Direction
                (LEACE: a concept erased)
    control     steer with Add, Ablate, Clamp, Scale, Replace, Noise, Affine, LowRank, gated by When; a Steering
                bundles them: a direction (or a map, or activations) put back into the model
    evaluation  dose_response, divergence: what that does
    report      write_report: one self-contained HTML page

Importing reprobe loads no model library; names are fetched when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reprobe.control import (
        Ablate,
        Add,
        Affine,
        Clamp,
        LowRank,
        Noise,
        Operator,
        Replace,
        Scale,
        Scope,
        Steering,
        When,
        steer,
    )
    from reprobe.errors import ReprobeError
    from reprobe.evaluation import Contrast, divergence, dose_response, log_odds
    from reprobe.extraction import Replay, Share, extract, extract_on_ray, import_vllm, replay
    from reprobe.model import LanguageModel, ModelIdentity, Site, capture, intervene, observe
    from reprobe.probing import (
        LEACE,
        CCSReader,
        ClusterMean,
        Direction,
        KSparseReader,
        LDAReader,
        LogisticReader,
        MeanDifference,
        PCAReader,
        ProbeGrid,
        RandomReader,
        RidgeReader,
        TransferGrid,
        TTPDReader,
        probe,
        transfer,
    )
    from reprobe.prompts import Position, PromptSet
    from reprobe.report import write_report
    from reprobe.store import ActivationStore

_HOME = {
    "Ablate": "control",
    "ActivationStore": "store",
    "Add": "control",
    "Affine": "control",
    "CCSReader": "probing",
    "Clamp": "control",
    "ClusterMean": "probing",
    "Contrast": "evaluation",
    "Direction": "probing",
    "KSparseReader": "probing",
    "LDAReader": "probing",
    "LEACE": "probing",
    "LanguageModel": "model",
    "LogisticReader": "probing",
    "LowRank": "control",
    "MeanDifference": "probing",
    "ModelIdentity": "model",
    "Noise": "control",
    "Operator": "control",
    "PCAReader": "probing",
    "Position": "prompts",
    "ProbeGrid": "probing",
    "PromptSet": "prompts",
    "RandomReader": "probing",
    "Replace": "control",
    "Replay": "extraction",
    "ReprobeError": "errors",
    "RidgeReader": "probing",
    "Scale": "control",
    "Scope": "control",
    "Share": "extraction",
    "Site": "model",
    "Steering": "control",
    "TTPDReader": "probing",
    "TransferGrid": "probing",
    "When": "control",
    "capture": "model",
    "divergence": "evaluation",
    "dose_response": "evaluation",
    "extract": "extraction",
    "extract_on_ray": "extraction",
    "import_vllm": "extraction",
    "intervene": "model",
    "log_odds": "evaluation",
    "observe": "model",
    "probe": "probing",
    "replay": "extraction",
    "steer": "control",
    "transfer": "probing",
    "write_report": "report",
}

__all__ = [  # noqa: RUF022 (sorted as `sorted` does)
    "Ablate",
    "ActivationStore",
    "Add",
    "Affine",
    "CCSReader",
    "Clamp",
    "ClusterMean",
    "Contrast",
    "Direction",
    "KSparseReader",
    "LDAReader",
    "LEACE",
    "LanguageModel",
    "LogisticReader",
    "LowRank",
    "MeanDifference",
    "ModelIdentity",
    "Noise",
    "Operator",
    "PCAReader",
    "Position",
    "ProbeGrid",
    "PromptSet",
    "RandomReader",
    "Replace",
    "Replay",
    "ReprobeError",
    "RidgeReader",
    "Scale",
    "Scope",
    "Share",
    "Site",
    "Steering",
    "TTPDReader",
    "TransferGrid",
    "When",
    "capture",
    "divergence",
    "dose_response",
    "extract",
    "extract_on_ray",
    "import_vllm",
    "intervene",
    "log_odds",
    "observe",
    "probe",
    "replay",
    "steer",
    "transfer",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reprobe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"reprobe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
