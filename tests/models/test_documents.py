"""Packed documents: position ids that start again. Each document is as it would be alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from quietstar.models.transformers_names import CACHE
from quietstar.training.metrics import ThoughtMetrics

LENGTHS = 5, 8, 7


@pytest.fixture
def packed():
    """Three documents in two rows: ids, positions, thoughts [B, N, L, k], and where each document lies."""
    ids = torch.randint(1, 38, (2, 20))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in LENGTHS]), torch.arange(20)])
    spans = [(0, 0, 5), (0, 5, 13), (0, 13, 20), (1, 0, 20)]
    return ids, position_ids, torch.randint(1, 38, (2, 2, 20, 3)), spans


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_packed_document_is_scored_as_alone(make_model, packed, window, masked):
    ids, position_ids, thoughts, spans = packed
    model = make_model(sliding_window=window)
    mask = torch.ones_like(ids) if masked else None
    output = model(ids, mask, position_ids, labels=ids, thought_tokens=thoughts)
    for row, start, end in spans:
        alone = model(
            ids[None, row, start:end],
            labels=ids[None, row, start:end],
            thought_tokens=thoughts[None, row, :, start:end],
        )
        positions, rewarded = end - start - 1, end - start - 3
        assert_close(output.base_nll[row, start : end - 1], alone.base_nll[0])
        assert_close(output.talk_nll[row, :, start : end - 1], alone.talk_nll[0])
        assert_close(output.reward[row, :, start : start + rewarded], alone.reward[0])
        assert not output.reward[row, :, start + rewarded : start + positions].any()
        assert_close(output.thought_logprobs[row, :, start : end - 1], alone.thought_logprobs[0])


def test_the_loss_of_packed_documents_is_that_of_a_batch_of_them(make_model):
    model = make_model()
    ids, thoughts = torch.randint(1, 38, (2, 9)), torch.randint(1, 38, (2, 2, 9, 3))
    batch = model(ids, labels=ids, thought_tokens=thoughts)
    row, position_ids = ids.view(1, 18), torch.arange(9).repeat(2)[None]
    in_a_row = thoughts.transpose(0, 1).reshape(1, 2, 18, 3)
    packed = model(row, position_ids=position_ids, labels=row, thought_tokens=in_a_row)
    for name in ("loss", "policy_loss"):
        assert_close(getattr(packed, name), getattr(batch, name))
    means = []
    for output, labels, position_ids in (
        (batch, ids, None),
        (packed, ids.view(1, 18), torch.arange(9).repeat(2)[None]),
    ):
        metrics = ThoughtMetrics()
        metrics.add(output, labels, None, position_ids)
        means.append(metrics.means(metrics.totals()))
    assert means[0][1] == means[1][1] == 16
    assert means[0][0] == pytest.approx(means[1][0], rel=1e-4)


@pytest.mark.parametrize("kept", [0, torch.tensor([4, 9, 19])], ids=["all", "some"])
def test_predictions_and_sampled_thoughts_of_a_packed_document(make_model, packed, kept):
    ids, position_ids, _, spans = packed
    model = make_model(thought_temperature=0.0)
    with torch.no_grad():
        output = model(ids, position_ids=position_ids, logits_to_keep=kept)
        everywhere = model.sample_thoughts(ids, position_ids=position_ids)
        for row, start, end in spans:
            alone = model(ids[None, row, start:end])
            assert torch.equal(everywhere[row, 0, start:end], alone.thought_tokens[0, 0])
            columns = torch.arange(20) if isinstance(kept, int) else kept
            for index, column in enumerate(columns.tolist()):
                if start <= column < end:
                    assert_close(output.logits[row, index], alone.logits[0, column - start])
    assert CACHE not in output


def test_the_flattening_collator_of_transformers(make_model):
    model, documents = make_model(num_thoughts=1), [torch.randint(1, 38, (n,)).tolist() for n in (6, 7)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    thoughts = torch.randint(1, 38, (1, 1, 13, 3))
    alone = torch.tensor([documents[1]])
    expected = model(alone, labels=alone, thought_tokens=thoughts[:, :, 6:])
    assert_close(model(**batch, thought_tokens=thoughts).talk_nll[0, :, 6:], expected.talk_nll[0])


def test_left_padded_documents(make_model, packed):
    """The positions of padding mean nothing, the first token behind it is predicted by nothing."""
    ids, position_ids, thoughts, _ = packed
    model = make_model()
    plain = model(ids, position_ids=position_ids, labels=ids, thought_tokens=thoughts)
    left = torch.nn.functional.pad
    output = model(
        left(ids, (3, 0)),
        left(torch.ones_like(ids), (3, 0)),
        left(position_ids, (3, 0), value=1),
        labels=left(ids, (3, 0)),
        thought_tokens=left(thoughts, (0, 0, 3, 0)),
    )
    assert_close(output.base_nll[:, 3:], plain.base_nll)
    assert_close(output.talk_nll[:, :, 3:], plain.talk_nll)
    assert_close(output.reward[:, :, 3:], plain.reward)
    assert not output.base_nll[:, :3].any()
    assert not output.talk_nll[:, :, :3].any()


def test_packed_documents_have_no_cache(make_model, packed):
    ids, position_ids, _, _ = packed
    with pytest.raises(ValueError, match="position_ids must go up by one with use_cache or a"):
        make_model()(ids, position_ids=position_ids, use_cache=True)
    with pytest.raises(ValueError, match="position_ids must go up by one"):
        make_model().generate(ids, position_ids=position_ids, max_new_tokens=2)
