"""The model card: the README.md of a saved folder, which the hub displays."""

import hashlib
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from quietstar.models.defaults import DEFAULT, choose

# The last line of a card that was written by this module and not changed since.
_SEAL = "<!-- Written by quietstar, which keeps it up to date until somebody changes it: {} -->\n"

_CARD = """\
---
{metadata}
---

# {title}

A language model of type `{family}` that thinks before every token, by
[Quiet-STaR](https://arxiv.org/abs/2403.09629): before every token it samples a short hidden thought, predicts the token
with and without it, and mixes the two predictions with a learned weight.

## How to use it

`pip install quietstar`, then

```python
from transformers import pipeline

pipe = pipeline("text-generation", "PATH OR NAME OF THIS FOLDER", trust_remote_code=True)
print(pipe("Once upon a time", max_new_tokens=50, think="always"))
```

`trust_remote_code` is not needed after `from quietstar import QuietStarForCausalLM`, which is all that the file
`modeling_quietstar.py` does. `think` may be `"always"`, `"never"` (the base model alone), a threshold in nats (think
only where the base prediction has more entropy), or `"learned"`, if the model was trained to know where to think.
`draft_length="auto"` is faster and does not change the distribution of the text. The defaults are those of the
configuration.

## How it thinks

| | |
|---|---|
{thinking}
{training}
## Limits

- A thought takes about as many forward passes as it has tokens; `draft_length` recovers part of this cost.
- Thoughts were rewarded for predicting the text that follows. They need not make sense to a reader, nor explain what
  the model writes.
- Engines that do not support quietstar (vLLM, SGLang, llama.cpp) cannot run the thoughts: `quietstar export` writes the
  base model for them.
- Risks, biases and licence are those of the base model and of the text that it was trained on.
"""


def write_card(
    folder: str | PathLike,
    model: PreTrainedModel,
    training: Mapping[str, object] | None = None,
    **metadata: object,
) -> bool:
    """Write README.md into a folder, unless it has one that somebody wrote or changed.

    Args:
        folder: the saved folder.
        model: the ``QuietStarForCausalLM`` in the folder.
        training: rows of a table of what is known about the training.
        metadata: more fields of ``huggingface_hub.ModelCardData`` (``license``, ``language``, ``model_name``,
            ...); ``tags`` are added to ours.

    Returns:
        Whether the file was written.
    """
    path = Path(folder) / "README.md"
    if path.exists() and not _is_ours(path.read_bytes()):
        return False
    text = _card(model, training or {}, metadata).encode()
    path.write_bytes(text + _seal(text))
    return True


def _seal(text: bytes) -> bytes:
    return _SEAL.format(hashlib.sha256(text).hexdigest()[:16]).encode()


def _is_ours(card: bytes) -> bool:
    """Whether a card was written by this module and is unchanged."""
    text = card[: card.rfind(b"<!--")]
    return card == text + _seal(text)


def _card(model: PreTrainedModel, training: Mapping[str, object], metadata: dict) -> str:
    config, sources = model.config, (model.generation_config, model.config)
    base = config.base_model_name_or_path
    on_hub = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    fields = {
        "base_model": base if on_hub else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quietstar", "quiet-star", "reasoning"],
    }
    given = {field: value for field, value in metadata.items() if value is not None}
    tags = given.pop("tags", [])
    fields["tags"] += [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in fields["tags"]]
    thinking = {
        "tokens in a thought": config.thought_length,
        "temperature of the thoughts": config.thought_temperature,
        "when it thinks, unless told otherwise": _when(
            choose("think", DEFAULT, *sources), choose("gain_threshold", DEFAULT, *sources)
        ),
        "tokens drafted at once, unless told otherwise": choose("draft_length", DEFAULT, *sources) or "none",
        "in training: thoughts per position, tokens predicted after one": f"{config.num_thoughts}, {config.lookahead}",
        "in training: weight of the policy term": f"{config.policy_weight:g}",
        "base model": "not known" if base is None else f"`{base}`",
    }
    return _CARD.format(
        metadata=ModelCardData(**fields | given).to_yaml(),
        title=given.get("model_name") or f"Quiet-STaR of {Path(base).name if base else 'a base model'}",
        family=config.text_config.model_type,
        thinking=_rows(thinking),
        training=f"\n## Training\n\n| | |\n|---|---|\n{_rows(training)}\n" if training else "",
    )


def _when(think: float | str, gain_threshold: float) -> str:
    if think == "learned":
        return f"where its gain head expects a thought to gain more than {gain_threshold:g} nats"
    return think if isinstance(think, str) else f"where the base prediction has more than {think:g} nats of entropy"


def _rows(table: Mapping[str, object]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in table.items())
