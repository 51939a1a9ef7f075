"""How many bytes a training step holds, followed from its beginning to its end.

The walk mirrors the code it describes: ``quietstar.models`` and what autograd keeps of transformers' Mistral layers.
Counted are bytes of tensors. What a process needs besides (CUDA context, fragments of the allocator, kernels) is not.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from quietstar.estimate.step import TrainingStep
from quietstar.ops._head_matmuls import _WIDENED_ROWS
from quietstar.ops._native import cpu_unavailable
from quietstar.ops._rows import _ALIGNMENT, CHUNK_BYTES, rows_within

WEIGHTS, STATES, GRADIENTS = "weights", "optimizer states", "gradients"
GATHERED, BUCKETS = "weights gathered from other GPUs", "gradients on their way to other GPUs"
BASE_CACHE, THOUGHT_CACHE = "base cache of sampling", "thought cache of sampling"
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


def kept_by_layer(step: TrainingStep) -> int:
    """Bytes that autograd keeps of a layer's forward over the tree, without checkpointing."""
    config, element = step.config, step.element
    hidden, inner = config.hidden_size, config.intermediate_size
    norm = _kept_by_norm(step) + step.tree_rows * hidden * element  # its output is the input of the next matrices
    heads = step.query_width + 2 * step.key_width  # rotated query and key, value
    # Attention keeps its output and log-sum-exp, over text and over slots, and the two outputs side by side are the
    # input of the output matrix.
    attended = 2 * step.query_width * element + config.num_attention_heads * step.wide
    mlp = 4 * inner * element  # gate before and after its activation, up, their product
    kept = 2 * norm + step.tree_rows * (heads * element + attended + mlp)
    if step.is_windowed:  # the library then wants a key and a value for every query head, and numbers for a mask
        kept += step.text_rows * (2 * step.query_width + step.length) * element
    return kept


def _kept_by_norm(step: TrainingStep) -> int:
    """Bytes kept of an RMSNorm: its input in float32, 1 / root mean square, and the row normalised."""
    return step.tree_rows * (step.config.hidden_size * (step.wide + step.element) + step.wide)


