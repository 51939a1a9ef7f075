"""The decoder's own forward and backward over rows without data: what every operation holds, computes and moves.

Layers of any family are run as they are, so what they keep and what they take meanwhile need not be known here. Only
what happens within our attention op is, which is not run: see ``_Trace``.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from quietstar.estimate.skeleton import Skeleton
from quietstar.models.decoder import Decoder
from quietstar.models.layouts import BaseStates, TextRows, ThoughtTree
from quietstar.models.layouts.attention import Layer
from quietstar.ops._native import cpu_unavailable
from quietstar.ops._precision import autocast_inputs
from quietstar.ops.thought_attention.autograd import ThoughtAttention
from quietstar.ops.thought_attention.cost import Cost

# In the order in which they run; backward, what was made last comes first.
START, FIRST, LAYER, NORM, NORM_BACK, LAYER_BACK, FIRST_BACK = (
    "start", "first layer", "layer", "norm", "norm, backward", "layer, backward", "first layer, backward",
)  # fmt: skip


class Attention(NamedTuple):
    """How a layer attends."""

    query_heads: int
    key_heads: int
    head_size: int
    window: int | None


class Course:
    """What happens in the stretches of a pass.

    Args:
        labels: the stretch of each operation.
        numbers: int64 [operations, 4], bytes held after it, FLOPs in products, bytes moved by them, and by all others.
        cache: bytes of the keys and values that a layer leaves.
    """

    def __init__(self, labels: list[str], numbers: Tensor, cache: int):
        self.labels, self.cache = labels, cache
        # Operations of a stretch follow each other.
        ends = dict(zip(labels, range(1, len(labels) + 1), strict=True))
        sizes = [end - start for start, end in pairwise((0, *ends.values()))]
        self.numbers = dict(zip(ends, numbers.split(sizes), strict=True))
        self._all = numbers

    def between(self, other: "Course", more: int) -> "Course":
        """In a batch of ``more`` texts more than this one's: all is linear in it; the ``other`` has one more."""
        numbers = self._all + more * (other._all - self._all)
        return Course(self.labels, numbers, self.cache + more * (other.cache - self.cache))

    def kept(self, label: str) -> int:
        """Bytes that are held at the end of a stretch beyond those of its beginning."""
        held = self.numbers[label][:, 0]
        return int(held[-1] - held[0])

    def most(self, label: str) -> int:
        """The most bytes that are held within it beyond those of its beginning."""
        held = self.numbers[label][:, 0]
        return int(held.max() - held[0])

    def products(self, label: str) -> Cost:
        """Of matrix products."""
        return Cost(*self.numbers[label][:, 1:3].sum(0).tolist())

    def moved(self, label: str) -> int:
        """Bytes that all else reads and writes, but attention, whose cost is known elsewhere."""
        return int(self.numbers[label][:, 3].sum())


