"""Configuration of a Quiet-STaR model: how it thinks and what it is trained on, beside that of its decoder."""

import copy
from os import PathLike
from typing import Any, Literal

from transformers import AutoConfig, MistralConfig, PreTrainedConfig

from quietstar._numbers import Interval, check_numbers
from quietstar.models import folder
from quietstar.models.defaults import CHECKS, Think, check_defaults

# Which values the fields may have; the two ids are looked at in `thought_token_ids`, against the vocabulary.
INTERVALS = {
    "thought_length": Interval(int, "[0, inf)"),
    "lookahead": Interval(int, "[1, inf)"),
    "num_thoughts": Interval(int, "[1, inf)"),
    "thought_temperature": Interval(float, "[0, inf)"),
    "policy_temperature": Interval(float, "(0, inf)"),
    "policy_weight": Interval(float, "[0, inf)"),
    "base_loss_weight": Interval(float, "[0, 1]"),
    "teacher_decay": Interval(float, "[0, 1]"),
    "policy_updates": Interval(int, "[1, inf)"),
    "entropy_weight": Interval(float, "[0, inf)"),
    "kl_weight": Interval(float, "[0, inf)"),
    "gain_weight": Interval(float, "[0, inf)"),
    "embedding_scale": Interval(float, "(0, inf)"),
}
# Of those that may be None too.
OPTIONAL_INTERVALS = {
    "talk_loss_weight": Interval(float, "[0, inf)"),
    "clip_ratio": Interval(float, "(0, inf)"),
    "anchors_per_text": Interval(int, "[1, inf)"),
}
CHOICES = {
    "prediction": ("mixed", "thought"),
    "baseline": ("self", "teacher", "none"),
    "reward": ("log_likelihood", "likelihood", "log_mean"),
    "advantage": ("mean", "leave_one_out", "none"),
    "anchor_choice": ("random", "entropy", "given"),
}
SWITCHES = ("advantage_clamp", "normalize_advantage", "learned_thought_end")

# What a Mistral's configuration may say, in the names of today and of older files.
_OF_MISTRAL = MistralConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() | {
    "rope_scaling", "rope_theta",
}  # fmt: skip


