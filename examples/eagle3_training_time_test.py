"""EAGLE-3's training-time test on ``quietstar.ops.thought_attention``: a draft head that trains as it will draft.

EAGLE-3 (arXiv 2503.01840) drafts tokens for a large model with a head of a single decoder layer. Its input at position
i are the large model's hidden states there and the next token; but when it drafts several tokens in a row, all after
the first come from its own outputs instead. So it is trained like that, in unrolled steps:

    step 0   input (fused hidden states i, token i+1)    predicts token i+2    a causal pass, as usual
    step n   input (output of step n-1 at i, token i+1+n)    predicts token i+2+n

The query of step n at position i sees the keys of step 0 up to i, for what came before, and those of steps 1..n at its
own position i, for what it has drafted since. Nothing else: what was drafted at other positions is another draft.

              keys of step 0    step 1    step 2
    query 0   █                 █         █
    query 1   ██                 █         █
    query 2   ███                 █         █
    query 3   ████                 █         █

That is thought attention with an anchor at every position, S = 1 and T = n. With a mask it would be a dense attention
over L·(n+1) keys of which hardly more than L/2 are visible; here no such mask exists, and gradients flow through every
step. The op takes keys of any strides, so those of all steps share one tensor, with room for the last of them from the
start (``Room``): a step appends its own and copies nothing.

Run it (15 seconds on a CPU): ``python examples/eagle3_training_time_test.py``
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_models import LargeModel, print_accepted, random_text, rotate, train

from quietstar.ops import thought_attention

STEPS = 4
DECAY = 0.8  # each step's loss counts less than the one before, as in the authors' code


class Room:
    """Keys or values of steps that come one by one, in one tensor [B, H, L, steps, D].

    A step is written where no earlier step has looked, so what autograd has saved of the views before stays as it was.
    """

    def __init__(self, like: Tensor, steps: int):
        self.memory = like.new_empty(*like.shape[:3], steps, like.shape[3])
        self.used = self.memory[:, :, :, :0]

    def append(self, step: Tensor) -> Tensor:
        """All steps so far, [B, H, L, n, D]: a view. ``step`` is [B, H, L, D]."""
        self.used = _Append.apply(self.used, step, self.memory)
        return self.used


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx, used: Tensor, step: Tensor, memory: Tensor) -> Tensor:
        n = used.shape[3]
        memory.data[:, :, :, n] = step
        return memory.data[:, :, :, : n + 1]  # .data: a tensor whose changes autograd does not count

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient[:, :, :, :-1], gradient[:, :, :, -1], None


class DraftHead(nn.Module):
    """One decoder layer between the large model's hidden states and its output matrix."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, levels: int):
        super().__init__()
        self.head_size = hidden // heads
        self.fuse = nn.Linear(levels * hidden, hidden, bias=False)
        self.norm_token, self.norm_state, self.norm_mlp, self.norm_out = (nn.RMSNorm(hidden) for _ in range(4))
        self.query = nn.Linear(2 * hidden, heads * self.head_size, bias=False)
        self.key, self.value = (nn.Linear(2 * hidden, kv_heads * self.head_size, bias=False) for _ in range(2))
        self.out = nn.Linear(heads * self.head_size, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden))

    def unroll(self, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """The outputs of all steps, each [B, L, hidden].

        Args:
            features: [B, L, levels · hidden], the large model's hidden states.
            tokens: [B, L + steps, hidden], embeddings of the tokens behind them: tokens[:, i] is that of token i + 1.
            steps: how many tokens to draft at every position.
        """
        length = features.shape[1]
        state, outputs = self.fuse(features), []
        for n in range(steps):
            x = torch.cat([self.norm_token(tokens[:, n : n + length]), self.norm_state(state)], dim=-1)
            query, key, value = (self.heads(project(x)) for project in (self.query, self.key, self.value))
            position = torch.arange(n, n + length, device=x.device)
            query, key = rotate(query, position), rotate(key, position)
            if n == 0:
                base_key, base_value = key, value
                own_keys, own_values = (Room(x, steps - 1) for x in (key, value))
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            else:
                attended = thought_attention(
                    query[:, :, :, None],  # [B, Hq, P = L, S = 1, D]
                    base_key,
                    base_value,
                    own_keys.append(key),  # [B, Hkv, P = L, T = n, D]
                    own_values.append(value),
                )[:, :, :, 0]
            state = state + self.out(attended.transpose(1, 2).flatten(2))
            state = state + self.mlp(self.norm_mlp(state))
            outputs.append(self.norm_out(state))
        return outputs

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, H · D] -> [B, H, L, D]."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def draft(head: DraftHead, model: LargeModel, text: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What the head drafts and what the large model says: logits [B, L, steps, vocabulary] of both.

    ``text`` [B, L + steps + 1] is cut so that every position has all its steps.
    """
    with torch.no_grad():
        logits, features = model(text)
        tokens = model.embedding(text[:, 1:])
    length = text.shape[1] - steps - 1
    outputs = head.unroll(features[:, :length], tokens[:, : length + steps], steps)
    drafted = torch.stack([F.linear(x, model.lm_head.weight.detach()) for x in outputs], dim=2)
    # The model's prediction of token i+2+n stands at position i+1+n.
    wanted = torch.stack([logits[:, n + 1 : n + 1 + length] for n in range(steps)], dim=2)
    return drafted, wanted


def draft_loss(drafted: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy against the large model's distribution, weighted by step."""
    steps = drafted.shape[2]
    nll = -(wanted.softmax(-1) * drafted.log_softmax(-1)).sum(-1).mean((0, 1))
    return (nll * DECAY ** torch.arange(steps, device=nll.device)).sum()


def accepted(drafted: Tensor, wanted: Tensor) -> Tensor:
    """Share of positions at which the drafted tokens 0..n are all the large model's choice, for every n: [steps]."""
    return (drafted.argmax(-1) == wanted.argmax(-1)).float().cumprod(-1).mean((0, 1))


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Train both models; print and return ``accepted`` before and after the head was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-updates", type=int, default=200)
    parser.add_argument("--draft-updates", type=int, default=120)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    vocabulary, hidden, heads, kv_heads, layers, rows, length = 16, 64, 4, 2, 3, 16, 64
    model = LargeModel(vocabulary, hidden, heads, layers)
    head = DraftHead(hidden, heads, kv_heads, layers)

    def model_loss() -> Tensor:
        text = random_text(rows, length, vocabulary)
        return F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    def head_loss() -> Tensor:
        return draft_loss(*draft(head, model, random_text(rows, length, vocabulary), STEPS))

    def evaluate() -> Tensor:
        with torch.no_grad():
            return accepted(*draft(head, model, random_text(64, length, vocabulary), STEPS))

    train(model, model_loss, options.model_updates)
    before = evaluate()
    train(head, head_loss, options.draft_updates)
    after = evaluate()
    print_accepted(before, after)
    return before, after


if __name__ == "__main__":
    main()