class _Trace(TorchDispatchMode):
    """Follows tensors from their first operation to their end.

    Args:
        module: whose tensors are there anyway.
        on_cpu: where the step is to run.
        half: whether attention computes in half precision.
    """

    def __init__(self, module: nn.Module, on_cpu: bool, half: bool):
        super().__init__()
        self.labels: list[str] = []
        self.numbers: list[tuple[int, int, int, int]] = []
        self.cache = 0  # bytes of the keys and values that a layer leaves
        self._now, self._label = 0, START
        self._weights = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())}
        self._sizes = dict.fromkeys(self._weights, 0)
        compiled = on_cpu and cpu_unavailable(torch.empty(0, dtype=torch.bfloat16 if half else torch.float32)) is None
        self._by_library, self._in_float32 = on_cpu and not compiled, compiled and half

    def mark(self, label: str) -> None:
        """A stretch ends here, and another begins."""
        self._add()
        self._label = label
        self._add()

    def _add(self, scratch: int = 0, flops: int = 0, products: int = 0, others: int = 0) -> None:
        self.labels.append(self._label)
        self.numbers.append((self._now + scratch, flops, products, others))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = self._now
        result = operation(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        is_new = [self._hold(x) for x in results]
        name, given = operation.overloadpacket.__name__, [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if name in ("thought_attention", "thought_attention_backward"):
            self._add(scratch=self._scratch(args, before, name.endswith("backward")))
        elif "attention" in name:
            self._add()
        elif flops := self._flops(operation, args, kwargs, result):
            self._add(flops=flops, products=sum(map(_bytes, given + results)))
        elif given and (any(is_new) or operation._schema.is_mutable):
            self._add(others=sum(map(_bytes, given + results)))
        else:
            self._add()
        return result

    def _hold(self, tensor: Tensor) -> bool:
        """Whether the tensor has memory of its own."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return False
        self._sizes[storage._cdata] = storage.nbytes()
        self._now += storage.nbytes()
        finalize(storage, self._drop, storage._cdata)
        return True

    def _drop(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)

    def _flops(self, operation, args: tuple, kwargs: dict | None, result) -> int:
        """Of a product with a weight; 0 of all else, and of those of attention, whose cost is known elsewhere."""
        packet = operation.overloadpacket
        if packet.__name__ == "_grouped_mm":  # the rows [n, k] of all experts with a matrix of each
            return 2 * args[0].numel() * result.shape[-1]
        with_weight = any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._weights for x in args)
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm) or (packet in flop_registry and with_weight):
            return flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return 0

    def _scratch(self, args: tuple, before: int, backward: bool) -> int:
        """Bytes within our op beyond those after it."""
        query, key = args[2 * backward].nbytes, args[2 * backward + 1]
        wide = args[2 * backward].numel() * 4 if self._in_float32 else 0
        if not self._by_library:
            # Compiled for a CPU, outputs in half precision have one in float32 beside them, and gradients of the query
            # the part that comes from the text.
            return wide
        if not backward:  # query and output, in an order of the library's own
            return 2 * query
        # The library takes query and incoming gradient in an order of its own, and gives a gradient of key and value
        # for every query row. Keys and values of the text are repeated for every query head, and so their gradients.
        repeated = key.nbytes * args[2].shape[1] // key.shape[1]
        return max(0, before + 5 * query + 4 * repeated - self._now)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class _UncheckedLayer(Layer):
    """A layer whose thought attention does not look at its anchors."""

    def think(self, query, base, key, value, anchors, key_start, lengths=None):
        inputs = autocast_inputs(query, *base, key, value)
        mask = anchors[None], None, None, self.window, True, True, self.scale, self.softcap
        return ThoughtAttention.apply(*inputs, *mask, "torch", "torch")[0].flatten(2, 3).transpose(1, 2)


class _Tree(ThoughtTree):
    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(_UncheckedLayer(*layer), query, key, value)


class _Look:
    """A layout that only looks at how layers attend."""

    def __init__(self):
        self.layers: list[Attention] = []

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers.append(Attention(query.shape[1], key.shape[1], query.shape[3], layer.window))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


class _Loss(torch.autograd.Function):
    """Ends a pass, and begins its backward with a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx, hidden, begin):
        ctx.begin, ctx.like = begin, (hidden.shape, hidden.dtype)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, _):
        ctx.begin()
        return torch.empty(ctx.like[0], dtype=ctx.like[1]), None


