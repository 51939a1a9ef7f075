"""Configuration of a Quiet-STaR model: Mistral's, plus how it thinks and what it is trained on."""

from transformers import MistralConfig

from quietstar._numbers import Interval

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


class QuietStarConfig(MistralConfig):
    """A :class:`~transformers.MistralConfig` with the hyper-parameters of Quiet-STaR (arXiv 2403.09629).

    The defaults are those of the authors' training run.

    Args:
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
    """

    model_type = "quietstar"

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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Look at the fields again: whoever sets them later, as ``AutoConfig.from_pretrained`` does, goes unchecked.

        Raises:
            TypeError, ValueError: a field of another type or out of range, named.
        """
        for name, interval in INTERVALS.items():
            interval.check(name, getattr(self, name))
        for name in ("start_thought_token_id", "end_thought_token_id"):
            token = getattr(self, name)
            if isinstance(token, bool) or not isinstance(token, int | None):
                raise TypeError(f"{name} must be a token id or None, got {token!r}")
        if self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0 (thought attention has none), got {self.attention_dropout}")

    @property
    def thought_token_ids(self) -> tuple[int, int]:
        """The ids of the start and the end token, checked.

        Raises:
            ValueError: an id is missing, not in the vocabulary, or both are the same.
        """
        ids = self.start_thought_token_id, self.end_thought_token_id
        for name, token in zip(("start_thought_token_id", "end_thought_token_id"), ids, strict=True):
            if token is None or not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} must be a token id in [0, {self.vocab_size}), got {token}")
        if ids[0] == ids[1]:
            raise ValueError(f"end_thought_token_id must differ from start_thought_token_id, got {ids[1]} for both")
        return ids
