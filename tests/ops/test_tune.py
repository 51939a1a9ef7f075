"""``python -m quietstar.ops.tune`` on a machine of its own making: what it finds, and that it keeps to its time."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from compile_kernels import pretend_gpu
from triton.runtime.errors import OutOfResources

from quietstar.ops import tune
from quietstar.ops._launch_table import ANY, HOPPER
from quietstar.ops._tuning import Outcome, Subject, search
from quietstar.ops.linear_cross_entropy import triton_tune

COMPILING, TIMING = 4.0, 0.25  # seconds


class Pair(NamedTuple):
    first: int
    second: int


class Fake:
    """Compiles in time of its own, on a clock that nothing else moves."""

    def __init__(self, milliseconds, together=4, spilled=lambda row: 0, slow=(), launched=None):
        self.together, self.slow = together, slow
        self.row_milliseconds, self.row_spilled, self.launched = milliseconds, spilled, launched
        self.clock, self.waves, self.timed = 0.0, [], []

    def now(self):
        return self.clock

    def compile(self, wave, seconds):
        self.waves.append([(subject.table, row) for subject, row in wave])
        needed = [1e6 if row in self.slow else COMPILING for _, row in wave]
        self.clock += min(max(needed), max(seconds, 0.0))
        return [time <= seconds for time in needed]

    def outcome(self, subject):
        launched = self.launched or {subject.kernel}
        return Outcome(subject.results(), self.row_spilled(subject.rows[subject.key]), launched)

    def milliseconds(self, subject):
        row = subject.rows[subject.key]
        self.clock += TIMING
        self.timed.append(row)
        milliseconds = self.row_milliseconds(row)
        if isinstance(milliseconds, Exception):
            raise milliseconds
        return milliseconds


PRESENT = Pair(32, 4)
CANDIDATES = [Pair(*numbers) for numbers in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8))]


def subject(name="kernel", candidates=CANDIDATES, run=lambda: [torch.ones(3)], **options):
    table = {(name, ANY, 2): PRESENT}
    key = name, HOPPER, 2
    return Subject(f"tables.{name}", table, key, "a_kernel", PRESENT, candidates, run, **({"moved": 3e9} | options))


def away_from(row):
    """Milliseconds that grow with the distance."""
    return lambda other: 1.0 + sum(abs(a - b) for a, b in zip(row, other, strict=True))


def test_the_fastest_is_found_and_the_table_left_alone():
    one = subject()
    before = dict(one.rows)
    [trial] = search([one], 1e3, Fake(away_from((128, 1))))
    assert trial.best == (128, 1)
    assert trial.times.keys() == set(CANDIDATES)
    assert next(iter(trial.times)) == PRESENT
    assert list(one.rows.items()) == list(before.items())


def test_a_row_of_its_own_stays_where_it_was():
    one = subject()
    one.rows.update({one.key: PRESENT, ("behind", HOPPER, 2): PRESENT})
    before = list(one.rows.items())
    search([one], 1e3, Fake(away_from((128, 1))))
    assert list(one.rows.items()) == before


def test_the_way_there_is_short():
    """The present row, then those nearest to the fastest so far, and not in the order of the candidates."""
    machine = Fake(away_from((128, 1)), together=1)
    search([subject()], 1e3, machine)
    assert machine.timed[0] == PRESENT
    assert (128, 1) in machine.timed[:12]
    assert [CANDIDATES.index(row) for row in machine.timed[1:5]] != [0, 1, 2, 3]


@pytest.mark.parametrize("seconds", [0.001, 3.0, COMPILING + TIMING, 17.0, 60.0])
@pytest.mark.parametrize("together", [1, 4, 16])
def test_the_time_is_kept(seconds, together):
    """But for the one row that is timed when it ends, also where a candidate takes for ever to compile."""
    machine = Fake(away_from((128, 1)), together, slow={Pair(64, 4), Pair(32, 8)})
    trials = search([subject("a"), subject("b")], seconds, machine)
    assert machine.clock <= seconds + TIMING
    assert all(trial.times.keys().isdisjoint(machine.slow) for trial in trials)
    if seconds >= 17:
        assert all(trial.times for trial in trials)


def test_every_kernel_gets_its_share():
    few, many = subject("few", CANDIDATES[:12]), subject("many")
    machine = Fake(away_from(PRESENT), together=4)
    trials = search([many, few], 30, machine)
    assert [len(trial.times) for trial in trials] == [11, 11]
    assert len(machine.waves[0]) == 2  # nothing is compared before the present row
    assert all(len(wave) == 4 for wave in machine.waves[1:])


def test_what_fails_spills_or_is_wrong_is_left_out():
    wrong, greedy, spilling, failing = CANDIDATES[:4]
    one = subject(run=lambda: [torch.ones(3) * (1.1 if one.rows.get(one.key) == wrong else 1)])

    def milliseconds(row):
        return OutOfResources(300, 200, "shared memory") if row == greedy else 1.0

    machine = Fake(milliseconds, spilled=lambda row: 8 if row == spilling else 2, slow={failing})
    [trial] = search([one], 1e3, machine)
    assert trial.times.keys() == set(CANDIDATES) - {wrong, greedy, spilling, failing}


@pytest.mark.parametrize(("share", "same"), [(0.01, True), (0.1, False)])
def test_tokens_are_compared_one_by_one(share, same):
    tokens = torch.arange(1000)
    other = torch.where(tokens < share * 1000, tokens + 30000, tokens)
    one = subject(candidates=[Pair(1, 1)], run=lambda: [other if one.rows.get(one.key) == Pair(1, 1) else tokens])
    [trial] = search([one], 1e3, Fake(away_from((1, 1))))
    assert (Pair(1, 1) in trial.times) == same


def test_a_kernel_that_does_not_run_is_no_hindrance():
    def out_of_memory():
        raise torch.OutOfMemoryError("no memory\nand more")

    broken, sound = search([subject("broken", run=out_of_memory), subject("sound")], 1e3, Fake(away_from((8, 1))))
    assert (broken.times, broken.tried, sound.best) == ({}, 1, (8, 1))
    assert broken.line() == "    # (BROKEN, HOPPER, 2): not timed, no memory"


def test_rows_of_what_is_not_launched_are_not_tuned():
    """On a GPU for which there is a better kernel, that is."""
    machine = Fake(away_from(PRESENT), launched={"better_kernel"})
    [trial] = search([subject()], 1e3, machine)
    assert (trial.times, trial.tried, machine.timed) == ({}, 1, [])
    assert trial.line().endswith("not timed, a typical call does not launch a_kernel here")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"flops": 2e12}, "    (THE_KERNEL, HOPPER, 2): Pair(8, 1),  # 4 ms, 500 TFLOP/s; 31 with (32, 4)"),
        ({"moved": 8e9}, "    (THE_KERNEL, HOPPER, 2): Pair(8, 1),  # 4 ms, 2000 GB/s; 31 with (32, 4)"),
    ],
)
def test_a_line_holds_the_measurement(options, line):
    one = subject("the kernel", **options)
    [trial] = search([one], 1e3, Fake(lambda row: 3 + away_from((8, 1))(row)))
    assert trial.line() == line
    by_number = one._replace(rows={128: PRESENT}, key=128)
    [trial] = search([by_number], 1e3, Fake(lambda row: 3 + away_from((8, 1))(row)))
    assert trial.line() == line.replace("(THE_KERNEL, HOPPER, 2)", "128")


SMALL = tune.Sizes(
    torch.float32, "cuda" if torch.cuda.is_available() else "cpu",
    length=6, steps=2, heads=2, kv_heads=1, head_size=16, decoding=1, rows=3, hidden_size=32, vocabulary=70,
)  # fmt: skip


@pytest.fixture(scope="module")
def real_subjects():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tune, "_LONG", 32769)  # the interpreter takes its time
        return tune.subjects(tune.OPS, SMALL)


def test_rows_of_every_table_are_tried_and_can_be_pasted(real_subjects):
    """In the interpreter, or on a GPU: each call runs with another row than the present one, and gives the same."""
    few = [
        each._replace(candidates=[row for row in each.candidates if row != each.present][:1]) for each in real_subjects
    ]
    before = [dict(each.rows) for each in few]
    trials = search(few, 1e3, Fake(lambda row: 1.0, together=16))
    for trial, table in zip(trials, before, strict=True):
        assert len(trial.times) == 2, trial.subject.key
        assert trial.subject.rows == table
        module, _, _ = trial.subject.table.rpartition(".")
        names = vars(__import__(module, fromlist=["*"])) | {"INTERPRETER": "interpreter"}
        assert eval("{" + trial.line().partition("#")[0] + "}", names) == {trial.subject.key: trial.best}
    assert {trial.subject.table.split(".")[2] for trial in trials} == set(tune.OPS)


def test_every_row_of_every_table_is_tuned(real_subjects):
    tuned = {(each.table, each.key[0]) for each in real_subjects}
    tables = {each.table: each.rows for each in real_subjects}
    assert tuned == {(name, key[0]) for name, table in tables.items() for key in table}


def test_kernels_of_rows_exist(real_subjects):
    for each in real_subjects:
        folder = Path(tune.__file__).parents[2] / Path(*each.table.split(".")[:3])
        assert any(f"def {each.kernel}(" in file.read_text() for file in folder.glob("*.py")), each.kernel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a GPU"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--head-size", "257"], "--head-size must be from 1 to 256, got 257"),
        (["--vocabulary", "0"], "--vocabulary must be at least 1, got 0"),
        (["--ops", "softmax"], "invalid choice: 'softmax'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        tune.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch):
    """A GPU, as far as the command itself asks for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "_shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(tune, "subjects", lambda ops, sizes: [subject(f"of {op}", flops=2e12) for op in ops])


