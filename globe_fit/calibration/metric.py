"""Make the metric of a calibrated fit from a text that the dense model runs over.

T tokens t, x_t the input of the experts of layer l. A token that is routed to expert i with router weight w_t gets
w_t V_i h(g, u) from this expert, g = W_gate x_t, u = W_up x_t, V_i the down matrix.

    C_l       = sum_t x_t x_t^T / T
    S_gate,ik = sum_t w_t^2 (dh_k / dg_k)^2 ||V_i[:, k]||^2        S_up,ik the same with dh_k / du_k
    d_ik      = sqrt(S_ik / mean of S over the experts and rows of layer l) + 0.1
    L_l L_l^T = C_l / mean(diag C_l) + 0.1 I

    minimise  sum_ik d_ik || (W_i - What_i)_k L_l ||^2

The sum approximates the error of the outputs of the experts, by a diagonal Gauss-Newton (Fisher-like) weighting: an
error e of row k moves the output for token t by w_t (dh_k/dg_k) (e x_t) V_i[:, k]. S holds the part of the square that
depends on the row, C_l the part that depends on the direction, as if the two were independent; how errors of different
rows add up is left out. The square root of S was measured to be better than S.

d and L are relative to their layer, so that layers weigh as they do in a fit without a text. Both are shrunk, because a
finite text says nothing of some directions and hardly reaches some experts. All experts of a layer share C_l, which is
never averaged over layers.

Where the user has no text, the model writes it (globe_fit.calibration.self_text), which takes no data at all.

Of several ranks the first runs the model and sends the sums, a layer in three messages: C_l in D^2 values, and S in E P
values of each family.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from globe_fit.calibration.moments import OnBatch, Sums, collect
from globe_fit.calibration.offload import plan_run
from globe_fit.calibration.self_text import sample_windows
from globe_fit.config import AUTO, SELF
from globe_fit.data.model import WINDOW, load_model, token_windows
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import ErrorMetric
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.run.snapshots import Snapshots
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.files import sha256
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.writing import require_room
from globe_kernels.units import format_bytes

_NAME = "calibration"
_SHRINKAGE = 0.1  # of C_l
_LEAST_ROW_WEIGHT = 0.1
_OFFLOADED = "offload-"
_TEXT = "text"  # that the model wrote: tokens (N, WINDOW)

Result = TypeVar("Result")
# model, source, batches of windows, device, on_batch -> result
Collector = Callable[[Any, ExpertSource, Sequence[torch.Tensor], str, OnBatch | None], Result]


@dataclass(frozen=True)
class Calibration:
    """The text of a calibrated fit and the sums over it."""

    text: str  # name of the file, for people, or SELF
    sha256: str | None  # of the file; None for SELF
    tokens: int
    sums: dict[int, Sums]  # by layer id, on the CPU

    def metrics(self, device: str) -> dict[str, ErrorMetric]:
        """Return {family: the metric of its fit} on `device`; the families share the roots."""
        roots = {layer: metric_root(sums.moment).to(device) for layer, sums in self.sums.items()}
        rows = {family: [row_weights(sums.rows[family]) for sums in self.sums.values()] for family in FAMILIES}
        return {family: ErrorMetric(roots, torch.cat(rows[family]).sqrt().to(device)) for family in FAMILIES}

    @property
    def facts(self) -> dict:
        """Return the text and its size, in JSON types, for the configuration of the fit."""
        return {"text": self.text, "sha256": self.sha256, "tokens": self.tokens}


def calibrate(
    source: ExpertSource,
    text: str | Path,
    device: str = "cpu",
    *,
    memory_limit: float | None = None,
    snapshots: Snapshots | None = None,
    on_batch: OnBatch | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Run the dense model of `source` on `device` once over a text file, or over a text that it writes (SELF).

    A model that does not fit into `memory_limit` bytes, or into the available memory, is read from disk layer by layer
    for every batch, and `say` gets a sentence about it; such a model cannot write. With `snapshots`, the sums that an
    interrupted fit had collected are taken over. All `ranks` call this together and get the same. Raises RequestError
    for a text that is missing or too short and for too little memory, GlobeError for a model whose inputs are not
    finite.
    """
    saved = None if snapshots is None else snapshots.load(_NAME)
    found = None if saved is None else _loaded(*saved)
    ((is_saved,), *_) = ranks.every(found is not None)  # a kill may have left the first rank's part alone
    if not is_saved:

        def run(beat: Callable[[], object]) -> Calibration:
            def on_every_batch(number: int, total: int) -> None:
                beat()
                if on_batch is not None:
                    on_batch(number, total)

            return _collected(source, text, device, memory_limit, snapshots, on_every_batch, say)

        found = ranks.on_first(run)
        if snapshots is not None:
            snapshots.save(_NAME, 0, *_saved(found))
    return _sent(found, source, Path(text).name, _sha256(text), ranks)


