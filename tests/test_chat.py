"""The command ``quietstar chat``."""

import io

import pytest
import word_model
from transformers import AutoTokenizer

from quietstar.chat import Conversation
from quietstar.cli import main

TEMPLATE = "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }} {% endfor %}on"


def chat(capsys, monkeypatch, folder, said, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    code = main(["chat", "--model", folder, "--max_new_tokens", "3", *options])
    out, err = capsys.readouterr()
    return code, [answer.strip() for answer in out.split("> ")[1:]], err


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
@pytest.mark.parametrize("leave", ["", "/exit\ncat\n"], ids=["end of input", "exit"])
def test_answers_every_line(tmp_path, capsys, monkeypatch, template, leave):
    folder = word_model.save(tmp_path, template)
    code, answers, err = chat(capsys, monkeypatch, folder, "cat\n\nsat\n/new\ncat\n" + leave, "--draft_length", "2")
    first, empty, second, new, again, end = answers
    assert (code, empty, new, end) == (0, "", "", "")
    for answer in (first, second, again):
        assert len(answer.split()) == 3
        assert set(answer.split()) <= set(word_model.WORDS)
    assert err.count("drafts accepted") == 3


def test_shows_thoughts(tmp_path, capsys, monkeypatch):
    _, answers, _ = chat(capsys, monkeypatch, word_model.save(tmp_path), "cat\n", "--show-thoughts")
    shown = " ".join(answers)
    assert shown.count("weight") == shown.count("gain") == shown.count("thought") == 3


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [(None, "cat", "cat sat mat"), (TEMPLATE, "the cat on", "the cat a sat the mat on")],
    ids=["plain", "template"],
)
def test_a_conversation_is_remembered(tmp_path, template, first, second):
    tokenizer = AutoTokenizer.from_pretrained(word_model.save(tmp_path, template))
    talk = Conversation(tokenizer)
    assert tokenizer.decode(talk.ask("cat")["input_ids"][0]) == first
    talk.answer("sat")
    assert tokenizer.decode(talk.ask("mat")["input_ids"][0]) == second


@pytest.mark.parametrize(
    ("said", "options", "message"),
    [
        ("cat\n", ["--temperature", "-1"], "--temperature must be >= 0, got -1.0"),
        ("cat\n", ["--top_p", "nan"], "--top_p must be in (0, 1], got nan"),
        ("cat\n", ["--max_new_tokens", "0"], "--max_new_tokens must be an integer in [1, 1000000], got 0"),
        ("cat\n", ["--draft_length", "0"], "--draft_length must be None, 'auto' or an integer >= 1, got 0"),
        ("cat\n", ["--model", "./nowhere"], "cannot load --model ./nowhere"),
        ("the cat " * 20, [], "input_ids must have at most max_position_embeddings = 32 tokens, got 40"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, monkeypatch, said, options, message):
    code, _, err = chat(capsys, monkeypatch, word_model.save(tmp_path), said, *options)
    assert code == 2
    assert f"quietstar chat: {message}" in err
