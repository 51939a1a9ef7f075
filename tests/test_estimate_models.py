"""What `quietstar estimate` predicts of every family, of adapters and of teachers, against what steps take."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from decoder_families import FAMILIES
from memory import peak_bytes
from training_steps import Products, measured_peak, model_of, run, step_of_family

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.estimate.configs import PRESETS, read_config
from quietstar.estimate.flops import step_parts
from quietstar.estimate.memory import step_memory
from quietstar.estimate.skeleton import four_bits_bytes
from quietstar.estimate.step import TrainingStep
from quietstar.training.distil import learn, teach
from quietstar.training.teacher import AverageTeacher, logprobs_of, thoughts_of

MEMORY_ERROR = 0.05
EXPERTS = {"Mixtral", "Qwen3Moe"}  # of which the layers can be followed in bfloat16 only

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")


@pytest.fixture(autouse=True)
def fastest_backend(monkeypatch):
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peak_memory(family, checkpointing):
    dtype = torch.bfloat16 if family in EXPERTS else torch.float32
    step = step_of_family(family, dtype=dtype, checkpointing=checkpointing)
    assert step_memory(step).peak == pytest.approx(measured_peak(step, model_of(step), peak_bytes), rel=MEMORY_ERROR)


RLP = {
    "learned_thought_end": True, "anchors_per_text": 1, "num_thoughts": 16, "thought_length": 24, "lookahead": 1,
    "prediction": "thought", "base_loss_weight": 0.0, "talk_loss_weight": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", [{"learned_thought_end": True}, {"gain_weight": 0.1}, RLP])
def test_peak_memory_of_objectives(fields, checkpointing):
    step = step_of_family("Qwen3", fields, dtype=torch.bfloat16, checkpointing=checkpointing)
    assert step_memory(step).peak == pytest.approx(measured_peak(step, model_of(step), peak_bytes), rel=MEMORY_ERROR)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters(family):
    step = step_of_family(family, {"gain_weight": 0.1}, dtype=torch.bfloat16)
    model = model_of(step)
    assert step.parameters == model.num_parameters()
    assert step.skeleton.whole.trained == step.parameters
    assert step.skeleton.whole.bytes == sum(x.nbytes for x in model.parameters())


@needs_peft
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen3", "Phi3"])
def test_adapters(family, dtype, checkpointing):
    step = step_of_family(family, dtype=dtype, checkpointing=checkpointing, lora_r=8, optimizer="adamw")
    model = model_of(step)
    whole = step.skeleton.whole
    assert whole.trained == sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert whole.bytes == sum(x.nbytes for x in model.parameters())
    assert step.states == 2 * whole.trained_bytes
    assert step_memory(step).peak == pytest.approx(measured_peak(step, model, peak_bytes), rel=MEMORY_ERROR)


@needs_peft
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_four_bits(dtype, checkpointing):
    step = step_of_family("Llama", dtype=dtype, checkpointing=checkpointing, lora_r=8, load_in_4bit=True)
    model = model_of(step)
    constants = sum(state_bytes(x.quant_state) for x in model.parameters() if hasattr(x, "quant_state"))
    assert step.skeleton.whole.bytes == sum(x.nbytes for x in model.parameters()) + constants
    measured = measured_peak(step, model, peak_bytes) + constants
    assert step_memory(step).peak == pytest.approx(measured, rel=MEMORY_ERROR)


def state_bytes(state) -> int:
    """Of what bitsandbytes keeps beside the 4 bits."""
    return sum(x.nbytes for x in state.as_dict().values() if isinstance(x, torch.Tensor) and x.dtype != torch.int64)


@needs_peft
def test_adapters_on_four_bits_in_a_known_model():
    """4.127 bits of all layers' matrices (QLoRA, section 3), the rest of the weights in float32."""
    config = read_config("mistral-7b")
    step = TrainingStep(config, 1, 64, lora_r=16, load_in_4bit=True)
    matrices = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    small = 3 * 4096**2 + 3 * 4096 + 2 * 4096  # mixing head and thought embeddings, of which PEFT trains a copy
    whole = step.skeleton.whole
    assert whole.trained == adapters + small
    assert whole.bytes == pytest.approx(
        matrices * 4.127 / 8 + 4 * (step.parameters - matrices + whole.trained), rel=1e-3
    )
    assert step_memory(step).peak < TrainingStep(config, 1, 64, lora_r=16).skeleton.whole.bytes


