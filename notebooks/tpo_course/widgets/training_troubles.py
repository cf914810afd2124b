"""What goes wrong in training, as settings of the training lab, each with what to look for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

WELL = {  # the settings of a run in which nothing goes wrong, and of everything that a trouble does not change
    "beta": 0.1,
    "alpha": 0.5,
    "gamma": 0.5,
    "guide_beta": 0.1,
    "shaping": "linear",
    "lr": 10**-3.5,
    "updates": 16,  # as of the stored runs
    "swapped": False,
    "guide_trained_at": 0.0,  # 0: with what it is read with
}


@dataclass(frozen=True)
class Trouble:
    """One thing that goes wrong: where, by which settings, and what to look for beside the same run without it."""

    objective: str
    look: str
    settings: Mapping = field(default_factory=dict)  # the rest are as in WELL

    @property
    def values(self) -> dict:
        """All settings of the lab's controls."""
        return {"objective": self.objective} | WELL | dict(self.settings)


TROUBLES = {
    "alpha too large": Trouble(
        "tdpo2",
        "Look at the KL, and then at the reward: loss and own margin are much as at alpha 0.5, but the policy pays four times as "
        "much for every nat on the rejected side and stays near the reference; what it does not move it cannot improve.",
        {"alpha": 2.0},
    ),
    "beta tiny": Trouble(
        "dpo",
        "Look at the own margin: about a tenth of what it is at beta 0.1, with a loss to match, as if little had been learned. "
        "The KL says that the policy went at least as far: beta scales what you are shown, and Adam takes the scale out of the "
        "gradient.",
        {"beta": 0.01},
    ),
    "weights on the floor": Trouble(
        "tgdpo",
        "Look at the tokens on the floor, in the status line or the table: between a quarter and a third, at f = 0.01, hardly "
        "trained. The weights of the others are so large that the loss is next to 0 within a few updates, and its gradient "
        "with it.",
        {"alpha": 2.0, "guide_beta": 10.0},
    ),
    "guide beta is not the guide's": Trouble(
        "tgdpo",
        "Look at the own margin: more than ten times a sound run's, at an own accuracy of 1. The guide was trained with beta 0.1 "
        "and is read with 10, so every r̂ is a hundred times too large, and since the label stands in the weights, the objective "
        "agrees with itself. The reward knows nothing of so large a success.",
        {"guide_beta": 10.0, "guide_trained_at": 0.1},
    ),
    "learning rate too large": Trouble(
        "dpo",
        "Look at the loss of the first five updates, which goes up where a sound run's hardly moves; at the KL, many times that "
        "of a sound run, while the reward alone may look well; and at the samples, in words that the reference would hardly "
        "ever write.",
        {"lr": 10**-2.5},
    ),
    "labels swapped": Trouble(
        "dpo",
        "Look at the curves: they are as good as a sound run's, since no training curve knows which text deserved to be chosen. "
        "Then look at the reward on held-out prompts: it is below the start's.",
        {"swapped": True},
    ),
}
