"""The bytes of each token, derived from the tokenizer's own description and not from a model name.

The JSON of a `tokenizers` tokenizer describes how tokens become text (decoder) and how it changes a text before tokenising it
(normalizer, pre-tokenizer). These determine exactly which bytes a token adds to a text. A tokenizer where they do not (a decoder
that cleans up, a normalizer that lower-cases, …) raises an error with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from oprd.data.control_tokens import control_token_ids

OpeningRule = Literal["never", "first", "segment", "always"]

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Removed from the encoder: these steps rewrite characters or add a space, so the ids would encode a different text.
_REWRITING = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Strip"}
_SPACE_REMOVING = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_CHECKED_TOKENS = 256


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of one tokenizer's tokens, and an exact encoder for parts of a text.

    Args:
        name: the tokenizer's name, for messages.
        pieces: id → the bytes it adds to a text. One character may take the bytes of several tokens.
        control: id → name of each token without text (start, end, padding, unknown, other special tokens).
        added: ids of added tokens; the text on either side of one is tokenised separately.
        opening_rule: where the tokenizer inserts a space before a text: nowhere ("never"), at the start ("first"), also after
            every added token ("segment"), or before any token ("always": words joined by spaces).
        encoder: the tokenizer without the steps that change a text: Unicode normalisation, inserted space, dropout, and
            recognising control tokens (`oprd.data.control_tokens`) in plain text.
    """

    name: str
    pieces: Mapping[int, bytes]
    control: Mapping[int, str]
    added: frozenset[int]
    opening_rule: OpeningRule
    encoder: Tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer") -> TokenBytes:
        """Build the table for a tokenizer: byte-level BPE (GPT-2, Qwen, Llama 3, tiktoken), SentencePiece style, characters, words.

        Raises:
            ValueError: the bytes of its tokens cannot be determined exactly; the message gives the reason.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise _refused(
                name,
                f"{type(tokenizer).__name__} is not from the library `tokenizers`, so it has no description to read",
            )
        description = json.loads(backend.to_str())
        vocabulary = _vocabulary(description["model"], name)
        added = {token["id"]: token for token in description["added_tokens"]}
        special = {i for i, token in added.items() if token["special"]} | set(tokenizer.all_special_ids)
        special |= _unknown_ids(description["model"], vocabulary)
        unwritten = special | {*control_token_ids(tokenizer).values()}
        words = {**{i: word for word, i in vocabulary.items()}, **{i: token["content"] for i, token in added.items()}}
        read = _piece_reader(description, name)
        # Added tokens are plain text: the byte-level decoder would misread their accented letters as byte stand-ins.
        plain = any(step["type"] == "ByteLevel" for step in _steps(description["decoder"]))
        pieces = {i: w.encode() if plain and i in added else read(w) for i, w in words.items() if i not in special}
        table = cls(
            name=name,
            pieces={i: piece for i, piece in pieces.items() if piece},
            control={i: words.get(i, "") for i in special} | {i: words[i] for i, piece in pieces.items() if not piece},
            added=frozenset(added),
            opening_rule=_opening_rule(description),
            encoder=_exact_encoder(description, unwritten, name),
        )
        _check_against_decoder(table, backend, description)
        return table

    def encode(self, text: str) -> list[int]:
        """Encode `text` exactly: no start token, no inserted space, names of control tokens as plain text.

        Some tokenizers cannot encode every text: compare the bytes of the ids with those of the text.

        Raises:
            ValueError: the tokenizer fails on this text.
        """
        try:
            return self.encoder.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"{self.name}: it cannot encode {text[:80]!r}: {error}. Give it an unknown token (unk_token)"
            ) from error

    def opening(self, prompt_ids: Sequence[int], template_space: str = "") -> str:
        """The whitespace before a response that the tokenizer or the chat template inserts; it is not part of the response.

        Args:
            prompt_ids: token ids of the prompt.
            template_space: whitespace that the chat template inserts before a response.
        """
        fresh = all(i in self.control for i in prompt_ids)
        after_added = bool(prompt_ids) and prompt_ids[-1] in self.added
        spaced = {"never": False, "first": fresh, "segment": fresh or after_added, "always": True}[self.opening_rule]
        return " " if spaced else template_space


def _refused(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name}: the bytes of its tokens cannot be determined, so its positions cannot be aligned with another's: {reason}. "
        "Allowed are byte-level, SentencePiece-style, character and word tokenizers of the library `tokenizers`; choose a "
        "model with one of these, or a teacher that shares the student's tokenizer"
    )


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    inner = next(part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part)
    return [step for item in inner for step in _steps(item)]


def _vocabulary(model: Mapping[str, Any], name: str) -> dict[str, int]:
    """Token → id of the tokenizer's model, without added tokens."""
    for setting in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise _refused(
                name, f"its tokens carry the mark {model[setting]!r} ({setting}), whose spaces depend on the text"
            )
    if model["type"] == "Unigram":
        return {entry[0]: i for i, entry in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _unknown_ids(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[int]:
    if model["type"] == "Unigram":
        return set() if model.get("unk_id") is None else {model["unk_id"]}
    return {vocabulary[model["unk_token"]]} if model.get("unk_token") in vocabulary else set()


def _piece_reader(description: Mapping[str, Any], name: str) -> Callable[[str], bytes]:
    """A function from a token's name to the bytes it adds after other tokens."""
    steps = _steps(description["decoder"])
    kinds = [step["type"] for step in steps]
    if not kinds:
        _check_words(description, name)
        return lambda token: b" " + token.encode()
    if "ByteLevel" in kinds:
        if set(kinds) - {"ByteLevel", "Fuse"}:
            raise _refused(name, f"its decoder does {', '.join(kinds)}, of which only ByteLevel and Fuse go together")
        return _byte_level_piece
    replaced = [
        pair for number, step in enumerate(steps) if (pair := _replacement(step, "Fuse" in kinds[:number], name))
    ]
    byte_tokens = "ByteFallback" in kinds or description["model"].get("byte_fallback", False)

    def read(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if byte_tokens else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return read


def _check_words(description: Mapping[str, Any], name: str) -> None:
    """Without a decoder, tokens are joined by spaces. Check that the pre-tokenizer removed the text's own spaces."""
    removing = [
        s
        for s in _steps(description["pre_tokenizer"])
        if s["type"] in _SPACE_REMOVING
        or (s["type"] == "CharDelimiterSplit" and s["delimiter"] == " ")
        or (s["type"] == "Split" and s["behavior"] == "Removed")
    ]
    if not removing:
        raise _refused(
            name,
            "it has no decoder, so decoding puts spaces between tokens that the text did not have; if tokens follow each "
            "other without spaces, set backend_tokenizer.decoder = tokenizers.decoders.Fuse()",
        )


def _replacement(step: Mapping[str, Any], fused: bool, name: str) -> tuple[str, str] | None:
    """The (old, new) replacement that a decoder step makes in every token, or None.

    Raises:
        ValueError: the step's effect on a token depends on other tokens or is unknown.
    """
    if step["type"] in ("Fuse", "ByteFallback"):
        return None
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace":
        old = step["pattern"].get("String")
        if old and (len(old) == 1 or not fused):
            return old, step["content"]
    if step["type"] == "Strip" and fused and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0:
        return None  # strips only the leading space of a whole text, which `opening` handles
    raise _refused(name, f"its decoder has the step {dict(step)}, whose effect on a single token is not known")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map from a printable character to each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    codes = [_ALPHABET.get(character) for character in token]
    return token.encode() if None in codes else bytes(code for code in codes if code is not None)


def _opening_rule(description: Mapping[str, Any]) -> OpeningRule:
    if description["decoder"] is None:
        return "always"
    steps = [*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])]
    schemes = {step["prepend_scheme"] for step in steps if step["type"] == "Metaspace"}
    if "always" in schemes or any(step["type"] == "Prepend" for step in steps):
        return "segment"
    return "first" if "first" in schemes else "never"


def _exact_encoder(description: dict[str, Any], special: set[int], name: str) -> Tokenizer:
    """A copy of the tokenizer without the steps that change a text."""
    normalizers = []
    for step in _steps(description["normalizer"]):
        kept = step["type"] == "ByteLevel" or (step["type"] == "Replace" and step["pattern"].get("String") == " ")
        if not (kept or step["type"] in _REWRITING or step["type"] == "Replace"):
            raise _refused(name, f"its normalizer has the step {step['type']}, which changes the text irreversibly")
        normalizers += [step] if kept else []
    splitters = _steps(description["pre_tokenizer"])
    for step in splitters:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    copy = {
        **description,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
        "added_tokens": [{**t, "special": t["special"] or t["id"] in special} for t in description["added_tokens"]],
        "model": {**description["model"], **({"dropout": None} if "dropout" in description["model"] else {})},
        "truncation": None,
        "padding": None,
    }
    encoder = Tokenizer.from_str(json.dumps(copy))
    encoder.encode_special_tokens = True
    return encoder


def _check_against_decoder(table: TokenBytes, backend: Tokenizer, description: Mapping[str, Any]) -> None:
    """Decode a sample of tokens, each three times in a row; raise unless the last two repeats equal the token's bytes."""
    plain = [i for i in table.pieces if i not in table.added]
    for i in plain[:: max(1, len(plain) // _CHECKED_TOKENS)]:
        try:
            piece = table.pieces[i].decode()
        except UnicodeDecodeError:
            continue
        if _BYTE_TOKEN.fullmatch(backend.id_to_token(i) or ""):
            continue  # some decoders print the names of byte tokens, although the encoder uses them as bytes
        decoded = backend.decode([i, i, i], skip_special_tokens=False)
        if not decoded.endswith(piece + piece):
            kinds = [step["type"] for step in _steps(description["decoder"])]
            raise _refused(
                table.name,
                f"id {i} should add {piece!r} to a text, but its decoder ({kinds}) decodes three of it to {decoded!r}",
            )
