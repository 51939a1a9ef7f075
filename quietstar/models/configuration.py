"""Configuration of a Quiet-STaR model: how it thinks and how it is trained, in addition to its decoder's."""

import copy
from os import PathLike
from typing import Any, Literal

from transformers import AutoConfig, MistralConfig, PreTrainedConfig

from quietstar._numbers import Interval, check_numbers
from quietstar.models import folder
from quietstar.models.defaults import CHECKS, Think, check_defaults

# Valid values of the fields. The two token ids are checked against the vocabulary in `thought_token_ids`.
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
# Valid values of fields that may also be None.
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

# Fields of a Mistral's configuration, including names used in older files.
_OF_MISTRAL = MistralConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() | {
    "rope_scaling", "rope_theta",
}  # fmt: skip


class QuietStarConfig(PreTrainedConfig):
    """Hyperparameters of Quiet-STaR (arXiv 2403.09629), together with the configuration of the decoder that thinks.

    The defaults are those of the authors' training run. Fields of the decoder (``hidden_size``, ``sliding_window`` and
    so on) can be read and set here too.

    Attributes:
        text_config: configuration of the decoder, or its dictionary with a ``model_type``. Default: a
            ``MistralConfig`` of the other keyword arguments, as in files of version 0.1.
        thought_length: k ≥ 0, sampled tokens in a thought, not counting its start and end token; 0: no policy term.
        lookahead: M ≥ 1, real tokens predicted after a thought during training.
        num_thoughts: N ≥ 1, independent thoughts per position during training; inference uses one.
        thought_temperature: temperature at which thoughts are sampled; 0 is greedy.
        policy_temperature: temperature of the log-probabilities in the policy term.
        policy_weight: factor of the policy term in the loss.
        base_loss_weight: factor of the loss of the prediction without a thought.
        talk_loss_weight: factor of the loss of the prediction after a thought. Default: 1 − ``base_loss_weight``.
        prediction: which prediction after a thought is trained, rewarded and used. ``"mixed"``: mixed with the
            prediction without a thought by a learned weight. ``"thought"``: unmixed; the model then has no mixing head.
        baseline: what the prediction after a thought is compared with to give the reward: the model's prediction
            without a thought (``"self"``), that of a ``"teacher"``, or nothing (``"none"``).
        teacher_decay: decay of the moving average of the model that the trainer keeps as the teacher; 1 freezes it.
        reward: the quantity to increase: the ``"log_likelihood"`` of the text after a thought, its ``"likelihood"``
            (VeriFree, arXiv 2505.21493), or ``"log_mean"``, the logarithm of the likelihood's mean over the N thoughts
            of a position (JEPO, arXiv 2503.19618).
        advantage: the reward minus its ``"mean"`` over the N thoughts, minus the mean over the other thoughts
            (``"leave_one_out"``), or unchanged (``"none"``).
        advantage_clamp: whether negative advantages count as 0.
        normalize_advantage: whether to divide advantages by their standard deviation over the rewarded thoughts of a
            pass.
        clip_ratio: ε of PPO's clipping (arXiv 1707.06347), for several updates on the same thoughts.
        policy_updates: number of updates on the same thoughts.
        entropy_weight: bonus per nat of entropy of the distributions that thought tokens are drawn from.
        kl_weight: cost per nat by which a thought is more likely under the model than under the teacher.
        gain_weight: factor in the loss of the squared error of a gain head, which predicts from the text alone what a
            thought will gain for the next token. 0: the model has no such head. Only the head learns from this error,
            but its gradients count where gradients are clipped by their common norm.
        anchors_per_text: how many positions of a text think in training. Default: all.
        anchor_choice: which positions these are: ``"random"`` ones, those where the prediction without a thought has
            the most ``"entropy"``, or those ``"given"`` as ``anchors`` in the batch.
        learned_thought_end: whether a thought may end before it has k tokens. The end token may then be drawn from the
            second token on.
        embedding_scale: factor on the two thought embeddings when they are used, which multiplies their step size.
        start_thought_token_id: vocabulary id of the token in front of a thought. The model never generates this token
            or the end token, neither inside a thought nor in text.
        end_thought_token_id: vocabulary id of the token after a thought.
        think: default of ``generate``'s ``think``, used if neither the call nor the ``generation_config`` sets it.
        gain_threshold: likewise for ``gain_threshold``: the gain in nats to expect with ``think="learned"``.
        draft_length: likewise for ``draft_length``.
        base_model_name_or_path: the checkpoint that the model was created from, if known.
        base_vocab_size: how many tokens that checkpoint had, if known.
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
            text = copy.deepcopy(text)  # else another model that shares it would get our attention
        self.text_config = text
        super().__post_init__(**kwargs)
        self.check()

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """Leave the rotary embeddings to ``text_config``, which has converted its own, unless ``kwargs`` change them.

        Before 5.18 transformers puts its default beside the parameters of each kind of layer, and fails on that later.
        """
        if kwargs.keys() & {"rope_scaling", "rope_theta", "partial_rotary_factor"}:
            return super().convert_rope_params_to_dict(**kwargs)
        return kwargs

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes in the decoder's configuration."""
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
        if of_text and (not own or name == "dtype"):  # transformers reads the dtype from either configuration
            setattr(text, name, value)
        if own or not of_text:
            super().__setattr__(name, value)

    def check(self) -> None:
        """Check the fields again. Assignments after construction, as in ``AutoConfig.from_pretrained``, are unchecked.

        Raises:
            TypeError, ValueError: a field has the wrong type or is out of range (the message names it), or fields
                contradict each other.
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
        """Check that fields do not contradict each other."""
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
        """Save as transformers does, plus code that loads the folder without importing quietstar (remote code)."""
        self.auto_map = dict(folder.AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder.write_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: a saved folder refers to the installed package and holds no copy of the class."""

    @property
    def text_loss_weights(self) -> tuple[float, float]:
        """The factors of the losses of the predictions without and after a thought."""
        talk = 1 - self.base_loss_weight if self.talk_loss_weight is None else self.talk_loss_weight
        return self.base_loss_weight, talk

    @property
    def thought_token_ids(self) -> tuple[int, int]:
        """The checked ids of the start and the end token.

        Raises:
            ValueError: an id is missing or not in the vocabulary, or both are the same.
        """
        ids, vocab_size = (self.start_thought_token_id, self.end_thought_token_id), self.text_config.vocab_size
        for name, token in zip(("start_thought_token_id", "end_thought_token_id"), ids, strict=True):
            if token is None or not 0 <= token < vocab_size:
                raise ValueError(f"{name} must be a token id in [0, {vocab_size}), got {token}")
        if ids[0] == ids[1]:
            raise ValueError(f"end_thought_token_id must differ from start_thought_token_id, got {ids[1]} for both")
        return ids
