"""``quietstar train`` on every family."""

import pytest
from decoder_families import FAMILIES, VOCABULARY, decoder_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.cli import main

SIZES = (
    "--block_size 10 --held_out_fraction 0.2 --per_device_train_batch_size 2 --max_steps 1 --learning_rate 1e-2 "
    "--eval_strategy no --report_to none --use_cpu --disable_tqdm true --dataloader_pin_memory false --lookahead 2 "
    "--thought_length 1 --num_thoughts 1 --warmup_steps 0"
)


@pytest.mark.parametrize("family", [family for family in FAMILIES if ":" not in family or family == "Gemma3:Text"])
def test_every_family_learns(family, tmp_path):
    base = decoder_of(family)
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"---": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="---"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="---").save_pretrained(tmp_path / "words")
    documents = (" ".join(f"w{(i * j) % 60}" for j in range(30)) for i in range(1, 20))
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    paths = {"model": "base", "tokenizer": "words", "data": "text.txt", "output_dir": "out"}
    flags = [f"--{flag}={tmp_path / name}" for flag, name in paths.items()]
    assert main(["train", *flags, *SIZES.split()]) == 0
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model) is type(base.model)
    before, after = base.model.embed_tokens.weight, model.model.embed_tokens.weight
    assert (before != after[: len(before)]).any()
