"""What a training step is made of: the sizes from which its FLOPs and its memory follow."""

from dataclasses import dataclass
from functools import cached_property

import torch

from quietstar.estimate.dry_run import Course, DryRun, dry_run
from quietstar.estimate.skeleton import Skeleton, skeleton_of
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
        lora_r: rank of adapters, of which the weights are in float32 (PEFT's default) and products in ``dtype``, as
            with ``--bf16``; None trains all weights.
        load_in_4bit: with adapters: the weights below have 4 bits, and what else the model has 32.
        distil: ``"kl"`` or ``"reward"``: the step trains the prediction without thoughts.

    Raises:
        ValueError: a size that no step can have, named; a decoder that cannot think.
        ImportError: there are to be adapters, and PEFT is not installed.
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
    lora_r: int | None = None
    load_in_4bit: bool = False
    distil: str | None = None

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
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be an integer >= 1, got {self.lora_r}")
        if self.load_in_4bit and self.lora_r is None:
            raise ValueError("load_in_4bit must be left out without lora_r, got True")
        if self.distil not in (None, "kl", "reward"):
            raise ValueError(f"distil must be kl or reward, got {self.distil!r}")
        if getattr(self.config, "num_local_experts", None) and self.dtype != torch.bfloat16:
            raise ValueError(f"dtype must be bfloat16 for a mixture of experts, got {self.dtype}")
        if self.has_teacher and self.gpus > 1 and self.sharding == "zero3":
            raise ValueError("sharding must not be zero3 with a teacher, whose weights cannot be exchanged")

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model without data."""
        return skeleton_of(self.config, self.dtype, self.lora_r, self.load_in_4bit)

    @cached_property
    def dry_run(self) -> DryRun:
        """Passes of its decoder."""
        autocast = self.dtype if self.lora_r is not None and self.element == 2 else None
        return dry_run(self.skeleton, autocast, self.device == "cpu")

    def tree_courses(self, checkpointing: bool) -> list[Course]:
        """Forward and backward of the pass that is learned from, as a pass with nothing but each of the layers."""
        run, rows = self.dry_run, (self.batch, self.length, self.anchors, self.slots, checkpointing)
        courses = {kind: run.tree(kind, *rows) for kind in set(run.kinds)}
        return [courses[kind] for kind in run.kinds]

    def plain_courses(self, batch: int, length: int) -> list[Course]:
        """Likewise of a forward without gradients."""
        courses = {kind: self.dry_run.plain(kind, batch, length) for kind in set(self.dry_run.kinds)}
        return [courses[kind] for kind in self.dry_run.kinds]

    @property
    def element(self) -> int:
        """Bytes of a number in weights and activations."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in logits, losses and sums."""
        return compute_dtype(self.dtype).itemsize

    @property
    def head_element(self) -> int:
        """Bytes of a number in a loss's gradient of the head, as of ``weight_gradient_dtype``."""
        return self.element if self.device == "cuda" and self.dtype == torch.bfloat16 else self.wide

    @property
    def states(self) -> int:
        """Bytes that the optimizer keeps, for the weights that are this GPU's."""
        numbers, dtype = OPTIMIZERS[self.optimizer]
        trained, size = self.skeleton.whole.trained, self.skeleton.whole.trained_bytes
        if self.gpus > 1 and self.sharding in ("zero2", "zero3") and self.optimizer != "none":
            return self.share("states", (numbers * trained + trained * (size < trained * self.wide)) * self.wide)
        return self.share("states", numbers * (size if dtype is None else trained * dtype.itemsize))

    def share(self, of: str, size: int) -> int:
        """How much of the ``size`` of weights, gradients or states one GPU holds."""
        return -(-size // self.gpus) if of in SHARDINGS[self.sharding] else size

    @property
    def row(self) -> int:
        """Bytes of a row of hidden states."""
        return self.config.hidden_size * self.skeleton.state_dtype.itemsize

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
        return self.length if self.distil else self.config.anchors_per_text or self.length

    @property
    def predicting(self) -> int:
        """Positions of a sequence that are chosen: those with a label for all they predict. The rest stays empty."""
        return min(self.positions, self.length - self.config.lookahead)

    @property
    def rewarded(self) -> int:
        """Positions of a sequence with a policy term, if their thoughts help."""
        return min(self.positions, self.length - 1 - self.config.lookahead)

    @property
    def thoughts(self) -> int:
        """N; a teacher whose predictions are learned thinks once."""
        return 1 if self.distil else self.config.num_thoughts

    @property
    def anchors(self) -> int:
        """P, anchors of a sequence in the tree: each position thinks N times."""
        return 0 if self.distil else self.positions * self.thoughts

    @property
    def mixes(self) -> bool:
        """Whether predictions are mixed."""
        return self.config.prediction == "mixed" and not self.distil

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is kept, a copy of what is trained."""
        return self.config.baseline == "teacher" or self.compares_thoughts or self.distil is not None

    @property
    def compares_thoughts(self) -> bool:
        """Whether a teacher says how likely thoughts are, which are sampled before it does."""
        return self.config.kl_weight > 0 and not self.distil

    @property
    def learns_base(self) -> bool:
        """Whether the loss without thoughts has gradients."""
        return self.config.text_loss_weights[0] > 0 or self.distil is not None

    @property
    def learns_talk(self) -> bool:
        """Whether the loss after thoughts has: with a mixing head they may be 0, but are there."""
        return not self.distil and (self.config.text_loss_weights[1] > 0 or self.mixes)

    @property
    def text_rows(self) -> int:
        """B · L."""
        return self.batch * self.length

    @property
    def sampled_rows(self) -> int:
        """Rows of a sampling step."""
        return self.batch * self.sampling_positions * self.thoughts

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
        """Rows of the base loss; twice as many where tokens that a teacher has drawn are learned too."""
        return self.batch * (self.length - 1) * (1 + (self.distil == "kl"))

    @property
    def talk_rows(self) -> int:
        """Rows of the mixed loss and of the mixing head, those that predict past the end included."""
        return self.batch * self.anchors * self.config.lookahead

    @property
    def labelled_talk_rows(self) -> int:
        """Rows of the mixed loss that have a label: m steps ahead of all positions, m at the end have none."""
        ahead = range(0 if self.distil else self.config.lookahead)
        if self.config.anchors_per_text is None:
            return self.batch * self.thoughts * sum(self.length - 1 - m for m in ahead)
        return self.batch * self.thoughts * self.predicting * len(ahead)

    @property
    def policy_rows(self) -> int:
        """Rows of the policy loss."""
        return self.batch * self.anchors * self.config.thought_length

    @property
    def helpful_policy_rows(self) -> int:
        """Rows of the policy loss with a weight: of rewarded positions and helpful thoughts."""
        thoughts = 0 if self.distil else self.batch * self.rewarded * self.thoughts
        return round(self.helpful * thoughts) * self.config.thought_length

    @property
    def head_matrix(self) -> int:
        """V · H, of the embedding and of the head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """Elements of all weights, without adapters."""
        return self.skeleton.base_elements
