"""Problems for the linear cross-entropies, with the answers of plain PyTorch; for the tests of all backends."""

import torch
import torch.nn.functional as F
from tolerances import assert_as_accurate

from quietstar.ops import linear_cross_entropy, mixed_linear_cross_entropy

INPUTS = ("hidden", "thought", "mixing", "weight", "row_weight", "entropy_weight")


class Problem:
    """Inputs of one call, and the call by quietstar or by plain PyTorch."""

    def __init__(self, rows=11, hidden_size=6, vocabulary=77, base_rows=None, mixed=False, ignored=(), size=1.0,
                 dtype=torch.float32, row_weight=False, entropy_weight=None, frozen=(), grad=1.0, device="cpu",
                 **options):  # fmt: skip
        self.mixed, self.frozen, self.grad, self.options = mixed, frozen, grad, options
        self.target = torch.randint(vocabulary, (rows,))
        if "suppress" in options:
            self.target[torch.isin(self.target, torch.tensor(options["suppress"]))] = vocabulary - 1
        self.target[list(ignored)] = options.get("ignore_index", -100)
        self.base_index = None if base_rows is None else torch.randint(base_rows, (rows,))
        self.inputs = {
            "hidden": torch.randn(base_rows or rows, hidden_size),
            "thought": torch.randn(rows, hidden_size) if mixed else None,
            "mixing": torch.randn(rows) if mixed else None,
            "weight": torch.randn(vocabulary, hidden_size) * size,
            "row_weight": torch.randn(rows).where(torch.rand(rows) < 0.5, 0) if row_weight else None,
            "entropy_weight": torch.randn(rows).where(torch.rand(rows) < 0.5, 0) if entropy_weight is True else None,
        }
        if isinstance(entropy_weight, float):
            options["entropy_weight"] = entropy_weight
        self.inputs = {name: None if x is None else x.to(device, dtype) for name, x in self.inputs.items()}
        self.target = self.target.to(device)
        self.base_index = None if base_rows is None else self.base_index.to(device)

    def ours(self, backend, **options):
        return self._run(None, lambda **x: self._call(backend, **x, **options))

    def plain(self, dtype=None):
        return self._run(dtype, self._plain)

    def _run(self, dtype, function):
        inputs = {
            name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_(name not in self.frozen)
            for name, x in self.inputs.items()
        }
        loss = function(**inputs)
        if loss.requires_grad:
            (loss * self.grad).sum().backward()
        gradients = {f"d_{name}": x.grad for name, x in inputs.items() if x is not None}
        return {"loss": loss.detach(), **gradients}

    def _call(self, backend, hidden, thought, mixing, weight, row_weight, entropy_weight, **options):
        options = {**self.options, **options}
        if entropy_weight is not None:
            options["entropy_weight"] = entropy_weight
        if self.mixed:
            return mixed_linear_cross_entropy(
                hidden, thought, mixing, weight, self.target,
                base_index=self.base_index, row_weight=row_weight, backend=backend, **options,
            )  # fmt: skip
        return linear_cross_entropy(hidden, weight, self.target, row_weight=row_weight, backend=backend, **options)

    def _plain(self, hidden, thought, mixing, weight, row_weight, entropy_weight):
        if self.mixed:
            base = hidden if self.base_index is None else hidden[self.base_index]
            hidden = (1 - mixing[:, None]) * base + mixing[:, None] * thought
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if "softcap" in self.options:
            logits = self.options["softcap"] * torch.tanh(logits / self.options["softcap"])
        logits = logits / self.options.get("temperature", 1)
        if "suppress" in self.options:
            logits[:, list(self.options["suppress"])] = float("-inf")
        ignore_index = self.options.get("ignore_index", -100)
        reduction = self.options.get("reduction", "mean")
        if reduction == "entropy":  # of every row, which no option of ours returns alone
            return self.entropy(logits, ignore_index)
        if row_weight is None:
            loss = F.cross_entropy(logits, self.target, ignore_index=ignore_index, reduction=reduction)
        else:
            nll = F.cross_entropy(logits, self.target, ignore_index=ignore_index, reduction="none")
            loss = (row_weight * nll).sum()
        entropy_weight = self.options.get("entropy_weight") if entropy_weight is None else entropy_weight
        if entropy_weight is not None:
            loss = loss - (entropy_weight * self.entropy(logits, ignore_index)).sum()
        return loss

    def entropy(self, logits, ignore_index):
        logs = logits.log_softmax(-1)
        entropy = -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0)).sum(-1)
        return entropy.masked_fill(self.target == ignore_index, 0)

    def with_options(self, **options):
        """The same problem with other options, and without weights of rows."""
        other = Problem.__new__(Problem)
        other.__dict__.update(self.__dict__, options=options)
        other.inputs = {**self.inputs, "row_weight": None, "entropy_weight": None}
        return other


