"""The divergence guard: sees an energy model blow up, and knows the last states before it did."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from typing import Any

import torch

from training import State, Step

CHECK_INTERVAL = 10  # iterations
SNAPSHOT_INTERVAL = 200  # iterations
SNAPSHOTS = 3  # states kept in memory; every rollback in a row goes back one further
USUAL = 10  # healthy checks that tell what is usual
NOT_FINITE = "not finite"  # what a cause says of figures that are not


@dataclasses.dataclass
class DivergenceGuard:
    """Watches a run without changing it: it reads figures, draws nothing and writes nothing to the state.

    A figure that is not finite counts at once, and so do energies beyond 1 that are max_jump times what was usual. The
    others count when `patience` checks in a row find them: energies beyond max_energy; a gap e_pos − e_neg beyond
    max_gap; chains stuck at the bounds where the data is not; or an energy gone flat, whose values on an image and on a
    sample differ by less than min_spread times what was usual.
    """

    max_energy: float = 1e4
    max_jump: float = 20.0
    max_gap: float = 1e2
    max_saturated: float = 0.99
    min_spread: float = 0.02
    patience: int = 3
    suspicious: int = 0
    usual: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # size and spread of the energies
    snapshots: list[dict] = dataclasses.field(default_factory=list)

    def cause(self, state: State, step: Step, bounds: tuple[float, float]) -> str | None:
        """Return in words what has gone wrong with this iteration, None while nothing has."""
        sample, image = step.samples, step.images
        margin = (bounds[1] - bounds[0]) / 256
        figures = {
            "e_pos": step.e_pos.mean(),
            "e_neg": step.e_neg.mean(),
            "loss": step.loss,
            "spread": (step.e_pos - step.e_neg).abs().mean(),
            "weights": torch.stack(torch._foreach_norm(list(state.model.parameters()))).norm(),
            "saturated": ((sample <= bounds[0]) | (sample >= bounds[1])).float().mean(),
            "saturated_data": ((image <= bounds[0] + margin) | (image >= bounds[1] - margin)).float().mean(),
        }
        values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))  # one transfer
        for name in ("weights", "e_pos", "e_neg", "loss"):
            if not abs(values[name]) < float("inf"):
                return f"{name} {NOT_FINITE}"
        found = None
        size, gap = max(abs(values["e_pos"]), abs(values["e_neg"])), values["e_pos"] - values["e_neg"]
        usual_size, usual_spread = float("inf"), 0.0
        if len(self.usual) == USUAL:
            usual_size, usual_spread = map(statistics.median, zip(*self.usual, strict=True))
        energies = f"energies of {values['e_pos']:.3g} (data) and {values['e_neg']:.3g} (samples)"
        if size > max(1.0, self.max_jump * usual_size):
            return f"{energies}, of {usual_size:.2g} before"
        if size > self.max_energy:
            found = energies
        elif abs(gap) > self.max_gap:
            found = f"a gap e_pos − e_neg of {gap:.3g}"
        elif values["saturated"] > self.max_saturated > values["saturated_data"]:
            found = f"{values['saturated']:.1%} of the samples' pixels at the bounds"
        elif values["spread"] < self.min_spread * usual_spread:
            found = f"a flat energy: from data to samples it changes by {values['spread']:.2g}, not {usual_spread:.2g}"
        self.suspicious = self.suspicious + 1 if found else 0
        if not found:
            self.usual = [*self.usual, (size, values["spread"])][-USUAL:]
        return found if self.suspicious >= self.patience else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know in order to judge as this one would; snapshots are not part of it."""
        return {"usual": self.usual, "suspicious": self.suspicious}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual, self.suspicious = list(map(tuple, state["usual"])), state["suspicious"]

    def remember(self, state: State) -> None:
        """Keep a copy of a healthy state; one found suspicious is not kept."""
        if not self.suspicious:
            self.snapshots = [*self.snapshots, copy.deepcopy({"shared": state.shared(), "own": state.own()})]
            self.snapshots = self.snapshots[-SNAPSHOTS:]

    def roll_back(self, state: State) -> None:
        """Return to the newest snapshot and forget it, unless it is the only one."""
        snapshot = self.snapshots[-1]
        self.snapshots = self.snapshots[:-1] or self.snapshots
        state.load_shared(copy.deepcopy(snapshot["shared"]))
        state.load_own(copy.deepcopy(snapshot["own"]))
        self.suspicious = 0
