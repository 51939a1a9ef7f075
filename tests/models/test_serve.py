"""``transformers serve`` and ``chat`` with a saved folder, in processes that have not imported quietstar."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import word_model

from quietstar import QuietStarForCausalLM

# The last imports what else it needs.
for package in ("fastapi", "uvicorn", "openai", "rich", "transformers.cli.transformers"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow

TRANSFORMERS = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
WORDS = set(word_model.WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = word_model.save(tmp_path_factory.mktemp("model"), "{% for m in messages %}{{ m.content }} {% endfor %}")
    model = QuietStarForCausalLM.from_pretrained(folder, think="never", thought_temperature=0.0)
    model.mixing_head[-1].weight.data *= 100  # so that thoughts change the text
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return os.environ | {
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def server(folder, settings, tmp_path_factory):
    """The address of a server of the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    options = [folder, "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*TRANSFORMERS, "serve", *options], env=settings | {"HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=10)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(server, path, **body):
    """The answer's lines."""
    body = json.dumps({"max_tokens": 5, "temperature": 0.0, "stream": False} | body).encode()
    request = urllib.request.Request(f"{server}/v1/{path}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode().splitlines()


def chat(server, folder, **options):
    (line,) = ask(
        server, "chat/completions", model=folder, messages=[{"role": "user", "content": "the cat"}], **options
    )
    return json.loads(line)["choices"][0]["message"]["content"]


def generation_config(**fields):
    return json.dumps({"do_sample": False, "max_new_tokens": 5} | fields)


def test_a_server_thinks_as_the_folder_or_the_request_says(server, folder):
    never = chat(server, folder, generation_config=generation_config(think="never"))
    always = chat(server, folder, generation_config=generation_config(think="always"))
    assert never != always
    assert chat(server, folder) == never
    assert len(never.split()) == len(always.split()) == 5
    assert {*never.split(), *always.split()} <= WORDS
    (line,) = ask(server, "completions", model=folder, prompt="the cat")
    assert set(json.loads(line)["choices"][0]["text"].split()) <= WORDS


def test_a_server_streams(server, folder):
    lines = ask(
        server, "chat/completions", model=folder, stream=True, messages=[{"role": "user", "content": "the cat"}]
    )
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == chat(server, folder)
    assert sum(bool(delta) for delta in deltas) == 5


def test_a_bad_option_fails_the_request_and_not_the_server(server, folder):
    with pytest.raises(urllib.error.HTTPError, match="500"):
        chat(server, folder, generation_config=generation_config(think="sometimes"))
    assert chat(server, folder)


def test_a_chat(server, folder, settings):
    online = {name: value for name, value in settings.items() if name != "HF_HUB_OFFLINE"}  # to reach the server
    flags = ["max_new_tokens=5", "do_sample=False"]
    run = subprocess.run(
        [*TRANSFORMERS, "chat", folder, f"{server}/v1", *flags], env=online, input="the cat\n!exit\n",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert chat(server, folder) in " ".join(run.stdout.split()), run.stderr


def test_a_server_that_trusts_no_code_says_so(folder, settings):
    run = subprocess.run(
        [*TRANSFORMERS, "serve", folder, "--device", "cpu"], env=settings | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode != 0
    assert "trust_remote_code=True" in run.stderr