CASES = {
    "mean": {"ignored": (0, 4)},
    "sum": {"reduction": "sum", "ignored": (10,)},
    "none": {"reduction": "none", "ignored": (1,)},
    "row_weight": {"reduction": "sum", "row_weight": True, "ignored": (2,)},
    "one row": {"rows": 1},
    "tiny vocabulary": {"vocabulary": 7, "rows": 30},
    "vocabulary 1000": {"vocabulary": 1000, "rows": 40, "hidden_size": 16},
    "vocabulary 32002": {"vocabulary": 32002, "rows": 3, "hidden_size": 8},
    "ignore_index in the vocabulary": {"ignored": (3, 5), "ignore_index": 0},
    "temperature": {"temperature": 3.0, "reduction": "none"},
    "low temperature": {"temperature": 0.1},
    "low temperature, none": {"temperature": 0.01, "reduction": "none", "grad": 50.0},
    "suppress": {"suppress": (0, 5, 76), "vocabulary": 78},
    "suppress and temperature": {"suppress": (3,), "temperature": 3.0, "reduction": "sum", "row_weight": True},
    "huge logits": {"size": 1000.0},
    "incoming gradient": {"grad": -2.5},
    "softcap": {"softcap": 2.0, "ignored": (3,)},
    "softcap, none": {"softcap": 30.0, "size": 20.0, "reduction": "none"},
    "softcap, temperature, suppress": {"softcap": 3.0, "temperature": 0.4, "suppress": (3,), "vocabulary": 1000},
    "entropy": {"reduction": "sum", "entropy_weight": 0.3, "ignored": (2,)},
    "entropy of rows": {"reduction": "sum", "row_weight": True, "entropy_weight": True, "ignored": (2,)},
    "entropy, suppress, temperature": {
        "reduction": "sum",
        "entropy_weight": True,
        "suppress": (1, 70),
        "temperature": 0.3,
        "vocabulary": 1000,
    },
    "entropy, softcap": {"reduction": "sum", "entropy_weight": True, "softcap": 1.5, "grad": -2.5, "suppress": (4,)},
    "entropy, softcap, vocabulary 32002": {
        "reduction": "sum",
        "entropy_weight": True,
        "softcap": 5.0,
        "vocabulary": 32002,
        "rows": 3,
        "temperature": 2.0,
    },
    "mixed": {"mixed": True, "ignored": (7,)},
    "mixed softcap and temperature": {"mixed": True, "softcap": 2.0, "temperature": 0.7, "base_rows": 4},
    "mixed none": {"mixed": True, "reduction": "none"},
    "mixed row_weight": {"mixed": True, "reduction": "sum", "row_weight": True},
    "repeated base rows": {"mixed": True, "base_rows": 4, "ignored": (0, 9)},
    "repeated base rows, none": {"mixed": True, "base_rows": 4, "reduction": "none"},
}


def assert_rows_that_do_not_count_may_hold_anything(backend, device="cpu", **case):
    """What counts has the loss and the gradients it has if they hold numbers; theirs are 0."""
    problem = Problem(ignored=(0, 4), device=device, **case)
    without = torch.zeros(11, dtype=torch.bool)
    without[[0, 4]] = True
    row_weight = problem.inputs["row_weight"]
    if row_weight is not None:
        without |= row_weight.cpu() == 0
        problem.frozen = ("row_weight",)
    expected = problem.ours(backend)
    for name in ("hidden", "thought", "mixing"):
        x = problem.inputs[name]
        if x is not None and len(x) == len(without):
            for row, value in zip(without.nonzero()[:, 0].tolist(), 9 * [float("nan"), float("inf")], strict=False):
                x[row] = value
    for name, value in problem.ours(backend).items():
        assert value is None or torch.equal(value, expected[name]), name


def assert_stride_0_changes_nothing(backend, device="cpu"):
    """Of what has one number for a row."""
    rows = 5
    numbers = {
        "mixing_weight": torch.tensor(0.3), "target": torch.tensor(3), "base_index": torch.tensor(1),
        "row_weight": torch.tensor(-2.0),
    }  # fmt: skip
    hidden = torch.randn(2, 6), torch.randn(rows, 6)
    weight, results = torch.randn(77, 6), []
    for spread in (lambda x: x.to(device).expand(rows), lambda x: x.to(device).expand(rows).contiguous()):
        leaves = [x.to(device).clone().requires_grad_() for x in (*hidden, weight)]
        options = {name: spread(x) for name, x in numbers.items()}
        loss, nll = mixed_linear_cross_entropy(
            *leaves[:2], weight=leaves[2], reduction="sum", return_nll=True, backend=backend, **options
        )
        results.append((loss.detach(), nll, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def assert_problem_solved(problem, actual):
    eager, oracle = problem.plain(), problem.plain(torch.float64)
    assert actual.keys() == oracle.keys()
    dtype = problem.inputs["hidden"].dtype
    assert_as_accurate(actual.pop("loss"), eager["loss"], oracle["loss"], unit=dtype, ulps=1 + 7 * dtype.itemsize // 4)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], oracle[name], name=name)
