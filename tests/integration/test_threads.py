"""One patched model in a server: threads that call it, change it and copy it, calls that are interrupted, forks."""

import copy
import itertools
import os
import pickle
import random
import signal
import sys
import threading

import pytest
import torch

import globe_kernels
from globe_kernels import RequestError
from globe_kernels.model import calls
from globe_kernels.model.targets import globe_modules
from globe_kernels.testing import tiny_model
from tests.integration.test_strategies import RUNS, logits, patched
from tests.threads import together

PROMPTS = list(torch.randint(128, (4, 1, 3), generator=torch.Generator().manual_seed(1)))
SMALL = "cached, a slot per active expert"
ROUNDS = 8


@pytest.fixture
def path(fit_tiny):
    return fit_tiny("qwen3_moe")[0]


def alone(model) -> list[torch.Tensor]:
    """The logits of each prompt, which differ from prompt to prompt."""
    found = [logits(model, prompt) for prompt in PROMPTS]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(found, 2))
    return found


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


def calling(model, expected: list[torch.Tensor], rounds: int = ROUNDS):
    """A thread's work: prompts in an order of its own, each compared with its logits alone."""

    def work(number: int) -> None:
        order = random.Random(number)
        for _ in range(rounds):
            prompt = order.randrange(len(PROMPTS))
            assert near(logits(model, PROMPTS[prompt]), expected[prompt]), f"thread {number}, prompt {prompt}"

    return work


def calls_while(change, model, expected: list[torch.Tensor], callers: int = 2) -> None:
    """Threads call the model for as long as another thread runs `change`."""
    changed = threading.Event()

    def work(number: int) -> None:
        if number == callers:
            try:
                change()
            finally:
                changed.set()
        else:
            while not changed.is_set():
                calling(model, expected, 1)(number)

    together(work, callers + 1)


@pytest.mark.parametrize("run", list(RUNS))
def test_every_call_has_the_logits_that_it_has_alone(run, path):
    model = patched(path, run=run)
    expected = alone(model)
    together(calling(model, expected), 4)
    assert all(near(found, once) for found, once in zip(alone(model), expected, strict=True)), "nor after"


def test_auto_with_calls_of_different_lengths(path):
    """Calls that take different strategies of one model, which share a device bank."""
    model = tiny_model("qwen3_moe")
    globe_kernels.patch(model, path, cache_bytes="60kB")
    prompts = [torch.randint(128, (1, tokens)) for tokens in (1, 2, 40, 300)]
    expected = [logits(model, prompt) for prompt in prompts]

    def work(number: int) -> None:
        for _ in range(4):
            assert near(logits(model, prompts[number]), expected[number])

    together(work, 4)


def test_two_models_and_a_copy_in_one_pool_of_threads(path):
    first, second = patched(path, run=SMALL), patched(path, run="cached, a quarter")
    models = [first, second, copy.deepcopy(first)]
    expected = alone(patched(path))
    together(lambda number: calling(models[number % 3], expected)(number), 6)


@pytest.mark.parametrize("run", [SMALL, "scratch"])
def test_generation_in_threads(run, path):
    model = patched(path, run=run)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [model.generate(prompt, **settings) for prompt in PROMPTS]
    assert len({tuple(tokens[0, 3:].tolist()) for tokens in expected}) > 1

    def work(number: int) -> None:
        for _ in range(2):
            assert torch.equal(model.generate(PROMPTS[number], **settings), expected[number])

    together(work, 4)


def test_calls_are_counted_one_by_one(path):
    model, before = patched(path), globe_kernels.call_counts().get("moe_ffn_ref", 0)
    together(calling(model, [logits(model, prompt) for prompt in PROMPTS]), 4)
    layers = len(globe_modules(model))
    assert globe_kernels.call_counts()["moe_ffn_ref"] - before == layers * (len(PROMPTS) + 4 * ROUNDS)


