"""How many bytes a training step holds, followed from its beginning to its end.

What a layer takes is found by ``.dry_run``; the rest of the walk mirrors ``quietstar.models`` and its trainer.
Counted are bytes of tensors. What a process needs besides (CUDA context, fragments of the allocator, kernels) is not.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from quietstar.estimate.dry_run import FIRST, LAYER, LAYER_BACK, NORM, NORM_BACK, START, Course
from quietstar.estimate.step import TrainingStep
from quietstar.ops._head_matmuls import _WIDENED_ROWS
from quietstar.ops._native import cpu_unavailable
from quietstar.ops._rows import _ALIGNMENT, CHUNK_BYTES, rows_within

WEIGHTS, STATES, GRADIENTS = "weights", "optimizer states", "gradients"
GATHERED, BUCKETS = "weights gathered from other GPUs", "gradients on their way to other GPUs"
BASE_CACHE, THOUGHT_CACHE = "base cache of sampling", "thought cache of sampling"
TEACHER = "teacher"
KEPT, HEAD, LOGITS = "activations kept for the backward", "head gradients kept for the backward", "chunk of logits"
TEMPORARY = "temporary tensors"

# Elements that DeepSpeed reduces, and gathers, at a time.
_ZERO_BUCKET = 500_000_000


@dataclass
class Memory:
    """What is held now, and the most that was held in every phase: ``peaks[phase]`` are bytes by part."""

    held: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        """The phase in which the most is held."""
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))

    @property
    def peak_parts(self) -> dict[str, int]:
        """Bytes by part at the peak."""
        return self.peaks[self.peak_phase]

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak_parts.values())

    def hold(self, part: str, size: int) -> None:
        """Bytes that stay until they are dropped; negative ones are given back."""
        self.held[part] += size

    def moment(self, phase: str, temporary: int = 0) -> None:
        """A moment at which ``temporary`` bytes are held besides."""
        now = {part: size for part, size in (self.held + Counter({TEMPORARY: temporary})).items() if size}
        if sum(now.values()) >= sum(self.peaks.get(phase, {}).values()):
            self.peaks[phase] = now


def step_memory(step: TrainingStep) -> Memory:
    """Memory of the second and all later steps: the optimizer has its states, and there are no gradients yet."""
    return _Walk(step).memory


class _Walk:
    """From the sampling of thoughts to the update of the weights."""

    def __init__(self, step: TrainingStep):
        self.step, self.memory, self.model = step, Memory(), step.skeleton
        self.on_cpu = step.device == "cpu"
        self.row = step.row  # bytes of a row of hidden states
        self.op_row = step.config.hidden_size * step.element  # and of one as our ops take it, under autocast
        self.wide_row = step.config.hidden_size * step.wide
        self.is_half = step.element < step.wide
        self.is_compiled = self.on_cpu and cpu_unavailable(torch.empty(0, dtype=step.dtype)) is None
        self.workspace = 0  # of logits: a CPU keeps it from call to call
        self.courses = step.tree_courses(step.checkpointing)
        # Autocast casts a head that is not in its dtype once for all ops of a pass.
        self.cast_head = step.head_matrix * step.element if self.row > self.op_row else 0

        self.memory.hold(WEIGHTS, step.share("weights", self.model.whole.bytes))
        self.memory.hold(STATES, step.states)
        self.hold_for_others()
        if step.has_teacher:
            self.ask_teacher()
        self.memory.hold(TEMPORARY, self.cast_head)
        if not (step.distil or step.compares_thoughts):
            self.sample("sampling")
        self.forward_layers()
        self.forward_head()
        self.memory.hold(TEMPORARY, -self.cast_head)
        self.backward_head()
        self.backward_layers()
        self.backward_embeddings()
        self.update()

    def hold_for_others(self) -> None:
        """What several GPUs need to work together.

        DDP copies gradients into buckets; ZeRO-2 has two buckets; where weights are in parts, the layer at work and the
        next one are gathered, and what is in no layer is whole from the first to the last use in a step.
        """
        step, model = self.step, self.model
        self.reduced = 0  # the gradient of a layer that is on its way to those whose it is
        if step.gpus == 1:
            return
        if step.sharding == "ddp":
            self.memory.hold(BUCKETS, model.whole.trained_bytes)
        elif step.sharding == "zero2":
            self.memory.hold(BUCKETS, 2 * min(_ZERO_BUCKET * step.element, model.whole.trained_bytes))
        else:
            self.reduced = max(layer.trained_bytes for layer in model.layers)
            self.memory.hold(GATHERED, model.others.bytes + 2 * max(layer.bytes for layer in model.layers))

    # Without gradients: thoughts are sampled, and a teacher answers.

    def ask_teacher(self) -> None:
        """It has its weights in float32, and answers through the model, whose own are put aside meanwhile."""
        step, memory, phase = self.step, self.memory, "teacher"
        own = step.share("weights", self.model.whole.trained_bytes)
        memory.hold(TEACHER, step.share("weights", self.model.whole.trained * step.wide))
        memory.hold(TEMPORARY, own + self.cast_head)
        if step.distil:
            plain = step.text_rows * self.row
            memory.hold(TEMPORARY, plain)
            self.sample(phase)
            memory.hold(TEMPORARY, -plain)
            self.measure(phase, step.text_rows, hidden=2)
        elif step.config.baseline == "teacher":
            self.read_text(phase)
            self.measure(phase, step.base_rows)
            memory.held.pop(BASE_CACHE)
        if step.compares_thoughts:  # of thoughts that the model has sampled before
            self.sample(phase)
            memory.moment(phase, _forward(step.plain_courses(step.tree_rows, 1)).most)
            helpful = step.helpful_policy_rows if self.on_cpu else 0  # of which a CPU has chunks of their own
            for rows in (step.base_rows, step.talk_rows, helpful, step.policy_rows - helpful):
                self.measure(phase, rows, step.tree_rows)
        memory.hold(TEMPORARY, -own - self.cast_head)

    def sample(self, phase: str) -> None:
        step, memory, k = self.step, self.memory, self.step.config.thought_length
        self.read_text(f"{phase}, pass over the text", step.sampled_rows if k else 0)
        if k > 0:
            memory.hold(KEPT, step.sampled_rows * k * 8)  # the tokens, int64, also kept by the embedding
            thoughts = _forward(step.plain_courses(step.sampled_rows, 1))
            memory.hold(THOUGHT_CACHE, (k + 2) * thoughts.cache)
            self.measure(f"{phase}, thought steps", step.sampled_rows, padded=True)
            if step.distil:  # the last token and the end are read together
                thoughts = _forward(step.plain_courses(step.sampled_rows, 2))
            memory.moment(f"{phase}, thought steps", thoughts.most)
        for part in (BASE_CACHE, THOUGHT_CACHE):
            memory.held.pop(part, None)

    def read_text(self, phase: str, thoughts: int = 0) -> None:
        """Read the text and the first steps of so many thoughts, whose keys and values lie in the same tensors."""
        passes = [_forward(self.step.plain_courses(self.step.batch, self.step.length))]
        if thoughts:
            passes.append(_forward(self.step.plain_courses(thoughts, 1)))
        self.memory.hold(BASE_CACHE, sum(each.cache for each in passes))
        self.memory.moment(phase, sum(each.most for each in passes))

    def measure(self, phase: str, rows: int, states: int = 0, hidden: int = 1, padded: bool = False) -> None:
        """Logits of ``rows`` of final states, of which there are more in ``states``.

        The noise of the library sampler, some MiB far from the peak, is left out.
        """
        vocabulary = self.step.config.vocab_size
        chunk = self.take_chunk(self.chunk_rows(rows, _padded(vocabulary) if padded else vocabulary))
        self.memory.moment(phase, (states + rows * hidden) * self.row + rows * self.op_row)
        self.give_back_chunk(chunk)

    # Forward over the tree.

    def forward_layers(self) -> None:
        memory, phase, first = self.memory, "forward", self.courses[0]
        memory.moment(phase, first.most(START))
        memory.hold(KEPT, first.kept(START))
        for i, course in enumerate(self.courses):
            memory.moment(phase, course.most(LAYER))
            memory.hold(KEPT, course.kept(LAYER if i else FIRST))
        memory.moment(phase, course.most(NORM))
        # The final states. For one sequence the mixing head keeps those of the text as a view of them all.
        self.final = self.step.tree_rows * self.row
        memory.hold(KEPT, course.kept(NORM) - self.final)
        memory.hold(TEMPORARY, self.final)

    def forward_head(self) -> None:
        step, memory, phase = self.step, self.memory, "forward of the head"
        talk, text = step.talk_rows * self.op_row, step.text_rows * self.op_row
        # Mixing head: its two inputs and two hidden layers.
        self.kept_by_mixing = 3 * talk + (text if step.batch > 1 else self.final) if step.mixes else 0
        if step.mixes:
            memory.hold(TEMPORARY, 0 if step.batch > 1 else -self.final)
            memory.hold(KEPT, self.kept_by_mixing)
            memory.moment(phase, 2 * talk)

        # Of every loss its gradients are kept.
        self.head_gradient = step.head_matrix * step.head_element * self.model.trains_head
        base = step.base_rows * self.op_row
        self.head_base = (base + self.head_gradient) * step.learns_base
        self.linear_cross_entropy(phase, step.base_rows, base * step.learns_base, step.learns_base, base, rows_held=2)
        # Several slots share a state of the text: their gradients are summed in the compute dtype.
        shared = text * step.mixes
        widened = step.text_rows * self.wide_row if self.is_half and step.mixes else 0
        self.head_talk = (shared + talk + self.head_gradient) * step.learns_talk
        self.linear_cross_entropy(
            phase, step.labelled_talk_rows if self.on_cpu else step.talk_rows, (shared + talk) * step.learns_talk,
            step.learns_talk, talk + shared + widened, rows_held=6 if self.on_cpu and step.mixes else 2,
        )  # fmt: skip
        self.head_policy = 0
        if step.policy_rows:
            policy = step.policy_rows * self.op_row
            self.head_policy = policy + self.head_gradient
            # A CPU leaves out thoughts that get no reward, and those that did not help.
            rows = step.helpful_policy_rows if self.on_cpu else step.policy_rows
            self.linear_cross_entropy(phase, rows, policy, True, policy, rows_held=2)
        if step.batch > 1 or not step.mixes:
            memory.hold(TEMPORARY, -self.final)

    def linear_cross_entropy(
        self, phase: str, rows: int, gradients: int, learns: bool, inputs: int, rows_held: int
    ) -> None:
        """One loss: ``gradients`` of rows are kept; ``inputs`` and ``rows_held`` rows per row of logits held meanwhile.

        The gradient of the head is summed over chunks in the compute dtype, and rounded at the end.
        """
        step = self.step
        self.memory.hold(HEAD, gradients)
        chunk_rows = self.chunk_rows(rows, step.config.vocab_size)
        chunk = self.take_chunk(chunk_rows)
        kept = self.head_gradient * learns
        summed = kept if chunk_rows == rows else kept * step.wide // step.head_element
        self.memory.hold(HEAD, summed)  # made by the first chunk
        widened = _WIDENED_ROWS * self.wide_row if self.on_cpu and self.is_half and not self.is_compiled else 0
        self.memory.moment(phase, inputs + rows_held * chunk_rows * self.wide_row + widened)
        self.give_back_chunk(chunk)
        self.memory.moment(phase, inputs + kept * (summed > kept))
        self.memory.hold(HEAD, kept - summed)

    # Chunks of logits.

    def chunk_rows(self, rows: int, vocabulary: int) -> int:
        """As many as fit, of chunks that are alike."""
        most = rows_within(CHUNK_BYTES, vocabulary * self.step.wide, torch.device(self.step.device))
        return -(-rows // -(-rows // most)) if rows else 0

    def take_chunk(self, rows: int) -> int:
        """Hold a chunk of logits; returns its size."""
        size = rows * _padded(self.step.config.vocab_size) * self.step.wide
        if not self.on_cpu:
            self.memory.hold(LOGITS, size)
        elif size > self.workspace:
            self.memory.hold(LOGITS, size - self.workspace)
            self.workspace = size
        return size

    def give_back_chunk(self, size: int) -> None:
        if not self.on_cpu:
            self.memory.hold(LOGITS, -size)

    def release_workspace(self) -> None:
        """Before a CPU makes a new tensor of a gradient."""
        self.memory.hold(LOGITS, -self.workspace)
        self.workspace = 0

    # Backward: what was made last comes first.

    def backward_head(self) -> None:
        step, memory, phase, tree = self.step, self.memory, "backward of the head", self.step.tree_rows * self.row
        head, slots = step.head_matrix * step.element * self.model.trains_head, step.slot_rows * self.row
        policy, talk, base = (rows * self.op_row for rows in (step.policy_rows, step.talk_rows, step.base_rows))
        # The losses' gradients of the head are added up, and those of the rows they took are spread over all slots.
        # Those that are not in the dtype of the head become new tensors, and on a CPU all of float16, which are scaled;
        # otherwise the first of the head is what the others are added to.
        in_place = self.head_gradient == head
        scaled = self.on_cpu and step.dtype == torch.float16
        memory.moment(phase)
        memory.hold(GRADIENTS, head)
        if not in_place:
            self.release_workspace()
        else:
            memory.hold(HEAD, -head)
            if step.policy_rows:
                self.head_policy -= head
            elif step.learns_talk:
                self.head_talk -= head
            else:
                self.head_base -= head
        gradients = 0  # of slots and text
        if step.policy_rows:
            memory.moment(phase, policy * scaled)
            memory.hold(HEAD, -self.head_policy)
            memory.moment(phase, policy + slots)
            memory.hold(TEMPORARY, slots)
            gradients = slots
        if step.learns_talk:
            shared = step.text_rows * self.row * step.mixes
            if step.mixes and self.is_half:  # the gradient of the mixing weights is a new tensor
                self.release_workspace()
            memory.moment(phase, (shared + talk) * scaled + head * (not in_place))
            memory.hold(HEAD, -self.head_talk)
            memory.moment(phase, shared + talk + head + slots)
            memory.hold(TEMPORARY, shared + slots - gradients)
            gradients = shared + slots
        if step.learns_base:
            memory.moment(phase, base * scaled + head * (not in_place))
            memory.hold(HEAD, -self.head_base)

        # The mixing head: gradients of a hidden layer and of its input, then spread over all slots.
        if step.mixes:
            memory.moment(phase, talk + max(2 * talk, slots))
            memory.hold(KEPT, -self.kept_by_mixing)
        small = 0 if step.distil else self.model.small.trained_bytes
        memory.hold(GRADIENTS, small)
        self.gradients = head + small  # so far

        # Gradients of text and slots become one of all rows, which goes through the last norm.
        memory.moment(phase, 2 * tree)
        memory.hold(TEMPORARY, -gradients)
        memory.moment(phase, self.courses[-1].most(NORM_BACK))
        memory.hold(KEPT, self.courses[-1].kept(NORM_BACK) - tree)
        memory.hold(TEMPORARY, tree)  # the gradient that goes down the layers

    def backward_layers(self) -> None:
        step, memory, phase = self.step, self.memory, "backward of the layers"
        for course, layer in zip(reversed(self.courses), reversed(self.model.layers), strict=True):
            # What checkpointing computes once more is among it.
            memory.moment(phase, course.most(LAYER_BACK) + self.reduced)
            memory.hold(KEPT, course.kept(LAYER_BACK) - layer.trained_bytes)
            memory.hold(GRADIENTS, step.share("gradients", layer.trained_bytes))

    def backward_embeddings(self) -> None:
        step, memory = self.step, self.memory
        embedding = step.head_matrix * step.element * self.model.trains_embedding
        if self.model.is_tied:  # the gradients of both uses become one
            memory.moment("backward of the embeddings", embedding)
        unused = self.model.small.trained_bytes + self.model.thought_embeddings.trained_bytes if step.distil else 0
        memory.hold(GRADIENTS, self.model.others.trained_bytes - unused - self.gradients)
        memory.moment("backward of the embeddings")
        memory.hold(TEMPORARY, -step.tree_rows * self.row)
        memory.held.pop(KEPT)

    def update(self) -> None:
        memory, step = self.memory, self.step
        if step.gpus > 1:  # gradients have gone where their weights are
            for part in (GATHERED, BUCKETS):
                memory.held.pop(part, None)
            others = self.model.others.trained_bytes
            memory.hold(GRADIENTS, step.share("gradients", others) - others)
        if step.optimizer != "none":
            memory.moment("update")
            if step.has_teacher:  # which takes each weight in float32
                widest = step.share("weights", self.model.largest_trained * step.wide)
                memory.moment("update", widest if self.is_half else 0)


class _Forward(NamedTuple):
    """Of a pass without gradients, in bytes."""

    most: int
    """Beside keys and values."""
    cache: int
    """Keys and values of all layers."""


def _forward(courses: list[Course]) -> _Forward:
    # Rows and positions that go into the first layer; what layers leave beside keys and values, such as weights that
    # autocast has cast; what a layer takes.
    states = courses[0].kept(START) + courses[0].kept(FIRST) - courses[0].kept(LAYER)
    left = sum(course.kept(LAYER) - course.cache for course in courses)
    within = max(course.most(LAYER) - course.kept(LAYER) for course in courses)
    return _Forward(states + left + within, sum(course.cache for course in courses))


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
