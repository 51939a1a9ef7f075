"""Configuration of a Quiet-STaR model: Mistral's, plus how it thinks and what it is trained on."""

from transformers import MistralConfig


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
        for name, least in (("thought_length", 0), ("lookahead", 1), ("num_thoughts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {getattr(self, name)}")
        if self.thought_temperature < 0:
            raise ValueError(f"thought_temperature must be >= 0, got {self.thought_temperature}")
        for name in ("policy_temperature", "embedding_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.base_loss_weight <= 1:
            raise ValueError(f"base_loss_weight must be in [0, 1], got {self.base_loss_weight}")
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
