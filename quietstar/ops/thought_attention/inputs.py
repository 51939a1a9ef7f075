"""The arguments of the backends of thought attention: five tensors, and the mask of the keys that each query sees."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The differentiable tensors, with the shapes of the public function. Also used for their gradients."""

    query: Tensor  # [B, Hq, P, S, D]
    key: Tensor  # [B, Hkv, L, D]
    value: Tensor  # [B, Hkv, L, Dv]
    thought_key: Tensor  # [B, Hkv, P, T, D]
    thought_value: Tensor  # [B, Hkv, P, T, Dv]

    @property
    def steps(self) -> int:
        """S, the number of steps that have a query: the last ones of ``thought_steps``."""
        return self.query.shape[3]

    @property
    def thought_steps(self) -> int:
        """T, the number of steps that have a key."""
        return self.thought_key.shape[3]

    @property
    def group(self) -> int:
        """The number of query heads that share a key/value head."""
        return self.query.shape[1] // max(1, self.key.shape[1])

    @property
    def sizes(self) -> list[int]:
        """B, Hq, Hkv, P, S, T, L, D, Dv, in the order of the compiled kernels' arguments."""
        batch, query_heads, num_anchors, steps, head_size = self.query.shape
        _, kv_heads, length, value_size = self.value.shape
        return [batch, query_heads, kv_heads, num_anchors, steps, self.thought_steps, length, head_size, value_size]

    @property
    def output_shape(self) -> torch.Size:
        """[B, Hq, P, S, Dv]."""
        return self.query.shape[:-1] + self.value.shape[-1:]


class Result(NamedTuple):
    """The result of a forward pass."""

    output: Tensor  # [B, Hq, P, S, Dv] in the dtype of the query
    lse: Tensor  # [B, Hq, P, S], natural log, in float32 (float64 for float64)


class ResultGradients(NamedTuple):
    """Incoming gradients of a backward pass, with the shapes of ``Result``."""

    output: Tensor
    lse: Tensor | None


class Mask(NamedTuple):
    """Which keys a query sees, and how its product with a key becomes a score.

    Index tensors are int64 and contiguous. A first dimension of 1 stands for the whole batch.
    """

    anchors: Tensor | None
    """[1 or B, P]; None is 0..L−1."""
    key_start: Tensor | None
    """[B, 1 or P]; None is 0."""
    thought_lengths: Tensor | None
    """[1 or B, P]; None is T."""
    window: int | None
    """None where it hides no key."""
    window_from_step: bool
    causal: bool
    scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        anchors: Tensor | None = None,
        key_start: Tensor | None = None,
        thought_lengths: Tensor | None = None,
        window: int | None = None,
        window_from: str = "anchor",
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> "Mask":
        """Create a mask from the (already checked) arguments of the public function."""
        farthest = inputs.key.shape[2]  # from a query to a key in front of it
        if window_from == "step":
            farthest += inputs.thought_steps
        if key_start is not None:
            key_start = _index(key_start[:, None] if key_start.dim() == 1 else key_start)
        return cls(
            _per_anchor(anchors),
            key_start,
            _per_anchor(thought_lengths),
            None if window is None or window >= farthest else window,
            window_from == "step",
            causal,
            inputs.query.shape[-1] ** -0.5 if scale is None else float(scale),
            None if softcap is None else float(softcap),
        )

    def per_anchor(self, inputs: Inputs) -> list[tuple[Tensor | None, tuple[int, int]]]:
        """Anchors, key_start and thought_lengths, each with its strides as [B, P]: over P 1, or 0 if all share one."""
        shape = inputs.query.shape[0], inputs.query.shape[2]
        expanded = [None if x is None else x.expand(shape) for x in self[:3]]
        # A dimension of size 1 may have any stride.
        return [(x, (0, 0) if x is None else (x.stride(0), min(x.stride(1), 1))) for x in expanded]

    @property
    def native_numbers(self) -> tuple[int, bool, bool, float, float]:
        """The remaining arguments of the compiled kernels; 0 stands for no window and for no softcap."""
        return self.window or 0, self.window_from_step, self.causal, self.scale, self.softcap or 0.0

    def anchors_in(self, length: int, device: torch.device) -> Tensor:
        """Anchors [1 or B, P] for a base sequence of ``length``."""
        return torch.arange(length, device=device)[None] if self.anchors is None else self.anchors

    def without_idle_anchors(self, inputs: Inputs) -> "Mask":
        """The same mask with −1 for anchors that have no existing query, so that they make no base key visible."""
        if self.thought_lengths is None:
            return self
        idle = self.thought_lengths <= inputs.thought_steps - inputs.steps
        return self._replace(anchors=torch.where(idle, -1, self.anchors_in(inputs.key.shape[2], idle.device)))

    def window_offset(self, steps: int, thought_steps: int) -> int:
        """How far past the anchor the first query's window ends; each later query's window ends one token later."""
        return 1 + thought_steps - steps if self.window_from_step else 0

    def sees_base(self, anchors: Tensor, key_start: Tensor | None, keys: Tensor, inputs: Inputs) -> Tensor:
        """Whether the queries of existing steps see base keys.

        Args:
            anchors, key_start: those of some anchors, [1 or B, p] and [B, 1 or p].
            keys: int64 [n], positions of base keys.
            inputs: give the numbers of steps.

        Returns:
            bool [1 or B, p, 1 or S, n]. Steps differ only if the window is measured from the step.
        """
        anchors = anchors[:, :, None, None]
        visible = keys <= anchors
        if key_start is not None:
            visible = visible & (keys >= key_start[:, :, None, None])
        if self.window is not None:
            query = anchors
            if self.window_from_step:
                first = self.window_offset(inputs.steps, inputs.thought_steps)
                query = anchors + torch.arange(first, first + inputs.steps, device=keys.device)[:, None]
            visible = visible & (query - keys < self.window)
        return visible

    def sees_thought(self, lengths: Tensor | None, inputs: Inputs, device: torch.device) -> Tensor:
        """Whether queries see the thought keys of their own anchor: bool [1 or B, 1 or p, S, T].

        Args:
            lengths: thought lengths of some anchors, [1 or B, p].
            inputs: give the numbers of steps.
        """
        step = torch.arange(inputs.thought_steps, device=device)
        own = step[inputs.thought_steps - inputs.steps :, None]
        visible = step <= own if self.causal else torch.ones_like(step <= own)
        if self.window is not None and self.window_from_step:
            visible = visible & (own - step < self.window)
        if lengths is None:
            return visible[None, None]
        lengths = lengths[:, :, None, None]
        return visible & (step < lengths) & (own < lengths)

    def inactive(self, inputs: Inputs) -> Tensor | None:
        """Which queries see nothing, bool [1 or B, P, 1 or S]; None if there cannot be any.

        Such queries belong to an inactive anchor (−1) or to a step that does not exist.
        """
        inactive = None if self.anchors is None else self.anchors[:, :, None] < 0
        if self.thought_lengths is not None:
            step = torch.arange(inputs.thought_steps - inputs.steps, inputs.thought_steps, device=inputs.query.device)
            missing = step >= self.thought_lengths[:, :, None]
            inactive = missing if inactive is None else inactive | missing
        return inactive


def _per_anchor(values: Tensor | None) -> Tensor | None:
    """Reshape per-anchor values, [P] or [B, P], to [1 or B, P]."""
    if values is None:
        return None
    if values.dim() == 1:
        values = values[None]
    return _index(values[:1] if values.stride(0) == 0 else values)


def _index(values: Tensor) -> Tensor:
    return values.to(torch.int64).contiguous()
