"""A training step never holds logits of more than one chunk of rows."""

import torch
from memory import largest_allocation

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.ops import _rows


def test_no_tensor_of_all_rows_and_the_vocabulary(monkeypatch):
    vocabulary, batch, length = 5000, 2, 40
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cpu", 8 * vocabulary * 4)
    monkeypatch.setattr(_rows, "_workspace", _rows._Workspace())  # so that the chunk is seen as well
    config = QuietStarConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, thought_length=2, lookahead=2, num_thoughts=2, start_thought_token_id=vocabulary - 2,
        end_thought_token_id=vocabulary - 1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = QuietStarForCausalLM(config)
    text = torch.randint(vocabulary - 2, (batch, length))
    largest = largest_allocation(lambda: model(text, labels=text).loss.backward())
    assert largest >= 8 * vocabulary * 4 * 0.99, "the measurement misses the chunk"
    assert largest <= 16 * vocabulary * 4 * 1.01  # a chunk, or the gradient of the head: the base text has 78 rows
