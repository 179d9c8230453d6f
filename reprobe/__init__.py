"""reprobe: extract hidden states once, probe them offline, control anywhere, and prove it is the same activation.

The way of the data, station by station:

    prompts     PromptSet: texts with labels, groups, pairs and spans
    model       LanguageModel, Site; observe and intervene, the only hooks
    extraction  extract: prompts → activations at sites, streamed into
                (import_vllm: from vLLM's files; replay: are they the model's?)
    store       ActivationStore: rows on disk with their provenance
    probing     probe: readers (MeanDifference, PCAReader, LogisticReader) at every site → ProbeGrid → Direction
                (LEACE: a concept erased)
    control     steer with Add, Ablate, Affine: a direction (or a map) put back into the model
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
        Scope,
        WeightEdit,
        apply_edits,
        edited,
        export_edited,
        ledger_of,
        load_edited,
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
    from reprobe.prompts import Fact, Position, PromptSet
    from reprobe.report import write_report
    from reprobe.store import ActivationStore

_HOME = {
    "Ablate": "control",
    "ActivationStore": "store",
    "Add": "control",
    "Affine": "control",
    "CCSReader": "probing",
    "ClusterMean": "probing",
    "Contrast": "evaluation",
    "Direction": "probing",
    "Fact": "prompts",
    "KSparseReader": "probing",
    "LDAReader": "probing",
    "LEACE": "probing",
    "LanguageModel": "model",
    "LogisticReader": "probing",
    "MeanDifference": "probing",
    "ModelIdentity": "model",
    "PCAReader": "probing",
    "Position": "prompts",
    "ProbeGrid": "probing",
    "PromptSet": "prompts",
    "RandomReader": "probing",
    "Replay": "extraction",
    "ReprobeError": "errors",
    "RidgeReader": "probing",
    "Scope": "control",
    "Share": "extraction",
    "Site": "model",
    "TTPDReader": "probing",
    "TransferGrid": "probing",
    "WeightEdit": "control",
    "apply_edits": "control",
    "capture": "model",
    "divergence": "evaluation",
    "dose_response": "evaluation",
    "edited": "control",
    "export_edited": "control",
    "extract": "extraction",
    "extract_on_ray": "extraction",
    "import_vllm": "extraction",
    "intervene": "model",
    "ledger_of": "control",
    "load_edited": "control",
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
    "ClusterMean",
    "Contrast",
    "Direction",
    "Fact",
    "KSparseReader",
    "LDAReader",
    "LEACE",
    "LanguageModel",
    "LogisticReader",
    "MeanDifference",
    "ModelIdentity",
    "PCAReader",
    "Position",
    "ProbeGrid",
    "PromptSet",
    "RandomReader",
    "Replay",
    "ReprobeError",
    "RidgeReader",
    "Scope",
    "Share",
    "Site",
    "TTPDReader",
    "TransferGrid",
    "WeightEdit",
    "apply_edits",
    "capture",
    "divergence",
    "dose_response",
    "edited",
    "export_edited",
    "extract",
    "extract_on_ray",
    "import_vllm",
    "intervene",
    "ledger_of",
    "load_edited",
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
