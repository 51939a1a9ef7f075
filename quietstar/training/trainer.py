"""The trainer: transformers' Trainer with Quiet-STaR's metrics, teacher, stages and checks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import unwrap_peft_model

from quietstar.models import QuietStarConfig, QuietStarForCausalLM, QuietStarOutput
from quietstar.models.card import write_card
from quietstar.models.documents import text_labels, token_starts
from quietstar.models.folder import write_code
from quietstar.training.card import training_table
from quietstar.training.checkpoints import last_whole, to_resume
from quietstar.training.checks import (
    NonFiniteError,
    check_arguments,
    check_processes,
    keep_trainable,
    warn_of_large_policy_steps,
)
from quietstar.training.difficulty import GainByDifficulty
from quietstar.training.distil import DISTILLATIONS, Distillation, learn, teach
from quietstar.training.kept_thoughts import KeptThoughts, RepeatedRows, RepeatedStream, repeated
from quietstar.training.metrics import Stopwatch, ThoughtMetrics
from quietstar.training.stages import SetsStage, Stage, check_stages, parse_stages, steps_of
from quietstar.training.teacher import (
    WITHOUT_TEACHER,
    AverageTeacher,
    GivenTeacher,
    logprobs_of,
    text_of,
    thoughts_of,
)
from quietstar.training.wrapped import Answer, call_inside, fields, part_here


class _Hooks(TrainerCallback):
    """Notifies the trainer when everything is ready for the first step, and when weights have changed."""

    def __init__(self, trainer: "QuietStarTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._before_training()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._repeated is not None:
            self.trainer._repeated.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._update_teacher()


class QuietStarTrainer(Trainer):
    """A ``transformers.Trainer`` for ``QuietStarForCausalLM``.

    Besides the Trainer's own values, every log has ``base_nll``, ``talk_nll_0`` … ``talk_nll_{M−1}``, ``reward``,
    ``mixing_weight``, ``policy_loss``, ``tokens_per_second`` and, with a gain head, ``gain_loss`` (the squared error of
    its predictions in nats²), all averaged over the steps since the last log. Evaluations have ``eval_base_nll`` and so
    on. Only text tokens with a label are counted. Time spent on evaluating and saving does not count as training time.
    Evaluations sample the same thoughts every time and restore the random number generators, so that they are
    comparable and do not change the course of training.

    Collapse of thoughts shows in ``thought_entropy`` (mean entropy in nats of the distributions of thought tokens at
    ``thought_temperature``; exact for up to 64 evenly spread tokens per pass), ``distinct_thoughts`` (the number of
    different thoughts in a forward pass as a share of all: 1/n if all n are equal), and ``advantage_mean`` and
    ``advantage_std`` (over all advantages, as used in the policy term, since the last log).

    Evaluations also report the gain of thoughts, base nll minus nll after a thought, on the hardest and the easiest
    tenth of tokens: ``eval_gain_hard`` and ``eval_gain_easy``. The tenths are chosen by the base prediction before the
    first step, in a short pass over ``eval_dataset``, and kept for the run and in its checkpoints. Text added later is
    rated by the very prediction that thoughts are compared with, which biases the gains in favour of thoughts. Neither
    value is reported if only chosen anchors think.

    The loss of an accumulated batch is the mean of the losses of its micro-batches, which for windows of equal length
    is the loss of the whole batch.

    A loss that is NaN or infinite raises ``NonFiniteError``. On a CPU this happens before the step is taken; elsewhere,
    where reading the loss would make every step wait for the device, at the next log, checkpoint or evaluation. Weights
    that are not finite are never saved.

    Saved folders have a model card with facts about the training, which names the text by ``data_source``.

    Training warns if ``policy_weight`` · ``learning_rate`` is more than ten times the paper's 1.

    If the model's configuration has ``baseline="teacher"`` or a ``kl_weight``, a teacher is kept besides the model: a
    moving average of its trained weights, or the initial weights if ``teacher_decay`` is 1 (docs/teacher.md). With
    ``policy_updates``, every batch is repeated that many times with the same thoughts.

    In addition to the arguments of ``Trainer`` there are these keyword arguments:

    - ``teacher``: another model, which is frozen and replaces that teacher;
    - ``stages``: thought length, lookahead and steps of successive stages, such as ``"16-8:50,8-4:50"``;
    - ``distil``: ``"kl"`` or ``"reward"``: train the prediction without thoughts on the teacher's prediction after
      thoughts (``quietstar.training.distil.learn``). The teacher is the initial model, or the one given. By default the
      saved model does not think in ``generate``.

    ``compute_metrics`` receives, and ``predict`` returns, the mixed logits [texts, L, V] after the first thought at
    every position; ``preprocess_logits_for_metrics`` can reduce them.

    Raises:
        TypeError: the model is not a ``QuietStarForCausalLM``.
        ValueError: a custom loss or label smoothing is given (the objective is the model's); Liger kernels are enabled
            (they bypass its thoughts); there are several GPUs in one process; batches have no labels; the checkpoint to
            resume from is incomplete; a CPU can no longer train 4-bit weights; a teacher is given but not used, or
            DeepSpeed ZeRO-3 shards its weights; stages do not fit the model or ``max_steps``.
    """

    data_source: str | Sequence[str] | None = None

    def __init__(
        self, *args, teacher: QuietStarForCausalLM | None = None, stages: str | Sequence[Stage] | None = None,
        distil: Distillation | None = None, **kwargs,
    ):  # fmt: skip
        arguments = signature(Trainer).bind(*args, **kwargs).arguments
        check_arguments(**arguments)
        if distil is not None and distil not in DISTILLATIONS:
            raise ValueError(f"distil must be None or {' or '.join(map(repr, DISTILLATIONS))}, got {distil!r}")
        if distil is not None and stages is not None:
            raise ValueError(f"stages must be None with distil {distil!r}, which trains no thoughts")
        self.distil, self.stages = distil, None if stages is None else parse_stages(stages)
        if self.stages is not None and arguments.get("args") is not None:
            arguments["args"].max_steps = steps_of(self.stages, arguments["args"].max_steps)
        super().__init__(*args, **kwargs)
        if not isinstance(base := self._plain_model(), QuietStarForCausalLM):
            raise TypeError(f"model must be a QuietStarForCausalLM, adapted or not, got {type(base).__name__}")
        check_processes(self.args)
        keep_trainable(base)
        self._training_metrics, self._evaluation_metrics = ThoughtMetrics(), ThoughtMetrics()
        self._gains = GainByDifficulty()
        self._teacher = AverageTeacher() if teacher is None else GivenTeacher(teacher, base.config, self.args.device)
        if teacher is not None and not self._has_teacher():
            raise ValueError(
                "teacher must be None without baseline 'teacher', a kl_weight or distil, which would ask it"
            )
        self._kept, self._resumed_from = KeptThoughts(), None
        self._repeated: RepeatedRows | None = None
        if self.stages is not None:
            check_stages(self.stages, base.config)
            self.args.max_steps = steps_of(self.stages, self.args.max_steps)
            self.add_callback(SetsStage(self.stages, base.config))
        if distil is not None:
            base.config.think = "never"
        self.add_callback(_Hooks(self))
        self._stopwatch = Stopwatch()
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self.args.device)  # 0: none yet
        self._check_every_step = self.args.device.type == "cpu"  # elsewhere this would wait for the device

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint:  # True means the newest complete one
            wanted = "last" if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = to_resume(wanted, self.args.output_dir, self.args.save_only_model)
            self._gains.load(resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint or None
        self._warn_of_large_policy_steps()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        self._stopwatch.start()
        loss = super().training_step(*args, **kwargs)
        first_bad = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step = torch.where(first_bad, self.state.global_step + 1, self._bad_step)
        if self._check_every_step:
            self._check_loss()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if "labels" not in inputs:
            raise ValueError(f"labels must be in every batch, got {', '.join(inputs)}")
        if self.distil is not None and model.training:
            return self._distil(model, inputs)
        step, updates = self.state.global_step, self._plain_model().config.policy_updates
        keeps = model.training and updates > 1
        again = self._kept.recall(step, updates, inputs) if keeps else None
        inputs = {**inputs, **(self._compared_with(model, inputs) if again is None else again)}
        inputs |= {"output_thought_logprobs": keeps and again is None, "output_thought_entropy": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if keeps and again is None:
            self._kept.keep(inputs, outputs)
        metrics = self._training_metrics if model.training else self._evaluation_metrics
        metrics.add(outputs, inputs["labels"], inputs.get("attention_mask"), inputs.get("position_ids"))
        if not model.training:
            self._add_gains(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        loss = labels = thoughts = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only or "labels" in inputs:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach().mean()
                if outputs.anchors is None:
                    thoughts = outputs.thought_tokens[:, :1]
            if prediction_loss_only:
                return loss, None, None
            inputs = {name: value for name, value in inputs.items() if name != "anchors"}
            labels = inputs.pop("labels", None)
            logits = model(**inputs, thought_tokens=thoughts, use_cache=False).logits
        return loss, logits.detach(), labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_loss()
        if "loss" in logs:  # logs of steps, not of an evaluation or the summary at the end
            means, tokens = self._means(self._training_metrics)
            logs |= means | {"tokens_per_second": tokens / self._stopwatch.lap()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._stopwatch.pause()
        with self._own_random_numbers():
            torch.manual_seed(self.args.seed)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._gains.means()
        if self._evaluation_metrics.any():
            means |= self._means(self._evaluation_metrics)[0]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._stopwatch.pause()
        self._check_loss()
        self._check_weights()
        with nullcontext() if _internal_call else self._whole_weights():
            super().save_model(output_dir, _internal_call)
        if _internal_call:  # a checkpoint
            self._save_what_goes_on(output_dir)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            Path(folder).mkdir(parents=True, exist_ok=True)  # sharded weights come later
            write_card(folder, self._plain_model(), training_table(self))
            if _internal_call:  # a checkpoint
                self._gains.save(folder)
                if self.args.push_to_hub:  # from output_dir the Trainer then copies weights and configuration
                    write_code(self.args.output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        *_,
        **__,
    ) -> None:
        """Write the model card of ``output_dir`` with present facts, unless somebody wrote or changed it."""
        if self.is_world_process_zero():
            write_card(
                self.args.output_dir, self._plain_model(), training_table(self), language=language, license=license,
                tags=tags, model_name=model_name, base_model=finetuned_from,
            )  # fmt: skip

    def _plain_model(self) -> QuietStarForCausalLM:
        """Return the model without the wrappers of accelerate and adapters."""
        return unwrap_peft_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _check_weights(self) -> None:
        """Check that weights are finite; all processes agree, whichever holds the part that is not finite."""
        parts = {name: part_here(parameter) for name, parameter in self.model.named_parameters()}
        bad = torch.stack([~part.isfinite().all() for part in parts.values()]).to(self.args.device, torch.int32)
        for name, count in zip(parts, self.accelerator.reduce(bad, reduction="sum").tolist(), strict=True):
            if count:
                self._refuse(f"{name} is not finite after step {self.state.global_step}")

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Make FSDP save unsharded weights, as reloading the model needs, even if it is set to save shards."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None:
            yield
            return
        usual = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(usual.name)

    def get_train_dataloader(self) -> DataLoader:
        """Like ``Trainer``'s; with ``policy_updates``, the rows of each step are repeated that many times."""
        updates, dataset, args = self._plain_model().config.policy_updates, self.train_dataset, self.args
        if updates == 1 or self.distil is not None or not isinstance(dataset, IterableDataset):
            return super().get_train_dataloader()
        if args.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers must be at most 1 with policy_updates {updates} on a stream, got "
                f"{args.dataloader_num_workers}: each reads rows of its own"
            )
        self.train_dataset = RepeatedStream(dataset, self._rows_per_step(), updates)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(dataset)
        updates = self._plain_model().config.policy_updates
        if updates == 1 or self.distil is not None or sampler is None:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._repeated = repeated(sampler, dataset, self._rows_per_step(), updates, seed)
        return self._repeated

    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _has_teacher(self) -> bool:
        config = self._plain_model().config
        return config.baseline == "teacher" or config.kl_weight > 0 or self.distil is not None

    def _before_training(self) -> None:
        if self._has_teacher():
            self._teacher.start(self.model, self._resumed_from)
        updates = self._plain_model().config.policy_updates
        if self._resumed_from and self.distil is None and self.state.global_step % updates:
            self._kept.load(self._resumed_from, self.args.process_index, self.args.world_size)
        self._rate_held_out_text()

    def _update_teacher(self) -> None:
        self._teacher.update(self.model, 1 if self.distil else self._plain_model().config.teacher_decay)

    def _save_what_goes_on(self, folder: str) -> None:
        """Save what a checkpoint needs besides the model; all processes must call this."""
        self._teacher.save(self.model, folder, self.args.should_save)
        if self.distil is None and self.state.global_step % self._plain_model().config.policy_updates:
            self._kept.save(folder, self.args.process_index, self.args.world_size)

    def _ask_teacher(self, model: Module, question: Callable[[QuietStarForCausalLM], Answer]) -> Answer:
        with self.accelerator.autocast():
            return self._teacher.ask(model, self._plain_model(), question)

    def _compared_with(self, model: Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the teacher's inputs to the objective, and the thoughts if the teacher needs them."""
        plain, labels, given = self._plain_model(), inputs["labels"], {}
        config, text = plain.config, text_of(inputs)
        if config.baseline == "teacher":
            given["baseline_nll"] = self._ask_teacher(model, lambda teacher: teacher.base_nll(labels=labels, **text))
        if config.kl_weight > 0:
            with self.accelerator.autocast(), torch.no_grad():
                thoughts = call_inside(model, plain, lambda: thoughts_of(plain, inputs))
            given |= thoughts
            given["teacher_logprobs"] = self._ask_teacher(
                model, lambda teacher: logprobs_of(teacher, config, inputs, thoughts)
            )
        return given

    def _distil(self, model: Module, inputs: dict[str, Tensor]) -> Tensor:
        plain, labels, text = self._plain_model(), inputs["labels"], text_of(inputs)
        lesson = self._ask_teacher(model, lambda teacher: teach(teacher, labels, text))
        with self.accelerator.autocast():
            loss, nll = call_inside(model, plain, lambda: learn(plain, labels, text, lesson, self.distil))
        self._training_metrics.add_plain(
            nll, lesson.nll, labels, inputs.get("attention_mask"), inputs.get("position_ids")
        )
        return loss

    @torch.no_grad()
    def _rate_held_out_text(self) -> None:
        """Rate all held-out text by base predictions, with empty thoughts, the cheapest that the objective computes."""
        if self.eval_dataset is None or not self._thinks_everywhere():
            return
        model = self.model_wrapped
        model.eval()
        with self._own_random_numbers(), _least_thoughts(self.model.config):
            for name in self.eval_dataset if isinstance(self.eval_dataset, dict) else [None]:
                for inputs in self.get_eval_dataloader(name):
                    if "labels" not in inputs:
                        continue  # evaluation will fail on it, training need not
                    batch, length = inputs["labels"].shape
                    no_thoughts = inputs["labels"].new_empty(batch, 1, length, 0)
                    inputs = self._prepare_inputs({**inputs, "thought_tokens": no_thoughts})
                    with self.compute_loss_context_manager():
                        self._add_gains(inputs, model(**inputs))
                self._gains.rate()
        model.train()

    def _thinks_everywhere(self) -> bool:
        config = self._plain_model().config
        return config.anchors_per_text is None and config.anchor_choice != "given"

    def _own_random_numbers(self) -> AbstractContextManager:
        """Return a context manager that restores the state of the random number generators at its end."""
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    def _add_gains(self, inputs: dict[str, Tensor], outputs: QuietStarOutput) -> None:
        """Add the gains on held-out text from all processes, unless only some positions think."""
        if outputs.anchors is not None:
            return
        mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        labels = text_labels(inputs["labels"], mask, token_starts(mask, position_ids, inputs["labels"].shape))
        gain = outputs.base_nll - outputs.talk_nll[..., 0].mean(dim=1)
        columns = self.accelerator.pad_across_processes((labels[:, 1:], outputs.base_nll, gain), dim=1, pad_index=-100)
        labels, base_nll, gain = self.accelerator.gather_for_metrics(columns)
        self._gains.add(base_nll, gain, labels)

    def _warn_of_large_policy_steps(self) -> None:
        rate = self.args.learning_rate
        if self.optimizer is not None:  # a scheduler may already have lowered its present rate
            rate = max(group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups)
        if self.is_world_process_zero():
            warn_of_large_policy_steps(self.model.config, rate)

    def _means(self, metrics: ThoughtMetrics) -> tuple[dict[str, float], int]:
        return metrics.means(self.accelerator.reduce(metrics.totals(), reduction="sum"))

    def _check_loss(self) -> None:
        if step := int(self._bad_step):
            self._refuse(f"the loss of step {step} is not finite")

    def _refuse(self, problem: str) -> None:
        checkpoint = last_whole(self.args.output_dir, self.args.save_only_model)
        raise NonFiniteError(
            f"{problem}; " + (f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint yet")
        )


def _least_thoughts(config: QuietStarConfig) -> AbstractContextManager:
    """Set the configuration to one empty thought per position that predicts one token."""
    least = {"thought_length": 0, "num_thoughts": 1, "lookahead": 1, "learned_thought_end": False}
    return fields(config, **least, **WITHOUT_TEACHER)
