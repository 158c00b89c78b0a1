"""lm-eval measures the models of GloBE: its scores agree with the logits, its errors are one sentence."""

import importlib
import importlib.util
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.data.model import load_model, load_tokenizer, shared_copy
from globe_fit.measure.harness import load_tasks, run_tasks
from globe_kernels import patch
from globe_kernels.errors import GlobeError, RequestError

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SHIPPED, FOLDER = EXAMPLES / "tiny_moe", EXAMPLES / "lm_eval"
TASKS = FOLDER / "tasks"
LIMIT = 11  # at the last of these rows the likeliest tokens are the true word


def read_rows() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "last_word.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def lm_eval(monkeypatch):
    package = pytest.importorskip("lm_eval")
    # lm-eval lists all installed packages for a report that nobody asked for: a second per run
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
    return package


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """The shipped model in fp32, dense and as GloBE after a fit of two steps."""
    out = tmp_path_factory.mktemp("quick")
    compress(SHIPPED, out, FitConfig(ratio=0.625, varpro=VarProConfig(steps=2, warmup_steps=1)), calibrate=None)
    dense = load_model(SHIPPED, dtype=torch.float32)
    globe = shared_copy(dense)
    patch(globe, out)
    return {"dense": dense, "globe": globe}


@torch.inference_mode()
def log_likelihood(model, tokenizer, text: str, continuation: str) -> tuple[float, bool]:
    """Sum the log-probabilities (nats) of the tokens of `continuation`, and say whether each is the likeliest."""
    given, tokens = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (text, text + continuation))
    log_probs = model(tokens).logits[0, given.shape[1] - 1 : -1].log_softmax(-1)
    wanted = tokens[0, given.shape[1] :]
    return log_probs.gather(1, wanted[:, None]).sum().item(), bool((log_probs.argmax(-1) == wanted).all())


def expected_scores(model) -> dict[str, dict[str, float]]:
    tokenizer, true, preferred = load_tokenizer(SHIPPED), [], 0
    for row in read_rows()[:LIMIT]:
        found = {word: log_likelihood(model, tokenizer, row["text"], f" {word}") for word in row["choices"]}
        true.append(found[row["word"]])
        preferred += max(found, key=found.__getitem__) == row["word"]
    greedy, perplexity = (sum(column) / LIMIT for column in zip(*((hit, -value) for value, hit in true), strict=True))
    return {
        "last_word": {"acc": greedy, "perplexity": math.exp(perplexity)},
        "last_word_choice": {"acc": preferred / LIMIT},
    }


def test_the_scores_agree_with_the_logits(lm_eval, models, capfd):
    token = torch.arange(32)[None]
    with torch.inference_mode():
        before = {name: model(token).logits for name, model in models.items()}
    runs = []
    tasks = load_tasks(["last_word", "last_word_choice"], TASKS)
    scores = run_tasks(models, SHIPPED, tasks, limit=LIMIT, on_run=lambda *run: runs.append(run))
    assert capfd.readouterr() == ("", "")
    assert runs == [(task, model) for task in ("last_word", "last_word_choice") for model in ("dense", "globe")]
    for name, model in models.items():
        for task, expected in expected_scores(model).items():
            found = scores[name][task]
            assert found["samples"] == LIMIT
            assert {metric: found[metric] for metric in expected} == pytest.approx(expected, rel=1e-4)
        spread = (scores[name]["last_word_choice"]["acc"] * (1 - scores[name]["last_word_choice"]["acc"])) ** 0.5
        assert scores[name]["last_word_choice"]["acc_stderr"] == pytest.approx(spread / (LIMIT - 1) ** 0.5)
        with torch.inference_mode():
            assert torch.equal(model(token).logits, before[name])  # the harness leaves the models as they are
    assert scores["dense"]["last_word"]["acc"] > 0
    assert scores["globe"]["last_word"]["perplexity"] != scores["dense"]["last_word"]["perplexity"]
    again = run_tasks({"globe": models["globe"]}, SHIPPED, load_tasks(["last_word"], TASKS), limit=LIMIT)
    assert again["globe"]["last_word"] == scores["globe"]["last_word"]


def test_a_score_that_does_not_exist_is_null(lm_eval, models):
    """A single example has no standard error."""
    scores = run_tasks({"dense": models["dense"]}, SHIPPED, load_tasks(["last_word"], TASKS), limit=1)
    assert scores["dense"]["last_word"]["perplexity_stderr"] is None
    json.dumps(scores, allow_nan=False)


def test_a_model_that_gives_nan_has_no_score(lm_eval, models):
    tasks = load_tasks(["last_word_choice"], TASKS)
    broken = shared_copy(models["dense"])
    with torch.no_grad():
        broken.model.norm.weight = torch.nn.Parameter(torch.full_like(broken.model.norm.weight, float("nan")))
    with pytest.raises(GlobeError, match="^The broken model gives NaN as logits; restore its files.$"):
        run_tasks({"broken": broken}, SHIPPED, tasks, limit=2)
    assert not broken._forward_hooks


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match="^lm-eval is not installed; run `pip install lm-eval accelerate`, or"):
        load_tasks(["last_word"])


def test_a_task_that_does_not_exist(lm_eval, monkeypatch, tmp_path):
    tasks = importlib.import_module("lm_eval.tasks")
    # the thousands of tasks of lm-eval take seconds to read
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    with pytest.raises(RequestError, match="no task 'last_wrd'; close names are last_word, last_word_choice; list its"):
        load_tasks(["last_wrd"], TASKS)
    with pytest.raises(RequestError, match="no task 'zebra'; list its tasks with `lm-eval ls tasks`"):
        load_tasks(["last_word", "zebra"], TASKS)
    with pytest.raises(RequestError, match="missing is not a folder; give a folder with YAML files"):
        load_tasks(["last_word"], tmp_path / "missing")


def test_a_task_that_cannot_run(lm_eval, tmp_path):
    remote = "output_type: loglikelihood\ntest_split: test\ndoc_to_text: text\ndoc_to_target: word\n"
    (tmp_path / "remote.yaml").write_text(f"task: remote\ndataset_path: globe-moe/no-such-data\n{remote}")
    with pytest.raises(GlobeError, match=r"cannot load the task remote \(.*\); a data set that is not on this machine"):
        load_tasks(["remote"], tmp_path)
    for name in ("dataset.py", "last_word.jsonl", "last_word.yaml"):
        (tmp_path / name).write_text((TASKS / name).read_text(encoding="utf-8"), encoding="utf-8")
    with (tmp_path / "last_word.yaml").open("a", encoding="utf-8") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(RequestError, match="The task last_word needs images or sound, or runs code that the model"):
        load_tasks(["last_word"], tmp_path)


def test_the_script_writes_the_rows():
    spec = importlib.util.spec_from_file_location("make_rows", FOLDER / "make_rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.rows() == read_rows()
