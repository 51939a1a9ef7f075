"""Drafts change how fast text is generated, never which: the same greedy text, the same distribution."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessor, LogitsProcessorList

from quietstar.models.speculation import DraftLength, verify


class NoEcho(LogitsProcessor):
    """Forbids the token that stands two places back: wrong for any other text than the one it is given."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


def padded(text):
    """The batch with 0 to 5 tokens of left padding, and its mask."""
    mask = torch.ones_like(text)
    for row, start in enumerate((0, 5, 2)):
        mask[row, :start] = 0
    return text * mask, mask


@pytest.fixture(autouse=True)
def plain_ops(monkeypatch):
    """The ops' shortest backend: what is tested here is the loop around them."""
    monkeypatch.setenv("QUIETSTAR_BACKEND", "reference")


@pytest.fixture
def texts():
    return torch.randint(1, 38, (3, 12))


SETTINGS = {
    "plain": {},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": [3, 4]},
    "early stops": {"eos_token_id": [*range(1, 9)]},
    "own processor": {"logits_processor": LogitsProcessorList([NoEcho()])},
}


@pytest.mark.parametrize(("left_padding", "window"), [(False, None), (False, 6), (True, None), (True, 6)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_text_is_the_same(make_model, texts, settings, left_padding, window):
    """Some drafts are accepted and some are not at a mixing weight of this size: rows fall apart."""
    model = make_model(thought_temperature=0.0, sliding_window=window)
    model.mixing_head[-1].weight.data *= 0.02
    inputs, mask = padded(texts) if left_padding else (texts, torch.ones_like(texts))
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False} | SETTINGS[settings]
    wanted = model.generate(inputs, **options)
    for draft_length in (1, 3, 4, 8, "auto"):
        output = model.generate(inputs, **options, draft_length=draft_length, return_dict_in_generate=True)
        assert torch.equal(output.sequences, wanted), draft_length
        assert 0 < output.accepted < output.drafted
        assert output.thought_share == 1


def test_stopped_rows_are_padded_as_without_drafts(make_model, texts):
    """Without a token for padding it is the end of text."""
    model = make_model(thought_temperature=0.0, pad_token_id=None, eos_token_id=[5, *range(10, 20)])
    wanted = model.generate(texts, max_new_tokens=12, do_sample=False)
    output = model.generate(texts, max_new_tokens=12, do_sample=False, draft_length=3, return_thoughts=True)
    assert torch.equal(output.sequences, wanted)
    assert len(set(output.new_tokens.tolist())) > 1
    behind = torch.arange(output.thinks.shape[1]) >= output.new_tokens[:, None]
    assert (wanted[:, 12:][behind] == 5).all()
    assert torch.equal(output.thinks, ~behind)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_k": 4, "logits_processor": [NoEcho()]}], ids=["", "p"]
)
@pytest.mark.parametrize("draft_length", [None, 1, 3])
def test_sampled_text_has_the_models_distribution(make_model, options, draft_length):
    """Chi-square of two sampled tokens against their probability, summed over all thoughts in front of both."""
    model = make_model(vocab_size=7, start_thought_token_id=5, end_thought_token_id=6, thought_length=1,
                       num_thoughts=1, policy_temperature=1.0, initializer_range=0.2)  # fmt: skip
    prompt = torch.tensor([[1, 2, 3]])
    draws = 20_000
    generated = model.generate(
        prompt, max_new_tokens=3, do_sample=True, num_return_sequences=draws, draft_length=draft_length,
        **({"top_k": 0} | options | {"logits_processor": LogitsProcessorList(options.get("logits_processor", []))}),
    )  # fmt: skip
    counts = torch.bincount(generated[:, 3] * 7 + generated[:, 4], minlength=49).view(7, 7)

    first = next_token_probability(model, prompt, options)
    second = torch.stack([next_token_probability(model, torch.tensor([[1, 2, 3, x]]), options) for x in range(5)])
    expected = (first[:, None] * second).double()
    possible = expected > 0
    assert not counts[5:].any()
    assert not counts[:, 5:].any()
    assert not counts[:5, :5][~possible].any()
    expected = expected[possible] / expected.sum() * draws
    assert chisquare(counts[:5, :5][possible], expected).pvalue > 1e-4


def next_token_probability(model, text, options):
    """Probability [5] of the next token: over the five thoughts of one token, the thought's times the token's."""
    batch, length = text.expand(5, -1), text.shape[1]
    thoughts = torch.arange(5)[:, None, None, None]
    with torch.no_grad():
        logits = model(batch, thought_tokens=thoughts, logits_to_keep=1, suppress_thought_tokens=True).logits[:, 0]
        every = thoughts.expand(-1, -1, length + 2, -1)
        scored = torch.nn.functional.pad(batch, (0, 2), value=1)  # the objective wants text behind the thought
        logprob = model(scored, labels=scored, thought_tokens=every).thought_logprobs[:, 0, length - 1, 0]
    torch.testing.assert_close(logprob.exp().sum(), torch.tensor(1.0))
    for process in options.get("logits_processor", []):
        logits = process(batch, logits)
    logits = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        logits = logits.masked_fill(logits < logits.topk(options["top_k"]).values[:, -1:], -torch.inf)
    return (logprob.exp()[:, None] * logits.softmax(-1)).sum(0)[:5]


def test_drafts_are_accepted_as_the_rule_says():
    """Token 0 is drafted with probability q and accepted with min(1, p / q); a rejected one is never drawn again."""
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.1, 0.3])
    draws = 50_000
    scores, draft_scores = (x.log().expand(draws, 2, -1) for x in (p, q))
    for token, probability in enumerate((1 / 3, 1, 1)):
        drafts = torch.full((draws, 1), token)
        accepted, following = verify(drafts, draft_scores[:, :1], scores, do_sample=True)
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(accepted.double().mean() - probability) <= 5 * error
        assert (following[accepted == 0] == 1).all()  # the only token of which the base model drafts too little
        share = torch.bincount(following[accepted == 1], minlength=3) / (accepted == 1).sum()
        torch.testing.assert_close(share, p, atol=0.02, rtol=0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_verdicts_do_not_depend_on_the_prediction_behind_the_drafts(do_sample):
    draft_scores, scores, drafts = torch.randn(500, 2, 7), torch.randn(500, 3, 7), torch.randint(0, 7, (500, 2))
    outcomes = []
    for known in (scores, scores[:, :2]):
        torch.manual_seed(0)
        outcomes.append(verify(drafts, draft_scores, known, do_sample))
    (accepted, following), (judged, instead) = outcomes
    assert torch.equal(accepted, judged)
    assert torch.equal(following[accepted < 2], instead[accepted < 2])
    assert (accepted == 2).any()


def test_equal_predictions_reject_nothing():
    scores = torch.randn(1000, 5, 7)
    drafts = torch.randint(0, 7, (1000, 4))
    assert (verify(drafts, scores, scores, do_sample=True)[0] == 4).all()


def test_automatic_draft_length_follows_the_acceptance_rate():
    lengths = []
    for accepted in (0, 1, 2, 3, 4):
        length = DraftLength("auto", thought_length=8)
        for _ in range(50):
            length.learn([accepted], 4)
        lengths.append(length())
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == 16
    assert DraftLength("auto", 1)() < DraftLength("auto", 12)()  # the dearer a thought, the more it is worth to share


def test_acceptance_counts_what_was_compared():
    length = DraftLength(4, 1)
    length.learn([0, 2, 4], 4)
    assert (length.accepted, length.drafted) == (6, 1 + 3 + 4)