class DryRun:
    """Passes of a decoder, in which one of its layers stands behind itself.

    Args:
        decoder: on the meta device.
        dtype: of its rows.
        autocast: to which products are cast; None: they are not.
        on_cpu: where they are to run.
    """

    def __init__(self, decoder: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None, on_cpu: bool):
        self.decoder, self.dtype, self.autocast, self.on_cpu = decoder, dtype, autocast, on_cpu
        self._courses: dict[tuple, Course] = {}
        look = _Look()
        with self._pretending(range(len(decoder.layers)), False) as pretended:
            pretended(self._rows(1, 1), torch.zeros(1, 1, dtype=torch.int64), look)
        for layer in look.layers:
            if layer.query_heads % layer.key_heads:
                raise ValueError(
                    f"num_attention_heads must be a multiple of num_key_value_heads = {layer.key_heads}, got "
                    f"{layer.query_heads}"
                )
        self.attention = look.layers
        """Of each layer."""
        self.kinds = _first_alike(decoder.layers, look.layers)
        """Of each layer the first that is like it."""

    def tree(self, layer: int, batch: int, length: int, anchors: int, steps: int, checkpointing: bool) -> Course:
        """Forward and backward over texts and the steps behind their anchors."""

        def run(trace: _Trace, decoder: Decoder, batch: int) -> None:
            positions = torch.empty(batch, length + anchors * steps, dtype=torch.int64)
            rows = TextRows(torch.arange(length)[None])
            layout = _Tree(rows, torch.arange(anchors)) if anchors else BaseStates(rows)
            with self._autocast():
                hidden = decoder(self._rows(*positions.shape).requires_grad_(), positions, layout)
            del rows, layout, positions
            trace.mark("loss")
            loss = _Loss.apply(hidden, partial(trace.mark, NORM_BACK))
            del hidden
            loss.backward()

        return self._course(run, layer, batch, checkpointing, "tree", length, anchors, steps)

    def plain(self, layer: int, batch: int, length: int) -> Course:
        """A forward over texts without gradients, which leaves keys and values of all layers."""

        @torch.no_grad()
        def run(trace: _Trace, decoder: Decoder, batch: int) -> None:
            states = BaseStates(TextRows(torch.arange(length)[None]))
            with self._autocast():
                decoder(self._rows(batch, length), torch.empty(batch, length, dtype=torch.int64), states)
            trace.cache = states.keys[1].nbytes + states.values[1].nbytes

        return self._course(run, layer, batch, False, "plain", length)

    def _course(self, run: Callable, layer: int, batch: int, checkpointing: bool, *key: object) -> Course:
        """Of any batch: what happens in batches of two and three happens in all larger ones."""

        def traced(batch: int) -> Course:
            with self._pretending([layer, layer], checkpointing) as decoder:
                trace = _Trace(decoder.module, self.on_cpu, (self.autocast or self.dtype).itemsize == 2)
                _mark_stretches(trace, decoder.module)
                with trace:
                    run(trace, decoder, batch)
            return Course(trace.labels, torch.tensor(trace.numbers), trace.cache)

        key = layer, checkpointing, *key
        if (key, batch) not in self._courses:
            if batch <= 3:
                self._courses[key, batch] = traced(batch)
            else:
                two, three = (self._course(run, layer, few, checkpointing, *key[2:]) for few in (2, 3))
                return two.between(three, batch - 2)
        return self._courses[key, batch]

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)

    def _rows(self, batch: int, rows: int) -> Tensor:
        return torch.empty(batch, rows, self.decoder.config.hidden_size, dtype=self.dtype)

    @contextmanager
    def _pretending(self, layers: Iterable[int], checkpointing: bool) -> Iterator[Decoder]:
        """The decoder with some of its layers, without data."""
        decoder = copy.copy(self.decoder)
        decoder._modules = {name: copy.deepcopy(part) for name, part in decoder._modules.items() if name != "layers"}
        decoder.layers = nn.ModuleList(copy.deepcopy(self.decoder.layers[i]) for i in layers)
        decoder.embed_tokens = None
        for i, layer in enumerate(decoder.layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = i
            layer.gradient_checkpointing = checkpointing
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        with FakeTensorMode():
            _pretend(decoder)
            yield Decoder(decoder.train())


@lru_cache(maxsize=16)
def dry_run(skeleton: Skeleton, autocast: torch.dtype | None, on_cpu: bool) -> DryRun:
    """Of the decoder of a skeleton; made once, with all that it has run."""
    return DryRun(skeleton.decoder, skeleton.state_dtype, autocast, on_cpu)


def _pretend(decoder: nn.Module) -> None:
    """Tensors without data take the place of those on the meta device."""
    for part in decoder.modules():
        if getattr(part, "rope_type", None) in ("dynamic", "longrope"):  # which look at positions; sizes are the same
            part.rope_type = "default"
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(torch.empty(x.shape, dtype=x.dtype), x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def _mark_stretches(trace: _Trace, decoder: nn.Module) -> None:
    """Where a pass comes to its two layers and to the norm behind them, and comes back."""
    forward, backward = iter((FIRST, LAYER, NORM)), iter((None, FIRST_BACK, LAYER_BACK))

    def mark(_, args: tuple[Tensor, ...]) -> None:
        label = next(forward, None)
        if label is None:  # a layer is computed once more
            return
        trace.mark(label)
        back = next(backward)
        if back is not None and args[0].requires_grad:
            args[0].register_hook(lambda _: trace.mark(back))

    for module in (*decoder.layers, decoder.norm):
        module.register_forward_pre_hook(mark)


def _first_alike(layers: nn.ModuleList, attention: list[Attention]) -> list[int]:
    first: dict[tuple, int] = {}
    kinds = []
    for i, (layer, attends) in enumerate(zip(layers, attention, strict=True)):
        shapes = tuple((name, x.shape, x.dtype) for name, x in layer.named_parameters())
        kinds.append(first.setdefault((attends, shapes), i))
    return kinds