class _Walk:
    """From the sampling of thoughts to the update of the weights."""

    def __init__(self, step: TrainingStep):
        self.step, self.memory = step, Memory()
        self.on_cpu = step.device == "cpu"
        self.row = step.config.hidden_size * step.element  # bytes of a row of hidden states
        self.wide_row = step.config.hidden_size * step.wide
        self.is_half = step.element < step.wide
        self.is_compiled = self.on_cpu and cpu_unavailable(torch.empty(0, dtype=step.dtype)) is None
        self.is_scaled = self.is_half or not self.on_cpu  # the losses' gradients, in new tensors
        self.layers = step.config.num_hidden_layers
        self.workspace = 0  # of logits: a CPU keeps it from call to call

        self.memory.hold(WEIGHTS, step.share("weights", step.parameters) * step.element)
        self.memory.hold(STATES, step.states)
        self.hold_for_others()
        self.sample()
        self.forward_layers()
        self.forward_head()
        self.backward_head()
        self.backward_layers()
        self.backward_embeddings()
        self.update()

    def hold_for_others(self) -> None:
        """What several GPUs need to work together.

        DDP copies gradients into buckets; ZeRO-2 has two buckets; where weights are in parts, the layer at work and the
        next one are gathered, and what is in no layer is whole from the first to the last use in a step.
        """
        step = self.step
        self.layers_at_work = 0
        if step.gpus == 1:
            return
        if step.sharding == "ddp":
            self.memory.hold(BUCKETS, step.parameters * step.element)
        elif step.sharding == "zero2":
            self.memory.hold(BUCKETS, 2 * min(_ZERO_BUCKET, step.parameters) * step.element)
        else:
            self.layers_at_work = 2 * step.layer_parameters
            self.memory.hold(GATHERED, (step.other_parameters + self.layers_at_work) * step.element)

    # Sampling, without gradients.

    def sample(self) -> None:
        step, memory, k = self.step, self.memory, self.step.config.thought_length
        keys_and_values = 2 * self.layers * step.key_width * step.element
        memory.hold(BASE_CACHE, step.text_rows * keys_and_values)
        # Held besides: the input of all layers, that of the current one, and the normalised rows.
        states = 3 * step.text_rows * self.row
        memory.moment("sampling, pass over the text", states + self.forward_temporary(step.text_rows))
        if k > 0:
            memory.hold(KEPT, step.sampled_rows * k * 8)  # the tokens, int64, also kept by the embedding
            memory.hold(THOUGHT_CACHE, step.sampled_rows * (k + 2) * keys_and_values)
            self.draw_tokens()
            states = 3 * step.sampled_rows * self.row
            memory.moment("sampling, thought steps", states + self.forward_temporary(step.sampled_rows))
        for part in (BASE_CACHE, THOUGHT_CACHE):
            memory.held.pop(part, None)

    def draw_tokens(self) -> None:
        """Logits of final states; the noise of the library sampler, some MiB far from the peak, is left out."""
        step, phase = self.step, "sampling, thought steps"
        states = 2 * step.sampled_rows * self.row
        chunk = self.take_chunk(self.chunk_rows(step.sampled_rows, _padded(step.config.vocab_size)))
        self.memory.moment(phase, states)
        self.give_back_chunk(chunk)

    def forward_temporary(self, rows: int) -> int:
        """Most bytes held within a layer's forward besides its input, normalised rows and what is kept."""
        step = self.step
        query, keys = step.query_width * step.element, 2 * step.key_width * step.element
        # Query, key and value; while one of the first two is rotated, three more of its size. Attention takes no more:
        # query and output, both also in the order of a CPU's library, or an output in the dtype and one in float32.
        attention = query + keys + max(3 * query, query + 3 * keys // 2)
        # The states after attention; the activated gate, up and their product.
        mlp = self.row + 3 * step.config.intermediate_size * step.element
        return rows * max(attention, mlp)

    # Forward over the tree.

    def forward_layers(self) -> None:
        step, memory = self.step, self.memory
        # Cosines, sines and positions.
        memory.hold(KEPT, step.tree_rows * (2 * step.head_size * step.element + 8))
        memory.hold(KEPT, step.text_rows * step.length if step.is_windowed else 0)  # the mask of the text
        self.kept_by_layer = step.tree_rows * self.row if step.checkpointing else kept_by_layer(step)
        for _ in range(self.layers):
            memory.hold(KEPT, self.kept_by_layer)
            if step.checkpointing:
                normalised = step.tree_rows * self.row
                memory.moment("forward", normalised + self.forward_temporary(step.tree_rows))
        memory.hold(KEPT, _kept_by_norm(step))
        # The final states. For one sequence the mixing head keeps those of the text as a view of them all.
        self.final = step.tree_rows * self.row
        memory.hold(TEMPORARY, self.final)
        # In half precision the norm and the layers keep none of these: input of all layers and of the norm, and the
        # rows normalised in float32.
        memory.moment("forward", step.tree_rows * (2 * self.row + self.wide_row) if self.is_half else 0)

    def forward_head(self) -> None:
        step, memory, phase = self.step, self.memory, "forward of the head"
        head, talk, text = step.head_matrix, step.talk_rows * self.row, step.text_rows * self.row
        # Mixing head: its two inputs and two hidden layers.
        self.kept_by_mixing = 3 * talk + (text if step.batch > 1 else self.final) if step.mixes else 0
        if step.mixes:
            memory.hold(TEMPORARY, 0 if step.batch > 1 else -self.final)
            memory.hold(KEPT, self.kept_by_mixing)
            memory.moment(phase, 2 * talk)

        # Of every loss its gradients are kept, that of the head in the compute dtype.
        base = step.base_rows * self.row
        self.head_base = (base + head * step.wide) * step.learns_base
        self.linear_cross_entropy(phase, step.base_rows, self.head_base, inputs=base, rows_held=2)
        # Several slots share a state of the text: their gradients are summed in the compute dtype.
        shared = text * step.mixes
        widened = step.text_rows * self.wide_row if self.is_half and step.mixes else 0
        self.head_talk = (shared + talk + head * step.wide) * step.learns_talk
        self.linear_cross_entropy(
            phase, step.labelled_talk_rows if self.on_cpu else step.talk_rows, self.head_talk,
            inputs=talk + shared + widened, rows_held=6 if self.on_cpu and step.mixes else 2,
        )  # fmt: skip
        self.head_policy = 0
        if step.policy_rows:
            policy = step.policy_rows * self.row
            self.head_policy = policy + head * step.wide
            # A CPU leaves out thoughts that get no reward, and those that did not help.
            rows = step.helpful_policy_rows if self.on_cpu else step.policy_rows
            self.linear_cross_entropy(phase, rows, self.head_policy, inputs=policy, rows_held=2)
        if step.batch > 1 or not step.mixes:
            memory.hold(TEMPORARY, -self.final)

    def linear_cross_entropy(self, phase: str, rows: int, gradients: int, inputs: int, rows_held: int) -> None:
        """One loss: ``gradients`` are kept; ``inputs`` and ``rows_held`` rows per logits row are held meanwhile."""
        step = self.step
        head = min(gradients, step.head_matrix * step.wide)
        self.memory.hold(HEAD, gradients - head)
        most = self.chunk_rows(rows, step.config.vocab_size)
        chunk_rows = -(-rows // -(-rows // most)) if rows else 0
        chunk = self.take_chunk(chunk_rows)
        self.memory.hold(HEAD, head)  # made by the first chunk
        widened = _WIDENED_ROWS * self.wide_row if self.on_cpu and self.is_half and not self.is_compiled else 0
        self.memory.moment(phase, inputs + rows_held * chunk_rows * self.wide_row + widened)
        self.give_back_chunk(chunk)

    # Chunks of logits.

    def chunk_rows(self, rows: int, vocabulary: int) -> int:
        return min(rows, rows_within(CHUNK_BYTES, vocabulary * self.step.wide, torch.device(self.step.device)))

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

    # Backward: what was made last comes first.

    def backward_head(self) -> None:
        step, memory, phase = self.step, self.memory, "backward of the head"
        head = step.head_matrix * step.element
        slots, tree = step.slot_rows * self.row, step.tree_rows * self.row
        talk, text = step.talk_rows * self.row, step.text_rows * self.row
        # The losses' gradients of the head are added up, and those of the rows they took are spread over all slots.
        # Scaled, they are new tensors; otherwise the first of the head is what the others are added to.
        memory.moment(phase)
        memory.hold(GRADIENTS, head)
        if self.is_scaled:
            memory.hold(LOGITS, -self.workspace)
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
            policy = step.policy_rows * self.row
            memory.moment(phase, policy * self.is_scaled)
            memory.hold(HEAD, -self.head_policy)
            memory.moment(phase, policy + slots)
            memory.hold(TEMPORARY, slots)
            gradients = slots
        if step.learns_talk:
            shared = text * step.mixes
            memory.moment(phase, (shared + talk + head) * self.is_scaled)
            memory.hold(HEAD, -self.head_talk)
            memory.moment(phase, shared + talk + head + slots)
            memory.hold(TEMPORARY, shared + slots - gradients)
            gradients = shared + slots
        if step.learns_base:
            memory.moment(phase, (step.base_rows * self.row + head) * self.is_scaled)
            memory.hold(HEAD, -self.head_base)

        # The mixing head: gradients of a hidden layer and of its input, then spread over all slots.
        if step.mixes:
            memory.moment(phase, talk + max(2 * talk, slots))
            memory.hold(KEPT, -self.kept_by_mixing)
        memory.hold(GRADIENTS, (step.mixing_parameters + step.gain_parameters) * step.element)

        # Gradients of text and slots become one of all rows, which goes through the last norm.
        memory.moment(phase, 2 * tree)
        memory.hold(TEMPORARY, -gradients)
        memory.moment(phase, self.norm_backward_temporary())
        memory.hold(KEPT, -_kept_by_norm(step))
        memory.hold(TEMPORARY, tree)  # the gradient that goes down the layers

    def backward_layers(self) -> None:
        step, memory = self.step, self.memory
        inner = step.tree_rows * step.config.intermediate_size * step.element
        kept = kept_by_layer(step)
        if step.checkpointing and not self.is_half:  # the first norm keeps the layer's input, which is there already
            kept -= step.tree_rows * self.row
        mlp = 4 * inner + step.tree_rows * self.row
        for _ in range(self.layers):
            if step.checkpointing:  # computed once more; the states between attention and MLP are held, too
                memory.hold(KEPT, kept)
                memory.moment("backward of the layers", step.tree_rows * self.row)
            # The gradient of the product, when the product itself is gone, and those of activated gate and up.
            memory.moment("backward of the layers", 2 * inner)
            memory.hold(KEPT, -mlp)
            memory.moment("backward of the layers", self.norm_backward_temporary())
            memory.hold(KEPT, -_kept_by_norm(step))
            memory.moment("backward of the layers", self.attention_backward_temporary())
            memory.hold(KEPT, mlp + _kept_by_norm(step) - kept - (self.kept_by_layer if step.checkpointing else 0))
            memory.hold(GRADIENTS, step.share("gradients", step.layer_parameters) * step.element)
            # A layer's whole gradient, and that of the one before on its way.
            memory.moment("backward of the layers", step.tree_rows * self.row + self.layers_at_work * step.element)

    def norm_backward_temporary(self) -> int:
        """The gradient of what an RMSNorm gives, and in float32 those of its two factors and of the square."""
        return self.step.tree_rows * (self.row + 4 * self.wide_row)

    def attention_backward_temporary(self) -> int:
        """What the gradients of the slots' attention take; the one that comes in has the place of its output."""
        step = self.step
        query, keys = step.query_width * step.element, 2 * step.key_width * step.element
        if self.on_cpu and not self.is_compiled:
            # The library takes query and incoming gradient in an order of its own, and gives a gradient of key and
            # value for every query row. Keys and values of the text are repeated for every query head, and so their
            # gradients.
            return (5 * step.slot_rows + 4 * step.text_rows) * query
        # Compiled for a CPU, those of the query through the text, and of the text, are in float32.
        wide = step.slot_rows * step.query_width * step.wide if self.is_compiled and self.is_half else 0
        return step.slot_rows * (query + keys) + wide

    def backward_embeddings(self) -> None:
        step, memory = self.step, self.memory
        embedding = step.head_matrix * step.element
        if not step.config.tie_word_embeddings:
            memory.hold(GRADIENTS, embedding)
        memory.hold(GRADIENTS, 3 * step.config.hidden_size * step.element)
        memory.moment("backward of the embeddings")
        memory.hold(TEMPORARY, -step.tree_rows * self.row)
        memory.held.pop(KEPT)

    def update(self) -> None:
        memory, step = self.memory, self.step
        if step.gpus > 1:  # gradients have gone where their weights are
            for part in (GATHERED, BUCKETS):
                memory.held.pop(part, None)
            others = step.other_parameters
            memory.hold(GRADIENTS, (step.share("gradients", others) - others) * step.element)
        if self.step.optimizer != "none":
            self.memory.moment("update")


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
