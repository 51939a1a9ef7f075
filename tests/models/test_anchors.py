"""Chosen positions think: which, what is given back, and what of a text costs nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quietstar import QuietStarForCausalLM
from quietstar.models.anchors import choose_anchors

VALUES = ("talk_nll", "mixing_weight", "thought_logprobs")  # [B, N, L−1, ...] where all positions think


def test_chosen_anchors_have_the_values_they_have_among_all(make_model, text):
    model = make_model()
    whole = model(text, labels=text)
    anchors = torch.tensor([[2, 7, 4], [0, -1, 10]])
    index = anchors.clamp_min(0)[:, None, :, None].expand(-1, 2, -1, 3)
    thoughts = whole.thought_tokens.gather(2, index).masked_fill(anchors[:, None, :, None] < 0, -1)
    output = model(text, labels=text, thought_tokens=thoughts, anchors=anchors)
    assert torch.equal(output.anchors, anchors)
    torch.testing.assert_close(output.base_nll, whole.base_nll)
    active = (anchors >= 0)[:, None, :, None]
    for name in VALUES:
        wanted = getattr(whole, name)
        wanted = wanted.gather(2, index[..., : wanted.shape[-1]]) * active
        torch.testing.assert_close(getattr(output, name) * active, wanted, atol=1e-5, rtol=1e-4)
    assert not (output.talk_nll * ~active).any()
    rewarded = active[..., 0] & (anchors < 9)[:, None]  # L − 1 − M
    wanted = whole.reward.gather(2, anchors.clamp(0, 8)[:, None].expand(-1, 2, -1)) * rewarded
    torch.testing.assert_close(output.reward, wanted, atol=1e-5, rtol=1e-4)
    assert output.advantage.shape == (2, 2, 3)


def test_anchors_of_packed_documents(make_model, text):
    """What would be predicted in the next document has no label, and is no reward."""
    model = make_model()
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    anchors = torch.tensor([[1, 3, 8]] * 2)
    output = model(text, labels=text, position_ids=position_ids, anchors=anchors)
    assert not output.talk_nll[:, :, 1, 1].any()  # of the token behind the document's last
    assert output.talk_nll[:, :, [0, 2]].all()
    assert not output.reward[:, :, 1].any()
    assert output.reward[:, :, [0, 2]].all()
    chosen = make_model(anchors_per_text=10)(text, labels=text, position_ids=position_ids).anchors
    assert chosen[0].tolist() == [0, 1, 2, *range(5, 10), -1, -1]


def test_the_last_that_sees_all_it_predicts_is_rewarded(make_model, text):
    """An answer may be the end of its text, or of its document."""
    mask = torch.ones_like(text)
    mask[1, :6] = 0
    position_ids = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    anchors = torch.tensor([[9, 10, 2, 3], [9, 10, 4, 6]])
    for k in (2, 0):
        output = make_model(thought_length=k)(
            text, labels=text, anchors=anchors, attention_mask=mask, position_ids=position_ids
        )
        assert output.reward.bool().all(dim=1).tolist() == [[True, False, True, False], [True, False, False, True]]


def test_random_anchors(make_model, text):
    model = make_model(anchors_per_text=4)
    labels = text.clone()
    labels[0, :6] = -100
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    output = model(text, attention_mask=mask, labels=labels)
    assert output.anchors.shape == (2, 4)
    assert output.thought_tokens.shape == (2, 2, 4, 3)
    assert output.anchors.diff(dim=1).gt(0).all()
    assert (output.anchors[0] >= 5).all()  # what they predict has labels
    assert (output.anchors[1] >= 3).all()
    assert (output.anchors <= 9).all()
    assert output.talk_nll.all()  # all of them
    assert not torch.equal(model(text, labels=text).anchors, model(text, labels=text).anchors)


def test_fewer_places_than_anchors(make_model, text):
    labels = text.clone()
    labels[0, :9] = -100
    output = make_model(anchors_per_text=30)(text, labels=labels)
    assert output.anchors[0].tolist() == [8, 9, *[-1] * 28]
    assert output.anchors[1].tolist() == [*range(10), *[-1] * 20]
    assert (output.thought_tokens[0, :, 2:] == -1).all()
    assert output.loss.isfinite()
    output.loss.backward()


def test_texts_without_a_label(make_model, text):
    model = make_model(anchors_per_text=2)
    output = model(text, labels=torch.full_like(text, -100))
    assert (output.anchors == -1).all()
    output.loss.backward()
    assert output.loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_anchors_where_the_base_prediction_is_unsure(make_model, text):
    model = make_model(anchors_per_text=3, anchor_choice="entropy")
    with torch.no_grad():
        logits = model.predictor().logits(model.model(text).last_hidden_state[:, :10])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    wanted = entropy.topk(3, dim=1).indices.sort(dim=1).values
    assert torch.equal(model(text, labels=text).anchors, wanted)
    assert torch.equal(model.choose_anchors(text, text), wanted)


def test_highest_scores_among_those_allowed():
    allowed = torch.tensor([[True, False, True, True]])
    score = torch.tensor([[1.0, 9.0, 3.0, 2.0]])
    assert choose_anchors(allowed, 2, score).tolist() == [[2, 3]]
    assert choose_anchors(allowed, 4, score).tolist() == [[0, 2, 3, -1]]


@pytest.mark.parametrize(
    ("anchors", "error", "message"),
    [
        (None, ValueError, "anchors must be given with anchor_choice 'given', got None"),
        (torch.tensor([[0.0], [1.0]]), TypeError, "anchors must be an integer tensor, got torch.float32"),
        (torch.tensor([0, 1]), ValueError, r"anchors must have shape \[2, A\] with A >= 1, got \[2\]"),
        (torch.tensor([[0], [12]]), ValueError, r"anchors must be positions in \[0, 12\) or -1, got 0 to 12"),
    ],
)
def test_given_anchors_that_are_none(make_model, text, anchors, error, message):
    with pytest.raises(error, match=message):
        make_model(anchor_choice="given")(text, labels=text, anchors=anchors)


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"baseline": "teacher"}, {}, "baseline_nll must be given with baseline 'teacher'"),
        ({}, {"baseline_nll": torch.zeros(2, 11)}, "baseline_nll must be left out without baseline 'teacher'"),
        ({"kl_weight": 1.0}, {}, "teacher_logprobs must be given with a kl_weight"),
        ({}, {"old_logprobs": torch.zeros(2, 2, 11, 3)}, "old_logprobs must be left out without a clip_ratio"),
        ({"clip_ratio": 0.2}, {"old_logprobs": torch.zeros(2, 2, 12, 3)},
         r"old_logprobs must have shape \[2, 2, 11, 3\], got \[2, 2, 12, 3\]"),
    ],
)  # fmt: skip
def test_what_the_objective_compares_with(make_model, text, fields, given, message):
    with pytest.raises(ValueError, match=message):
        make_model(**fields)(text, labels=text, **given)


def test_without_labels_nothing_is_compared(make_model, text):
    with pytest.raises(ValueError, match="anchors must be left out without labels, got Tensor"):
        make_model()(text, anchors=torch.zeros(2, 1, dtype=torch.int64))


def test_a_teacher_says_what_it_predicts_without_thoughts(make_model, text):
    model = make_model()
    labels = text.clone()
    labels[0, 4] = -100
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    wanted = model(text, attention_mask=mask, labels=labels).base_nll
    actual = model.base_nll(text, labels, attention_mask=mask)
    torch.testing.assert_close(actual, wanted)
    assert not actual.requires_grad


def test_a_model_of_thoughts_alone_has_no_mixing_head(make_model, text, tmp_path):
    model = make_model(prediction="thought")
    assert not list(model.mixing_head.parameters())
    output = model(text, labels=text)
    assert (output.mixing_weight == 1).all()
    model.save_pretrained(tmp_path)
    again = QuietStarForCausalLM.from_pretrained(tmp_path)
    thoughts = output.thought_tokens
    assert torch.equal(again(text, labels=text, thought_tokens=thoughts).talk_nll, output.talk_nll)
    behind = model(text, thought_tokens=thoughts[:, :1])
    nll = torch.nn.functional.cross_entropy(behind.logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
    torch.testing.assert_close(nll, output.talk_nll[:, 0, :, 0], atol=1e-5, rtol=1e-4)
    generated = model.generate(text, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 15)
    with pytest.raises(ValueError, match=r"prediction must be 'thought' for .*, which has no mixing_head, got 'mixed'"):
        QuietStarForCausalLM.from_pretrained(tmp_path, prediction="mixed")


def test_work_follows_the_anchors(make_model):
    """A quarter of the positions: no more than the text and a quarter of the rest."""
    text = torch.randint(1, 38, (1, 81))
    flops = {}
    for count in (None, 20, 0):
        model = make_model(anchors_per_text=count or None, thought_length=4)
        anchors = torch.full((1, 1), -1) if count == 0 else None
        with FlopCounterMode(display=False) as counter:
            model(text, labels=text, anchors=anchors).loss.backward()
        flops[count] = counter.get_total_flops()
    assert flops[20] - flops[0] < 0.27 * (flops[None] - flops[0])
