"""The noise of sampling: a pure function of (seed, row, token) that every backend computes from the same bits.

Sampling is a race. Token v of a row gets an arrival time E(v), exponentially distributed with mean 1 and independent of
all others. The token with the largest z(v) − log E(v) wins. Since −log E is Gumbel noise, token v wins with probability
softmax(z)(v) (Maddison, Tarlow, Minka, "A* Sampling", arXiv 1411.0030).

Bits. philox(i, s) denotes the four 32-bit words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) with counter (i, row mod 2³², row div 2³², s) and key (seed mod 2³², seed div 2³²), where the seed is
taken as 64 bits in two's complement. A word x becomes the exponential

    u = min((float32(x) + ½) · 2⁻³², 1 − 2⁻²⁴)        exponential(x) = −log1p(−u)        all in float32

Small arrivals, which win races, come from small u, where float32 is finest: nothing is ever 0, infinite or NaN.

Groups. Tokens 64g … 64g+63 form group g, whether or not the vocabulary reaches that far. With (x, y) the words
0 and 1 (g even) or 2 and 3 (g odd) of philox(g div 2, 1), the first arrival in the group and the token it belongs to
are

    first(g) = exponential(x) / 64        winner(g) = 64g + (y div 2²⁶)

and, with x the word v mod 4 of philox(v div 4, 0), the arrival times of all its tokens are

    E(v) = first(g) if v is winner(g), else first(g) + exponential(x)

The first of 64 exponentials is itself exponential with mean 1/64, belongs to each token with equal probability, and is
independent of how much later the others arrive. So all E(v) are independent with mean 1, as if drawn one by one. But
half a Philox call now bounds 64 tokens, and a sampler can skip groups that cannot win without drawing their tokens.
"""

import torch
from torch import Tensor

from quietstar.ops._rows import slices

GROUP = 64

_TOKENS, _GROUPS = 0, 1  # the last word of the counter
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Philox takes about a hundred integer operations per call. On a CPU, blocks of this size stay in the cache, and below
# the 32768 elements from which PyTorch uses threads: on a busy machine a hundred forks cost far more than they gain.
_SERIAL = 30000


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Compute Philox4x32-10: four words from a counter of four and a key of two. Words are int64 in [0, 2³²)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    rounds = torch.arange(_ROUNDS, device=c0.device)
    round_keys = [(word[..., None] + rounds * step).unbind(-1) for word, step in zip(key, _KEY_STEPS, strict=True)]
    for k0, k1 in zip(*round_keys, strict=True):
        # int64 products wrap around to the bits of unsigned ones. Above 32 bits, c1, c3 and the round keys hold
        # leftovers, which the masks drop together with the copies of the sign that the shift brings in.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
    return [c0, c1 & _WORD, c2, c3 & _WORD]


def _words(seed: Tensor, rows: Tensor, index: Tensor, stream: int) -> Tensor:
    """Compute philox(index, stream) of every row, int64 [..., 4]; ``rows`` and ``index`` broadcast to [...]."""
    key = seed & _WORD, (seed >> 32) & _WORD
    rows, index = torch.broadcast_tensors(rows, index)
    words = torch.empty(*index.shape, 4, dtype=torch.int64, device=index.device)
    flat, rows, index = words.view(-1, 4), rows.flatten(), index.flatten()
    for part in slices(len(index), _SERIAL if index.device.type == "cpu" else max(1, len(index))):
        counter = index[part], rows[part] & _WORD, rows[part] >> 32, torch.full_like(index[part], stream)
        for i, word in enumerate(philox(counter, key)):
            flat[part, i] = word
    return words


def exponential_(word: Tensor) -> Tensor:
    """Turn words, exact or rounded to float32, into exponentials from 2⁻³³ to 16.6, in place."""
    return word.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def first_arrivals(seed: Tensor, rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Compute first arrival times (float32) and their tokens' places in the group (int64, 0 … 63), [rows, groups].

    Args:
        seed: int64 scalar.
        rows: int64 [rows], row numbers.
        groups: number of groups in the vocabulary.
    """
    words = _words(seed, rows[:, None], torch.arange(-(-groups // 2), device=rows.device), _GROUPS)
    pairs = words.unflatten(-1, (2, 2)).flatten(1, 2)[:, :groups]  # (x, y) of every group
    return exponential_(pairs[..., 0].to(torch.float32)).div_(GROUP), pairs[..., 1] >> 26


def arrivals(seed: Tensor, rows: Tensor, groups: Tensor, first: Tensor, places: Tensor) -> Tensor:
    """Compute the arrival times E(v) of all tokens of some groups, float32 [..., 64].

    Args:
        seed: int64 scalar.
        rows: int64 row numbers, broadcastable against ``groups``.
        groups: int64 group numbers [...].
        first, places: [...], results of ``first_arrivals`` for these groups.
    """
    calls = torch.arange(GROUP // 4, device=groups.device)
    words = _words(seed, rows[..., None], groups[..., None] * (GROUP // 4) + calls, _TOKENS)
    times = exponential_(words.flatten(-2).to(torch.float32))
    return times.scatter_(-1, places[..., None], 0).add_(first[..., None])
