"""Every switch of the objective against its definition: full logits, each thought alone, autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from thoughts_alone import Alone
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

BATCH, LENGTH, TEACHER_SEED = 2, 9, 5
ANCHORS = torch.tensor([[1, 4, 5], [0, 3, -1]])

METHODS = {
    "Quiet-STaR": {},
    "RLP": {
        "prediction": "thought", "baseline": "teacher", "advantage": "leave_one_out", "advantage_clamp": False,
        "clip_ratio": 0.2, "base_loss_weight": 0.0, "talk_loss_weight": 0.0,
    },
    "LaTRO": {
        "prediction": "thought", "baseline": "none", "advantage": "leave_one_out", "advantage_clamp": False,
        "kl_weight": 0.3, "base_loss_weight": 0.0, "talk_loss_weight": 1.0,
    },
    "JEPO": {
        "prediction": "thought", "baseline": "none", "reward": "log_mean", "advantage": "leave_one_out",
        "advantage_clamp": False, "kl_weight": 0.2,
    },
    "VeriFree": {
        "prediction": "thought", "baseline": "none", "reward": "likelihood", "advantage": "leave_one_out",
        "advantage_clamp": False,
    },
    "log_mean, no baseline": {"reward": "log_mean", "advantage": "none", "advantage_clamp": False},
    "likelihood, mixed": {"reward": "likelihood", "advantage": "none"},
    "teacher, mixed": {"baseline": "teacher", "kl_weight": 0.5, "clip_ratio": 0.1},
    "no baseline": {"baseline": "none", "advantage": "none", "advantage_clamp": False},
    "normalised": {"normalize_advantage": True},
    "normalised, not clamped": {"normalize_advantage": True, "advantage_clamp": False, "advantage": "leave_one_out"},
    "entropy": {"entropy_weight": 0.7},
    "entropy alone": {"entropy_weight": 0.7, "policy_weight": 0.0},
    "weights of its own": {"base_loss_weight": 0.3, "talk_loss_weight": 0.9},
    "one thought": {"num_thoughts": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def all_in_float64(monkeypatch):
    """Norms and the softmax of attention too, which transformers takes in float32."""

    def normed(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(MistralRMSNorm, "forward", normed)
    monkeypatch.setattr(Alone, "attention", "sdpa")


@pytest.fixture
def make(make_model):
    def make(**fields):
        defaults = {"thought_length": 2, "lookahead": 2, "num_thoughts": 3, "policy_weight": 2.0, "anchors_per_text": 3}
        torch.manual_seed(0)
        model = make_model(**defaults | {"policy_temperature": 1.5, "embedding_scale": 1.0} | fields).double()
        if model.config.prediction == "mixed":
            torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.3)
        return model

    return make


@pytest.fixture
def teacher(make):
    model = make(num_thoughts=1)
    torch.manual_seed(TEACHER_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def rows_of(model, text, anchors, thoughts):
    """Of every thought behind an active anchor: where it stands, and what it predicts and was drawn with."""
    alone, config = Alone(model), model.config
    hidden, logits = alone(alone.embed(text))
    base = F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
    k, rows = config.thought_length, []
    for b in range(BATCH):
        for a, i in enumerate(anchors[b].tolist()):
            for n in range(config.num_thoughts) if i >= 0 else ():
                one, thought = text[b : b + 1], thoughts[b, n, a][thoughts[b, n, a] >= 0][None]
                slots = alone.thought(one, i, thought, config.lookahead)
                after = slots[:, thought.shape[1] + 1 :]
                if config.prediction == "thought":
                    predicted = alone.logits(after)
                else:
                    predicted = alone.mixed(
                        *(x.flatten(0, 1) for x in (hidden[b : b + 1, i : i + after.shape[1]], after))
                    )
                ahead = one[0, i + 1 : i + 1 + config.lookahead]
                drawn = thought if thought.shape[1] == k else F.pad(thought, (0, 1), value=config.end_thought_token_id)
                policy = alone.logits(slots[:, : drawn.shape[1]]) / config.policy_temperature
                policy[..., config.start_thought_token_id] = -torch.inf
                never_ends = slice(0, 1) if config.learned_thought_end else slice(None)
                policy[:, never_ends, config.end_thought_token_id] = -torch.inf
                log_p = policy.log_softmax(-1)
                rows.append({
                    "at": (b, n, a), "i": i,
                    "score": -F.cross_entropy(predicted.view(-1, predicted.shape[-1]), ahead, reduction="sum"),
                    "logprobs": F.pad(log_p.gather(-1, drawn[..., None])[0, :, 0], (0, k - drawn.shape[1])),
                    "entropy": -(log_p.exp() * log_p.nan_to_num(neginf=0)).sum(-1).sum(),
                })  # fmt: skip
    return base, rows


def literal_loss(model, text, anchors, thoughts, teacher_nll, teacher_rows, old):
    """The objective by DESIGN: one thought after the other."""
    config = model.config
    base, rows = rows_of(model, text, anchors, thoughts)
    baseline_nll = {"self": base.detach(), "teacher": teacher_nll, "none": torch.zeros_like(base)}[config.baseline]
    groups = {}
    for row in rows:
        groups.setdefault((row["at"][0], row["at"][2]), []).append(row)
    M, N, k = config.lookahead, config.num_thoughts, config.thought_length
    policy, talk, advantages = 0.0, 0.0, []
    for (b, _), group in groups.items():
        score = torch.stack([row["score"] for row in group])
        baseline = -baseline_nll[b, group[0]["i"] : group[0]["i"] + M].sum()
        costs = torch.zeros(N, dtype=score.dtype)
        if config.kl_weight:
            log_p = torch.stack([row["logprobs"] for row in group]).detach().sum(-1)
            costs = config.kl_weight * (log_p - torch.stack([teacher_rows[row["at"]] for row in group]).sum(-1))
        if config.reward == "log_likelihood":
            talk = talk - score.mean()
            reward = (score - baseline).detach() - costs
        elif config.reward == "likelihood":
            talk = talk - score.exp().mean()
            reward = (score.exp() - (baseline.exp() if config.baseline != "none" else 0)).detach() - costs
        else:
            talk = talk - score.exp().mean().log()
            gain = (score - baseline).detach()
            reward = gain.exp().mean().log().expand(N)
        advantage = []
        for n in range(N):
            others = [m for m in range(N) if m != n]
            if config.reward == "log_mean":
                against = gain[others].exp().mean().log() if config.advantage == "leave_one_out" else 0
                own = costs[n] - (costs[others].mean() if config.advantage == "leave_one_out" else 0)
                advantage.append(reward[n] - against - own)
            elif N > 1 and config.advantage == "leave_one_out":
                advantage.append(reward[n] - reward[others].mean())
            else:
                advantage.append(reward[n] - (reward.mean() if N > 1 and config.advantage == "mean" else 0))
        advantages.append(torch.stack(advantage))
    advantages = torch.stack(advantages)
    if config.normalize_advantage:
        advantages = advantages / advantages.std(correction=0)
    if config.advantage_clamp:
        advantages = advantages.clamp_min(0)
    entropy = 0.0
    for group, advantage in zip(groups.values(), advantages, strict=True):
        for row, value in zip(group, advantage, strict=True):
            entropy = entropy + row["entropy"] / (k * len(rows))
            if config.clip_ratio is None:
                surrogate = value * row["logprobs"]
            else:
                ratio = (row["logprobs"] - old[row["at"]]).exp()
                clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
                surrogate = torch.minimum(ratio * value, clipped * value)
            policy = policy - surrogate.sum() / (k * len(rows))
    base_weight = config.base_loss_weight
    talk_weight = 1 - base_weight if config.talk_loss_weight is None else config.talk_loss_weight
    loss = base_weight * base.mean() + talk_weight * talk / (M * len(groups))
    return loss + config.policy_weight * policy - config.entropy_weight * entropy, advantages


def of_rows(rows):
    """log p of the teacher, by thought."""
    return {row["at"]: row["logprobs"].detach() for row in rows}


def as_tensor(of, shape):
    whole = torch.zeros(shape, dtype=torch.float64)
    for at, value in of.items():
        whole[at] = value
    return whole


@pytest.mark.parametrize("learned_end", [False, True], ids=["fixed length", "learned end"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_definition(name, learned_end, make, teacher):
    own = {"learned_thought_end": learned_end, "thought_length": 3 if learned_end else 2}
    model = make(**METHODS[name] | own)
    config = model.config
    torch.manual_seed(1)
    text = torch.randint(1, 38, (BATCH, LENGTH))
    shape = BATCH, config.num_thoughts, ANCHORS.shape[1], config.thought_length
    thoughts = torch.randint(1, 38, shape)
    if learned_end:
        thoughts[torch.arange(3) >= torch.randint(1, 4, shape[:-1])[..., None]] = -1
    for field, value in (own | {"num_thoughts": config.num_thoughts}).items():
        setattr(teacher.config, field, value)
    teacher_nll, teacher_rows = rows_of(teacher, text, ANCHORS, thoughts)
    teacher_nll, teacher_rows = teacher_nll.detach(), of_rows(teacher_rows)
    noise = torch.Generator().manual_seed(2)
    old = {
        row["at"]: row["logprobs"].detach() + 0.3 * torch.randn(shape[-1], generator=noise, dtype=torch.float64)
        for row in rows_of(model, text, ANCHORS, thoughts)[1]
    }
    wanted, advantages = literal_loss(model, text, ANCHORS, thoughts, teacher_nll, teacher_rows, old)
    given = {
        "baseline_nll": teacher_nll if config.baseline == "teacher" else None,
        "teacher_logprobs": as_tensor(teacher_rows, shape) if config.kl_weight else None,
        "old_logprobs": as_tensor(old, shape) if config.clip_ratio else None,
    }
    output = model(text, labels=text, thought_tokens=thoughts, anchors=ANCHORS, **given)
    actual = output.advantage.transpose(1, 2)[ANCHORS >= 0].double()
    torch.testing.assert_close(actual, advantages, rtol=1e-5, atol=1e-6)
    assert not output.advantage.transpose(1, 2)[ANCHORS < 0].any()
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (output.loss, wanted))
    for name, own, literal in zip(names, ours, theirs, strict=True):
        assert literal.any() or (name == "end_embedding.weight" and config.talk_loss_weight == 0), name
        assert (own - literal).norm() <= 1e-6 * literal.norm(), name
