"""reprobe: extract hidden states once, probe them offline, control anywhere, and prove it is the same activation.

The way of the data, station by station:

    prompts     PromptSet: texts with labels, groups, pairs and spans
    model       LanguageModel, Site; observe and intervene, the only hooks; lm.monitor: directions as live probes
    extraction  extract: prompts → activations at sites, streamed into
                (import_vllm: from vLLM's files; replay: are they the model's?)
    store       ActivationStore: rows on disk with their provenance
    probing     probe: readers (MeanDifference, PCAReader, LogisticReader) at every site → ProbeGrid → Direction
                (compare: several readers in the same folds; LEACE: a concept erased; push, pull: a folder with a
                model card, here or on the hub)
    control     steer with Add, Ablate, Clamp, Scale, Replace, Noise, Affine, LowRank, gated by When; a Steering
                bundles them: a direction (or a map, or activations) put back into the model
                (bake, export_baked: into its weights; export, read_control_vector: the files of other programs)
                WeightEdit, edited, ledger_of: weights changed, and changed back
    methods     iti, caa, actadd, repe, refusal, cast: published methods, each of which makes a Steering
                rome, memit: edits of facts; tracing: which states carry them (a TraceGrid)
                lorra: a contrast trained into low-rank adapters (an Adapter, which is a set of WeightEdits)
                DoLa: decoding by contrasting layers
                dissect: which Concept each neuron detects; causes (evaluation): and what that causes
    evaluation  dose_response, divergence, side_effects: what that does, and what else; tune: how strong
                multiple_choice: TruthfulQA's MC1, MC2, MC3
    report      write_report: one self-contained HTML page

Importing reprobe loads no model library; names are fetched when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reprobe.control import (
        Ablate,
        Adapter,
        Add,
        Affine,
        Baked,
        Clamp,
        LowRank,
        Noise,
        Operator,
        Replace,
        Scale,
        Scope,
        Steering,
        WeightEdit,
        When,
        apply_edits,
        bake,
        edited,
        export,
        export_baked,
        export_edited,
        ledger_of,
        load_edited,
        read_control_vector,
        steer,
    )
    from reprobe.errors import ReprobeError
    from reprobe.evaluation import (
        Choices,
        ChoiceScore,
        Contrast,
        Passage,
        Readout,
        SideEffects,
        Tuned,
        causes,
        divergence,
        dose_response,
        log_odds,
        multiple_choice,
        side_effects,
        tune,
    )
    from reprobe.extraction import Replay, Share, extract, extract_on_ray, import_vllm, replay
    from reprobe.methods.concepts import Concept
    from reprobe.methods.dissected import Dissection
    from reprobe.methods.dissection import dissect
    from reprobe.methods.dola import DoLa
    from reprobe.methods.tracing import TraceGrid
    from reprobe.model import LanguageModel, ModelIdentity, Monitor, Reading, Site, capture, intervene, observe
    from reprobe.probing import (
        LEACE,
        AttentionReader,
        CCSReader,
        ClassGrid,
        ClusterMean,
        Comparison,
        Direction,
        KSparseReader,
        LDAReader,
        LogisticReader,
        MeanDifference,
        MultiClassReader,
        PCAReader,
        ProbeGrid,
        RandomReader,
        RidgeReader,
        TransferGrid,
        TTPDReader,
        compare,
        probe,
        probe_classes,
        probe_sequences,
        pull,
        push,
        transfer,
    )
    from reprobe.prompts import Fact, Position, PromptSet
    from reprobe.report import write_dissection, write_report
    from reprobe.store import ActivationStore

_HOME = {
    "Ablate": "control",
    "ActivationStore": "store",
    "Adapter": "control",
    "Add": "control",
    "Affine": "control",
    "AttentionReader": "probing",
    "Baked": "control",
    "CCSReader": "probing",
    "ChoiceScore": "evaluation",
    "Choices": "evaluation",
    "Clamp": "control",
    "ClassGrid": "probing",
    "ClusterMean": "probing",
    "Comparison": "probing",
    "Concept": "methods.concepts",
    "Contrast": "evaluation",
    "Direction": "probing",
    "Dissection": "methods.dissected",
    "DoLa": "methods.dola",
    "Fact": "prompts",
    "KSparseReader": "probing",
    "LDAReader": "probing",
    "LEACE": "probing",
    "LanguageModel": "model",
    "LogisticReader": "probing",
    "LowRank": "control",
    "MeanDifference": "probing",
    "ModelIdentity": "model",
    "Monitor": "model",
    "MultiClassReader": "probing",
    "Noise": "control",
    "Operator": "control",
    "PCAReader": "probing",
    "Passage": "evaluation",
    "Position": "prompts",
    "ProbeGrid": "probing",
    "PromptSet": "prompts",
    "RandomReader": "probing",
    "Reading": "model",
    "Readout": "evaluation",
    "Replace": "control",
    "Replay": "extraction",
    "ReprobeError": "errors",
    "RidgeReader": "probing",
    "Scale": "control",
    "Scope": "control",
    "Share": "extraction",
    "SideEffects": "evaluation",
    "Site": "model",
    "Steering": "control",
    "TTPDReader": "probing",
    "TraceGrid": "methods.tracing",
    "TransferGrid": "probing",
    "Tuned": "evaluation",
    "WeightEdit": "control",
    "When": "control",
    "apply_edits": "control",
    "bake": "control",
    "capture": "model",
    "causes": "evaluation",
    "compare": "probing",
    "dissect": "methods.dissection",
    "divergence": "evaluation",
    "dose_response": "evaluation",
    "edited": "control",
    "export": "control",
    "export_baked": "control",
    "export_edited": "control",
    "extract": "extraction",
    "extract_on_ray": "extraction",
    "import_vllm": "extraction",
    "intervene": "model",
    "ledger_of": "control",
    "load_edited": "control",
    "log_odds": "evaluation",
    "multiple_choice": "evaluation",
    "observe": "model",
    "probe": "probing",
    "probe_classes": "probing",
    "probe_sequences": "probing",
    "pull": "probing",
    "push": "probing",
    "read_control_vector": "control",
    "replay": "extraction",
    "side_effects": "evaluation",
    "steer": "control",
    "transfer": "probing",
    "tune": "evaluation",
    "write_dissection": "report",
    "write_report": "report",
}

__all__ = [
    "Ablate",
    "ActivationStore",
    "Adapter",
    "Add",
    "Affine",
    "AttentionReader",
    "Baked",
    "CCSReader",
    "ChoiceScore",
    "Choices",
    "Clamp",
    "ClassGrid",
    "ClusterMean",
    "Comparison",
    "Concept",
    "Contrast",
    "Direction",
    "Dissection",
    "DoLa",
    "Fact",
    "KSparseReader",
    "LDAReader",
    "LEACE",
    "LanguageModel",
    "LogisticReader",
    "LowRank",
    "MeanDifference",
    "ModelIdentity",
    "Monitor",
    "MultiClassReader",
    "Noise",
    "Operator",
    "PCAReader",
    "Passage",
    "Position",
    "ProbeGrid",
    "PromptSet",
    "RandomReader",
    "Reading",
    "Readout",
    "Replace",
    "Replay",
    "ReprobeError",
    "RidgeReader",
    "Scale",
    "Scope",
    "Share",
    "SideEffects",
    "Site",
    "Steering",
    "TTPDReader",
    "TraceGrid",
    "TransferGrid",
    "Tuned",
    "WeightEdit",
    "When",
    "apply_edits",
    "bake",
    "capture",
    "causes",
    "compare",
    "dissect",
    "divergence",
    "dose_response",
    "edited",
    "export",
    "export_baked",
    "export_edited",
    "extract",
    "extract_on_ray",
    "import_vllm",
    "intervene",
    "ledger_of",
    "load_edited",
    "log_odds",
    "multiple_choice",
    "observe",
    "probe",
    "probe_classes",
    "probe_sequences",
    "pull",
    "push",
    "read_control_vector",
    "replay",
    "side_effects",
    "steer",
    "transfer",
    "tune",
    "write_dissection",
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
