"""Tokens to text, and stop strings: what comes out does not depend on how it was cut."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import cla_export
from cla_export.serve.detokenizer import Detokenizer
from cla_export.serve.requests import Request
from cla_export.serve.sequence import Sequence
from cla_export.serve.stopping import StopMatcher
from cla_export.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(cla_export.demo_checkpoint())
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def fallback_tokenizer():
    """Sentencepiece's manner: `▁` for a space, the first one dropped, bytes as tokens."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {piece: 256 + i for i, piece in enumerate(["▁the", "▁", "a", "▁word", "s", "."])}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


FALLBACK = fallback_tokenizer()


def pieces_of(decoding, prompt, tokens):
    stream = Detokenizer(decoding, prompt)
    return [*(stream.add(token) for token in tokens), stream.flush()]


@given(TEXTS)
@example("Ärger 🙂 中文")
@example("🏳️‍🌈 e\u0301")
@example("a\ufffd b")  # text like any other
@example("a\ufffd\ufffd")  # but at the end, where no decoder tells it from a character cut off
def test_pieces_are_the_text(text):
    pieces = pieces_of(decode, (), TOKENIZER.encode(text).ids)
    assert "".join(pieces) == text.rstrip("\ufffd")
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.lists(st.integers(3, 2047), max_size=20), st.lists(st.integers(3, 2047), max_size=30))
def test_pieces_of_any_tokens_are_their_text_but_for_a_broken_end(prompt, tokens):
    alone = "".join(pieces_of(decode, (), tokens))
    assert alone == decode(tokens).rstrip("\ufffd")
    if "\ufffd" not in decode(prompt[-5:]) + decode(tokens):
        assert "".join(pieces_of(decode, prompt, tokens)) == alone


@given(TEXTS)
def test_bytes_as_tokens(text):
    def by_pieces(ids):
        return FALLBACK.decode(list(ids))

    tokens = [*text.encode()]
    alone = by_pieces(tokens).rstrip("\ufffd")
    assert "".join(pieces_of(by_pieces, (), tokens)) == alone
    behind = "".join(pieces_of(by_pieces, [259, 260], tokens))
    whole = by_pieces([259, 260, *tokens])
    assert behind == whole[len(by_pieces([259, 260])) :].rstrip("\ufffd")


def test_the_space_in_front_of_the_first_token_is_kept():
    def by_pieces(ids):
        return FALLBACK.decode(list(ids))

    assert pieces_of(by_pieces, [256], [259, 260]) == [" word", "s", ""]
    assert pieces_of(by_pieces, [], [259, 260]) == ["word", "s", ""]


def test_an_unfinished_character_is_never_told():
    tokens = TOKENIZER.encode("ok 🙂").ids
    assert "".join(pieces_of(decode, (), tokens[:-1])).strip() == "ok"


def test_bytes_that_are_no_character_do_not_hold_back_for_ever():
    wrong = TOKENIZER.token_to_id("ÿ")  # the byte 0xff
    stream = Detokenizer(decode)
    assert "".join(stream.add(wrong) for _ in range(100)).count("\ufffd") >= 64


def cut(text, places):
    places = sorted({min(place, len(text)) for place in places})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def stopped(stops, pieces):
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        text += matcher.add(piece)
        if matcher.found is not None:
            return text, matcher.found
    return text + matcher.flush(), None


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 24), max_size=6),
)
def test_stops_are_found_wherever_the_text_is_cut(text, stops, places):
    expected = (text, None)
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            expected = (text[: end - len(longest)], longest)
            break
    assert stopped(stops, cut(text, places)) == expected
    assert stopped(stops, list(text)) == expected


def test_only_what_may_become_a_stop_is_held_back():
    matcher = StopMatcher(["</end>"])
    assert [matcher.add(piece) for piece in ("a</", "en", "x", "<", "/end> more")] == [
        "a", "", "</enx", "", "",
    ]  # fmt: skip
    assert matcher.found == "</end>"


def generated(tokens, **options):
    """The text that a sequence tells while it is given tokens, and how it ends."""
    request = Request((5,), 40, stream=True, **options)
    sequence, told = Sequence(0, request, frozenset({2}), decode), []
    for token in tokens:
        sequence.add(token, None)
        output = sequence.output()
        told += [output.text] if output else []
        if sequence.finish:
            break
    return "".join(told), sequence


@pytest.mark.parametrize("stop", ["pass", " came to", "e to p", "And", "\n"])
def test_stop_strings_in_generated_text(stop):
    text = "And it came to pass,\nafter"
    told, sequence = generated(TOKENIZER.encode(text).ids, stop=(stop, "never"))
    assert told == text.partition(stop)[0]
    assert (sequence.finish.reason, sequence.finish.stopped_by) == ("stop", stop)


def test_end_tokens_have_no_text():
    tokens = [*TOKENIZER.encode("Selah").ids, 2, 300]
    told, sequence = generated(tokens)
    assert told == "Selah"
    assert sequence.finish.reason == "stop"
    assert sequence.finish.completion_tokens == len(tokens) - 1
    told, sequence = generated(tokens, ignore_eos=True)
    assert told.startswith("Selah") and len(told) > len("Selah")
    assert sequence.finish is None
    told, sequence = generated(tokens, stop_tokens=frozenset({tokens[1]}))
    assert sequence.finish.stopped_by == tokens[1]


def test_stops_do_not_count_before_the_least_number_of_tokens():
    tokens = TOKENIZER.encode("And And And And").ids
    told, sequence = generated(tokens, stop=("And",), min_tokens=2)
    assert told == "And And "
    assert sequence.finish.completion_tokens == 3


def test_text_without_streaming_comes_once():
    request = Request((5,), 3)
    sequence = Sequence(0, request, frozenset(), decode)
    for token in TOKENIZER.encode("it came to").ids[:3]:
        assert sequence.output() is None
        sequence.add(token, None)
    assert sequence.output().text == "it came to"
