"""What a training step is made of: the sizes from which its FLOPs and its memory follow."""

from dataclasses import dataclass
from functools import cached_property

import torch

from quietstar.models import QuietStarConfig
from quietstar.ops._precision import compute_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Numbers that an optimizer keeps per weight, and their dtype; None is that of the weights, as in PyTorch.
OPTIMIZERS: dict[str, tuple[int, torch.dtype | None]] = {
    "adamw": (2, None),
    "adamw-fp32": (2, torch.float32),
    "adamw-bf16": (2, torch.bfloat16),
    "sgd": (0, None),
    "none": (0, None),
}

# How several GPUs share a model, and what each of them holds only its part of.
SHARDINGS: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "states"}),
    "zero3": frozenset({"gradients", "states", "weights"}),
    "fsdp2": frozenset({"gradients", "states", "weights"}),
}


@dataclass(frozen=True)
class TrainingStep:
    """Forward, backward and update of ``QuietStarForCausalLM`` on one batch without padding, as the trainer runs it.

    Args:
        config: of the model.
        batch: B, sequences; of each GPU.
        length: L, tokens of text in a sequence.
        dtype: of weights, gradients and activations.
        checkpointing: whether activations inside the layers are computed again in the backward instead of kept.
        optimizer: a key of ``OPTIMIZERS``; none stops after the backward. AdamW is the fused one, which needs no
            temporary tensors.
        device: "cuda" (``triton`` backend) or "cpu" (``cpu`` backend where it is compiled, else ``torch``).
        helpful: share of thoughts with a positive advantage. Only these have a policy term, and a CPU computes no
            logits for the others. ½ is what chance gives.
        gpus: how many train together.
        sharding: a key of ``SHARDINGS``. DeepSpeed (ZeRO-2 and ZeRO-3) keeps optimizer states in float32, and beside
            them a copy of weights that are not.

    Raises:
        ValueError: a size that no step can have, named.
    """

    config: QuietStarConfig
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    optimizer: str = "adamw"
    device: str = "cuda"
    helpful: float = 0.5
    gpus: int = 1
    sharding: str = "ddp"

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be an integer >= 1, got {self.batch}")
        least = self.config.lookahead + 2
        if self.length < least:
            raise ValueError(f"length must be at least lookahead + 2 = {least}, got {self.length}")
        if self.length > self.config.max_position_embeddings:
            raise ValueError(
                f"length must be at most max_position_embeddings = {self.config.max_position_embeddings}, "
                f"got {self.length}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.gpus < 1:
            raise ValueError(f"gpus must be an integer >= 1, got {self.gpus}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if not 0 <= self.helpful <= 1:
            raise ValueError(f"helpful must be in [0, 1], got {self.helpful}")

    @property
    def element(self) -> int:
        """Bytes of a number in weights and activations."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in logits, losses and sums."""
        return compute_dtype(self.dtype).itemsize

    @property
    def states(self) -> int:
        """Bytes that the optimizer keeps, for the weights that are this GPU's."""
        numbers, dtype = OPTIMIZERS[self.optimizer]
        size = (dtype or self.dtype).itemsize
        if self.gpus > 1 and self.sharding in ("zero2", "zero3") and self.optimizer != "none":
            numbers, size = numbers + (self.element < self.wide), self.wide
        return self.share("states", self.parameters) * numbers * size

    def share(self, of: str, elements: int) -> int:
        """How many of the ``elements`` of weights, gradients or states one GPU holds."""
        return -(-elements // self.gpus) if of in SHARDINGS[self.sharding] else elements

    @property
    def head_size(self) -> int:
        """D."""
        return self.config.head_dim or self.config.hidden_size // self.config.num_attention_heads

    @property
    def query_width(self) -> int:
        """Hq · D."""
        return self.config.num_attention_heads * self.head_size

    @property
    def key_width(self) -> int:
        """Hkv · D."""
        return self.config.num_key_value_heads * self.head_size

    @property
    def slots(self) -> int:
        """S, steps behind an anchor in the tree: start, k thought tokens, end, M − 1 tokens of text."""
        return self.config.thought_length + 2 + self.config.lookahead - 1

    @property
    def positions(self) -> int:
        """A, positions of a sequence that think in the tree: all but the last, or as many as are chosen."""
        return self.config.anchors_per_text or self.length - 1

    @property
    def sampling_positions(self) -> int:
        """Positions of a sequence whose thoughts are sampled: where all think, the last one too."""
        return self.config.anchors_per_text or self.length

    @property
    def predicting(self) -> int:
        """Positions of a sequence that are chosen: those with a label for all they predict. The rest stays empty."""
        return min(self.positions, self.length - self.config.lookahead)

    @property
    def rewarded(self) -> int:
        """Positions of a sequence with a policy term, if their thoughts help."""
        return min(self.positions, self.length - 1 - self.config.lookahead)

    @property
    def anchors(self) -> int:
        """P, anchors of a sequence in the tree: each position thinks N times."""
        return self.positions * self.config.num_thoughts

    @property
    def mixes(self) -> bool:
        """Whether there is a mixing head."""
        return self.config.prediction == "mixed"

    @property
    def learns_base(self) -> bool:
        """Whether the loss without thoughts has gradients."""
        return self.config.text_loss_weights[0] > 0

    @property
    def learns_talk(self) -> bool:
        """Whether the loss after thoughts has: with a mixing head they may be 0, but are there."""
        return self.config.text_loss_weights[1] > 0 or self.mixes

    @property
    def is_windowed(self) -> bool:
        """Whether the sliding window hides text from text."""
        return self.config.sliding_window is not None and self.config.sliding_window < self.length

    @property
    def text_rows(self) -> int:
        """B · L."""
        return self.batch * self.length

    @property
    def sampled_rows(self) -> int:
        """Rows of a sampling step."""
        return self.batch * self.sampling_positions * self.config.num_thoughts

    @property
    def slot_rows(self) -> int:
        """Thought rows of the tree."""
        return self.batch * self.anchors * self.slots

    @property
    def tree_rows(self) -> int:
        """All rows of the tree."""
        return self.text_rows + self.slot_rows

    @property
    def base_rows(self) -> int:
        """Rows of the base loss."""
        return self.batch * (self.length - 1)

    @property
    def talk_rows(self) -> int:
        """Rows of the mixed loss and of the mixing head, those that predict past the end included."""
        return self.batch * self.anchors * self.config.lookahead

    @property
    def labelled_talk_rows(self) -> int:
        """Rows of the mixed loss that have a label: m steps ahead of all positions, m at the end have none."""
        ahead = range(self.config.lookahead)
        if self.config.anchors_per_text is None:
            return self.batch * self.config.num_thoughts * sum(self.length - 1 - m for m in ahead)
        return self.batch * self.config.num_thoughts * self.predicting * len(ahead)

    @property
    def policy_rows(self) -> int:
        """Rows of the policy loss."""
        return self.batch * self.anchors * self.config.thought_length

    @property
    def helpful_policy_rows(self) -> int:
        """Rows of the policy loss with a weight: of rewarded positions and helpful thoughts."""
        thoughts = self.batch * self.rewarded * self.config.num_thoughts
        return round(self.helpful * thoughts) * self.config.thought_length

    @property
    def layer_matrices(self) -> int:
        """Elements of the seven matrices of a layer."""
        attention = 2 * self.query_width + 2 * self.key_width
        return self.config.hidden_size * (attention + 3 * self.config.intermediate_size)

    @property
    def layer_parameters(self) -> int:
        """The matrices and two norms."""
        return self.layer_matrices + 2 * self.config.hidden_size

    @property
    def head_matrix(self) -> int:
        """V · H, of the embedding and of the head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def mixing_parameters(self) -> int:
        """The mixing head, if there is one: matrices [H, 2H], [H, H] and [1, H], two biases."""
        if not self.mixes:
            return 0
        hidden = self.config.hidden_size
        return 3 * hidden**2 + 3 * hidden

    @property
    def gain_parameters(self) -> int:
        """The gain head, if there is one: matrices [H, H] and [1, H], two biases."""
        hidden = self.config.hidden_size
        return hidden**2 + 2 * hidden + 1 if self.config.gain_weight > 0 else 0

    @property
    def other_parameters(self) -> int:
        """Those outside the layers."""
        return self.parameters - self.config.num_hidden_layers * self.layer_parameters

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights: layers, embedding and head, last norm, both small heads, two thought embeddings."""
        vocabularies = 1 if self.config.tie_word_embeddings else 2
        return (
            self.config.num_hidden_layers * self.layer_parameters
            + vocabularies * self.head_matrix
            + self.mixing_parameters
            + self.gain_parameters
            + 3 * self.config.hidden_size
        )
