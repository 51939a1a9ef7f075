"""What a model learns from a thinking teacher, against autograd on whole logits."""

import pytest
import torch

from quietstar.training.data import collate_windows
from quietstar.training.distil import Lesson, learn, teach


@pytest.mark.parametrize("how", ["kl", "reward"])
def test_losses_and_gradients_are_those_of_whole_logits(make_model, windows, how):
    model = make_model().double().eval()
    ids = collate_windows(windows[:3])["input_ids"]
    labels = ids.masked_fill(ids % 5 == 0, -100)
    lesson = Lesson(torch.randint(38, (3, 9)), 4 * torch.rand(3, 9, dtype=torch.float64))
    loss, nll = learn(model, labels, {"input_ids": ids}, lesson, how)
    gradients = (
        torch.autograd.grad(loss, model.lm_head.weight),
        torch.autograd.grad(learn(model, labels, {"input_ids": ids}, lesson, how)[0], model.model.embed_tokens.weight),
    )

    def slow():
        logprobs = model.lm_head(model.model(ids).last_hidden_state)[:, :-1].log_softmax(dim=-1)
        known = labels[:, 1:] != -100
        own = -logprobs.gather(2, labels[:, 1:, None].clamp_min(0))[..., 0].masked_fill(~known, 0)
        if how == "reward":
            return ((lesson.nll - own).detach().clamp_min(0) * own).sum() / known.sum(), own
        drawn = -logprobs.gather(2, lesson.drawn[..., None])[..., 0].masked_fill(~known, 0)
        return (own + drawn).sum() / 2 / known.sum(), own

    expected, own = slow()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll, own, rtol=1e-6, atol=1e-9)
    for (actual,), weight in zip(gradients, (model.lm_head.weight, model.model.embed_tokens.weight), strict=True):
        exact = torch.autograd.grad(slow()[0], weight)[0]
        assert (actual - exact).norm() <= 1e-6 * exact.norm()


def test_the_teacher_says_what_it_predicts_after_a_thought(make_model, windows):
    model = make_model(thought_temperature=0.0, num_thoughts=1, lookahead=1).eval()
    batch = collate_windows(windows[:3])
    lesson = teach(model, batch["labels"], {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(lesson.nll, model(**batch).talk_nll[:, 0, :, 0], rtol=1e-5, atol=1e-6)
    draws = torch.stack(
        [teach(model, batch["labels"], {"input_ids": batch["input_ids"]}).drawn[0, 4] for _ in range(400)]
    )
    probabilities = model(batch["input_ids"], suppress_thought_tokens=True).logits[0, 4].softmax(dim=-1)
    likeliest = probabilities.argmax()
    assert (draws == likeliest).float().mean() == pytest.approx(float(probabilities[likeliest]), abs=0.1)
