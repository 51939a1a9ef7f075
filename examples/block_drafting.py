"""Block drafting on ``quietstar.ops.thought_attention``: a draft head that fills a block of tokens in one pass.

DFlash (arXiv 2602.06036) and its kin draft the next tokens for a large model all at once: the input is the last token
of the text and, behind it, a mask token for each token to draft, which see each other both ways. What came before is
known by the large model's hidden states, of which the head makes keys and values. In training there are many such
blocks in a text, each behind an anchor of its own, and none may see another:

                    keys of the text      own block
    block behind 1  ██                    ████
                    ██                    ████
    block behind 3  ████                      ████
                    ████                      ████

That is thought attention with ``causal=False`` and S = T: the text is read once for all blocks, and there is no mask of
P·S rows and L + P·S columns.

Run it (half a minute on a CPU): ``python examples/block_drafting.py``
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_models import LargeModel, print_accepted, random_text, rotate, train

from quietstar.ops import thought_attention

BLOCK = 4  # tokens of a block: the last known one and three to draft
BLOCKS = 16  # in a text, for training


class DraftLayer(nn.Module):
    """A decoder layer whose rows are blocks, and whose text is given by hidden states of the large model."""

    def __init__(self, hidden: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_size = hidden // heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key, self.value = (nn.Linear(hidden, kv_heads * self.head_size, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden))

    def forward(self, blocks: Tensor, text: Tensor, anchors: Tensor) -> Tensor:
        """New states of blocks [B, P, S, hidden] behind ``anchors`` [B, P] of the text [B, L, hidden]."""
        x = self.norm_attention(blocks)
        query, thought_key, thought_value = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        key, value = (self.heads(project(text)) for project in (self.key, self.value))
        place = (anchors[:, :, None] + 1 + torch.arange(blocks.shape[2], device=anchors.device))[:, None]
        attended = thought_attention(
            rotate(query, place),  # [B, Hq, P, S, D]
            rotate(key, torch.arange(text.shape[1], device=text.device)),  # [B, Hkv, L, D]
            value,
            rotate(thought_key, place),  # [B, Hkv, P, S, D]
            thought_value,
            anchors=anchors,
            causal=False,
        )
        blocks = blocks + self.out(attended.movedim(1, -2).flatten(-2))
        return blocks + self.mlp(self.norm_mlp(blocks))

    def heads(self, x: Tensor) -> Tensor:
        """[B, ..., H · D] -> [B, H, ..., D]."""
        return x.unflatten(-1, (-1, self.head_size)).movedim(-2, 1)


class BlockDrafter(nn.Module):
    """Draft layers between the large model's hidden states and its output matrix."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, levels: int, layers: int = 2):
        super().__init__()
        self.fuse = nn.Linear(levels * hidden, hidden, bias=False)
        self.mask_token = nn.Parameter(torch.randn(hidden) / hidden**0.5)
        self.layers = nn.ModuleList(DraftLayer(hidden, heads, kv_heads) for _ in range(layers))
        self.norm_text, self.norm_out = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, features: Tensor, known: Tensor, anchors: Tensor) -> Tensor:
        """Outputs [B, P, S, hidden]; that of place s predicts the token behind place s of the block.

        Args:
            features: [B, L, levels · hidden], the large model's hidden states.
            known: [B, P, hidden], embeddings of the tokens behind the anchors, which are known already.
            anchors: int [B, P], positions of the text up to which its hidden states are known.
        """
        text = self.norm_text(self.fuse(features))
        masked = self.mask_token.expand(*known.shape[:2], BLOCK - 1, -1)
        blocks = torch.cat([known[:, :, None], masked], dim=2)
        for layer in self.layers:
            blocks = layer(blocks, text, anchors)
        return self.norm_out(blocks)


def draft(drafter: BlockDrafter, model: LargeModel, text: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the drafted tokens, and the large model's choices: [B, P, S, vocabulary] and int [B, P, S].

    Anchors are at most the length of the text − 1 − S, so that all of a block's tokens are in the text.
    """
    with torch.no_grad():
        logits, features = model(text)
        known = model.embedding(text.gather(1, anchors + 1))
    outputs = drafter(features, known, anchors)
    # The token behind place s of a block is predicted by the large model at place s.
    place = anchors[:, :, None] + 1 + torch.arange(BLOCK)
    choices = logits.argmax(-1).gather(1, place.flatten(1)).view(place.shape)
    return F.linear(outputs, model.lm_head.weight.detach()), choices


def accepted(drafted: Tensor, choices: Tensor) -> Tensor:
    """Share of blocks of which the drafted tokens 0..s are all the large model's choice, for every s: [S]."""
    return (drafted.argmax(-1) == choices).float().cumprod(-1).mean((0, 1))


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Train both models; print and return ``accepted`` before and after the drafter was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-updates", type=int, default=200)
    parser.add_argument("--draft-updates", type=int, default=250)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    vocabulary, hidden, heads, kv_heads, layers, rows, length = 8, 64, 4, 2, 3, 16, 64
    model = LargeModel(vocabulary, hidden, heads, layers)
    drafter = BlockDrafter(hidden, heads, kv_heads, layers)

    def model_loss() -> Tensor:
        text = random_text(rows, length, vocabulary)
        return F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    def blocks(rows: int) -> tuple[Tensor, Tensor]:
        anchors = torch.randint(1, length - 1 - BLOCK, (rows, BLOCKS))
        return draft(drafter, model, random_text(rows, length, vocabulary), anchors)

    def draft_loss() -> Tensor:
        drafted, choices = blocks(rows)
        return F.cross_entropy(drafted.flatten(0, -2), choices.flatten())

    def evaluate() -> Tensor:
        with torch.no_grad():
            return accepted(*blocks(64))

    train(model, model_loss, options.model_updates)
    before = evaluate()
    train(drafter, draft_loss, options.draft_updates)
    after = evaluate()
    print_accepted(before, after)
    return before, after


if __name__ == "__main__":
    main()
