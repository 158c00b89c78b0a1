"""Measure how large a cache of bases must be: hits and tokens/s in decode, over its share of all bases.

Routing is "real" (what the model chooses on a text, token by token), "zipf" (by rank to the power -1, a permutation of
its own for each layer) or "uniform". The layers alone run, one token at a time, all caches and composed in turns.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import summarise
from subjects import Subject, Variant, build, cache_of, experts_of

from globe_kernels import cache_stats, warm_cache
from globe_kernels.format.names import BANK_NAME
from globe_kernels.model.bank import DeviceBank
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.targets import globe_modules
from globe_kernels.testing import relative_errors

SHARES = (2.0, 5.0, 10.0, 25.0, 50.0, 100.0)
_WARM_UP = 192  # tokens before those that count
_COUNTED = 192
_GATE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Routing = list[
    tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]  # per layer hidden (T, D), experts (T, K), weights (T, K)


def measure_curve(subject: Subject, dtype: torch.dtype) -> list[dict]:
    """Return the rows. Raises SystemExit when a cache changes the results of the layers."""
    composed = build(subject, Variant("composed", "composed"), dtype)
    whole = build(subject, Variant("cached", "cached", cache_of(subject.config, 100, dtype.itemsize)), dtype)
    rows = []
    for name, routing in _routings(subject, dtype).items():
        caches = {share: _empty_cache(subject, whole, share) for share in SHARES}
        for token in range(_WARM_UP):
            for cache in caches.values():
                _step(whole, routing, token, cache)
        uses = cache_stats(whole).uses  # the same for each cache
        for cache in caches.values():
            cache.reset_stats()
        times: dict[float, list[float]] = {share: [] for share in (0.0, *SHARES)}  # 0: composed
        for token in range(_WARM_UP, _WARM_UP + _COUNTED):
            took, expected = _timed(composed, routing, token, None)
            times[0.0].append(took)
            for share, cache in caches.items():
                took, found = _timed(whole, routing, token, cache)
                times[share].append(took)
                if not (error := relative_errors(found, expected)[0]) <= _GATE[dtype]:
                    raise SystemExit(f"model: with a cache of {share:g} % the layers have relative error {error:.3g}.")
        base = summarise(times[0.0]).median_us
        for share, cache in caches.items():
            timing = summarise(times[share])
            rows.append(
                {
                    "op": "cache_curve",
                    "provider": name,
                    "shape": subject.shape | {"tokens": 1, "share": share},
                    **asdict(timing),
                    "tokens_per_s": 1e6 / timing.median_us,
                    "ratio_to_composed": base / timing.median_us,
                    "hit_rate": _hit_rate(cache),
                    "warm_hit_rate": _warm_hit_rate(subject, whole, routing, share, uses),
                }
            )
    return rows


def _routings(subject: Subject, dtype: torch.dtype) -> dict[str, Routing]:
    """Return {name: routing}; the inputs of all are the inputs of the model's layers on its tokens."""
    tokens = _WARM_UP + _COUNTED
    seen: Routing = []
    hooks = [
        experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        for experts in experts_of(subject.dense).values()
    ]
    subject.dense(subject.tokens[None, :tokens], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    real = [(hidden.to(dtype), index, weights.to(dtype)) for hidden, index, weights in seen]
    experts, device = subject.shape["experts"], subject.tokens.device
    found = {"real": real} if subject.is_text else {}
    by_rank = {"zipf": 1 / torch.arange(1, experts + 1, device=device), "uniform": torch.ones(experts, device=device)}
    for name, chances in by_rank.items():
        found[name] = []
        for hidden, index, weights in real:
            own = chances[torch.randperm(experts, device=device)].expand(tokens, experts)
            found[name].append((hidden, torch.multinomial(own, index.shape[1]), weights))
    return found


def _device_bank(model: Any) -> DeviceBank:
    """Return the only one: these models are on one device."""
    (device_bank,) = getattr(model, BANK_NAME).device_banks
    return device_bank


def _empty_cache(subject: Subject, model: Any, share: float) -> BasisCache:
    whole = _device_bank(model).cache
    assert whole is not None
    slots = max(1, round(share / 100 * subject.config.base.total_experts))
    _, rows, width = whole.pool.shape
    return BasisCache(whole.num_experts, slots, rows // 2, width, whole.pool.dtype, whole.pool.device)


def _step(model: Any, routing: Routing, token: int, cache: BasisCache | None) -> torch.Tensor:
    """Return the outputs (L, D) of all layers for one token."""
    if cache is not None:
        _device_bank(model).cache = cache
    own = slice(token, token + 1)
    modules = globe_modules(model).values()
    return torch.cat([module(*(part[own] for part in of)) for module, of in zip(modules, routing, strict=True)])


def _timed(model: Any, routing: Routing, token: int, cache: BasisCache | None) -> tuple[float, torch.Tensor]:
    """Microseconds and outputs of `_step`; a host that prepares the next layer meanwhile is a part of decoding."""
    if not routing[0][0].is_cuda:
        began = time.process_time()
        out = _step(model, routing, token, cache)
        return 1e6 * (time.process_time() - began), out
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = _step(model, routing, token, cache)
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop), out


def _hit_rate(cache: BasisCache) -> float:
    return cache.stats().hit_rate


def _warm_hit_rate(subject: Subject, model: Any, routing: Routing, share: float, uses: dict) -> float:
    """Return the hit rate of a cache that starts with the most used experts of the tokens before."""
    cache = _empty_cache(subject, model, share)
    _device_bank(model).cache = cache
    warm_cache(model, uses)
    for token in range(_WARM_UP, _WARM_UP + _COUNTED):
        _step(model, routing, token, cache)
    return _hit_rate(cache)


def draw(path: Path, rows: list[dict]) -> None:
    """Hit rate and tokens/s relative to composed, over the share of the bases that have a slot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    hits, speed = figure.subplots(1, 2)
    for color, name in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        own = [row for row in rows if row["provider"] == name]
        shares = [row["shape"]["share"] for row in own]
        hits.plot(shares, [row["hit_rate"] for row in own], "o-", color=f"C{color}", label=name)
        hits.plot(shares, [row["warm_hit_rate"] for row in own], "x:", color=f"C{color}", label=f"{name}, warmed")
        speed.plot(shares, [row["ratio_to_composed"] for row in own], "o-", color=f"C{color}", label=name)
    for axes, title in ((hits, "hit rate after the cold start"), (speed, "tokens/s of the MoE layers over composed")):
        axes.set(title=title, xlabel="slots, % of all bases", xscale="log", ylim=(0, None))
        axes.set_xticks(SHARES, [f"{share:g}" for share in SHARES])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    first = rows[0]
    figure.suptitle(f"{first['model']} on {first['device']}, T = 1, commit {first['commit']}", fontsize=11)
    figure.savefig(path, dpi=110)
