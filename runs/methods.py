"""Every published way to train thoughts that this package knows, on the quickstart's world. Results: docs/methods.md.

python runs/methods.py                                        all of METHODS and STRESS, seeds 0, 1 and 2
python runs/methods.py --methods RLP --seeds 0 1 --output x   some of them; runs that x has of others stay there
python runs/methods.py --seeds --page docs/methods.md         no training, the tables of the page from the results

Per seed there are one world, one base model, one text for the second training and one exam; methods differ in that
training alone. Seconds are of the processor, on one thread, so that a busy machine does not change them much.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from method_table import write_tables
from star_world import star_on_world
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from quietstar.evaluation import gain, held_out_nll, shuffle_thoughts
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart import experiment
from quietstar.quickstart.controls import FILLER, Stage
from quietstar.quickstart.measures import Exam, answer, answer_at_once, steps_thought
from quietstar.quickstart.stages import THINKING, new_base, second_seed, train_base, train_thinking
from quietstar.quickstart.world import Windows, World, world_tokenizer
from quietstar.training.data import collate_windows

RESULTS = Path(__file__).parent / "results" / "methods.json"
HOPS = 3
SEEDS = (0, 1, 2)

Run = dict[str, Any]


class Ready(NamedTuple):
    """What all methods of a seed share."""

    seed: int
    size: experiment.Size
    stage: Stage
    held_out: Windows


class Method(NamedTuple):
    """A way to train thoughts."""

    fields: Mapping[str, Any] = {}  # of the configuration, beside the quickstart's own
    training: Mapping[str, float] = {}  # of quietstar.quickstart.stages.Training, likewise
    train: Callable[[Ready, "Method", str], PreTrainedModel] | None = None  # default: Quiet-STaR, with what follows
    run: Callable[[Ready], Run] | None = None  # trains and measures by itself
    at_answers: bool = False  # thoughts stand behind "is" alone
    filler: str | None = None  # what all thoughts are made of
    stages: Sequence[tuple[int, int]] = ()  # thought lengths and lookaheads, one after the other
    distil: str | None = None  # how the prediction without a thought learns from the one after a thought, as long again

    def settings(self) -> dict[str, Any]:
        """What was trained, for JSON."""
        return {name: value for name, value in self._asdict().items() if name not in ("train", "run")}


def train_ordinary(ready: Ready, method: Method, name: str) -> PreTrainedModel:
    """Of the text alone, without thoughts."""
    return ready.stage.train_without_thoughts()


def train_with_thoughts(ready: Ready, method: Method, name: str) -> QuietStarForCausalLM:
    """Quiet-STaR with what the method changes."""
    stage = ready.stage
    set_seed(stage.seed)
    model = QuietStarForCausalLM.from_base(stage.folder / "base", stage.tokenizer, **stage.thinking | method.fields)
    token = stage.tokenizer.convert_tokens_to_ids

    def collate(windows: list) -> dict[str, Tensor]:
        batch = collate_windows(windows)
        if method.at_answers:
            batch["anchors"] = positions_of(token("is"), batch["input_ids"])
        if method.filler is not None:
            shape = len(windows), model.config.num_thoughts, batch["input_ids"].shape[1], model.config.thought_length
            batch["thought_tokens"] = torch.full(shape, token(method.filler))
        return batch

    training, tokens = stage.training._replace(**method.training), stage.text.tokens
    options = {"stages": parts_of(method.stages, training.steps)} if method.stages else {}
    trained = train_thinking(model, tokens, training, stage.seed, name, collate, **options)
    model.last_log = trained.state.log_history[-2]  # behind it is the summary
    if method.distil is not None:
        train_thinking(model, tokens, training, stage.seed, f"{name}, without", distil=method.distil)
    return model


def parts_of(stages: Sequence[tuple[int, int]], steps: int) -> list[tuple[int, int, int]]:
    """Equal shares of the steps, what is left over for the last."""
    share = steps // len(stages)
    shares = [share] * (len(stages) - 1) + [steps - share * (len(stages) - 1)]
    return [(*stage, share) for stage, share in zip(stages, shares, strict=True)]


def run_star(ready: Ready) -> Run:
    """STaR writes its thoughts out as text, and is measured by the answers behind them."""
    after = star_on_world(ready.seed, hops=HOPS, size=ready.size)["star"]
    return {"accuracy_without": after["at_once"], "accuracy_with": after["with_sampled_rationale"]}


def positions_of(token: int, input_ids: Tensor) -> Tensor:
    """Where texts [B, L] have a token that something follows, int64 [B, A]; −1 behind the last."""
    found = [row.nonzero().flatten() for row in input_ids[:, :-1] == token]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


QUARTER = {"anchors_per_text": experiment.WINDOW // 4}
# Methods that know where an answer begins think there, N = 4 times, and have no loss without a thought.
OF_ANSWERS = {
    "prediction": "thought", "baseline": "none", "advantage": "leave_one_out", "advantage_clamp": False,
    "num_thoughts": 4, "anchor_choice": "given", "base_loss_weight": 0.0, "policy_temperature": 1.0,
}  # fmt: skip
# Of the paper's 16 thoughts of one position, as many as make a step cost what Quiet-STaR's costs.
RLP = QUARTER | {
    "prediction": "thought", "advantage": "leave_one_out", "advantage_clamp": False, "num_thoughts": 4,
    "thought_temperature": 0.7, "policy_temperature": 0.7, "policy_weight": 1.0, "base_loss_weight": 0.0,
    "talk_loss_weight": 0.0,
}  # fmt: skip
SHORTER = ((4, 1), (3, 1), (2, 1))  # thought length and lookahead
METHODS = {
    "ordinary training": Method(train=train_ordinary),
    "pause tokens": Method(filler=FILLER),
    "policy weight 0": Method({"policy_weight": 0.0}),
    "STaR": Method(run=run_star),
    "Quiet-STaR": Method(),
    "Quiet-STaR, a random quarter": Method(QUARTER),
    "Quiet-STaR, the unsurest quarter": Method(QUARTER | {"anchor_choice": "entropy"}),
    "RLP": Method(RLP | {"baseline": "teacher"}, {"learning_rate": 3e-4}),
    "RLP, too fast": Method(RLP),
    "LaTRO": Method(OF_ANSWERS | {"kl_weight": 0.05, "teacher_decay": 1.0}, at_answers=True),
    "JEPO": Method(OF_ANSWERS | {"reward": "log_mean"}, at_answers=True),
    "VeriFree": Method(OF_ANSWERS | {"reward": "likelihood"}, at_answers=True),
    "Fast Quiet-STaR": Method(stages=SHORTER, distil="reward"),
    "Fast Quiet-STaR, by KL": Method(stages=SHORTER, distil="kl"),
}  # fmt: skip

# What collapses, and what may keep it from that.
COLLAPSE = QUARTER | {
    "anchor_choice": "entropy", "num_thoughts": 3, "thought_temperature": 0.5, "policy_temperature": 0.5,
    "policy_weight": 2000.0,
}  # fmt: skip
REMEDIES = {
    "entropy bonus": {"entropy_weight": 500.0},
    "normalised advantages": {"normalize_advantage": True},
    "KL to the base": {"kl_weight": 0.1, "teacher_decay": 1.0},
    "no clamp": {"advantage_clamp": False},
    "leave-one-out, no clamp": {"advantage": "leave_one_out", "advantage_clamp": False},
}
STRESS = {"stress": Method(COLLAPSE)} | {
    f"stress, {name}": Method(COLLAPSE | fields) for name, fields in REMEDIES.items()
}


def prepare(folder: Path, size: experiment.Size, seed: int) -> Ready:
    """The world of the quickstart with this seed, its base model, which is saved in ``folder``, and its texts."""
    set_seed(seed)
    streams = [np.random.default_rng([seed, part]) for part in range(3)]
    world, tokenizer = World(HOPS, seed, size.people), world_tokenizer()
    thinking, training = THINKING | {"thought_length": HOPS - 1}, size.thinking
    training = training._replace(steps=training.steps * (HOPS - 1))

    def text(windows: int, shares, questions, stream: int) -> Windows:
        return world.windows(tokenizer, windows, experiment.WINDOW, shares, questions, streams[stream])

    corpus = text(size.windows, experiment.READING, world.train, 0)
    terse = text(training.steps * training.batch_size, experiment.TERSE, world.train, 1)
    held_out = text(size.held_out_windows, experiment.TERSE, world.held_out, 2)
    base = new_base(
        tokenizer, hidden_size=size.hidden_size, intermediate_size=4 * size.hidden_size, layers=1, kv_heads=4
    )
    train_base(base, corpus.tokens, size.base, seed)
    base.save_pretrained(folder / "base")
    exam = Exam.of(world, tokenizer)
    return Ready(
        seed, size, Stage(folder, tokenizer, world, exam, terse, training, second_seed(seed), thinking), held_out
    )


def run(ready: Ready, name: str, method: Method) -> Run:
    """Train and measure; what cannot be measured of a method is not there."""
    if method.run is not None:
        return method.run(ready) | method.settings()
    start = time.process_time()
    model = (method.train or train_with_thoughts)(ready, method, name)
    seconds = time.process_time() - start
    exam = ready.stage.exam
    results = {"seconds": seconds, "accuracy_without": _share(answer_at_once(model, exam).right)}
    if isinstance(model, QuietStarForCausalLM):
        results |= measure_thoughts(model, ready, method)
    return results | method.settings()


def measure_thoughts(model: QuietStarForCausalLM, ready: Ready, method: Method) -> Run:
    """Answers after thoughts, the model's own or all one token, and what thoughts did for all other tokens."""
    stage, (windows, answers) = ready.stage, map(torch.from_numpy, ready.held_out)
    exam, given = stage.exam, None
    length = model.config.thought_length
    if method.filler is not None:
        given = torch.full((len(exam.prompts), length), stage.tokenizer.convert_tokens_to_ids(method.filler))
    own = answer(model, exam, given)
    results = {"accuracy_with": _share(own.right), "thoughts_that_name_the_steps": steps_thought(exam, own.thoughts)}
    everywhere: str | Tensor = "own"
    if given is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            shuffled = shuffle_thoughts(own.thoughts[:, None, None])[:, 0, 0]
        results["accuracy_shuffled"] = _share(answer(model, exam, shuffled).right)
    else:
        everywhere = given[0, 0].expand(len(windows), 1, windows.shape[1], length)
    others = gain(held_out_nll(model, windows, thoughts=everywhere), ~answers[:, 1:])
    log = getattr(model, "last_log", {})
    kept = {name: log[name] for name in ("thought_entropy", "distinct_thoughts") if name in log}
    return results | kept | {"gain_other_tokens": others.gain.value, "nll_other_tokens": others.base.value}


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def runs_of(methods: Mapping[str, Method], seeds: Iterable[int], size: experiment.Size) -> Iterable[Run]:
    """All methods of a seed, then those of the next."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            ready = prepare(Path(folder), size, seed)
            for name, method in methods.items():
                yield {"method": name, "seed": seed} | run(ready, name, method)


def keep(path: Path, new: Run) -> None:
    """Add a run to those in a file, or replace the one of the same method and seed."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [each for each in runs if (each["method"], each["seed"]) != (new["method"], new["seed"])]
    path.write_text(json.dumps({"hops": HOPS, "runs": [*runs, new]}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write as the command line says."""
    parser = argparse.ArgumentParser(description="Compare ways to train thoughts on the quickstart's world.")
    known = METHODS | STRESS
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model, to see that everything runs")
    parser.add_argument("--page", type=Path, help="write the tables of the output into this page, e.g. docs/methods.md")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    size = experiment.TINY if options.tiny else experiment.USUAL
    with experiment.one_thread():
        for result in runs_of({name: known[name] for name in options.methods}, options.seeds, size):
            keep(options.output, result)
            print(json.dumps(result), flush=True)
    if options.page is not None:
        write_tables(options.page, options.output, list(METHODS), list(STRESS))


if __name__ == "__main__":
    main()
