"""The API server of vLLM, with the client of OpenAI: its answers are those of transformers, also under load."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
import torch
from api_server import SECONDS_TO_END, ApiServer, api_server
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 24
LONG = 150  # tokens of an answer that is under way when the server is told to end
ABANDONED = 900  # tokens of an answer that nobody waits for
PROMPTS = (
    "The del statement",
    "Return a list of the names",
    "This module provides",
    "Raise an exception if the file",
    "A dictionary maps keys to values and",
    "Changed in version 3.2:",
    "If the argument is omitted",
    "An object of this class",
)
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.3")
# without it the engine is killed at once, and the server waits for clients that wait for the engine
DRAIN = ("--shutdown-timeout", "60")


class Reference:
    """Greedy answers of transformers, in fp32."""

    def __init__(self, directory: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(self, prompt: str, tokens: int = TOKENS) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        found = self.model.generate(ids, do_sample=False, max_new_tokens=tokens)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


class Streamed(NamedTuple):
    text: str
    logprobs: list[float]


@pytest.fixture(scope="module")
def reference(shipped) -> Reference:
    return Reference(shipped.globe)


@pytest.fixture(scope="module")
def server(shipped, tmp_path_factory):
    with api_server(shipped.globe, tmp_path_factory.mktemp("server") / "log", *OPTIONS, *DRAIN) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str, tokens: int = TOKENS, **options):
    return client.completions.create(model="model", prompt=prompt, max_tokens=tokens, temperature=0, **options)


def read(stream) -> Streamed:
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    logprobs = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
    return Streamed("".join(choice.text for choice in choices), logprobs)


def counted(server: ApiServer, metric: str) -> float:
    return sum(map(float, re.findall(rf"^vllm:{metric}\S* (\S+)$", server.get("/metrics"), re.MULTILINE)))


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_list_of_models(client):
    assert [(model.id, model.model_dump()["max_model_len"]) for model in client.models.list()] == [("model", 1024)]


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_completions_and_streams(client, reference, prompt):
    expected = reference.answer(prompt)
    assert complete(client, prompt).choices[0].text == expected
    assert read(complete(client, prompt, stream=True)).text == expected


def test_chat(client, reference):
    messages = [{"role": "user", "content": "How are files opened?"}]
    template = reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template == "user: How are files opened?\n\nassistant:"
    options = {"model": "model", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == reference.answer(template)
    chunks = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(chunk or "" for chunk in chunks) == answer.choices[0].message.content


def test_logprobs(client, reference):
    found = complete(client, PROMPTS[0], logprobs=3).choices[0]
    ids = reference.tokenizer(PROMPTS[0] + found.text, return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = reference.model(ids).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, 1:, None])[-TOKENS:, 0].tolist()
    assert found.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert all(len(top) >= 3 and max(top.values()) <= 0 for top in found.logprobs.top_logprobs)
    streamed = read(complete(client, PROMPTS[0], logprobs=3, stream=True))
    assert streamed.logprobs == pytest.approx(found.logprobs.token_logprobs, abs=1e-5)


def test_concurrent_requests(client, reference):
    expected = [reference.answer(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4 * len(PROMPTS)) as pool:
        found = [answer.choices[0].text for answer in pool.map(lambda prompt: complete(client, prompt), PROMPTS * 4)]
    assert found == expected * 4


def test_a_client_that_hangs_up(server, client, reference):
    """Its request ends at once: vLLM generates less than the request asked for."""
    before = counted(server, "generation_tokens_total")
    with complete(client, PROMPTS[1], ABANDONED, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = [answer.choices[0].text for answer in pool.map(lambda prompt: complete(client, prompt), PROMPTS)]
    assert found == [reference.answer(prompt) for prompt in PROMPTS]
    until(lambda: counted(server, "num_requests_running") == 0)
    assert counted(server, "generation_tokens_total") - before < ABANDONED


def test_sigterm_under_load(server, client):
    """The last test, because it ends the server: requests under way get whole answers, later ones an error."""
    processes = subprocess.run(["pgrep", "-s", str(server.process.pid)], capture_output=True, text=True).stdout.split()
    assert len(processes) > 1  # the engine has a process of its own

    def stream(prompt: str) -> str:
        return read(complete(client, prompt, LONG, stream=True, extra_body={"ignore_eos": True})).text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        expected = list(pool.map(stream, PROMPTS))
        answers = pool.map(stream, PROMPTS)
        until(lambda: counted(server, "num_requests_running") == len(PROMPTS))
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(SECONDS_TO_END) == 0
        assert list(answers) == expected
    until(lambda: not any(Path("/proc", process).exists() for process in processes))
    assert "/globe_kernels/" not in server.log.read_text()  # no traceback leads through GloBE
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
