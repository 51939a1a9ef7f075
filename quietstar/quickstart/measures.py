"""The measurements in the world: answers to held-out questions, and the text around them."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quietstar.evaluation import Mean, gain, held_out_nll, shuffle_thoughts, token_mean
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.world import Windows, World

THINK_ABOVE = 2.0  # nats of entropy


class Exam(NamedTuple):
    """Q held-out questions as tokens; all prompts have the same length."""

    prompts: Tensor  # int64 [Q, L]
    steps: Tensor  # int64 [Q, hops], the people on the way; the last is the answer

    @classmethod
    def of(cls, world: World, tokenizer: PreTrainedTokenizerFast) -> "Exam":
        """Create the exam of a world's held-out questions."""
        prompts = [tokenizer(str(question))["input_ids"] for question in world.held_out]
        steps = [tokenizer.convert_tokens_to_ids(world.steps(question)) for question in world.held_out]
        return cls(torch.tensor(prompts), torch.tensor(steps))


class Answers(NamedTuple):
    """Greedy answers to Q questions, each after at most one thought."""

    tokens: Tensor  # int64 [Q]
    right: Tensor  # bool [Q]
    nll: Tensor  # float [Q], nll of the right answer in nats
    thoughts: Tensor  # int64 [Q, k]; k = 0 without thoughts

    def means(self, name: str = "") -> dict[str, float]:
        """Return the share of right answers and the mean nll, with standard errors; ``name`` is a suffix of keys."""
        accuracy, nll = (token_mean(values[:, None]) for values in (self.right.float(), self.nll))
        return _named(f"accuracy{name}", accuracy) | _named(f"nll{name}", nll)


@torch.no_grad()
def answer(model: QuietStarForCausalLM, exam: Exam, thoughts: Tensor | None = None, seed: int = 0) -> Answers:
    """Answer after the model's own thoughts, sampled with the seed, or after given ones, int64 [Q, k]."""
    model.eval()
    given = None if thoughts is None else thoughts[:, None, None]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        output = model(exam.prompts, thought_tokens=given, logits_to_keep=1, use_cache=False)
    return _answers(exam, output.logits[:, -1], output.thought_tokens[:, 0, 0])


@torch.no_grad()
def answer_at_once(model: torch.nn.Module, exam: Exam) -> Answers:
    """Answer without a thought; the model may also be an ordinary Mistral."""
    hidden = model.eval().model(exam.prompts).last_hidden_state[:, -1]
    return _answers(exam, model.lm_head(hidden), exam.prompts[:, :0])


def _answers(exam: Exam, logits: Tensor, thoughts: Tensor) -> Answers:
    right, tokens = exam.steps[:, -1], logits.argmax(dim=-1)
    return Answers(
        tokens, tokens == right, torch.nn.functional.cross_entropy(logits, right, reduction="none"), thoughts
    )


def steps_thought(exam: Exam, thoughts: Tensor) -> float:
    """Return the share of thoughts, int64 [Q, k], that begin with the people in between."""
    between = exam.steps[:, :-1]
    return float((thoughts[:, : between.shape[1]] == between).all(dim=1).float().mean())


@torch.no_grad()
def steps_right(base: torch.nn.Module, exam: Exam, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return how often a base model gets each step (the last is the answer) right if earlier steps are spelled out."""
    dash = torch.full_like(exam.steps[:, :1], tokenizer.convert_tokens_to_ids("---"))
    spelled = torch.cat([exam.prompts, dash, exam.steps[:, :-1], dash], dim=1)
    predicted = base.eval()(spelled).logits[:, exam.prompts.shape[1] :].argmax(dim=-1)
    hops = exam.steps.shape[1]
    predicted = torch.cat([predicted[:, : hops - 1], predicted[:, -1:]], dim=1)  # without the closing dash
    return (predicted == exam.steps).float().mean(dim=0).tolist()


@torch.no_grad()
def think_where_unsure(model: QuietStarForCausalLM, exam: Exam, windows: Tensor) -> dict[str, float]:
    """Let the model think only where unsure; return its accuracy, and for which share of held-out tokens it thinks."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        answers = model.generate(
            exam.prompts, max_new_tokens=1, do_sample=False, think=THINK_ABOVE, eos_token_id=None, pad_token_id=0,
            return_thoughts=True,
        )  # fmt: skip
    right = answers.sequences[:, -1] == exam.steps[:, -1]
    logits = model.lm_head(model.model(windows[:, :-1]).last_hidden_state)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return {"accuracy": float(right.float().mean()), "share": float((entropy > THINK_ABOVE).float().mean())}


def measure(model: QuietStarForCausalLM, exam: Exam, held_out: Windows) -> tuple[dict[str, object], Answers]:
    """Return all measurements of a model, JSON-serialisable, and its answers after a thought."""
    windows, answers = torch.from_numpy(held_out.tokens), torch.from_numpy(held_out.answers[:, 1:])
    own = answer(model, exam)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        shuffled = shuffle_thoughts(own.thoughts[:, None, None])[:, 0, 0]
    results = answer_at_once(model, exam).means("_without") | own.means("_with")
    results |= answer(model, exam, shuffled).means("_shuffled")
    nll = held_out_nll(model, windows)
    others, at_answers = gain(nll, ~answers), gain(nll, answers)
    results |= _named("other_tokens_nll_without", others.base) | _named("other_tokens_nll_with", others.mixed)
    results |= _named("other_tokens_gain", others.gain)
    results |= {"mixing_weight_answers": at_answers.mixing_weight.value}
    results |= {"mixing_weight_other_tokens": others.mixing_weight.value}
    results |= {"thoughts_that_name_the_steps": steps_thought(exam, own.thoughts)}
    results |= {f"{name}_think_above_2": value for name, value in think_where_unsure(model, exam, windows).items()}
    return results, own


def _named(name: str, mean: Mean) -> dict[str, float]:
    return {name: mean.value, f"{name}_error": mean.error}


def described_questions(
    world: World, exam: Exam, answers: Answers, tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, object]]:  # fmt: skip
    """Return every held-out question with its right answer and the model's thought and answer."""
    columns = zip(world.held_out, answers.thoughts, answers.tokens, strict=True)
    return [
        {
            "prompt": str(question),
            "answer": world.steps(question)[-1],
            "steps": world.steps(question)[:-1],
            "thought": tokenizer.decode(thought[thought >= 0]),
            "said": tokenizer.decode([said]),
        }
        for question, thought, said in columns
    ]
