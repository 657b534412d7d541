"""The control tokens of a tokenizer, and how text that writes their names is tokenised without them.

Transformers has two arguments that do less. `split_special_tokens` does not cover chat templates, nor special tokens in a
Unigram vocabulary; `sanitize_control_tokens` (not in 5.16) does not cover plain prompts. Both cut the text at the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from oprd.data.chat_template import continues, rendered
from oprd.data.rows import Messages, PromptRow, merged_system_prompt
from oprd.sanitize import printable

# Private-use characters. In a copy of the tokenizer, one of them stands for each control token, so that no text writes it.
_FIRST, _BEGIN, _END = 0xF0000, "\U00100000", "\U00100001"
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_TAG = re.compile(r"</?([\w-]+)>")
_PROBES = [("system", "user"), ("user",), ("user", "assistant")]


def control_token_ids(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Control token → id: the tokens that say who speaks and where a text ends.

    These are the tokenizer's special tokens, and other added tokens listed in `tokenizer.chat_control_tokens`; without such a list,
    those that its chat template writes (`<|user|>` is not special everywhere). Pairs of tags that are not special (`<think>`,
    `</think>`) are words of a message. So are marks of a template that are no tokens (Llama 2's `[INST]`): a text that writes
    them has the template's ids.

    Args:
        tokenizer: any.
        template_kwargs: arguments of its chat template.
    """
    added = {token.content: (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
    control = {name for name, (_, special) in added.items() if special} | {*tokenizer.all_special_tokens}
    listed = getattr(tokenizer, "chat_control_tokens", None)
    others = {name for name in added if name not in control and not name.isspace()}
    if listed is not None:
        control |= others & {*listed}
    elif others and tokenizer.chat_template is not None:
        written = _template_text(tokenizer, template_kwargs or {})
        tags = {name: match[1] for name in others if (match := _TAG.fullmatch(name))}
        words = {name for name, tag in tags.items() if {f"<{tag}>", f"</{tag}>"} <= {*added}}
        control |= {name for name in others - words if name in written}
    return {name: i for name, (i, _) in added.items() if name in control}


def _template_text(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """The source of the chat template, and what it makes of short conversations: it may put a token together from parts."""
    source = kwargs.get("chat_template") or tokenizer.chat_template
    parts = list(source.values()) if isinstance(source, Mapping) else [str(source)]
    for roles in _PROBES:
        try:
            parts.append(rendered(tokenizer, [{"role": role, "content": "x"} for role in roles], kwargs))
        except Exception:  # the template refuses this conversation; its errors share no base class
            continue
    return "\0".join(parts)


@contextmanager
def naming_the_row(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, kwargs: Mapping[str, Any] | None
) -> Iterator[None]:
    """Turn what the chat template or the tokenizer raises inside the block into a ValueError with the row and a remedy.

    Args:
        tokenizer: of the model that reads the row.
        row: the row that the block renders.
        kwargs: arguments of the chat template.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of a template's own raise_exception, jinja and tokenizers, which share no base class
        where, why = row.source or "the prompt", f"{type(error).__name__}: {printable(error)[:300]}"
        if isinstance(row.prompt, str):
            shown = printable(row.prompt)[:80]
            raise ValueError(
                f"{where}: the tokenizer cannot read the prompt '{shown}' ({why}). Change or remove the row"
            ) from error
        roles = ", ".join(printable(message["role"]) for message in row.prompt)
        raise ValueError(
            f"{where}: the chat template cannot render the prompt, whose roles are {roles[:120]} ({why}). "
            f"{_remedy(tokenizer, row, kwargs or {})}"
        ) from error


def _remedy(tokenizer: PreTrainedTokenizerBase, row: PromptRow, kwargs: Mapping[str, Any]) -> str:
    """What makes the template render the row: tried, not guessed from its message."""
    assert not isinstance(row.prompt, str), "only a conversation has a template"
    if (merged := merged_system_prompt(row.prompt)) is not None and _renders(tokenizer, merged, kwargs):
        return "Set merge_system_prompt: true, which puts the system message into the user's turn"
    if continues(row) and row.prompt[1:] and _renders(tokenizer, row.prompt[:-1], kwargs):
        return (
            "The template cannot leave the assistant's last turn open, for the model to continue it: remove this turn"
        )
    return "Change the roles of the row, or give another template with chat_template_kwargs"


def _renders(tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]) -> bool:
    try:
        return bool(rendered(tokenizer, messages, kwargs))
    except Exception:  # so this is not the remedy
        return False


@dataclass(frozen=True)
class ControlTokens:
    """Tokenises prompts so that only the chat template and the tokenizer itself write control tokens, never the text of a row.

    The copy of the tokenizer that reads such text is made at the first of them.

    Args:
        tokenizer: the tokenizer.
        ids: control token → id.
        template_kwargs: arguments of its chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: Mapping[str, int]
    template_kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> ControlTokens:
        """The control tokens of a tokenizer (`control_token_ids`)."""
        return cls(tokenizer, control_token_ids(tokenizer, template_kwargs), dict(template_kwargs or {}))

    def find(self, prompt: PromptRow | str) -> str | None:
        """The first control token that a text, or the text of a row, writes; None if there is none."""
        if isinstance(prompt, PromptRow):
            if not isinstance(prompt.prompt, str):
                texts = (text for message in prompt.prompt for text in (message["content"], message["role"]))
                return next((found for text in texts if (found := self.find(text))), None)
            prompt = prompt.prompt
        if not self.ids:
            return None
        match = self._names.search(prompt)
        if match is None and self._normalizer is not None:
            match = self._names.search(self._normalizer.normalize_str(prompt))
        return None if match is None else match[0]

    def encode(self, text: str, *, add_special_tokens: bool = True, source: str = "") -> list[int]:
        """Token ids of a text, whose control tokens are read as text.

        Args:
            text: any.
            add_special_tokens: as the tokenizer's argument: its own start and end tokens.
            source: name of the text, for messages.

        Raises:
            ValueError: the tokenizer cannot read the text without its control tokens.
        """
        row = PromptRow(text, source=source)
        self._check_no_private(text, row)
        usual = self.tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]
        return self._encode(text, usual, row, add_special_tokens=add_special_tokens)

    def encode_chat(self, row: PromptRow) -> list[int]:
        """Token ids of a conversation, where only the chat template writes control tokens.

        Raises:
            ValueError: the tokenizer or the template cannot keep the text of this row apart; names the row.
        """
        assert not isinstance(row.prompt, str), "a conversation is a list of messages"
        self._check_no_private("".join(text for message in row.prompt for text in message.values()), row)
        marked = [{key: self._mark(text) for key, text in message.items()} for message in row.prompt]
        with naming_the_row(self.tokenizer, row, self.template_kwargs):
            text, plain = (rendered(self.tokenizer, given, self.template_kwargs) for given in (marked, row.prompt))
        if text.replace(_BEGIN, "").replace(_END, "") != plain:
            raise self._refused(row, "the chat template does not copy the text of the messages but depends on it")
        written: list[int] = []

        def private(match: re.Match[str]) -> str:
            if match["name"] is None:
                return match["text"] or ""
            written.append(self.ids[match["name"]])
            return self._private[match["name"]]

        return self._encode(self._marked.sub(private, text), written, row, add_special_tokens=False)

    def _encode(self, text: str, written: Sequence[int], row: PromptRow, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text in which private characters stand for control tokens; checked to have the control ids `written`."""
        copy = self._copy
        if isinstance(copy, str):
            raise self._refused(row, copy)
        found = copy.encoder.encode(text, add_special_tokens=add_special_tokens).ids
        ids = [copy.original.get(i, i) for i in found]
        control = {*self.ids.values()} - copy.unknown
        if [i for i in ids if i in control] != [i for i in written if i in control]:
            raise self._refused(row, "the tokenizer makes a control token of it even so")
        return ids

    def _mark(self, text: str) -> str:
        return self._names.sub(lambda match: f"{_BEGIN}{match[0]}{_END}", text)

    def _check_no_private(self, text: str, row: PromptRow) -> None:
        if found := _PRIVATE.search(text):
            raise self._refused(row, f"the character U+{ord(found[0]):X} in the same text is used for this; remove it")

    def _refused(self, row: PromptRow, reason: str) -> ValueError:
        return ValueError(
            f"{row.source or 'the text'}: it writes {self.find(row)!r}, a control token of the tokenizer, which cannot be read as "
            f"plain text: {reason}. Remove the token from the row, or write it in other characters"
        )

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile(_any_of([*self.ids]))

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        return re.compile(
            f"{_BEGIN}(?P<text>{self._names.pattern}){_END}|(?P<name>{self._names.pattern})|{_BEGIN}|{_END}"
        )

    @cached_property
    def _private(self) -> dict[str, str]:
        return {name: chr(_FIRST + n) for n, name in enumerate(self.ids)}

    @cached_property
    def _normalizer(self) -> Any:
        """The tokenizer's normalizer, if it comes before the search for a control token; else None."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        control = {*self.ids.values()}
        late = any(token.normalized for i, token in self.tokenizer.added_tokens_decoder.items() if i in control)
        return backend.normalizer if late and isinstance(backend, Tokenizer) else None

    @cached_property
    def _copy(self) -> _Copy | str:
        """The copy of the tokenizer; why there is none, as text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return f"{type(self.tokenizer).__name__} is not from the library `tokenizers`"
        description = json.loads(backend.to_str())
        try:
            encoder = Tokenizer.from_str(json.dumps(_renamed(description, self._private)))
        except Exception as error:  # the library raises nothing more specific
            return f"the tokenizer's vocabulary needs it ({error})"
        kept = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()}
        if any(encoder.token_to_id(name) != i for i, name in kept.items() if name not in self.ids):
            return "its added tokens cannot be renamed"
        model = description["model"]
        return _Copy(
            encoder,
            original={encoder.token_to_id(private): self.ids[name] for name, private in self._private.items()},
            unknown={self.tokenizer.unk_token_id, model.get("unk_id"), self.ids.get(model.get("unk_token"))},
        )


@dataclass(frozen=True)
class _Copy:
    """A copy of a tokenizer, with a private character for each control token's name.

    Args:
        encoder: the copy.
        original: id of a control token in the copy → in the tokenizer.
        unknown: ids that stand for unknown characters of a text.
    """

    encoder: Tokenizer
    original: Mapping[int | None, int]
    unknown: set[int | None]


def _any_of(words: Sequence[str]) -> str:
    """A regular expression for the longest of some words, which reads shared beginnings once: Gemma has 6,400 added tokens."""
    rest: dict[str, list[str]] = {}
    for word in words:
        rest.setdefault(word[:1], []).append(word[1:])
    ends = rest.pop("", None) is not None
    branches = [re.escape(first) + _any_of(others) for first, others in rest.items()]
    if len(branches) < 2 and not ends:
        return "".join(branches)
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}" if branches else ""


def _renamed(description: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The description of a tokenizer with other names for some tokens, in its added tokens and in its model's vocabulary."""
    model = dict(description["model"])
    words = model["vocab"]
    if isinstance(words, Mapping):
        model["vocab"] = {names.get(word, word): i for word, i in words.items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in words]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        {**token, "content": names.get(token["content"], token["content"])} for token in description["added_tokens"]
    ]
    return {**description, "model": model, "added_tokens": added, "truncation": None, "padding": None}
