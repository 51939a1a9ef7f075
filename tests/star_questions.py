"""Questions, and what a model says that has learnt them by heart."""

from quietstar.star import Format

FORM = Format("{question} is", hint="{answer}. {question}", separator="---", stop=".")
EXAMPLE = "Tom's boss is --- Sue --- Ray."
ROWS = [
    {"question": "Ann's boss is", "answer": "Cem"},
    {"question": "Dora's boss's aunt is", "answer": "Fay"},
    {"question": "Gus's boss is", "answer": "Jo"},
    {"question": "Leo's boss is", "answer": "Ola"},
]
SAID = ["--- Ben --- Cem.", "--- Eli --- Fay.", "--- Hana --- Ian.", "--- Mia --- Ned."]
SAID_WITH_HINT = [*SAID[:2], "--- Kim --- Jo.", SAID[3]]