class QuietStarConfig(PreTrainedConfig):
    """The hyper-parameters of Quiet-STaR (arXiv 2403.09629), beside the configuration of the decoder that thinks.

    The defaults are those of the authors' training run. Fields of the decoder (``hidden_size``, ``sliding_window`` and
    so on) can be read and set here too.

    Attributes:
        text_config: of the decoder, or its dictionary with a ``model_type``. Default: a
            ``MistralConfig`` of the other keyword arguments, as in files of version 0.1.
        thought_length: k, sampled tokens in a thought, start and end token not counted; 0 is legal (no policy term).
        lookahead: M ≥ 1, real tokens predicted after a thought during training.
        num_thoughts: N ≥ 1, independent thoughts per position during training; inference uses one.
        thought_temperature: temperature at which thoughts are sampled; 0 is greedy.
        policy_temperature: temperature of the log-probabilities in the policy term.
        policy_weight: factor of the policy term in the loss.
        base_loss_weight: factor of the loss of the prediction without a thought.
        talk_loss_weight: factor of that of the prediction after a thought; default what is left of 1.
        prediction: which prediction after a thought is trained, rewarded and used: ``"mixed"``, with the one without by
            a learned weight, or ``"thought"``, alone: the model then has no mixing head.
        baseline: what a thought is rewarded against: the prediction without one of the model (``"self"``) or of a
            teacher, or nothing (``"none"``).
        teacher_decay: of the teacher, which the trainer keeps as a moving average of the model; 1 is frozen.
        reward: what is to grow: the log-likelihood of the text after a thought, its ``"likelihood"`` (VeriFree,
            arXiv 2505.21493), or ``"log_mean"``, the logarithm of its mean over the N thoughts of a position (JEPO,
            arXiv 2503.19618).
        advantage: the reward minus its mean over the N thoughts, minus the mean of the others (``"leave_one_out"``), or
            as it is (``"none"``).
        advantage_clamp: negative advantages count as 0.
        normalize_advantage: divide advantages by their standard deviation over the rewarded thoughts of a pass.
        clip_ratio: ε of PPO's clipping (arXiv 1707.06347), for several updates on the same thoughts.
        policy_updates: so many.
        entropy_weight: bonus for the entropy of what a thought token is drawn from, in nats.
        kl_weight: what each nat costs by which a thought is likelier to the model than to the teacher.
        gain_weight: factor in the loss of the squared error of a gain head, which predicts from the text alone what a
            thought will gain for the next token; 0: the model has no such head. Nothing else learns from this error,
            but where gradients are clipped by their common norm, its own count.
        anchors_per_text: how many positions of a text think in training; default all.
        anchor_choice: which: ``"random"`` ones, those where the prediction without a thought has the most
            ``"entropy"``, or those ``"given"`` with the batch as ``anchors``.
        learned_thought_end: a thought may end before it has k tokens: from its second token on the end token may be
            drawn.
        embedding_scale: the two thought embeddings are multiplied by this on use, which multiplies their step size.
        start_thought_token_id: vocabulary id of the token in front of a thought. The model never produces it nor the
            next: neither inside a thought nor in generated text.
        end_thought_token_id: vocabulary id of the token behind a thought.
        think: where ``generate`` thinks, where neither the call nor its ``generation_config`` says.
        gain_threshold: nats that a thought must be expected to gain with ``think="learned"``, likewise.
        draft_length: of drafts in ``generate``, likewise.
        base_model_name_or_path: the checkpoint that Quiet-STaR started from, if it is known.
        base_vocab_size: how many tokens that checkpoint had, if it is known.
    """

    model_type = "quietstar"
    sub_configs = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    thought_length: int = 9
    lookahead: int = 4
    num_thoughts: int = 2
    thought_temperature: float = 1.0
    policy_temperature: float = 3.0
    policy_weight: float = 1e6
    base_loss_weight: float = 0.5
    talk_loss_weight: float | None = None
    prediction: Literal["mixed", "thought"] = "mixed"
    baseline: Literal["self", "teacher", "none"] = "self"
    teacher_decay: float = 0.999
    reward: Literal["log_likelihood", "likelihood", "log_mean"] = "log_likelihood"
    advantage: Literal["mean", "leave_one_out", "none"] = "mean"
    advantage_clamp: bool = True
    normalize_advantage: bool = False
    clip_ratio: float | None = None
    policy_updates: int = 1
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    gain_weight: float = 0.0
    anchors_per_text: int | None = None
    anchor_choice: Literal["random", "entropy", "given"] = "random"
    learned_thought_end: bool = False
    embedding_scale: float = 100.0
    start_thought_token_id: int | None = None
    end_thought_token_id: int | None = None
    think: Think = "always"
    gain_threshold: float = 0.1
    draft_length: int | Literal["auto"] | None = None
    base_model_name_or_path: str | None = None
    base_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        text = self.text_config
        if text is None:
            text = MistralConfig(**{name: kwargs.pop(name) for name in list(kwargs) if name in _OF_MISTRAL})
        elif isinstance(text, dict):
            text = AutoConfig.for_model(**text)
        else:
            text = copy.deepcopy(text)  # that of another model would get our attention
        self.text_config = text
        super().__post_init__(**kwargs)
        self.check()

    def __getattr__(self, name: str) -> Any:
        """What is not said here is asked of the decoder's configuration."""
        text = None if name.startswith("_") else self.__dict__.get("text_config")
        try:
            return getattr(text, name)
        except AttributeError:
            message = f"{type(self).__name__} has no attribute {name!r}, nor has its text_config"
            raise AttributeError(message) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS:
            CHECKS[name](value)
        text = self.__dict__.get("text_config")
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        of_text = isinstance(text, PreTrainedConfig) and hasattr(text, name)
        if of_text and (not own or name == "dtype"):  # which transformers asks either for
            setattr(text, name, value)
        if own or not of_text:
            super().__setattr__(name, value)

    def check(self) -> None:
        """Look at the fields again: whoever sets them later, as ``AutoConfig.from_pretrained`` does, goes unchecked.

        Raises:
            TypeError, ValueError: a field of another type or out of range, named; fields that contradict each other.
        """
        for name, interval in INTERVALS.items():
            interval.check(name, getattr(self, name))
        check_numbers(OPTIONAL_INTERVALS, {name: getattr(self, name) for name in OPTIONAL_INTERVALS})
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        for name in SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        self._check_together()
        check_defaults(self)
        for name in ("start_thought_token_id", "end_thought_token_id"):
            token = getattr(self, name)
            if isinstance(token, bool) or not isinstance(token, int | None):
                raise TypeError(f"{name} must be a token id or None, got {token!r}")
        if dropout := getattr(self.text_config, "attention_dropout", None):
            raise ValueError(f"attention_dropout must be 0 (thought attention has none), got {dropout}")

    def _check_together(self) -> None:
        """Fields that are right alone may contradict each other."""
        contradictions = (
            ("advantage", self.advantage == "leave_one_out", "num_thoughts", self.num_thoughts == 1, "at least 2"),
            ("reward", self.reward == "log_mean", "num_thoughts", self.num_thoughts == 1, "at least 2"),
            ("reward", self.reward == "log_mean", "advantage", self.advantage == "mean", "'leave_one_out' or 'none'"),
            ("policy_updates", self.policy_updates > 1, "clip_ratio", self.clip_ratio is None, "a number"),
            ("learned_thought_end", self.learned_thought_end, "thought_length", self.thought_length == 0, "at least 1"),
            ("anchor_choice", self.anchor_choice == "entropy", "anchors_per_text", self.anchors_per_text is None,
             "a number"),
            ("think", self.think == "learned", "gain_weight", self.gain_weight == 0, "> 0"),
        )  # fmt: skip
        for first, switched, second, wrong, wanted in contradictions:
            if switched and wrong:
                raise ValueError(
                    f"{second} must be {wanted} with {first} {getattr(self, first)!r}, got {getattr(self, second)!r}"
                )

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """As in transformers, and what lets the folder load where nobody imports quietstar (``trust_remote_code``)."""
        self.auto_map = dict(folder.AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder.write_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a folder names the installed package and holds no copy of the class."""

    @property
    def text_loss_weights(self) -> tuple[float, float]:
        """Factors of the losses of the predictions without and after a thought."""
        talk = 1 - self.base_loss_weight if self.talk_loss_weight is None else self.talk_loss_weight
        return self.base_loss_weight, talk

    @property
    def thought_token_ids(self) -> tuple[int, int]:
        """The ids of the start and the end token, checked.

        Raises:
            ValueError: an id is missing, not in the vocabulary, or both are the same.
        """
        ids, vocab_size = (self.start_thought_token_id, self.end_thought_token_id), self.text_config.vocab_size
        for name, token in zip(("start_thought_token_id", "end_thought_token_id"), ids, strict=True):
            if token is None or not 0 <= token < vocab_size:
                raise ValueError(f"{name} must be a token id in [0, {vocab_size}), got {token}")
        if ids[0] == ids[1]:
            raise ValueError(f"end_thought_token_id must differ from start_thought_token_id, got {ids[1]} for both")
        return ids
