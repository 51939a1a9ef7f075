"""Tokens as people read them."""

import pytest
import word_model
from hostile_text import HOSTILE
from transformers import AutoTokenizer

from quietstar.quickstart.world import world_tokenizer
from quietstar.report import pieces


def of_text(tokenizer, text):
    return pieces.pieces(tokenizer, tokenizer(text)["input_ids"])


@pytest.mark.parametrize("text", ["the cat  sat\n\n on", HOSTILE, "😀", "é" * 5 + "漢\ufffd字", "\ufffd" * 3])
def test_together_they_are_the_text(tokenizer, text):
    assert "".join(of_text(tokenizer, text)) == text


def test_a_character_stands_where_its_last_byte_is(tokenizer):
    assert of_text(tokenizer, "a😀 é") == ["a", "", "", "", "😀", " ", "", "é"]


def test_a_text_that_ends_within_a_character_hides_nothing_before(tokenizer):
    tokens = tokenizer("ab😀")["input_ids"][:-1]
    assert pieces.pieces(tokenizer, tokens) == ["a", "b", "", "", "\ufffd"]


def test_words_keep_their_spaces():
    assert of_text(world_tokenizer(), "Ann's boss is Eli. Eli's aunt is") == [
        "Ann", "'s boss", " is", " Eli", ".", " Eli", "'s aunt", " is"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [("a", "a"), (" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "‹U+000D›"), ("😀", "‹F0›"), ("é", "‹C3›"), ("<", "<")],
)
def test_names_of_tokens(tokenizer, text, name):
    assert pieces.name(tokenizer, tokenizer(text)["input_ids"][0]) == name


def test_spaces_around_a_word_are_seen(tokenizer):
    (token,) = tokenizer(" the")["input_ids"]
    assert pieces.name(tokenizer, token) == "␣the"


def test_thoughts(tokenizer, tmp_path):
    emoji = tokenizer("😀")["input_ids"]
    assert pieces.thought(tokenizer, tokenizer("the cat\nsat")["input_ids"]) == "the cat↵sat"
    assert pieces.thought(tokenizer, emoji) == "😀"
    assert pieces.thought(tokenizer, emoji[:2] + tokenizer(" cat")["input_ids"]) == "‹F0› ‹9F› ␣cat"
    assert pieces.thought(tokenizer, []) == "(nothing)"
    words = AutoTokenizer.from_pretrained(word_model.save(tmp_path))
    assert pieces.thought(words, [1, 2, 3]) == "the cat sat"


def test_a_token_that_the_tokenizer_does_not_know_has_a_name(tokenizer):
    assert pieces.name(tokenizer, len(tokenizer) + 1) == f"#{len(tokenizer) + 1}"


def test_control_characters_are_seen_and_reorder_nothing():
    assert pieces.visible("a\n\tb\u202ec\x00\u2028") == "a\n\tb‹U+202E›c‹U+0000›‹U+2028›"
    assert pieces.visible("a\n\tb", one_line=True) == "a↵⇥b"
    family = "👩‍👩‍👧 é ع"  # with what joins, which is no control
    assert pieces.visible(family) == family
