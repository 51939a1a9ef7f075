"""The flags of `quietstar train`: model, data, and all of transformers' TrainingArguments.

Defaults are the paper's (arXiv 2403.09629, appendix A, and the authors' training script).
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from textwrap import wrap
from typing import Literal

from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from quietstar._command_line import SuggestingParser, attach_texts
from quietstar._numbers import SEED, Interval, check_numbers
from quietstar.models import QuietStarConfig
from quietstar.models.configuration import INTERVALS, OPTIONAL_INTERVALS
from quietstar.training.stages import parse_stages, steps_of

# The flags of TrainingArguments (which has more than a hundred) that --help shows. Not every version has all of them.
COMMON_TRAINING_FLAGS = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16",
    "activation_checkpointing", "logging_steps", "report_to", "eval_strategy", "eval_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir", "seed", "use_cpu",
)  # fmt: skip

# Flags that --help leaves out: they select methods other than Quiet-STaR, usually in combination (docs/teacher.md).
METHOD_FLAGS = frozenset(
    (
        "talk_loss_weight", "prediction", "baseline", "teacher_decay", "reward", "advantage", "advantage_clamp",
        "normalize_advantage", "clip_ratio", "policy_updates", "entropy_weight", "kl_weight", "anchor_choice",
        "learned_thought_end", "teacher", "anchors_per_text", "gain_weight",
    )
)  # fmt: skip


# Valid ranges of the flags. TrainingArguments itself checks few of them.
_COUNT, _NOT_NEGATIVE, _POSITIVE = Interval(int, "[1, inf)"), Interval(float, "[0, inf)"), Interval(float, "(0, inf)")
_DATA_INTERVALS = {
    "block_size": _COUNT,
    "max_held_out_windows": _COUNT,
    "workers": _COUNT,
    "held_out_fraction": Interval(float, "[0, 1)"),
}
_LORA_INTERVALS = {"lora_r": _COUNT, "lora_alpha": _POSITIVE, "lora_dropout": Interval(float, "[0, 1)")}
_TRAINING_INTERVALS = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps",
            "ddp_bucket_cap_mb", "ddp_timeout",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "eval_delay",
            "neftune_noise_alpha",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Interval(float, "[0, 1)")),
    "warmup_ratio": Interval(float, "[0, 1]"),
    "dataloader_num_workers": Interval(int, "[0, inf)"),
    "seed": SEED,
    "data_seed": SEED,
}  # fmt: skip


def _thoughts(help_text: str):
    return field(default=None, metadata={"help": f"{help_text} (default: as saved, or the paper's)"})


@dataclass
class ModelArguments:
    """The model and how it thinks."""

    _argument_group_name = "model"

    model: str = field(metadata={"help": "folder or hub name of a decoder or a Quiet-STaR checkpoint"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "tokenizer, folder or hub name (default: the model's)"}
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "dtype of the weights: float32 or bfloat16 (default: the checkpoint's)"}
    )
    thought_length: int | None = _thoughts("sampled tokens in a thought")
    lookahead: int | None = _thoughts("real tokens predicted after a thought")
    num_thoughts: int | None = _thoughts("independent thoughts per position")
    thought_temperature: float | None = _thoughts("sampling temperature of thoughts")
    policy_temperature: float | None = _thoughts("temperature of log p in the policy term")
    policy_weight: float | None = _thoughts("weight of the policy term")
    gain_weight: float | None = _thoughts("weight of the loss of a head that learns where to think; 0: no head")
    base_loss_weight: float | None = _thoughts("weight of the loss without a thought")
    talk_loss_weight: float | None = _thoughts("weight of the loss after a thought; if never set, 1 - base_loss_weight")
    prediction: Literal["mixed", "thought"] | None = _thoughts(
        "prediction used after a thought: mixed, or the thought's"
    )
    baseline: Literal["self", "teacher", "none"] | None = _thoughts(
        "what thoughts are compared with: the model's prediction without a thought, a teacher's, or none"
    )
    teacher_decay: float | None = _thoughts("decay of the teacher, a moving average of the model; 1 freezes it")
    reward: Literal["log_likelihood", "likelihood", "log_mean"] | None = _thoughts("quantity that thoughts increase")
    advantage: Literal["mean", "leave_one_out", "none"] | None = _thoughts("what is subtracted from rewards")
    advantage_clamp: bool | None = _thoughts("true or false: whether negative advantages count as 0")
    normalize_advantage: bool | None = _thoughts("true or false: divide advantages by their standard deviation")
    clip_ratio: float | None = _thoughts("clipping of PPO, for several updates on the same thoughts")
    policy_updates: int | None = _thoughts("number of updates on the same thoughts")
    entropy_weight: float | None = _thoughts("bonus per nat of entropy of thought tokens")
    kl_weight: float | None = _thoughts("cost per nat by which thoughts are likelier than under the teacher")
    anchors_per_text: int | None = _thoughts("positions of a window that think in training; if never set, all")
    anchor_choice: Literal["random", "entropy"] | None = _thoughts("which positions think")
    learned_thought_end: bool | None = _thoughts("true or false: whether thoughts may end early")
    embedding_scale: float | None = field(
        default=None,
        metadata={"help": "factor on the two thought embeddings, which multiplies their step size; "
                  "only when starting from an ordinary checkpoint (default: the paper's 100)"},
    )  # fmt: skip
    initial_text: str | None = field(
        default=None,
        metadata={"help": "text whose embedding initialises the two thought embeddings, best one after which the model "
                  "writes something useful; only when starting from an ordinary checkpoint (default: the paper's ---)"},
    )  # fmt: skip

    teacher: str | None = field(
        default=None,
        metadata={"help": "folder or hub name of another Quiet-STaR checkpoint, the frozen teacher for baseline "
                  "teacher, kl_weight or distil (default: the model itself)"},
    )  # fmt: skip
    distil: Literal["kl", "reward"] | None = field(
        default=None,
        metadata={"help": "learn to predict without thoughts: kl or reward (docs/teacher.md)",
                  "nargs": "?", "const": "kl"},
    )  # fmt: skip
    stages: str | None = field(
        default=None,
        metadata={"help": "successive stages, thought_length-lookahead:steps, as in 16-8:50,8-4:50"},
    )  # fmt: skip

    lora_r: int | None = field(
        default=None, metadata={"help": "train LoRA adapters of this rank instead of the weights (docs/peft.md)"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "adapters are scaled by alpha / r (default: 2 r)"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout before adapters (default: 0)"})
    load_in_4bit: bool = field(default=False, metadata={"help": "train adapters on 4-bit weights (QLoRA)"})

    def __post_init__(self):
        check_numbers(INTERVALS | OPTIONAL_INTERVALS | _LORA_INTERVALS, vars(self))
        if self.stages is not None:
            parse_stages(self.stages)
            for name in ("thought_length", "lookahead"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name} must be left out with stages, which set it, got {value}")
            if self.distil is not None:
                raise ValueError(f"stages must be left out with distil, which trains no thoughts, got {self.stages}")
        for name in ("lora_alpha", "lora_dropout", "load_in_4bit"):
            if self.lora_r is None and (value := getattr(self, name)) not in (None, False):
                raise ValueError(f"{name} must be left out without lora_r, got {value}")

    def config_fields(self) -> dict[str, int | float | str]:
        """Return the fields of ``QuietStarConfig`` that were given."""
        names = QuietStarConfig.__dataclass_fields__.keys() & vars(self).keys() - {"dtype"}
        given = {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}
        if self.stages is not None:  # starts with the first stage; the trainer sets the others
            first = parse_stages(self.stages)[0]
            given |= {"thought_length": first.thought_length, "lookahead": first.lookahead}
        return given


@dataclass
class DataArguments:
    """The text and how it is cut into windows."""

    _argument_group_name = "data"

    data: list[str] = field(
        metadata={"help": "one or more of: a .txt, .jsonl, .json, .parquet or .csv file, compressed or not, a pattern "
                  "or folder of such files, or the name of a dataset. Rows are documents; in .txt files, paragraphs. "
                  "With FILE:WEIGHT, windows are drawn from the sources by weight"}
    )  # fmt: skip
    data_config: str | None = field(default=None, metadata={"help": "configuration of a dataset"})
    data_split: str = field(default="train", metadata={"help": "split of a dataset, such as train[:1000]"})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "text to evaluate on, given like data (default: documents held out of data)"}
    )
    eval_data_split: str = field(default="train", metadata={"help": "split of eval_data if it is a dataset"})
    text_column: str | None = field(
        default=None,
        metadata={"help": "column with text, chat messages or token ids (default: text, messages or input_ids)"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read text while training, never all at once; set max_steps"}
    )
    block_size: int = field(
        default=256,
        metadata={"help": "tokens per window; documents are packed without padding, the remainder is dropped"},
    )
    separate_documents: bool = field(
        default=False, metadata={"help": "documents in a window do not see each other (position_ids)"}
    )
    held_out_fraction: float = field(
        default=0.05, metadata={"help": "share of documents held out to evaluate on; 0: none"}
    )
    max_held_out_windows: int = field(default=256, metadata={"help": "evaluate on at most this many windows"})
    workers: int | None = field(default=None, metadata={"help": "processes that tokenise (default: only this one)"})

    def __post_init__(self):
        check_numbers(_DATA_INTERVALS, vars(self))
        if self.streaming and self.workers is not None:
            raise ValueError(
                f"workers must be left out with streaming, got {self.workers}; dataloader_num_workers read a stream"
            )


@dataclass
class PaperTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's values as defaults.

    The authors' learning rate falls linearly over 100 000 steps, of which they ran some hundreds; here it is constant.
    """

    _argument_group_name = "training"

    output_dir: str | None = field(default="quietstar-trained", metadata={"help": "folder for model and checkpoints"})
    num_train_epochs: float = field(default=1, metadata={"help": "number of passes over the text"})
    max_steps: int = field(default=-1, metadata={"help": "stop after this many steps; -1: after num_train_epochs"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "number of batches per step"})
    save_total_limit: int | None = field(
        default=None, metadata={"help": "keep at most this many checkpoints, the newest (and the best, if requested)"}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "learning rate of AdamW"})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup", metadata={"help": "schedule of the learning rate: linear, cosine, ..."}
    )
    warmup_steps: float = field(default=20, metadata={"help": "steps during which the learning rate rises linearly"})
    weight_decay: float = field(default=0.001, metadata={"help": "weight decay of AdamW, except for norms and biases"})
    logging_steps: float = field(default=10, metadata={"help": "log every N steps"})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "leave losses that are not finite out of the log; training stops at them in any case"},
    )
    eval_strategy: IntervalStrategy | str = field(
        default="steps", metadata={"help": "when to evaluate on held-out text: no, steps or epoch"}
    )
    eval_steps: float | None = field(default=100, metadata={"help": "evaluate every N steps"})
    save_steps: float = field(default=100, metadata={"help": "save a checkpoint every N steps"})
    report_to: None | str | list[str] = field(  # noqa: RUF036, HfArgumentParser takes the second of the three
        default="tensorboard", metadata={"help": "where logs are sent besides the terminal, or none"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint of this run to resume from, or last for the newest complete one"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start from scratch and remove the checkpoints in output_dir"}
    )

    def __post_init__(self):
        check_numbers(_TRAINING_INTERVALS, vars(self))
        if self.max_steps != -1:  # -1 means by epochs
            _COUNT.check("max_steps", self.max_steps)
        super().__post_init__()