@pytest.mark.filterwarnings("ignore:A layer of this checkpoint uses")
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its decoder alone"])
def test_the_strategy_changes_while_threads_call(whole, path):
    model = patched(path, run=SMALL)
    part = model if whole else model.model

    def run(prompt: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return part(prompt)[0]

    expected, changed = [run(prompt) for prompt in PROMPTS], threading.Event()

    def work(number: int) -> None:
        if number == 2:
            try:
                for strategy in ("composed", "scratch", "cached", "bank_first", "cached", "auto"):
                    globe_kernels.set_strategy(model, strategy)
            finally:
                changed.set()
        while not changed.is_set():
            assert near(run(PROMPTS[number]), expected[number])

    together(work, 3)


def test_statistics_warm_ups_and_explanations_while_threads_call(path):
    model = patched(path, run=SMALL)
    expected = alone(model)

    def change() -> None:
        for _ in range(6):
            stats = globe_kernels.cache_stats(model)
            assert stats.hits + stats.misses == sum(int(uses.sum()) for uses in stats.uses.values())
            globe_kernels.warm_cache(model, stats.uses)
            model.globe_bank.caches[0].clear()
            assert "taken" in str(globe_kernels.explain(model, 4))

    calls_while(change, model, expected)


def test_weights_are_loaded_while_threads_call(path):
    model = patched(path, run=SMALL)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls_while(lambda: [model.load_state_dict(state) for _ in range(3)], model, alone(model))


def test_copies_are_made_while_threads_call(path):
    model = patched(path, run=SMALL)
    expected = alone(model)

    def change() -> None:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            calling(twin, expected, 3)(0)

    calls_while(change, model, expected)


def test_patch_and_unpatch_while_threads_call(path):
    """A call runs on dense experts or on GloBE experts, never on some of both."""
    model = tiny_model("qwen3_moe")
    dense, globe = alone(model), alone(patched(path, run=SMALL))
    found: list[set[int]] = [set(), set()]
    changed = threading.Event()

    def work(number: int) -> None:
        if number == 2:
            try:
                for _ in range(4):
                    globe_kernels.patch(model, path, strategy="cached", keep_dense=True)
                    assert near(logits(model, PROMPTS[2]), globe[2])
                    globe_kernels.unpatch(model)
                    assert near(logits(model, PROMPTS[2]), dense[2])
            finally:
                changed.set()
        while not changed.is_set():
            logit = logits(model, PROMPTS[number])
            kinds = [near(logit, expected[number]) for expected in (dense, globe)]
            assert any(kinds), "a mixture"
            found[number].add(kinds.index(True))

    together(work, 3)
    assert found[0] and found[1]
    assert not model._forward_hooks and not model._forward_pre_hooks, "unpatch leaves nothing behind"


def test_a_patch_that_fails_leaves_no_hooks(path, tmp_path):
    model = tiny_model("qwen3_moe", hidden_size=32)
    for place in (tmp_path, path):
        with pytest.raises(globe_kernels.GlobeError):
            globe_kernels.patch(model, place)
    with pytest.raises(RequestError, match="memory budget"):
        globe_kernels.patch(other := tiny_model("qwen3_moe"), path, memory_budget=1000)
    assert not any(it._forward_hooks or it._forward_pre_hooks for it in (model, other))


def test_a_change_gives_up_on_calls_that_do_not_end(path, monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.05)
    model = patched(path, run=SMALL, keep_dense=True)
    expected, inside, leave = alone(model), threading.Event(), threading.Event()

    def stay(*_) -> None:
        inside.set()
        leave.wait(20)

    def work(number: int) -> None:
        if number == 0:
            handle = model.model.layers[1].register_forward_pre_hook(stay)
            assert near(logits(model, PROMPTS[0]), expected[0])
            handle.remove()
            return
        inside.wait(20)
        try:
            with pytest.raises(RequestError, match="within calls of this model for 0 seconds"):
                globe_kernels.unpatch(model)
        finally:
            leave.set()

    together(work, 2)
    assert model.globe_bank.arrangement.strategies == ("cached",)
    assert near(logits(model, PROMPTS[0]), expected[0])


def test_calls_wait_for_a_change_and_a_change_for_another(path):
    model = patched(path, run=SMALL)
    order, inside = [], threading.Event()

    def work(number: int) -> None:
        if number == 0:
            with model.globe_bank.calls.change(globe_modules(model).values()):
                inside.set()
                threading.Event().wait(0.1)
                order.append("change")
            return
        inside.wait(20)
        if number == 1:
            logits(model, PROMPTS[0])
        else:
            globe_kernels.set_strategy(model, "composed")
        order.append("other")

    together(work, 3)
    assert order[0] == "change" and len(order) == 3


@pytest.mark.parametrize("run", [SMALL, "scratch", "composed"])
@pytest.mark.parametrize("where", ["attention", "experts"])
def test_an_interrupted_call_leaves_the_model_as_it_was(where, run, path, monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.05)
    model = patched(path, run=run)
    expected = alone(model)
    layer = model.model.layers[1]
    part = layer.self_attn if where == "attention" else layer.mlp.experts

    def stopping(*_) -> None:
        raise KeyboardInterrupt

    for hook in (part.register_forward_pre_hook, part.register_forward_hook):
        handle = hook(stopping)
        with pytest.raises(KeyboardInterrupt):
            logits(model, PROMPTS[0])
        handle.remove()
    globe_kernels.set_strategy(model, "composed")
    globe_kernels.set_strategy(model, "cached")
    assert all(near(found, once) for found, once in zip(alone(model), expected, strict=True))
    together(lambda _: globe_kernels.set_strategy(model, "scratch"), 1)
    together(calling(model, expected, 3), 2)


def test_out_of_memory_in_a_call(path, monkeypatch):
    from globe_kernels.ops import compose_slots

    model = patched(path, run=SMALL)
    expected, real, left = alone(model), compose_slots.compose_basis_ref, itertools.count()

    def failing(*args):
        if next(left) % 5 == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    with monkeypatch.context() as patches:
        patches.setattr(compose_slots, "compose_basis_ref", failing)
        for prompt in PROMPTS * 2:
            with pytest.raises(torch.OutOfMemoryError):
                logits(model, prompt)
    assert all(near(found, once) for found, once in zip(alone(model), expected, strict=True))


@pytest.mark.filterwarnings("ignore:A layer of this checkpoint uses")
@pytest.mark.parametrize("run", [run for run in RUNS if "all bases" not in run])
@pytest.mark.parametrize("used", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_strategy_that_is_set_in_inference_mode_serves_in_every_mode(used, run, path):
    expected = logits(patched(path, run=run), PROMPTS[0])
    model = patched(path)
    with torch.inference_mode():
        globe_kernels.set_strategy(model, RUNS[run][0])
        model(PROMPTS[0])
    with used():
        assert near(model(PROMPTS[0]).logits, expected)
        model.load_state_dict(patched(path).state_dict())
        assert near(model(PROMPTS[0]).logits, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_fork_while_another_thread_has_every_lock(path):
    """As a DataLoader does it, whose workers may tokenise or score with the model."""
    model = patched(path, run=SMALL)
    expected = alone(model)
    inside, leave = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            bank = model.globe_bank
            with bank.calls.change([model]), bank.caches[0].turn() as state:
                state.slot_of.fill_(0)  # half a lookup
                inside.set()
                leave.wait(20)
                raise KeyboardInterrupt
        inside.wait(20)
        if (child := os.fork()) == 0:
            signal.alarm(20)
            os._exit(0 if all(near(found, once) for found, once in zip(alone(model), expected, strict=True)) else 1)
        _, status = os.waitpid(child, 0)
        leave.set()
        assert status == 0

    with pytest.raises(KeyboardInterrupt):
        together(work, 2)
    assert all(near(found, once) for found, once in zip(alone(model), expected, strict=True))


def replicas(model, devices: list[str], monkeypatch) -> list:
    """As nn.DataParallel makes them; torch broadcasts between GPUs alone."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, *_, **__: [[tensor.detach().to(device) for tensor in tensors] for device in devices],
    )
    return torch.nn.parallel.replicate(model, list(range(len(devices))), detach=True)


@pytest.mark.parametrize("run", list(RUNS))
def test_replicas_on_one_device_share_the_experts(run, path, monkeypatch):
    model = patched(path, run=run)
    expected = alone(model)
    twins = replicas(model, ["cpu", "cpu"], monkeypatch)
    together(lambda number: calling(twins[number % 2], expected, 4)(number), 4)


@pytest.mark.filterwarnings("ignore:A layer of this checkpoint uses")
@pytest.mark.parametrize("run", [SMALL, "scratch", "bank_first"])
def test_a_replica_on_another_device_is_refused(run, path, monkeypatch):
    experts = next(iter(globe_modules(replicas(patched(path, run=run), ["cpu", "meta"], monkeypatch)[1]).values()))
    routed = (torch.zeros(3, 64), torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))
    with pytest.raises(RequestError, match=r"runs on meta and its atoms are on cpu; .*for nn.DataParallel use"):
        experts(*(tensor.to("meta") for tensor in routed))
