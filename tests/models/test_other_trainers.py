"""Trainers that go around the thoughts are refused: stand-ins that do what TRL and Liger do, and those themselves."""

from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(1, 38, (4, 8))]


@pytest.fixture
def arguments(tmp_path):
    return {"output_dir": tmp_path, "max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


class TaggingTrainer(Trainer):
    """Tags the model it is made for, as all of TRL's do."""

    _tag_names = ["trl", "sft"]

    def __init__(self, model, **arguments):
        super().__init__(model, **arguments)
        self.model.add_model_tags(self._tag_names)


def decoder_and_head(model, input_ids, labels):
    """The loss that chunked and fused kernels compute, without the model's forward."""
    logits = model.lm_head(model.model(input_ids).last_hidden_state)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class ChunkingTrainer(Trainer):
    """Computes the loss itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        return decoder_and_head(model, inputs["input_ids"], inputs["labels"])


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_a_trainer_that_tags_is_refused_when_it_is_made(make_model, arguments, adapted):
    model = make_model()
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got a TRL trainer \(trl, sft\).*use quietstar\.QuietStarTrainer or"):
        TaggingTrainer(model, args=TrainingArguments(**arguments), train_dataset=ROWS)


@pytest.mark.parametrize("tags", ["mine", ["mine", "other"]])
def test_other_tags_are_taken(make_model, tags):
    model = make_model()
    model.add_model_tags(tags)
    assert model.model_tags == ([tags] if isinstance(tags, str) else tags)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_a_loss_around_the_model_is_refused_at_the_first_step(make_model, arguments, adapted, checkpointing):
    model = make_model()
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).get_base_model()
    settings = TrainingArguments(**arguments, gradient_checkpointing=checkpointing)
    with pytest.raises(ValueError, match=r"must be trained with thoughts, .* the decoder without the model around it"):
        ChunkingTrainer(model, args=settings, train_dataset=ROWS).train()


def test_a_replaced_forward_is_refused_at_the_first_step(make_model):
    """As Liger's kernels do it."""
    model = make_model().train()
    model.forward = lambda input_ids, labels: decoder_and_head(model, input_ids, labels)
    with pytest.raises(ValueError, match="must be trained with thoughts"):
        model(**{name: row[None] for name, row in ROWS[0].items()})


def test_the_decoder_alone_may_be_used_and_a_head_on_it_trained(make_model):
    text = ROWS[0]["input_ids"][None]
    model = make_model()
    expected = model.eval().model(text).last_hidden_state
    expected.sum().backward()  # in evaluation: whoever asks for gradients there does not train
    with torch.no_grad():
        torch.testing.assert_close(model.train().model(text).last_hidden_state, expected)
    model.model.requires_grad_(False)
    probe = torch.nn.Linear(expected.shape[-1], 1)
    probe(model.model(text).last_hidden_state).sum().backward()
    assert probe.weight.grad.any()


def test_the_ordinary_trainer_thinks(make_model, arguments):
    model = make_model()
    before = model.start_embedding.weight.detach().clone()
    Trainer(model, args=TrainingArguments(**arguments, learning_rate=1e-2), train_dataset=ROWS).train()
    assert not torch.equal(model.start_embedding.weight, before)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "RLOO", "KTO"])
def test_trainers_of_trl(make_model, arguments, name):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    model, options, others = make_model(), {"bf16": False}, {}
    row = {"prompt": "w2 w3 w4"}
    if name == "SFT":
        row = {"text": "w2 w3 w4"}
    elif name in ("DPO", "KTO"):
        row |= {"chosen": "w5", "rejected": "w6"} if name == "DPO" else {"completion": "w5", "label": True}
        others = {"ref_model": deepcopy(model)}
    else:
        options |= {"num_generations": 2, "per_device_train_batch_size": 2, "beta": 0.0}
        others = {"reward_funcs": [lambda completions, **_: [0.0] * len(completions)]}
    config = getattr(trl, f"{name}Config")(**arguments | options)
    data = {"train_dataset": datasets.Dataset.from_list([row] * 8), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="got a TRL trainer"):
        getattr(trl, f"{name}Trainer")(model=model, args=config, **data, **others)


def test_kernels_of_liger(make_model):
    liger = pytest.importorskip("liger_kernel.transformers")
    model = make_model().train()
    liger.apply_liger_kernel_to_mistral(model=model, rope=False, rms_norm=False, swiglu=False)  # those need a GPU
    with pytest.raises(ValueError, match="must be trained with thoughts"):
        model(**{name: row[None] for name, row in ROWS[0].items()})
