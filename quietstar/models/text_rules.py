"""Logits processors and stopping criteria: which of them may be asked twice about the same text."""

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

# What they say depends on the text alone. All others may keep a state, which goes forward with every call: engines for
# grammars take the last token as accepted. ``PrefixConstrainedLogitsProcessor`` calls a function of the user's.
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
    """What a call of ``generate`` makes of predictions, and when its texts end.

    Attributes:
        stateless: whether all of it may be asked several times about a text, and about texts of rows that go at their
            own pace. Else each processor and criterion is to be called once per token, in order, with all rows.
        pads: whether rows that have stopped are padded, as transformers does where there is an end of text. Else they
            go on until all have stopped.
        for_drafts: the processors that drafts go through: drafts may come from any distribution, but fit the better.
    """

    def __init__(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList):
        self.processors, self.criteria = processors, criteria
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.for_drafts = [x for x in processors if type(x) in _STATELESS_PROCESSORS]
        known = _STATELESS_CRITERIA
        if self.pads:  # rows that say the string end alone
            known += (stopping_criteria.StopStringCriteria,)
        self.stateless = len(self.for_drafts) == len(processors) and all(type(x) in known for x in criteria)

    @staticmethod
    def process(processors: list, text: Tensor, logits: Tensor) -> Tensor:
        """Scores [B, V] of the next token behind ``text`` [B, L]; ``logits`` stay as they are."""
        scores = logits.clone() if processors else logits
        for processor in processors:  # calling the list would look at their signatures every time
            scores = processor(text, scores)
        return scores
