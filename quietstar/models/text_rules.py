"""Logits processors and stopping criteria, and which of them may be called twice on the same text."""

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

# Their results depend only on the text. Any other may keep a state that advances with every call: grammar engines take
# the last token as accepted, and ``PrefixConstrainedLogitsProcessor`` calls a function of the user.
_STATELESS_PROCESSORS = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.WatermarkLogitsProcessor,
)
_STATELESS_CRITERIA = (
    stopping_criteria.EosTokenCriteria,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
)


class TextRules:
    """The logits processors and stopping criteria of a call of ``generate``.

    Attributes:
        stateless: whether all of them may be called several times on a text, and on rows of different lengths. If not,
            each must be called once per token, in order, with all rows.
        pads: whether rows that have stopped are padded, as in transformers if there is an end-of-text token. If not,
            they continue until all have stopped.
        for_drafts: the processors applied to drafts. Drafts may come from any distribution, but more are accepted this
            way.
    """

    def __init__(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList):
        self.processors, self.criteria = processors, criteria
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.for_drafts = [x for x in processors if type(x) in _STATELESS_PROCESSORS]
        known = _STATELESS_CRITERIA
        if self.pads:  # each row ends where it contains the string
            known += (stopping_criteria.StopStringCriteria,)
        self.stateless = len(self.for_drafts) == len(processors) and all(type(x) in known for x in criteria)

    @staticmethod
    def process(processors: list, text: Tensor, logits: Tensor) -> Tensor:
        """Compute scores [B, V] of the next token after ``text`` [B, L]; ``logits`` are not changed."""
        scores = logits.clone() if processors else logits
        for processor in processors:  # calling the list would inspect their signatures every time
            scores = processor(text, scores)
        return scores
