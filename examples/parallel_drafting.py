"""Parallel drafting on ``quietstar.ops.thought_attention``: chains of several lengths, all in one pass.

P-EAGLE (arXiv 2602.01469) drafts all tokens of a chain at once where EAGLE needs a pass for each: in the place of the
tokens and hidden states that are not known yet stands one learned vector. Row 0 of a chain is the ordinary one (hidden
states of position i, token i+1); rows 1, 2, … behind it are made of that vector:

    row 0     input (fused hidden states i, token i+1)    predicts token i+2      one for every position
    row n     input (the learned vector)                  predicts token i+2+n    sees rows 0 up to i, its own 1..n

A chain behind every position would be as many rows again for each further token, so deeper rows are kept for fewer
positions: each for a share of those that have the one before. What is left are chains of falling length:

              rows 0     chain behind 0    1    2    3
    chain 0   █          █
              █          ██
              █          ███
    chain 1   ██                           █
    chain 2   ███                               (none)
    chain 3   ████                                   █
              ████                                   ██

That is thought attention with ``thought_lengths``: rows behind the end of a chain do not exist, and nothing is computed
for tiles of them.

Run it (half a minute on a CPU): ``python examples/parallel_drafting.py``
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_models import LargeModel, print_accepted, random_text, rotate, train

from quietstar.ops import thought_attention

DEPTH = 3  # rows of the longest chain, drafted in parallel behind the ordinary row
KEPT = 0.7  # share of positions that keep the next deeper row


class DraftLayer(nn.Module):
    """A decoder layer for the ordinary rows of a text and the chains behind them."""

    def __init__(self, hidden: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_size = hidden // heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key, self.value = (nn.Linear(hidden, kv_heads * self.head_size, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden))

    def forward(self, text: Tensor, chains: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """New states of the rows [B, L, hidden] of a text and of chains [B, L, DEPTH, hidden] of ``lengths`` [B, L]."""
        position = torch.arange(text.shape[1], device=text.device)
        query, key, value = self.projected(text, position)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        own_query, own_key, own_value = self.projected(
            chains, position[:, None] + 1 + torch.arange(DEPTH, device=text.device)
        )
        own_attended = thought_attention(own_query, key, value, own_key, own_value, thought_lengths=lengths)
        return self.rest(text, attended), self.rest(chains, own_attended)

    def projected(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, ..., D] of rows [B, ..., hidden]."""
        x = self.norm_attention(x)
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_size)).movedim(-2, 1)
            for project in (self.query, self.key, self.value)
        )
        return rotate(query, position), rotate(key, position), value

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.movedim(1, -2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class ParallelDrafter(nn.Module):
    """Draft layers between the large model's hidden states and its output matrix."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, levels: int, layers: int = 2):
        super().__init__()
        self.fuse = nn.Linear((levels + 1) * hidden, hidden, bias=False)
        self.unknown = nn.Parameter(torch.randn(hidden) / hidden**0.5)
        self.layers = nn.ModuleList(DraftLayer(hidden, heads, kv_heads) for _ in range(layers))
        self.norm_out = nn.RMSNorm(hidden)

    def forward(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Outputs [B, L, 1 + DEPTH, hidden]; that of row n predicts the token n + 2 behind the position.

        Args:
            features: [B, L, levels · hidden], the large model's hidden states.
            tokens: [B, L, hidden], embeddings of the tokens behind the positions.
            lengths: int [B, L], rows of every position's chain; 0 … DEPTH. Outputs of others mean nothing.
        """
        text = self.fuse(torch.cat([tokens, features], dim=-1))
        chains = self.unknown.expand(*text.shape[:2], DEPTH, -1)
        for layer in self.layers:
            text, chains = layer(text, chains, lengths)
        return self.norm_out(torch.cat([text[:, :, None], chains], dim=2))


def falling_lengths(shape: tuple[int, int]) -> Tensor:
    """Lengths of chains, of which every row is there for a share KEPT of those that have the one before."""
    return (torch.rand(*shape, DEPTH) < KEPT).cumprod(dim=-1).sum(dim=-1)


def draft(drafter: ParallelDrafter, model: LargeModel, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, L, 1 + DEPTH, vocabulary] of the drafted tokens, and the large model's choices, int [B, L, 1 + DEPTH].

    ``text`` is [B, L + DEPTH + 2], so that every position has all its tokens.
    """
    length = lengths.shape[1]
    with torch.no_grad():
        logits, features = model(text)
        tokens = model.embedding(text[:, 1 : length + 1])
    outputs = drafter(features[:, :length], tokens, lengths)
    # The large model's choice of token i+2+n stands at position i+1+n.
    choices = torch.stack([logits.argmax(-1)[:, n + 1 : n + 1 + length] for n in range(DEPTH + 1)], dim=2)
    return F.linear(outputs, model.lm_head.weight.detach()), choices


def accepted(drafted: Tensor, choices: Tensor) -> Tensor:
    """Share of positions at which the drafted tokens 0..n are all the large model's choice, for every n."""
    return (drafted.argmax(-1) == choices).float().cumprod(-1).mean((0, 1))


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Train both models; print and return ``accepted`` before and after the drafter was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-updates", type=int, default=200)
    parser.add_argument("--draft-updates", type=int, default=150)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    vocabulary, hidden, heads, kv_heads, layers, rows, length = 8, 64, 4, 2, 3, 16, 64
    model = LargeModel(vocabulary, hidden, heads, layers)
    drafter = ParallelDrafter(hidden, heads, kv_heads, layers)

    def model_loss() -> Tensor:
        text = random_text(rows, length, vocabulary)
        return F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    def draft_loss() -> Tensor:
        lengths = falling_lengths((rows, length - DEPTH - 2))
        drafted, choices = draft(drafter, model, random_text(rows, length, vocabulary), lengths)
        exists = torch.arange(DEPTH + 1) <= lengths[..., None]
        return F.cross_entropy(drafted[exists], choices[exists])

    def evaluate() -> Tensor:
        with torch.no_grad():
            whole = torch.full((64, length - DEPTH - 2), DEPTH)
            return accepted(*draft(drafter, model, random_text(64, length, vocabulary), whole))

    train(model, model_loss, options.model_updates)
    before = evaluate()
    train(drafter, draft_loss, options.draft_updates)
    after = evaluate()
    print_accepted(before, after)
    return before, after


if __name__ == "__main__":
    main()
