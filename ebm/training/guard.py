"""The divergence guard: it detects that a training run diverges, and keeps the last healthy states."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from typing import Any

import torch

from ebm.training.state import State, Step

CHECK_INTERVAL = 10  # iterations
SNAPSHOT_INTERVAL = 200  # iterations
SNAPSHOTS = 3  # states kept in memory; each further rollback in a row goes back to an earlier one
USUAL = 10  # the number of healthy checks whose median is the usual figure
NOT_FINITE = "not finite"  # the words with which a cause describes such figures


@dataclasses.dataclass
class DivergenceGuard:
    """A detector of divergence, with snapshots of healthy states to go back to.

    Two signs count at once: a figure that is not finite, and energies beyond 1 that exceed max_jump times the usual
    ones. The other signs count if `patience` checks in a row show one: energies beyond max_energy; a gap e_pos − e_neg
    beyond max_gap; chains at the bounds (a share of more than max_saturated of the pixels) although the data is not; or
    a flat energy, whose values on an image and on a sample differ by less than min_spread times the usual difference.
    A check draws no random numbers and does not change the state.
    """

    max_energy: float = 1e4
    max_jump: float = 20.0
    max_gap: float = 1e2
    max_saturated: float = 0.99
    min_spread: float = 0.02
    patience: int = 3
    suspicious: int = 0  # how many checks in a row showed a sign
    usual: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # size and spread of the energies
    snapshots: list[dict] = dataclasses.field(default_factory=list)

    def find_cause(self, state: State, step: Step, bounds: tuple[float, float]) -> str | None:
        """Return a phrase that says how the run has diverged at this iteration, or None."""
        sample, image = step.samples, step.images
        margin = (bounds[1] - bounds[0]) / 256
        figures = {
            "e_pos": step.e_pos.mean(),
            "e_neg": step.e_neg.mean(),
            "loss": step.loss,
            "spread": (step.e_pos.view(len(step.e_neg), -1) - step.e_neg[:, None]).abs().mean(),
            "weights": torch.stack(torch._foreach_norm(list(state.model.parameters()))).norm(),
            "saturated": ((sample <= bounds[0]) | (sample >= bounds[1])).float().mean(),
            "saturated_data": ((image <= bounds[0] + margin) | (image >= bounds[1] - margin)).float().mean(),
        }
        values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))  # one transfer
        for name in ("weights", "e_pos", "e_neg", "loss"):
            if not abs(values[name]) < float("inf"):
                return f"{name} {NOT_FINITE}"
        sign = None
        size, gap = max(abs(values["e_pos"]), abs(values["e_neg"])), values["e_pos"] - values["e_neg"]
        usual_size, usual_spread = float("inf"), 0.0
        if len(self.usual) == USUAL:
            usual_size, usual_spread = map(statistics.median, zip(*self.usual, strict=True))
        energies = f"energies of {values['e_pos']:.3g} (data) and {values['e_neg']:.3g} (samples)"
        if size > max(1.0, self.max_jump * usual_size):
            return f"{energies}, of {usual_size:.2g} before"
        if size > self.max_energy:
            sign = energies
        elif abs(gap) > self.max_gap:
            sign = f"a gap e_pos − e_neg of {gap:.3g}"
        elif values["saturated"] > self.max_saturated > values["saturated_data"]:
            sign = f"{values['saturated']:.1%} of the samples' pixels at the bounds"
        elif values["spread"] < self.min_spread * usual_spread:
            sign = f"a flat energy: from data to samples it changes by {values['spread']:.2g}, not {usual_spread:.2g}"
        self.suspicious = self.suspicious + 1 if sign else 0
        if not sign:
            self.usual = [*self.usual, (size, values["spread"])][-USUAL:]
        return sign if self.suspicious >= self.patience else None

    def state_dict(self) -> dict[str, Any]:
        """Return the values that a resumed run needs to judge as this run would; snapshots are not among them."""
        return {"usual": self.usual, "suspicious": self.suspicious}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.usual, self.suspicious = list(map(tuple, state["usual"])), state["suspicious"]

    def remember(self, state: State) -> None:
        """Keep a snapshot of the state, unless the last check was suspicious."""
        if not self.suspicious:
            self.snapshots = [
                *self.snapshots,
                copy.deepcopy({"shared": state.get_shared_state(), "own": state.get_worker_state()}),
            ]
            self.snapshots = self.snapshots[-SNAPSHOTS:]

    def roll_back(self, state: State) -> None:
        """Set the state back to the newest snapshot, and forget that snapshot unless it is the only one."""
        snapshot = self.snapshots[-1]
        self.snapshots = self.snapshots[:-1] or self.snapshots
        state.load_shared_state(copy.deepcopy(snapshot["shared"]))
        state.load_worker_state(copy.deepcopy(snapshot["own"]))
        self.suspicious = 0
