"""What the examples of draft heads share: a small large model, text to learn, and a training loop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding of x [..., D] at positions that broadcast with x's other dimensions."""
    frequency = 10000.0 ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    angle = position[..., None] * frequency
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)


class LargeModel(nn.Module):
    """Stands in for the large model: what matters is that it has hidden states at several depths."""

    def __init__(self, vocabulary: int, hidden: int, heads: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, vocabulary] and the hidden states of all layers side by side, [B, L, layers · hidden]."""
        x, states = self.embedding(tokens), []
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
            states.append(x)
        return self.lm_head(x), torch.cat(states, dim=-1)


def random_text(rows: int, length: int, vocabulary: int) -> Tensor:
    """Texts [rows, length] in which a token follows from the two before it, nine times out of ten."""
    rule = torch.randint(vocabulary, (vocabulary, vocabulary), generator=torch.Generator().manual_seed(0))
    text = torch.randint(vocabulary, (rows, length))
    for i in range(2, length):
        follows = torch.rand(rows) < 0.9
        text[:, i] = torch.where(follows, rule[text[:, i - 2], text[:, i - 1]], text[:, i])
    return text


def print_accepted(before: Tensor, after: Tensor) -> None:
    """Two rows of shares in columns, one line for each number of drafted tokens."""
    print("drafted tokens   accepted before   after training")
    for n, (untrained, trained) in enumerate(zip(before.tolist(), after.tolist(), strict=True), 1):
        print(f"{n:14d}   {untrained:15.1%}   {trained:14.1%}")


def train(module: nn.Module, loss_of: Callable[[], Tensor], updates: int, rate: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