def test_the_command_prints_and_writes_rows(pretended, tmp_path, capsys):
    arguments = ["--ops", "mixing", "linear_sample", "--output", str(tmp_path / "rows.txt")]
    assert tune.main(arguments, lambda together: Fake(away_from((8, 1)))) == 0
    text = (tmp_path / "rows.txt").read_text()
    assert capsys.readouterr().out == text
    origin, *lines = text.splitlines()
    assert origin.startswith(f"# python -m quietstar.ops.tune {' '.join(arguments)}: 40 of 40 candidates in ")
    assert "a GPU, torch" in origin
    assert lines == [
        "# tables.of mixing",
        "    (OF_MIXING, HOPPER, 2): Pair(8, 1),  # 1 ms, 2000 TFLOP/s; 28 with (32, 4)",
        "# tables.of linear_sample",
        "    (OF_LINEAR_SAMPLE, HOPPER, 2): Pair(8, 1),  # 1 ms, 2000 TFLOP/s; 28 with (32, 4)",
    ]


def test_nothing_measured_is_a_failure(pretended, capsys):
    assert tune.main(["--minutes", "1e-9"], lambda together: Fake(away_from((8, 1)))) == 1
    assert "not timed, no time was left" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_said_first(pretended, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        tune.main(["--output", "/nowhere/rows.txt"])
    assert "--output /nowhere/rows.txt: No such file or directory" in capsys.readouterr().err


@triton.jit
def _fill_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def test_candidates_are_compiled_and_not_launched():
    """For a GPU that is not there, in a process of its own: one is impossible, and for another there is no time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["", *sys.path])
    done = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.stdout.split() == ["True", "True", "False", "True", "False"]


def compile_for_a_gpu():
    pretend_gpu(90)

    def run():
        pair = one.rows[one.key]
        _fill_kernel[(1,)](torch.empty(1024), BLOCK=pair.first, num_warps=pair.second)
        return []

    one, machine = subject(run=run), tune.Gpu(2)
    print(*machine.compile([(one, Pair(*pair)) for pair in ((64, 4), (128, 4), (100, 4), (64, 4))], 200.0))
    print(*machine.compile([(one, Pair(256, 4))], 0.0), flush=True)
    os._exit(0)


if __name__ == "__main__":
    compile_for_a_gpu()
