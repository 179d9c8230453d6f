"""Tiny tokenizers, each with one property that has misled span arithmetic somewhere."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The harbour of Lisbon opens to the west.",
    "Nobody in Lisbon had seen the comet.",
    "A comet is a lump of ice and dust.",
    "The baker said that the bread was old.",
    "Is the bread from Lisbon? The baker said no.",
]
#: Brings its own BOS, and copies every message verbatim.
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(*, trim: bool = False, bos: bool = False, template: str | None = None) -> Any:
    """Byte-level BPE: tokens begin with the blank before a word, and an emoji is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_fallback() -> Any:
    """SentencePiece-like: blanks are ▁, unknown characters fall apart into bytes."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁t", "▁th", "▁the"]
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{i:02X}>": i + 2 for i in range(256)}
    vocab |= {piece: 258 + i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "a"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def word_level() -> Any:
    """BERT-like: CLS and SEP around the text, and one unknown token for any word it has not seen."""
    words = sorted({w for s in SENTENCES for w in s.replace(".", "").replace("?", "").split()})
    vocab = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", ".", "?", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="session")
def plain() -> Any:
    return byte_level()


@pytest.fixture(scope="session")
def trimmed() -> Any:
    return byte_level(trim=True, bos=True)


@pytest.fixture(scope="session")
def with_bos() -> Any:
    return byte_level(bos=True)


@pytest.fixture(scope="session")
def chat() -> Any:
    return byte_level(bos=True, template=TEMPLATE)


@pytest.fixture(scope="session")
def pieces() -> Any:
    return byte_fallback()


@pytest.fixture(scope="session")
def bert() -> Any:
    return word_level()
