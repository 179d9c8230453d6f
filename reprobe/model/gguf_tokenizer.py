"""The vocabulary of a GGUF file, as a transformers tokenizer.

Enters: a GGUF file. Leaves: tokenizer files in a folder, checked to give the same ids when they are loaded
again. transformers builds the vocabulary, merges and added tokens; what it leaves to defaults is set here
from the file's metadata: how text is split before merging, the prefix space, BOS and EOS, padding, the chat
template. Does not know weights.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reprobe.errors import ModelLoadFailed

#: transformers' name of a special token → its name in GGUF keys.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokenizer, apart from the tokens themselves.

    `ids` has one entry `<role>_token_id` per role of `ROLES`, None where the file names no such token.
    """

    model: str
    split: str | None
    ids: Mapping[str, int | None]
    end_of_turn: int | None
    adds_bos: bool | None
    adds_eos: bool
    prefix_space: bool
    template: str | None

    @classmethod
    def of(cls, reader: gguf.GGUFReader) -> "Vocabulary":
        def get(key: str, default: Any = None) -> Any:
            field = reader.get_field(f"tokenizer.{key}")
            return default if field is None else field.contents()

        return cls(
            model=get("ggml.model"),
            split=get("ggml.pre"),
            ids={f"{role}_token_id": get(f"ggml.{word}_token_id") for role, word in ROLES.items()},
            end_of_turn=get("ggml.eot_token_id"),
            adds_bos=get("ggml.add_bos_token"),
            adds_eos=get("ggml.add_eos_token", False),
            prefix_space=get("ggml.add_space_prefix", True),
            template=get("chat_template"),
        )


@dataclass(frozen=True)
class _Split:
    """How a byte-level vocabulary cuts text before merging.

    `pattern` None is GPT-2's; `digits` cuts every digit off first; `whole` takes a piece that is a token as
    it is, without merging; `bos` is whether BOS is added where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = _Split(), _Split(digits=True)
_LLAMA3, _QWEN2 = _Split(_words(r"\p{N}{1,3}"), whole=True, bos=True), _Split(_words(r"\p{N}"))

#: `tokenizer.ggml.pre` → how to split. The expressions are part of what those vocabularies are.
SPLITS: Mapping[str, _Split] = (
    dict.fromkeys(("gpt-2", "gpt2", "granite-docling", "jais", "mpt", "olmo", "phi-2", "trillion"), _GPT2)
    | dict.fromkeys(("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"), _DIGITS)
    | dict.fromkeys(("falcon3", "llama-bpe", "llama-v3", "llama3"), _LLAMA3)
    | dict.fromkeys(("deepseek-r1-qwen", "hunyuan", "qwen2", "stablelm2"), _QWEN2)
    | {"tekken": _Split(_CASED, whole=True, bos=True)}
)

#: Texts whose ids are compared before saving and after loading: spaces, digits, line ends, scripts.
_PROBES = (
    "The Eiffel Tower is located in the city of",
    " a  b   c\n\n12,345.6\t\tdon't WE'LL\r\n  3 x",
    "Ünïcode, 日本語, ελληνικά, 🙂🙃 <b>&amp;</b> [1] {2}",
)


def convert(path: Path, vocabulary: Vocabulary, config: Any, folder: Path) -> None:
    """Write the tokenizer of the GGUF file at `path` into `folder`, which holds its config already.

    Raises `ModelLoadFailed` if the file's tokenizer is of a kind that is not known here.
    """
    backend = _backend(path, vocabulary)
    if backend.get_vocab_size() > config.vocab_size:
        raise ModelLoadFailed(f"{backend.get_vocab_size()} tokens, but {config.vocab_size} embeddings")
    named = {}
    for role in ROLES:
        token_id = vocabulary.ids[f"{role}_token_id"]
        if token_id is not None:
            token = backend.id_to_token(token_id)
            if token is None:
                raise ModelLoadFailed(f"its {role} token is {token_id}, and there is no such token")
            named[f"{role}_token"] = token
    if "pad_token" not in named and "eos_token" in named:
        named["pad_token"] = named["eos_token"]  # padding is never attended to; any token will do
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = vocabulary.template
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _PROBES:
        if tokenizer(text, verbose=False).input_ids != again(text, verbose=False).input_ids:
            raise ModelLoadFailed(f"{type(again).__name__} gives other ids for {text!r} than its vocabulary does")


def _backend(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    with _alone(path) as folder:
        built = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
    backend: Tokenizer = built.backend_tokenizer
    bos = vocabulary.adds_bos
    if vocabulary.model == "gpt2":
        split = SPLITS.get(vocabulary.split or "")
        if split is None:
            raise ModelLoadFailed(
                f"its vocabulary splits text in the way {vocabulary.split!r}; known are {', '.join(SPLITS)}"
            )
        backend.pre_tokenizer = split.pre_tokenizer()
        backend.model.ignore_merges = split.whole
        bos = split.bos if bos is None else bos
    elif vocabulary.model == "llama":
        if not vocabulary.prefix_space and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence(steps)
        bos = True if bos is None else bos
    else:
        raise ModelLoadFailed(f"its vocabulary is of the kind {vocabulary.model!r}; known are gpt2 and llama")
    _frame(backend, vocabulary.ids, bos, vocabulary.adds_eos)
    return backend


def _frame(backend: Tokenizer, ids: Mapping[str, int | None], bos: bool, eos: bool) -> None:
    """Put BOS before and EOS after every text, where the vocabulary wants them, and nothing else."""

    def token(role: str, wanted: bool) -> list[tuple[str, int]]:
        token_id = ids[f"{role}_token_id"]
        text = None if token_id is None else backend.id_to_token(token_id)
        return [(text, token_id)] if wanted and text is not None and token_id is not None else []

    before, after = token("bos", bos), token("eos", eos)
    around = [[t for t, _ in before], [t for t, _ in after]]
    single, other = [*around[0], "$A", *around[1]], [*around[0], "$B", *around[1]]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=single + [f"{t}:1" for t in other], special_tokens=before + after
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[str]:
    """A folder that holds nothing but the file: tokenizer files beside it would be taken for its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path)
        yield folder