def test_bytes_of_four_bits():
    """As bitsandbytes 0.50 has them, two tables included: counted for matrices of 4096 x 1024 and 1000 x 96."""
    assert [four_bits_bytes(4096 * 1024), four_bits_bytes(1000 * 96)] == [2164800, 50612]


class LearnsFromTeacher:
    """A model with a teacher of its own, as the trainer runs them."""

    def __init__(self, step: TrainingStep, model: QuietStarForCausalLM):
        self.step, self.model, self.teacher = step, model, AverageTeacher()
        self.teacher.start(model)

    def parameters(self):
        """All weights, the teacher's too."""
        return (*self.model.parameters(), *self.teacher._weights.values())

    def __call__(self, text: torch.Tensor, labels: torch.Tensor, **options):
        config, inputs = self.step.config, {"input_ids": text}
        if self.step.distil is not None:
            lesson = self._ask(lambda teacher: teach(teacher, labels, inputs))
            return Loss(learn(self.model, labels, inputs, lesson, self.step.distil)[0])
        if config.baseline == "teacher":
            options["baseline_nll"] = self._ask(lambda teacher: teacher.base_nll(labels=labels, **inputs))
        if config.kl_weight > 0:
            inputs["labels"] = labels
            with torch.no_grad():
                thoughts = thoughts_of(self.model, inputs)
            options |= thoughts
            options["teacher_logprobs"] = self._ask(lambda teacher: logprobs_of(teacher, config, inputs, thoughts))
        return self.model(text, labels=labels, **options)

    def _ask(self, question):
        return self.teacher.ask(self.model, self.model, question)


class Loss:
    def __init__(self, loss: torch.Tensor):
        self.loss = loss


