"""Tokenizers of every kind, built in code, each with special tokens, an end of turn and a chat template of its own.

Beside each kind stands the bytes of a token written down by hand: what the tests hold the package's reading against.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SMOLLM2 = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
CORPUS = [
    "The answer is 42. So 12 + 30 = 42, and that is the answer.", "  indented\n\n\tcode(x) = x * 2  # note",
    "Größe, naïve café, Straße über Köln", "数学的答案是四十二。", "emoji 🙂🙂 and 👩‍👩‍👧 and flags 🇩🇪", "שלום עולם, مرحبا",
] * 3  # fmt: skip
TIKTOKEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
BYTES = [f"<0x{b:02X}>" for b in range(256)]
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def wrapped(
    tokenizer: Tokenizer, *, turn: str = "<turn>", end: str = "<end>", space: str = ""
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with a start, an end, a turn marker and a chat template that uses them."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end, additional_special_tokens=[turn, "<tool>"]
    )
    fast.chat_template = (
        "{% for m in messages %}" + turn + "{% if m.role == 'assistant' %}" + space + "{% endif %}{{ m.content }}" + end
        + "{% endfor %}{% if add_generation_prompt %}" + turn + "{% if thinking %}think{% endif %}{% endif %}"
    )  # fmt: skip
    return fast


def byte_level(gpt4: bool = False, vocab_size: int = 400) -> Tokenizer:
    """GPT-2's kind; with `gpt4` GPT-4's and Qwen's: another split, and NFC before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if gpt4:
        split = pre_tokenizers.Split(Regex(TIKTOKEN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe(prefix: bool = True, longest: int = 6) -> Tokenizer:
    """Llama 2's kind; without `prefix` Gemma's, which puts no space of its own before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], show_progress=False, max_token_length=longest
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    size = len(described["model"]["vocab"])
    described["model"]["vocab"] |= {token: size + n for n, token in enumerate(BYTES)}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence([*LLAMA_DECODER, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def sentencepiece_unigram(scheme: str = "first") -> Tokenizer:
    """Unigram with Metaspace and byte fallback."""
    words = "▁the|▁answer|▁is|is|an|▁a|swer|4|2|12|0|1|3|.|,|=|+|▁|▁▁|é|ö|e|h|t|o|r|n|s|w|a|i|数|学|的|答|🙂|\n"
    vocab = [("<unk>", 0.0), *((token, -20.0) for token in BYTES), *((w, -5.0 + len(w)) for w in words.split("|"))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return tokenizer


def characters(extra: str = "") -> Tokenizer:
    """One token a character; most characters are unknown."""
    alphabet = sorted({*"0123456789+-*=.,() \n", *"abcdefghijklmnopqrstuvwxyzTS", *"é数学", *extra})
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<unk>", *alphabet])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def words() -> Tokenizer:
    """Words and marks with the spaces between them lost."""
    known = ["<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", CORPUS[0] + CORPUS[3])))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _spm_piece(token: str) -> bytes:
    byte = re.fullmatch("<0x(..)>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _byte_level_piece(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


def tiktoken() -> PreTrainedTokenizerFast:
    """Qwen's kind, with ChatML's marks."""
    return wrapped(byte_level(gpt4=True, vocab_size=600), turn="<|im_start|>", end="<|im_end|>")


KINDS = {
    "byte_level": (lambda: wrapped(byte_level()), _byte_level_piece),
    "tiktoken": (tiktoken, _byte_level_piece),
    "llama": (lambda: wrapped(sentencepiece_bpe(), end="</s>", space=" "), _spm_piece),
    "gemma": (lambda: wrapped(sentencepiece_bpe(prefix=False, longest=3), end="<eos>"), _spm_piece),
    "unigram": (lambda: wrapped(sentencepiece_unigram(), space=" "), _spm_piece),
    "characters": (lambda: wrapped(characters()), str.encode),
    "words": (lambda: wrapped(words()), lambda token: b" " + token.encode()),
    "smollm2": (lambda: AutoTokenizer.from_pretrained(SMOLLM2), _byte_level_piece),
}  # fmt: skip
if not SMOLLM2.is_dir():
    del KINDS["smollm2"]
MARKED = [pytest.param(kind, marks=pytest.mark.further) if kind == "smollm2" else kind for kind in KINDS]
"""The real vocabulary is slow, and repeats what a built one of its kind shows."""


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, built once."""
    return KINDS[kind][0]()


@cache
def pieces_of(kind: str) -> dict[int, bytes]:
    """Bytes of its tokens by hand; special tokens have none."""
    tokenizer = tokenizer_of(kind)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    special |= {tokenizer.get_vocab().get("<unk>", -1)}
    return {i: KINDS[kind][1](token) for token, i in tokenizer.get_vocab().items() if i not in special}
