"""Rows of logits from which no token can be drawn, and ones that only look so; for the tests of all backends."""

import math

import torch

from quietstar.ops.linear_sample.inputs import Sampling

INF, NAN = math.inf, math.nan
VOCABULARY, PADDED = 150, 192
SUPPRESSED = 70
# Temperature, softcap, top_k, top_p.
OPTIONS = [(1.0, None, None, None), (0.7, None, 100, 0.9), (0.7, 1.5, 5, None), (1.5, None, None, 0.8)]


def make_logits(device):
    """Logits of some rows, and which of the rows have a token if SUPPRESSED is."""
    rows = [(place, value) for place in (63, VOCABULARY - 1) for value in (NAN, -NAN, INF)]
    logits = torch.randn(len(rows) + 6, VOCABULARY, device=device)
    for row, (place, value) in enumerate(rows):
        logits[row, place] = value
    nothing, one, suppressed, both, signs, many = logits[len(rows) :]
    nothing.fill_(-INF)
    one.fill_(-INF)[33] = 0.5
    suppressed[SUPPRESSED] = NAN
    both.fill_(NAN)[SUPPRESSED] = INF
    signs[:64], signs[64:] = INF, -INF
    many[1::2] = -INF
    drawn = torch.tensor([False] * len(rows) + [False, True, True, False, False, True], device=device)
    padded = torch.full((len(logits), PADDED), -INF, device=device)
    padded[:, :VOCABULARY] = logits
    return padded, drawn


def assert_broken_rows_have_no_token(sample_rows, device="cpu", options=OPTIONS):
    """Of a row kernel (``linear_sample.chunks.SampleKernel``); the other rows get what they get without them."""
    for temperature, softcap, top_k, top_p in options:
        logits, drawn = make_logits(device)

        def sample(logits, temperature=temperature, softcap=softcap, top_k=top_k, top_p=top_p):
            seed, suppress = torch.tensor(3, device=device), torch.tensor([SUPPRESSED], device=device)
            return sample_rows(logits, 0, Sampling(seed, temperature, softcap, suppress, top_k, top_p))

        tokens = sample(logits.clone())
        assert torch.equal(tokens >= 0, drawn), (temperature, top_k, top_p, tokens)
        assert (tokens[~drawn] == -1).all()
        assert (tokens != SUPPRESSED).all()
        assert (logits[drawn].gather(1, tokens[drawn][:, None]) > -INF).all()
        whole = torch.where(drawn[:, None], logits, torch.zeros_like(logits))
        whole[:, VOCABULARY:] = -INF
        assert torch.equal(sample(whole)[drawn], tokens[drawn])
