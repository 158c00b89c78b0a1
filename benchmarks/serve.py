# pyright: reportMissingImports=false
"""Serve the dense export and the GloBE export of one checkpoint by vLLM, and compare their speed and their answers.

    python benchmarks/serve.py                                     exports of a short fit of the shipped model
    python benchmarks/serve.py --dense DIR --globe DIR             other exports of one checkpoint
    python benchmarks/serve.py --requests 1000                     also known answers to so many requests of each server
    python benchmarks/serve.py -- --enforce-eager                  with options of vLLM

Needs an environment with vLLM. Both servers get the same options; they run in turn, and change places each round.
Tokens per second are generated ones, of all clients together, wall time, medians over the rounds; a ratio is the median
of the ratios of the rounds. Prompts and numbers of tokens are equal for both.

The known answers are the greedy ones of transformers for the same export in fp32. Prompts where two tokens nearly tie
are left out, because there a batch of another size may choose the other token. An answer with another token is wrong, a
request without an answer is lost; one of either kind ends the program with exit code 1.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import openai
import torch
from api_server import ApiServer, api_server
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from globe_fit import ExpertSource, FitConfig, VarProConfig, export_dense, export_globe, fit, save_fit
from globe_fit.cli.demo import shipped_model
from globe_kernels import GlobeCheckpoint
from globe_kernels.table import Table

KINDS = ("dense", "globe")
PROMPTS = 64
CLIENTS = (1, 8, 32)
PROMPT_TOKENS = (8, 64)  # shortest and longest
ANSWER_TOKENS = 64  # of a timed request
KNOWN_TOKENS = 24
_REQUESTS_OF_A_CLIENT = 4
_FEWEST_REQUESTS = 16
_TIE = 1e-3  # difference of log-probabilities
LENGTH = 256  # of prompt and answer

Prompt = list[int]


class Answer(NamedTuple):
    """A prompt, and the tokens that follow."""

    prompt: Prompt
    tokens: list[int]


class Measured(NamedTuple):
    """One round of one server."""

    seconds: float  # to start
    rates: dict[int, float]  # {clients: tokens per second}
    wrong: int
    lost: int


def prompts_from(directory: Path, text: str, count: int) -> list[Prompt]:
    """Return pieces of a text, of random places and lengths."""
    tokens = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    choice = random.Random(0)
    lengths = [choice.randint(*PROMPT_TOKENS) for _ in range(count)]
    starts = [choice.randrange(len(tokens) - length) for length in lengths]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@torch.inference_mode()
def known_answers(directory: Path, prompts: list[Prompt]) -> list[Answer]:
    """Return the greedy answers of transformers without ties."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        found = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=KNOWN_TOKENS,
            min_new_tokens=KNOWN_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(found.logits).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > _TIE:
            answers.append(Answer(prompt, found.sequences[0, len(prompt) :].tolist()))
    return answers


def ask(client: openai.OpenAI, prompt: Prompt, tokens: int) -> list[int] | None:
    """Return the tokens of an answer, or None when the request is lost."""
    try:
        answer = client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    except openai.OpenAIError:
        return None
    return answer.choices[0].model_dump()["token_ids"]


def rate(client: openai.OpenAI, prompts: list[Prompt], clients: int) -> float:
    """Return the generated tokens per second of so many clients at a time."""
    turns = list(islice(cycle(prompts), max(_FEWEST_REQUESTS, _REQUESTS_OF_A_CLIENT * clients)))
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda prompt: ask(client, prompt, ANSWER_TOKENS), turns))
        seconds = time.perf_counter() - began
    found = [len(answer) for answer in answers if answer]
    if len(found) < len(turns):
        raise RuntimeError(f"{len(turns) - len(found)} of {len(turns)} requests had no answer")
    return sum(found) / seconds


def check(client: openai.OpenAI, known: list[Answer], requests: int) -> tuple[int, int]:
    """Return how many of so many answers are wrong, and how many are lost."""
    turns = list(islice(cycle(known), requests))
    with ThreadPoolExecutor(max(CLIENTS)) as pool:
        answers = list(pool.map(lambda one: ask(client, one.prompt, KNOWN_TOKENS), turns))
    lost = answers.count(None)
    right = sum(answer == one.tokens for answer, one in zip(answers, turns, strict=True))
    return requests - right - lost, lost


def measure(server: ApiServer, prompts: list[Prompt], known: list[Answer], requests: int) -> Measured:
    """Measure a server that has just started."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        rate(client, prompts, max(CLIENTS))  # what a first request compiles
        rates = {clients: rate(client, prompts, clients) for clients in CLIENTS}
        return Measured(server.seconds, rates, *check(client, known, requests))


def export_both(directory: Path, steps: int) -> dict[str, Path]:
    """Fit the shipped model and return its exports."""
    source = ExpertSource(shipped_model())
    save_fit(fit(source, FitConfig(varpro=VarProConfig(steps=steps))), source, directory / "fit")
    checkpoint, exports = GlobeCheckpoint(directory / "fit"), {kind: directory / kind for kind in KINDS}
    export_dense(checkpoint, source, exports["dense"])
    export_globe(checkpoint, source, exports["globe"])
    return exports


def rows(rounds: list[dict[str, Measured]]) -> Iterator[list[str]]:
    """Describe the rounds: medians, and the median, the least and the largest of the ratios."""
    values: dict[str, Callable[[Measured], float]] = {"seconds to start": lambda one: one.seconds}
    values |= {f"tokens/s, {n} clients": lambda one, n=n: one.rates[n] for n in CLIENTS}
    for name, value in values.items():
        found = {kind: [value(each[kind]) for each in rounds] for kind in KINDS}
        ratios = [globe / dense for dense, globe in zip(*found.values(), strict=True)]
        medians = [f"{statistics.median(each):.1f}" for each in found.values()]
        yield [name, *medians, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="the dense export")
    parser.add_argument("--globe", type=Path, help="the GloBE export of the same checkpoint")
    parser.add_argument("--steps", type=int, default=60, help="of the fit of the shipped model")
    parser.add_argument("--text", type=Path, default=shipped_model() / "heldout.txt", help="where the prompts are from")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=0, help="with known answers, to each server of a round")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("options", nargs="*", help="of the servers, after --")
    args = parser.parse_args()
    disable_progress_bar()
    if (args.dense is None) != (args.globe is None):
        parser.error("give --dense and --globe together")
    with TemporaryDirectory() as folder:
        exports = {"dense": args.dense, "globe": args.globe}
        if args.dense is None:
            exports = export_both(Path(folder), args.steps)
        prompts = prompts_from(exports["globe"], args.text.read_text(encoding="utf-8"), PROMPTS)
        known = {kind: known_answers(path, prompts) if args.requests else [] for kind, path in exports.items()}
        options = ["--dtype", args.dtype, "--max-model-len", str(LENGTH), "--gpu-memory-utilization", "0.3"]
        rounds = []
        for number in range(args.rounds):
            found = {}
            for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                with api_server(exports[kind], Path(folder) / "log", *options, *args.options) as server:
                    found[kind] = measure(server, prompts, known[kind], args.requests)
                print(number + 1, kind, found[kind], flush=True)
            rounds.append(found)
    print(Table("", ("", *KINDS, "ratio"), list(rows(rounds))))
    bad = sum(one.wrong + one.lost for each in rounds for one in each.values())
    if args.requests:
        asked = args.requests * len(KINDS) * args.rounds
        print(f"{asked} requests with {[len(each) for each in known.values()]} known answers: {bad} wrong or lost")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