class TrainParser(SuggestingParser, HfArgumentParser):
    """Parser of the three groups. ``--help`` shows the flags that most runs need, ``--help_all`` every flag."""

    def __init__(self) -> None:
        super().__init__(
            [ModelArguments, DataArguments, PaperTrainingArguments],
            prog="quietstar train",
            usage="quietstar train --model MODEL --data DATA [--output_dir DIR] [FLAGS ...]",
            description="Train a language model to think before every token.",
            allow_abbrev=False,
        )
        self.add_argument("--help_all", action=_HelpAll, help="list every flag and exit")

    def parse(self, argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PaperTrainingArguments]:
        """Parse ``argv``; invalid usage exits with code 2, as in argparse."""
        try:
            arguments = attach_texts(argv, "--initial_text", "--initial-text")
            *groups, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except (
            TypeError,
            ValueError,
            ImportError,
        ) as error:  # a value that a dataclass refuses, a logger that is not installed
            self.error(str(error))
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        model, _, training = groups
        if model.stages is not None:
            try:
                training.max_steps = steps_of(parse_stages(model.stages), training.max_steps)
            except ValueError as error:
                self.error(str(error))
        return tuple(groups)

    def format_help(self) -> str:
        lines = [self.format_usage().rstrip(), "", self.description]
        for group in self.dataclass_types:
            lines += ["", f"{group._argument_group_name}:"]
            shown = [entry for entry in fields(group) if entry.name not in METHOD_FLAGS]
            if group is PaperTrainingArguments:
                by_name = {entry.name: entry for entry in shown}
                shown = [by_name[name] for name in COMMON_TRAINING_FLAGS if name in by_name]
            for entry in shown:
                lines += _flag_lines(entry.name, entry.metadata.get("help", ""), entry.default)
        lines += [
            "",
            "Other objectives and every other flag of transformers' TrainingArguments: --help_all lists them.",
        ]
        lines += ["On a CPU that others use too, OMP_NUM_THREADS=1 in the environment makes steps faster."]
        return "\n".join(lines) + "\n"

    def format_full_help(self) -> str:
        """Return argparse's help, with all flags."""
        return super().format_help()


class _HelpAll(argparse.Action):
    """Prints every flag and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_full_help())
        parser.exit()


def _flag_lines(name: str, help_text: str, default: object) -> list[str]:
    """Format a flag and its help text in two columns."""
    if default is MISSING:
        help_text = f"{help_text} (required)"
    elif default is not None and default is not False:
        help_text = f"{help_text} (default: {getattr(default, 'value', default)})"
    first, *rest = wrap(" ".join(help_text.split()).replace("%%", "%"), 76) or [""]
    return [f"  --{name:<28} {first}", *(f"{'':<33}{line}" for line in rest)]
