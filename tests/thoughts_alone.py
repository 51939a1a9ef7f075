"""The slow, literal way: each thought alone behind its text, through the family's own model."""

import copy

import torch
from transformers import AutoModelForCausalLM


class Alone:
    """The family's own model on the parameters of one that thinks, with the attention that the family wrote."""

    attention = "eager"  # of transformers; its softmax is in float32, that of "sdpa" in the dtype of the model

    def __init__(self, model):
        self.thinking = model
        self.own = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).to(model.dtype).eval()
        self.own.model, self.own.lm_head = model.model, model.lm_head
        self.embed = model.get_input_embeddings()

    def __call__(self, rows):
        """Hidden states [B, rows, H] and logits [B, rows, V]."""
        config = self.own.model.config
        config._attn_implementation = self.attention
        try:
            output = self.own(inputs_embeds=rows, use_cache=False, output_hidden_states=True)
        finally:
            config._attn_implementation = "quietstar"
        return output.hidden_states[-1], output.logits

    def logits(self, hidden):
        """Of mixed hidden states, which no family has."""
        config = self.own.config
        logits = self.own.lm_head(hidden) / getattr(config, "logits_scaling", 1)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def thought(self, text, i, thought, lookahead=1):
        """Hidden states of the slots behind position i, [B, k + 1 + M, H]."""
        model = self.thinking
        start, end = (x().expand(len(text), 1, -1) for x in (model.start_embedding, model.end_embedding))
        slots = [start, self.embed(thought), end, self.embed(text[:, i + 1 : i + lookahead])]
        return self(torch.cat([self.embed(text[:, : i + 1]), *slots], dim=1))[0][:, i + 1 :]

    def mixed(self, base, thought):
        weight = self.thinking.mixing_head(base, thought)
        return self.logits(torch.lerp(base, thought, weight[:, None]))
