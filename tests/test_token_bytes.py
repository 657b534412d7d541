"""The bytes of tokens, read off each kind of tokenizer's description."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.alignment.token_bytes import TokenBytes
from tiny import tiny_tokenizer
from tokenizer_kinds import KINDS, byte_level, pieces_of, sentencepiece_unigram, tokenizer_of, wrapped

TABLES: dict[str, TokenBytes] = {}
COMPLETE = [k for k in KINDS if k not in ("characters", "words", "smollm2")]  # those that can write every text


def table(kind: str) -> TokenBytes:
    if kind not in TABLES:
        TABLES[kind] = TokenBytes.of(tokenizer_of(kind), kind)
    return TABLES[kind]


def of(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "the teacher's tokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_kind(kind):
    assert dict(table(kind).pieces) == pieces_of(kind)
    assert not table(kind).pieces.keys() & table(kind).control.keys()
    assert table(kind).pieces.keys() | table(kind).control.keys() == set(tokenizer_of(kind).get_vocab().values())


def test_pieces_by_hand():
    vocab = {"a": 0, "Ġthe": 1, "ł": 2, "Ģ": 3, "Ã©": 4, "Ċ": 5, "é": 6}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<é>"])
    assert dict(of(tokenizer).pieces) == {
        0: b"a", 1: b" the", 2: b"\xa0", 3: b"\x80", 4: "é".encode(), 5: b"\n", 6: b"\xe9", 7: "<é>".encode()
    }  # fmt: skip
    tokenizer = sentencepiece_unigram()
    pieces = of(tokenizer).pieces
    assert [pieces[tokenizer.token_to_id(t)] for t in ("<0x00>", "<0xE6>", "▁▁", "▁the", "数")] == [
        b"\x00", b"\xe6", b"  ", b" the", "数".encode()
    ]  # fmt: skip


@pytest.mark.parametrize("kind", COMPLETE)
@given(text=st.text())
def test_a_text_is_written_byte_by_byte(kind, text):
    ids = table(kind).encode(text)
    # What these cannot write as it is: the stand-in for a space, and the name of a byte token.
    if "▁" in text or "<0x" in text:
        return
    assert b"".join(table(kind).pieces[i] for i in ids) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="The answer is 42 数é🙂\n"))
def test_what_decode_makes_of_ids_is_their_bytes(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i in pieces_of(kind)]
    ours = b"".join(table(kind).pieces[i] for i in ids)
    # A whole text decodes without the space that its tokenizer puts before it (Metaspace drops all of the first token).
    assert tokenizer.decode(ids).lstrip(" ") == ours.decode(errors="replace").lstrip(" ")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tiktoken", "words")])
@given(text=st.text(alphabet="The answer is 42 数é🙂\n"))
def test_the_encoder_is_the_tokenizer_but_for_its_own_space(kind, text):
    tokenizer = tokenizer_of(kind)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    space = " " if text and table(kind).opening([]) and not (kind == "unigram" and text.startswith(" ")) else ""
    assert table(kind).encode(space + text) == own


def test_nothing_is_normalised_and_no_special_token_is_read_out_of_text():
    for text in ("e\u0301", "<|im_end|>", "<tool>"):
        ids = table("tiktoken").encode(text)
        assert b"".join(table("tiktoken").pieces[i] for i in ids) == text.encode()
    assert tokenizer_of("tiktoken")("<|im_end|>")["input_ids"] == [tokenizer_of("tiktoken").eos_token_id]
    assert tokenizer_of("tiktoken")("e\u0301")["input_ids"] == tokenizer_of("tiktoken")("é")["input_ids"]  # as it was


def test_the_tokenizer_itself_stays_as_it_is():
    tokenizer = wrapped(sentencepiece_unigram())
    before = tokenizer.backend_tokenizer.to_str()
    TokenBytes.of(tokenizer).encode("<end> a")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_the_space_before_a_response():
    def opening(kind: str, *names: str, template: str = "") -> str:
        return table(kind).opening([tokenizer_of(kind).get_vocab()[n] for n in names], template)

    assert opening("byte_level", "<turn>") == ""
    assert opening("byte_level", "<turn>", template=" ") == " "
    assert opening("llama", "a", "<turn>") == " "  # Llama 2's normalizer starts anew after every added token
    assert opening("llama", "<turn>", "a") == ""
    assert opening("unigram", "a", "<turn>") == ""  # Metaspace "first" does so at the very start only
    assert opening("unigram", "<s>") == " "
    assert opening("unigram", "a", "<turn>", template=" ") == " "
    assert opening("words", "The") == " "  # between two words there is always one


def test_settings_of_the_tokenizer_that_do_not_belong_here_are_off():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.model.dropout = 0.9
    read = of(tokenizer)
    once = read.encode("The answer is")
    assert b"".join(read.pieces[i] for i in once) == b"The answer is"
    assert all(read.encode("The answer is") == once for _ in range(20))


def test_special_tokens_that_only_transformers_knows():
    tokenizer = tiny_tokenizer()
    read = TokenBytes.of(tokenizer)
    assert dict(read.control) == {0: "<pad>", 1: "<bos>", 2: "<eos>"}
    assert read.pieces[3] == b"0"


def with_parts(decoder=None, normalizer=None, pre_tokenizer=None, model=None) -> Tokenizer:
    tokenizer = Tokenizer(model or models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    for name, part in (("decoder", decoder), ("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if part is not None:
            setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (with_parts(decoders.WordPiece()), "'type': 'WordPiece'.*whose effect on a single token is not known"),
        (with_parts(decoders.CTC()), "'type': 'CTC'"),
        (with_parts(decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])), "'type': 'Strip'"),
        (with_parts(decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])), "'type': 'Replace'"),
        (with_parts(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])), "ByteLevel, Strip, of which"),
        (with_parts(decoders.Fuse(), normalizers.Lowercase()), "normalizer has the step Lowercase"),
        (with_parts(decoders.Fuse(), normalizers.BertNormalizer()), "step BertNormalizer"),
        (with_parts(pre_tokenizer=pre_tokenizers.Digits()), "it has no decoder.*decoders.Fuse"),
        (with_parts(), "it has no decoder"),
        (with_parts(decoders.BPEDecoder(), model=models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), "the mark '</w>'"),
        (with_parts(decoders.Fuse(), model=models.WordPiece({"a": 0}, unk_token="a")), "the mark '##'"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused_with_the_reason(tokenizer, reason):
    with pytest.raises(
        ValueError, match=f"the teacher's tokenizer: the bytes of its tokens cannot be determined.*{reason}"
    ):
        of(tokenizer)


def test_a_reading_that_the_decoder_contradicts_is_refused():
    # Metaspace leaves out every stand-in of a first token, and after Fuse there is but one.
    joined = decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])
    tokenizer = with_parts(joined, model=models.WordLevel({"?": 0, "▁a": 1}, unk_token="?"))
    with pytest.raises(
        ValueError, match=r"id 1 should add ' a' to a text, but its decoder \(\['Fuse', 'Metaspace'\]\) decodes three"
    ):
        of(tokenizer)


def test_a_tokenizer_that_does_not_describe_itself_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)
    with pytest.raises(ValueError, match="is not from the library `tokenizers`"):
        TokenBytes.of(tokenizer)


def test_a_text_that_the_tokenizer_fails_on_says_so():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(ValueError, match=r"it cannot encode 'b': .*Give it an unknown token"):
        of(tokenizer).encode("b")
