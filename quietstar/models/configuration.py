"""Configuration of a Quiet-STaR model: how it thinks and what it is trained on, beside that of its decoder."""

import copy
from os import PathLike
from typing import Any, Literal

from transformers import AutoConfig, MistralConfig, PreTrainedConfig

from quietstar._numbers import Interval
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
    "embedding_scale": Interval(float, "(0, inf)"),
}

# What a Mistral's configuration may say, in the names of today and of older files.
_OF_MISTRAL = MistralConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() | {
    "rope_scaling", "rope_theta",
}  # fmt: skip


class QuietStarConfig(PreTrainedConfig):
    """The hyper-parameters of Quiet-STaR (arXiv 2403.09629), beside the configuration of the decoder that thinks.

    The defaults are those of the authors' training run. Fields of the decoder (``hidden_size``, ``sliding_window`` and
    so on) can be read and set here too.

    Args:
        text_config: of the decoder, or its dictionary with a ``model_type``. Default: a
            :class:`~transformers.MistralConfig` of the other keyword arguments, as in files of version 0.1.
        thought_length: k, sampled tokens in a thought, start and end token not counted; 0 is legal (no policy term).
        lookahead: M ≥ 1, real tokens predicted after a thought during training.
        num_thoughts: N ≥ 1, independent thoughts per position during training; inference uses one.
        thought_temperature: temperature at which thoughts are sampled; 0 is greedy.
        policy_temperature: temperature of the log-probabilities in the policy term.
        policy_weight: factor of the policy term in the loss.
        base_loss_weight: factor of the loss of the prediction without a thought; the rest goes to the one with.
        embedding_scale: the two thought embeddings are multiplied by this on use, which multiplies their step size.
        start_thought_token_id, end_thought_token_id: vocabulary ids of the two thought tokens. The model never
            produces them: neither inside a thought nor in generated text.
        think, draft_length: what ``generate`` does where neither the call nor its ``generation_config`` says.
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
    embedding_scale: float = 100.0
    start_thought_token_id: int | None = None
    end_thought_token_id: int | None = None
    think: Think = "always"
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
            TypeError, ValueError: a field of another type or out of range, named.
        """
        for name, interval in INTERVALS.items():
            interval.check(name, getattr(self, name))
        check_defaults(self)
        for name in ("start_thought_token_id", "end_thought_token_id"):
            token = getattr(self, name)
            if isinstance(token, bool) or not isinstance(token, int | None):
                raise TypeError(f"{name} must be a token id or None, got {token!r}")
        if dropout := getattr(self.text_config, "attention_dropout", None):
            raise ValueError(f"attention_dropout must be 0 (thought attention has none), got {dropout}")

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """As in transformers, and what lets the folder load where nobody imports quietstar (``trust_remote_code``)."""
        self.auto_map = dict(folder.AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder.write_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a folder names the installed package and holds no copy of the class."""

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
