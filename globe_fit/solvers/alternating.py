"""Fit by the classic recipe, corrected: codes and bank take turns, the adapters are eliminated.

Codes and atoms can only be estimated on targets in the coordinates of the bank. The coordinates of separate factors
W_i = A_i X_i are arbitrary: X_i and T X_i describe the same expert for any invertible T. Two kinds of step avoid them:

  in the metric of the adapters   A_i solves least squares on the present Bhat_i, so it is in the coordinates of the
                                  bank by construction; the steps lower sum_i || W_i - A_i sum_j a_ij B_j ||^2, and the
                                  eliminated objective, which is at most this sum, never rises
  on aligned targets              X_i = Q_i^T W_i with Q_i^T Q_i = I nearest to W_i (orthogonal Procrustes: the polar
                                  factor of W_i Bhat_i^T; Schoenemann, 1966); an error of X_i is then
                                  an error of W_i

The solver holds only the codes per expert; every block of a pass makes its adapters and targets again.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from globe_fit.config import AlternatingConfig
from globe_fit.data.stream import Block, FamilyWeights
from globe_fit.linalg import SingularBasisError, solve_spd
from globe_fit.solvers.base import BankState, Pass, code_index, steps_before_fixing, support_index
from globe_fit.solvers.coding import (
    entmax,
    entmax_scores,
    masked_least_squares,
    matching_pursuit,
    next_temperature,
    non_negative,
    on_simplex,
    require_entmax,
)
from globe_fit.solvers.dictionary import (
    RIDGE,
    OptimalDirections,
    Projected,
    add_gradient,
    add_image,
    atom_by_atom,
    exact_step,
    independent,
    normalise_atoms,
    project,
)
from globe_fit.solvers.objective import backward_block, eliminated_error
from globe_fit.solvers.start import allowed_atoms, separate_factors
from globe_fit.solvers.support import fix_support
from globe_kernels.format.checkpoint import GlobeConfig

_PLATEAU = 1e-3  # a larger gain of the error starts the count of `patience` again


class Alternating:
    """The solver; it changes `state` in place, and a step is a round of codes, bank and norms.

    Once the support is fixed, no expert has more atoms than its support and no layer more than its palette.
    """

    def __init__(self, weights: FamilyWeights, state: BankState, sizes: GlobeConfig, config: AlternatingConfig):
        self.state, self._weights, self._sizes, self._config = state, weights, sizes, config
        self._allowed = allowed_atoms(sizes.base, sizes.num_atoms, sizes.scope).to(state.codes.device)
        self._step, self._fixed, self.finished = 0, False, False
        self._reference, self._quiet = math.inf, 0
        self._support = state.codes != 0
        self.extras = {"ridge_raised": 0.0}
        if config.dictionary == "mod":
            self.extras["dictionary_condition"] = 1.0
        self._soft = config.coding.method == "entmax"
        if self._soft or config.coding.initial == "simplex":
            require_entmax()
        if self._soft:
            self.extras["temperature"] = 1.0
            self._scores = torch.zeros_like(state.codes, requires_grad=True)
            self._scale = torch.ones_like(state.codes[0])  # of the codes of each atom: the simplex has none
            self._adam = torch.optim.Adam([self._scores], lr=config.entmax.lr, fused=True)

    def _fix(self) -> None:
        self._allowed = fix_support(self.state, self._allowed, self._sizes, self._weights.ranks)
        self._fixed = True

    def evaluate(self) -> float:
        if not self._fixed and self._step >= self._config.support_at * self._config.steps:
            self._fix()
        try:
            error = eliminated_error(self._weights, self.state, code_index(self.state.codes != 0), RIDGE)
        except SingularBasisError:
            return math.nan
        support = self.state.codes != 0
        self._quiet += 1
        if error < (1 - _PLATEAU) * self._reference or not torch.equal(support, self._support):
            self._reference, self._quiet, self._support = error, 0, support
        self.finished = self._fixed and self._quiet >= self._config.patience
        return error

    def update(self) -> None:
        try:
            self._round()
        except (SingularBasisError, torch.linalg.LinAlgError):  # type: ignore[reportPrivateImportUsage]
            # the round is not finished: nobody may go on from this state, also not after an interruption
            self.state.bank.fill_(torch.nan)
        self._step += 1

    def _round(self) -> None:
        config, entmax_config = self._config, self._config.entmax
        if self._step == 0:
            self._initial_codes()
        if self._soft and not self._fixed:
            self._entmax_steps()
        with torch.no_grad():
            if config.dictionary == "mod":
                self._round_on_targets()
            else:
                self._round_in_the_metric()
            factors = normalise_atoms(self.state, self._weights.ranks)
        if self._soft and not self._fixed:
            self._scale *= factors
            if (self._step + 1) % entmax_config.every == 0:
                median = (self.state.codes != 0).sum(1).median().item()
                self.extras["temperature"] = next_temperature(
                    self.extras["temperature"], median, self._sizes.support, entmax_config.eta
                )

    def _targets(self, block: Block) -> tuple[slice, torch.Tensor]:
        """Return the span of a block and the targets (E, R, D) of its mixtures."""
        if self._config.targets == "aligned":
            cross = block.weights @ self.state.basis(block.span).mT
            self._weights.ranks.all_sum(cross)
            left, _, right = torch.linalg.svd(cross, full_matrices=False)
            return block.span, (left @ right).mT @ block.weights
        if self._step == 0:
            return block.span, separate_factors(self._weights, block.weights, self._sizes.rank)
        seen = self._project(block)
        return block.span, solve_spd(seen.gram, seen.cross)[0]

    def _project(self, block: Block) -> Projected:
        return project(block, self.state, self._weights.ranks)

    def _target_passes(self) -> Iterable[tuple[slice, torch.Tensor]]:
        return map(self._targets, self._weights.normalised())

    def _metric_passes(self) -> Iterable[Projected]:
        return map(self._project, self._weights.normalised())

    @torch.no_grad()
    def _initial_codes(self) -> None:
        state, coding = self.state, self._config.coding
        slack = (-state.codes).clamp_min(0)
        if coding.initial != "given":
            atoms = state.bank.flatten(1)
            cross = torch.zeros_like(state.codes)
            for span, targets in self._target_passes():
                cross[span] = targets.flatten(1) @ atoms.mT
            gram = self._atom_gram()
            self._weights.ranks.all_sum(cross)
            if coding.initial == "nnls":
                l1 = coding.l1 * cross.amax(1, keepdim=True)
                codes, slack = non_negative(gram, cross, self._allowed, l1)
            else:
                codes, slack = on_simplex(gram, cross, self._allowed)
            state.codes.copy_(self._pruned(codes))
        if self._soft:
            self._scores.copy_(entmax_scores(state.codes.clamp_min(0), slack, self._config.entmax.alpha))

    def _pruned(self, codes: torch.Tensor) -> torch.Tensor:
        size = codes.abs()
        return codes * (size >= self._config.coding.prune * size.amax(1, keepdim=True))

    def _soft_codes(self) -> torch.Tensor:
        scores = (self._scores / self.extras["temperature"]).masked_fill(~self._allowed, -torch.inf)
        return self._pruned(entmax(scores, self._config.entmax.alpha) * self._scale)

    def _entmax_steps(self) -> None:
        """Take Adam steps on the scores; the loss is the eliminated error and `l1` times the mean sum of the codes."""
        for _ in range(self._config.entmax.steps):
            codes = self._soft_codes()
            leaf = codes.detach().requires_grad_()
            state = BankState(self.state.bank, leaf, self.state.phi)
            eliminated_error(self._weights, state, code_index(leaf != 0), RIDGE)
            assert leaf.grad is not None
            self._adam.zero_grad(set_to_none=True)
            codes.backward(leaf.grad + self._config.coding.l1 / len(codes))
            self._adam.step()
        self.state.codes.copy_(self._soft_codes().detach())

    def _round_on_targets(self) -> None:
        directions, gram = OptimalDirections(self.state), self._atom_gram()
        for span, targets in self._target_passes():
            self._code_on_targets(span, targets, gram)
            directions.add(span, targets)
        raised, self.extras["dictionary_condition"] = directions.step()
        self.extras["ridge_raised"] += raised

    def _round_in_the_metric(self) -> None:
        config, ranks = self._config, self._weights.ranks
        if config.coding.method == "omp" and not self._fixed:
            gram = self._atom_gram()
            for span, targets in self._target_passes():
                self._code_on_targets(span, targets, gram)
        elif not self._soft or self._fixed:
            for seen in self._metric_passes():
                self._code_in_the_metric(seen)
        if config.dictionary == "exact":
            self.extras["ridge_raised"] += exact_step(self.state, self._metric_passes, config.cg_steps, ranks)
        else:
            self.extras["ridge_raised"] += atom_by_atom(self.state, self._metric_passes)

    def _atom_gram(self) -> torch.Tensor:
        """Return <B_j, B_k> (M, M)."""
        atoms = self.state.bank.flatten(1)
        gram = atoms @ atoms.mT
        self._weights.ranks.all_sum(gram)
        return gram

    def _code_on_targets(self, span: slice, targets: torch.Tensor, gram: torch.Tensor) -> None:
        if self._soft and not self._fixed:
            return
        cross = targets.flatten(1) @ self.state.bank.flatten(1).mT
        self._weights.ranks.all_sum(cross)
        if self._config.coding.method == "omp" and not self._fixed:
            codes = matching_pursuit(gram, cross, self._allowed[span], self._sizes.support)
        else:
            index, valid = support_index(self._kept(span))
            of_support = gram[index[:, :, None], index[:, None, :]]
            codes = self._least_squares(of_support, cross.gather(1, index), span, index, valid)
        self.state.codes[span] = codes

    def _code_in_the_metric(self, seen: Projected) -> None:
        """Solve for the codes of a block with gram_jk = <B_j, G_i B_k>, cross_j = <B_j, C_i> over each support."""
        index, valid = support_index(self._kept(seen.span))
        gram = seen.gram.new_empty(*index.shape, index.shape[1])
        cross = seen.gram.new_empty(index.shape)
        for expert, support in enumerate(index):  # expert by expert: a support of atoms is as large as S bases
            atoms = self.state.bank[support]
            gram[expert] = atoms.flatten(1) @ (seen.gram[expert] @ atoms).flatten(1).mT
            cross[expert] = atoms.flatten(1) @ seen.cross[expert].flatten()
        self._weights.ranks.all_sum(gram, cross)
        self.state.codes[seen.span] = self._least_squares(gram, cross, seen.span, index, valid)

    def _kept(self, span: slice) -> torch.Tensor:
        return self._allowed[span] if self._fixed else self.state.codes[span] != 0

    def _least_squares(
        self, gram: torch.Tensor, cross: torch.Tensor, span: slice, index: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        codes, raised = masked_least_squares(gram, cross, self.state.codes[span], index, valid)
        self.extras["ridge_raised"] += raised
        return codes if self._fixed else self._pruned(codes)

    @torch.no_grad()
    def passes(self) -> Iterator[Pass]:
        config, codes, atoms = self._config, self.state.codes, self.state.bank.flatten(1)
        free = steps_before_fixing(config.steps, config.support_at)
        yield Pass(1, self._evaluation(self.state))
        if config.steps > 0 and config.coding.initial != "given":
            yield Pass(1, lambda block: self._targets(block)[1].flatten(1) @ atoms.mT)
            codes.clamp_min_(0)  # non-negative least squares would give these codes if the atoms were orthogonal
        if self._soft:
            self._scores.copy_(entmax_scores(codes.clamp_min(0), torch.zeros_like(codes), config.entmax.alpha))
        self._step = 1
        yield from self._passes_of_rounds(free)
        self._fix()
        yield from self._passes_of_rounds(config.steps - free)

    def _passes_of_rounds(self, rounds: int) -> Iterator[Pass]:
        """Yield the passes of `rounds` rounds, all before or all after the support is fixed."""
        config, state, soft = self._config, self.state, self._soft and not self._fixed
        yield Pass(rounds, self._evaluation(state))
        if soft:
            with_gradient = BankState(state.bank, self._soft_codes().detach().requires_grad_(), state.phi)
            yield Pass(rounds * config.entmax.steps, self._evaluation(with_gradient))
        gram = torch.eye(len(state.bank), device=state.bank.device)
        if config.dictionary == "mod":
            directions = OptimalDirections(state)

            def visit(block: Block) -> None:
                span, targets = self._targets(block)
                self._code_on_targets(span, targets, gram)
                directions.add(span, targets)

            yield Pass(rounds, visit)
            return
        if config.coding.method == "omp" and not self._fixed:
            yield Pass(rounds, lambda block: self._code_on_targets(*self._targets(block), gram))
        elif not soft:
            yield Pass(rounds, lambda block: self._code_in_the_metric(self._project(block)))
        exact, batches = config.dictionary == "exact", independent(state.codes != 0)
        codes = state.codes if exact else state.codes[:, batches[0]]
        residual = torch.zeros_like(state.bank[: codes.shape[1]])
        curvature = residual.new_zeros(len(residual), residual.shape[1], residual.shape[1])
        count = rounds if exact else rounds * len(batches)
        yield Pass(
            count,
            lambda block: add_gradient(self._project(block), state, codes, residual, curvature),
        )
        if exact:
            step = state.bank
            yield Pass(
                rounds * config.cg_steps,
                lambda block: add_image(self._project(block), codes, step, residual),
            )

    def _evaluation(self, state: BankState) -> Callable[[Block], torch.Tensor]:
        index = code_index(state.codes.detach() != 0)
        return lambda block: backward_block(self._weights, block, state, index, RIDGE)

    def tensors(self) -> dict[str, torch.Tensor]:
        progress = [self._step, self._fixed, self._quiet, self._reference, *self.extras.values()]
        tensors = {"bank": self.state.bank, "codes": self.state.codes, "allowed": self._allowed}
        tensors |= {"support": self._support, "progress": torch.tensor(progress, dtype=torch.float64)}
        if self._soft:
            tensors |= {"scores": self._scores.detach(), "scale": self._scale}
            tensors |= {f"adam.{key}": value for key, value in self._adam.state[self._scores].items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.state.bank.copy_(tensors["bank"])
        self.state.codes.copy_(tensors["codes"])
        self._allowed.copy_(tensors["allowed"])
        self._support = tensors["support"].to(self._allowed.device)
        step, fixed, quiet, self._reference, *extras = tensors["progress"].tolist()
        self._step, self._fixed, self._quiet = int(step), bool(fixed), int(quiet)
        self.extras = dict(zip(self.extras, extras, strict=True))
        if self._soft:
            self._scores.copy_(tensors["scores"])
            self._scale.copy_(tensors["scale"])
            self._adam.state[self._scores] = {
                key.removeprefix("adam."): value.to(self._scores.device)
                for key, value in tensors.items()
                if key.startswith("adam.")
            }
