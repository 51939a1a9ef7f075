"""Logits in which tokens are impossible, −∞, and what mixing must make of them; for the tests of all backends."""

import math

import torch

from quietstar.ops import mix_logits, mixed_cross_entropy

INF = math.inf
WEIGHTS = [0.0, 1.0, 0.3, 0.75, -1.5, 2.5]  # of the thought; the last two make +∞ of a token that is −∞ in one only
IN_BOTH, IN_BASE, IN_THOUGHT = 0, 3, -1


def mixed_number(base, thought, weight):
    if base == thought == -INF:
        return -INF
    if base == -INF:
        return thought if weight == 1 else (weight - 1) * INF
    if thought == -INF:
        return base if weight == 0 else -weight * INF
    return (1 - weight) * base + weight * thought


def expected(function, base, thought, weight, target, incoming):
    """Result and gradients in float64, of each row by itself."""
    base, thought, weight, incoming = (x.double() for x in (base, thought, weight, incoming))
    rows = [
        [mixed_number(*pair, w) for pair in zip(b, t, strict=True)]
        for b, t, w in zip(base.tolist(), thought.tolist(), weight.tolist(), strict=True)
    ]
    mix = torch.tensor(rows, dtype=torch.float64, device=base.device)
    result, gradient = mix, incoming
    if function == "cross entropy":
        log_probabilities = mix.log_softmax(dim=1)
        result = -log_probabilities.gather(1, target[:, None]).squeeze(1)
        chosen = torch.zeros_like(mix).scatter_(1, target[:, None], 1)
        gradient = incoming[:, None] * (log_probabilities.exp() - chosen)
    known = base.isfinite() & thought.isfinite()
    d_weight = (gradient * torch.where(known, thought - base, 0)).sum(dim=1)
    return result, gradient * (1 - weight[:, None]), gradient * weight[:, None], d_weight


def assert_impossible_tokens_right(function, backend, dtype=torch.float32, vocabulary=77, device="cpu"):
    weight = torch.tensor(WEIGHTS, device=device)
    rows, between = len(weight), (weight >= 0) & (weight <= 1)
    base, thought = (torch.randn(rows, vocabulary, device=device).to(dtype) for _ in range(2))
    base[:, IN_BOTH] = thought[:, IN_BOTH] = -INF
    base[between, IN_BASE] = -INF
    thought[between, IN_THOUGHT] = -INF
    target = torch.full((rows,), vocabulary // 2, device=device)
    incoming = torch.randn((rows, vocabulary) if function == "mix" else (rows,), device=device)

    leaves = [x.detach().requires_grad_() for x in (base, thought, weight)]
    if function == "mix":
        result = mix_logits(*leaves, backend=backend)
    else:
        result = mixed_cross_entropy(*leaves, target, reduction="none", backend=backend)
    result.backward(incoming.to(result.dtype))
    eps = max(torch.finfo(dtype).eps, 1e-6)
    actual = result.detach(), *(x.grad for x in leaves)
    for a, e in zip(actual, expected(function, base, thought, weight, target, incoming), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=4 * eps, atol=8 * eps)