def _collected(
    source: ExpertSource,
    text: str | Path,
    device: str,
    memory_limit: float | None,
    snapshots: Snapshots | None,
    on_batch: OnBatch,
    say: Callable[[str], None],
) -> Calibration:
    """Run the dense model over the text, and require finite sums."""
    sums, tokens = run_over(
        source, text, device, collect, memory_limit=memory_limit, snapshots=snapshots, on_batch=on_batch, say=say
    )
    for layer, of_layer in sums.items():
        if not all(torch.isfinite(tensor).all() for tensor in (of_layer.moment, *of_layer.rows.values())):
            raise GlobeError(
                f"The inputs of the experts of layer {layer} are not finite on {text}; calibrate on another text."
            )
    return Calibration(Path(text).name, _sha256(text), tokens, sums)


def _saved(calibration: Calibration | None) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and facts of a snapshot; of a rank without the sums an empty one."""
    if calibration is None:
        return {}, {}
    sums = calibration.sums
    tensors = {f"{layer}.moment": of_layer.moment for layer, of_layer in sums.items()}
    tensors |= {f"{layer}.{f}": of_layer.rows[f] for layer, of_layer in sums.items() for f in FAMILIES}
    return tensors, {"calibration": calibration.facts, "layers": list(sums)}


def _loaded(tensors: dict[str, torch.Tensor], facts: dict) -> Calibration | None:
    """Return the calibration of a snapshot; None of a rank that saved an empty one."""
    if not tensors:
        return None
    sums = {
        layer: Sums(tensors[f"{layer}.moment"], {family: tensors[f"{layer}.{family}"] for family in FAMILIES})
        for layer in facts["layers"]
    }
    return Calibration(**facts["calibration"], sums=sums)


def _sent(found: Calibration | None, source: ExpertSource, text: str, digest: str | None, ranks: Ranks) -> Calibration:
    """Return the calibration of the first rank, which the others do not have."""
    if found is None:
        base, sums = source.base, {}
        for layer, experts in base.num_experts.items():
            rows = {family: torch.empty(experts, base.intermediate_size) for family in FAMILIES}
            sums[layer] = Sums(torch.empty(base.hidden_size, base.hidden_size), rows)
        found = Calibration(text, digest, 0, sums)
    for of_layer in found.sums.values():
        for tensor in (of_layer.moment, *of_layer.rows.values()):
            ranks.from_first(tensor)
    ((tokens,), *_) = ranks.every(found.tokens)
    return replace(found, tokens=int(tokens))


def run_over(
    source: ExpertSource,
    text: str | Path,
    device: str,
    collector: Collector[Result],
    *,
    most_windows: int | None = None,
    memory_limit: float | None = None,
    snapshots: Snapshots | None = None,
    on_batch: OnBatch = lambda number, total: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[Result, int]:
    """Run the dense model once over a text as `calibrate` does; return what `collector` collects, and the tokens.

    Of a text file with more than `most_windows` windows, so many of them, spread evenly, are taken.
    """
    if text == SELF:
        return _run_over_self_text(source, device, collector, memory_limit, snapshots, on_batch)
    windows = token_windows(source.model_dir, text)
    if most_windows is not None and len(windows) > most_windows:
        windows = windows[torch.linspace(0, len(windows) - 1, most_windows).long()]
    return _run(source, windows, device, collector, memory_limit, snapshots, on_batch, say), windows.numel()


def require_text(text: str | Path) -> None:
    """Require a file or SELF; raise RequestError otherwise."""
    if text not in (SELF, AUTO) and not Path(text).is_file():
        raise RequestError(
            f'{text} is not a file; give a text file to calibrate on, or "{SELF}" for a text that the model writes.'
        )


def identity(text: str | Path) -> str:
    """Return a string that tells a text to calibrate on from any other."""
    return _sha256(text) or SELF


def _sha256(text: str | Path) -> str | None:
    """Hash the file; None for SELF."""
    return None if text == SELF else sha256(Path(text))


def _run_over_self_text(
    source: ExpertSource,
    device: str,
    collector: Collector[Result],
    memory_limit: float | None,
    snapshots: Snapshots | None,
    on_batch: OnBatch,
) -> tuple[Result, int]:
    """Let the model write a text, unless the snapshots have it; return the result over it and its number of tokens."""
    plan = plan_run(source, device, memory_limit, writes=True)
    model = load_model(source.model_dir, device)
    done = 0  # batches that were written; collecting them counts as much again

    def on_written(number: int, total: int) -> None:
        nonlocal done
        done = total
        on_batch(number, 2 * total)

    def on_collected(number: int, total: int) -> None:
        on_batch(done + done * number // total, 2 * done) if done else on_batch(number, total)

    saved = None if snapshots is None else snapshots.load(_TEXT)
    windows = sample_windows(model, WINDOW, device, on_batch=on_written) if saved is None else saved[0][_TEXT]
    if snapshots is not None and saved is None and snapshots.of_one_rank:  # healing, on one rank, runs over it again
        snapshots.save(_TEXT, 0, {_TEXT: windows}, {})
    return collector(model, source, windows.split(plan.windows), device, on_collected), windows.numel()


def _run(
    source: ExpertSource,
    windows: torch.Tensor,
    device: str,
    collector: Collector[Result],
    memory_limit: float | None,
    snapshots: Snapshots | None,
    on_batch: OnBatch,
    say: Callable[[str], None],
) -> Result:
    """Return the result over the windows of a text, in memory or from disk as the memory allows."""
    plan = plan_run(source, device, memory_limit)
    batches = windows.split(plan.windows)
    if not plan.offload:
        return collector(load_model(source.model_dir, device), source, batches, device, on_batch)
    say(
        f"Running {source.base.name} over the text in memory needs {format_bytes(plan.in_memory_bytes)} and "
        f"{format_bytes(plan.available_bytes)} may be used; its layers are read from disk, once per batch "
        f"({len(batches)})."
    )
    with _offload_folder(snapshots) as folder:
        require_room(folder, plan.rewritten_bytes)
        model = load_model(source.model_dir, device, offload_folder=folder)
        return collector(model, source, batches, device, on_batch)


@contextmanager
def _offload_folder(snapshots: Snapshots | None) -> Iterator[Path]:
    """Make a folder for this run alone; beside the snapshots where there are any, on a disk that has room."""
    if snapshots is not None:
        snapshots.directory.mkdir(parents=True, exist_ok=True)
        for left in snapshots.directory.glob(f"{_OFFLOADED}*"):  # a killed run left them
            rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_OFFLOADED, dir=None if snapshots is None else snapshots.directory) as folder:
        yield Path(folder)


def metric_root(moment: torch.Tensor) -> torch.Tensor:
    """Return lower triangular L (D, D) float32 with L L^T = C / mean(diag C) + 0.1 I, for the moment C (D, D)."""
    moment = moment.double()
    level = moment.diagonal().mean()
    shrunk = moment / torch.where(level > 0, level, 1.0)
    shrunk.diagonal().add_(_SHRINKAGE)
    return torch.linalg.cholesky(shrunk).float()


def row_weights(sensitivities: torch.Tensor) -> torch.Tensor:
    """Return d (E, P) float32 of one layer and family from S (E, P); ones where the text reaches no expert."""
    level = sensitivities.double().mean()
    if level == 0:
        return torch.ones_like(sensitivities)
    return (sensitivities.double() / level).sqrt().add_(_LEAST_ROW_WEIGHT).float()
