"""What goes wrong in the frontier lab: settings, and what to look for. A test finds every sentence's effect in the numbers."""

from dataclasses import dataclass

from tpo_course.frontier import Setting


@dataclass(frozen=True)
class Preset:
    """Settings, and one sentence."""

    setting: Setting
    show: str  # the objective whose tree and credit to look at; the lab has to have it
    words: str


PRESETS = {
    "tiny β": Preset(
        Setting(beta=0.05),
        "dpo",
        "DPO's optimum lies at the far end of the front, where one response is nearly certain, and its way leaves the front "
        "and has not come there after 200 updates.",
    ),
    "tiny β, the one-step policy": Preset(
        Setting(beta=0.05),
        "tdpo1",
        "TDPO1 does reach its optimum, and that lies far below the front: nearly certain of a response that looks best to the "
        "reference's values, it earns half of what DPO does.",
    ),
    "α too large for TDPO2": Preset(
        Setting(alpha=4.0),
        "tdpo2",
        "TDPO2 hardly leaves the reference: the KL of the rejected response is pushed down harder than the preference is learnt.",
    ),
    "α too large for TGDPO": Preset(
        Setting(alpha=2.0),
        "tgdpo",
        "One token in ten stands on the floor, and TGDPO ends below the front, with less reward at less KL than at α = 0.5, "
        "although its loss is smaller.",
    ),
    "everything on the floor": Preset(
        Setting(alpha=8.0, noise=1.0),
        "tgdpo",
        "More than half of all tokens stand on the floor, for the guide contradicts labels that are all swapped; what the labels "
        "say hardly counts there, and the policy follows the guide, far below the front.",
    ),
    "the guide's β taken for the run's": Preset(
        Setting(beta=2.0, guide_beta=0.2, run_beta=True),
        "tgdpo",
        "r̂ is ten times too large: a quarter of the tokens is on the floor instead of one in fifty, and TGDPO lies far below the "
        "front; pin, and read r̂ with the guide's β again.",
    ),
    "too few pairs": Preset(
        Setting(pairs=10),
        "dpo",
        "The loss is nearly 0, far below the .485 of all pairs, and the reward is worse than there at more KL: ten pairs are "
        "learnt by heart, and the credit of the tokens is hardly right any more.",
    ),
    "swapped labels": Preset(
        Setting(noise=1.0),
        "dpo",
        "The loss is as small as with right labels and the reward falls below the reference's: no number that training sees "
        "tells; TGDPO alone rises, since its guide here is the optimum of the right labels.",
    ),
}
