"""The split lab: one return, split over its tokens in many ways, and what that does to Theorem 4.1 and to the relaxation.

The widget sets sliders and draws; every number comes from `tpo_course.derivations.tgdpo`.
"""

import ipywidgets as w
import torch
from matplotlib.figure import Figure

from tpo_course.derivations.tgdpo import random_potential, slack_and_loss
from tpo_course.widgets.parts import LAB_DPI, Lab, frame, look
from tpo_course.world import TokenWorld
from tpo_lib.runs.plots import FONT

SIZES = torch.linspace(-0.5, 2, 51, dtype=torch.float64)
NATURAL = "V*, the natural one"
LINES = {  # label: line, marker, its size and face: both stay visible where they meet
    "slack of Theorem 4.1": (":", "o", 13, "white"),
    "lost by the relaxation": ("--", "s", 6, "black"),
}


class SplitLab(Lab):
    """R + t (Phi(s') - Phi(s)): sliders for t and beta, a choice of the potential Phi; slack and loss over t.

    Attributes:
        controls: {name: control}: potential, size, beta.
        slack, loss: of what is shown, in units of reward.
        figure: the matplotlib Figure, redrawn in place; picture: the HTML widget that shows it.
        text: the HTML widget that says the numbers; alt: the same as plain text.

    Example:
        >>> lab = split_lab(TokenWorld(3, 2, seed=0, num_prompts=1))
        >>> lab.controls["size"].value = 1.0
        >>> abs(lab.slack) < 1e-12 and abs(lab.loss) < 1e-12
        True
    """

    def __init__(self, world: TokenWorld) -> None:
        self.world = world
        self._curves: dict[tuple[str, float], torch.Tensor] = {}
        figure = Figure(figsize=(9.4, 3.9), dpi=LAB_DPI, facecolor="white")  # inches
        figure.add_axes((0.08, 0.15, 0.62, 0.79))
        wide = look("150px", "395px")
        choices = [NATURAL, "random 1", "random 2"]
        controls = {
            "potential": w.Dropdown(options=choices, description="potential Φ", **wide),
            "size": w.FloatSlider(0.0, min=-0.5, max=2.0, step=0.05, description="t", readout_format=".2f", **wide),
            "beta": w.SelectionSlider(options=[0.1, 0.2, 0.5, 1.0, 2.0, 5.0], value=0.1, description="β", **wide),
        }
        super().__init__(controls, (("potential", "size"), ("beta",)), figure, text=60)

    def _potential(self, name: str, beta: float) -> torch.Tensor:
        return self.world.soft_optimum(beta)[0].v if name == NATURAL else random_potential(self.world, int(name[-1]))

    def _follow(self, moved: w.Widget) -> None:
        """Nothing goes with anything here."""

    def _draw(self) -> None:
        name, beta, size = (self.controls[key].value for key in ("potential", "beta", "size"))
        potential = self._potential(name, beta)
        if (name, beta) not in self._curves:
            over = [slack_and_loss(self.world, beta, float(t) * potential) for t in SIZES]
            self._curves[name, beta] = torch.tensor(over)
        self.slack, self.loss = (
            round(x, 12) + 0.0 for x in slack_and_loss(self.world, beta, size * potential)
        )  # no -0
        ax = self.figure.axes[0]
        ax.clear()
        for (label, (line, marker, large, face)), curve, now in zip(
            LINES.items(), self._curves[name, beta].T, (self.slack, self.loss), strict=True
        ):
            ax.plot(SIZES, curve, line, color="black", linewidth=2, label=label)
            ax.plot(size, now, marker, color="black", ms=large, mfc=face, clip_on=False, zorder=5)
        ax.axvline(size, color="#888888", linewidth=1)
        ax.set_xlabel("t, size of the potential (0: the reward as it is; 1: all of Φ)", fontsize=FONT)
        ax.set_ylabel("units of reward", fontsize=FONT)
        ax.set(xlim=(SIZES[0], SIZES[-1]), ylim=(0, None))
        frame(ax)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=FONT - 1)
        said = f"Potential {name}, t = {size:.2f}, β = {beta:g}: slack {self.slack:.3f}, lost by the relaxation {self.loss:.3f} "
        said += "units of reward. The preferences are the same for every t."
        self._show(said, said)


split_lab = SplitLab  # as the chapters call it
