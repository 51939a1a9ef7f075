"""Measures of families that do more with their hidden states than to multiply them with a matrix."""

import pytest
import torch
import torch.nn.functional as F
from decoder_families import VOCABULARY, decoder_of

from quietstar import QuietStarForCausalLM
from quietstar.evaluation import held_out_nll, likeliest_tokens, text_nll
from quietstar.evaluation.predictions import next_token_logits


@pytest.mark.parametrize("family", ["Gemma2", "Granite"])
@torch.no_grad()
def test_predictions_without_thoughts_are_those_of_the_family(family, tmp_path):
    base = decoder_of(family)
    base.save_pretrained(tmp_path)
    options = {"thought_length": 1, "lookahead": 1, "num_thoughts": 1}
    model = QuietStarForCausalLM.from_base(tmp_path, initial_token_ids=[5], **options).eval()
    model.lm_head.weight[VOCABULARY:] = -model.lm_head.weight[:2]  # of other sizes than the two new rows begin with
    windows = torch.randint(1, VOCABULARY, (3, 7))
    own = base(windows).logits[:, :-1]

    assert_close(text_nll(base, windows), F.cross_entropy(own.transpose(1, 2), windows[:, 1:], reduction="none"))
    logits = next_token_logits(model, windows, torch.arange(6), think="never")
    assert_close(logits[..., :VOCABULARY], own)
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    assert_close(text_nll(model, windows), expected)
    measured = held_out_nll(model, windows)
    assert_close(measured.base, expected)
    likeliest = likeliest_tokens(model, windows, measured.thought_tokens, count=3)
    assert_close(likeliest.base_logprobs, logits.log_softmax(-1).topk(3).values)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
