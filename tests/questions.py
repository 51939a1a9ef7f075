"""Small files of questions."""

import json
from pathlib import Path

GSM8K = [
    {"question": "One and 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    {"question": "How many?", "answer": "Many.\n#### 1,072"},
    {"question": "How cold is it today?", "answer": "#### -5"},
    {"question": "Half of 15", "answer": "7.5"},
]
COMMONSENSE_QA = [
    {"question": "Where?", "choices": {"label": list("ABCDE"), "text": ["a", "b", "see", "d", "e"]}, "answerKey": "C"},
    {"question": "Who is it?", "choices": {"label": list("AB"), "text": ["me", "you"]}, "answerKey": "A"},
]
QA = [{"question": "Kim is", "answer": "in"}, {"question": "Sue was not", "answer": "out."}]
ROWS = {"gsm8k": GSM8K, "commonsense_qa": COMMONSENSE_QA, "qa": QA}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