TEACHERS = [
    ({"baseline": "teacher"}, None),
    ({"kl_weight": 0.1}, None),
    ({"baseline": "teacher", "kl_weight": 0.1, "anchors_per_text": 8, "prediction": "thought"}, None),
    ({}, "kl"),
    ({}, "reward"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fields", "distil"), TEACHERS)
def test_peak_memory_with_a_teacher(fields, distil, dtype, checkpointing):
    step = step_of_family("Qwen3", fields, dtype=dtype, checkpointing=checkpointing, distil=distil)
    measured = measured_peak(step, LearnsFromTeacher(step, model_of(step)), peak_bytes)
    assert step_memory(step).peak == pytest.approx(measured, rel=MEMORY_ERROR)


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_copies_what_is_trained(dtype):
    whole, adapted = (
        step_of_family("Llama", {"baseline": "teacher"}, dtype=dtype, lora_r=lora_r) for lora_r in (None, 4)
    )
    for step in (whole, adapted):
        teacher = AverageTeacher()
        teacher.start(model_of(step))
        assert step_memory(step).peak_parts["teacher"] == sum(x.nbytes for x in teacher._weights.values())


def matrices(step: TrainingStep) -> int:
    return sum(part.flops for part in step_parts(step) if "matrices" in part.name or "mixing head" in part.name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_r", [None, pytest.param(4, marks=needs_peft)])
@pytest.mark.parametrize("family", ["Gemma2", "Olmo2", "Phi3", "Qwen2"])
def test_flops_of_layers(family, lora_r, checkpointing):
    step = step_of_family(family, lora_r=lora_r, checkpointing=checkpointing)
    with Products() as products:
        run(step, model_of(step))
    assert products.flops == matrices(step)


@pytest.mark.parametrize(("fields", "distil"), TEACHERS)
def test_flops_with_a_teacher(fields, distil):
    step = step_of_family("Qwen3", fields, distil=distil)
    with Products() as products:
        run(step, LearnsFromTeacher(step, model_of(step)))
    assert products.flops == matrices(step)


@needs_peft
def test_flops_of_a_head_that_is_not_trained(monkeypatch):
    monkeypatch.setenv("QUIETSTAR_BACKEND", "torch")  # the products of compiled kernels are not counted
    step = step_of_family("Llama", lora_r=4)
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        output = run(step, model_of(step))
    products = (event for event in profile.events() if event.name in ("aten::mm", "aten::addmm"))
    counted = sum(event.flops for event in products if any(1002 in shape for shape in event.input_shapes))
    thoughts = step.batch * step.rewarded * step.config.num_thoughts
    step = replace(step, helpful=(output.advantage > 0).sum().item() / thoughts)
    assert counted == sum(
        part.flops for part in step_parts(step) if "head:" in part.name or part.name.endswith(": head")
    )


def test_known_models():
    """Parameters as their model cards have them, and what Quiet-STaR adds."""
    known = {"mistral-7b": 7.24e9, "llama-3.1-8b": 8.03e9, "qwen3-1.7b": 1.72e9}
    for name in PRESETS:
        config = read_config(name)
        added = 3 * config.hidden_size**2
        assert TrainingStep(config, 1, 64).parameters - added == pytest.approx(known[name], rel=2e-3)


@pytest.mark.parametrize("family", ["Llama", "Gemma3:Text", "Qwen3"])
def test_folder_of_any_family(family, tmp_path, capsys):
    text = step_of_family(family).config.text_config
    text.save_pretrained(tmp_path)
    words, arguments = text.vocab_size, ["estimate", "--config", str(tmp_path), "--batch", "2", "--length", "32"]
    assert main([*arguments, "--baseline", "teacher", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    step = TrainingStep(read_config(str(tmp_path), baseline="teacher"), 2, 32)
    assert step.config.thought_token_ids == (words, words + 1)
    assert printed["model"]["parameters"] == printed["trained"]["parameters"] == step.parameters
    assert printed["trained"]["teacher"]
    assert printed["peak_memory"]["bytes"] == step_memory(step).peak
    assert "teacher: matrices" in [part["name"] for part in printed["parts"]]


@needs_peft
def test_adapters_are_arguments(capsys):
    arguments = ["estimate", "--config", "qwen3-1.7b", "--batch", "1", "--length", "64", "--device", "rtx-4090"]
    assert main([*arguments, "--lora_r", "8", "--load_in_4bit"]) == 0
    printed = capsys.readouterr().out
    step = TrainingStep(read_config("qwen3-1.7b"), 1, 64, lora_r=8, load_in_4bit=True)
    trained = step.skeleton.whole.trained / 1e6
    assert f"{trained:,.1f} M in adapters of rank 8 and small heads on weights of 4 bits" in printed
    assert f"{step_memory(step).peak / 2**30:.2f} GiB of tensors, fits" in printed


@pytest.mark.parametrize("distil", ["kl", "reward"])
def test_distillation_is_an_argument(distil, capsys):
    arguments = ["estimate", "--config", "qwen3-1.7b", "--batch", "1", "--length", "64", "--distil", distil, "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["trained"]["distil"] == distil
    assert "head: policy loss" not in [part["name"] for part in printed["parts"]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora_r": 0}, "lora_r must be an integer >= 1, got 0"),
        ({"load_in_4bit": True}, "load_in_4bit must be left out without lora_r"),
        ({"distil": "both"}, "distil must be kl or reward, got 'both'"),
        ({"distil": "kl", "gpus": 2, "sharding": "zero3"}, "sharding must not be zero3 with a teacher"),
    ],
)
def test_bad_step(options, problem):
    with pytest.raises(ValueError, match=problem):
        step_of_family("Llama", **options)


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, 2), (torch.float16, 4), (torch.float32, 4)])
def test_gradients_of_the_head_on_a_gpu(dtype, element):
    """Of bfloat16 they are in it, as there is one chunk of logits."""
    step = step_of_family("Llama", dtype=dtype, device="cuda", checkpointing=True)
    rows = step.base_rows + step.text_rows + step.talk_rows + step.policy_rows
    held = step_memory(step).peaks["forward of the head"]["head gradients kept for the backward"]
    assert held == rows * 64 * dtype.itemsize + 3 * 1002 * 64 * element


def test_heads_must_go_together(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}')
    assert main(["estimate", "--config", str(file), "--batch", "1", "--length", "64"]) == 2
    problem = "num_attention_heads must be a multiple of num_key_value_heads = 3, got 4"
    assert capsys.readouterr().err == f"quietstar estimate: {problem}\n"


def test_embeddings_that_change_with_the_length():
    """Which embeddings they are is read from the positions, of which there are none."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    long, usual = (step_of_family("Phi3", rope_parameters=x) for x in (rope, None))
    assert step_memory(long).peak == step_memory(usual).peak


@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_experts_in_float32_are_refused(family):
    with pytest.raises(ValueError, match="dtype must be bfloat16 for a mixture of experts"):
        step_of_family(family)
