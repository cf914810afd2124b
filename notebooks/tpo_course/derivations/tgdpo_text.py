"""The equations and words of derivation 5, by step; `tgdpo` holds the numbers."""

from __future__ import annotations

_TGDPO = "TGDPO, arXiv 2506.14574"
_HERE = "derived here"

TEXTS: dict[str, dict[str, str]] = {
    "by_timestep": {
        "title": "PPO's objective, token by token",
        "latex": r"\mathbb{E}_{y \sim \pi}\Bigl[r(x,y) - \beta \log \frac{\pi(y|x)}{\pi_{\mathrm{ref}}(y|x)}\Bigr] "
        r"= \sum_t \mathbb{E}_{s_t \sim D_t^\pi}\, \mathbb{E}_{a \sim \pi}\Bigl[r(s_t,a) - \beta \log \frac{\pi(a|s_t)}{\pi_{\mathrm{ref}}(a|s_t)}\Bigr]",
        "words": "Cut the objective into one term per timestep. Each term looks like a bandit, except for D_t: which states you "
        "meet depends on your own earlier tokens.",
        "assumption": "gamma = 1; the reward is a sum of token rewards.",
        "source": _TGDPO,
        "implements": "tpo_course.world.TokenWorld.visits",
        "changed": r"\mathbb{E}_{s_t \sim D_t^\pi}",
    },
    "upper_bound": {
        "title": "Theorem 4.1: an upper bound",
        "latex": r"\max_\pi \sum_t J_t(\pi) \le \sum_t \max_\pi J_t(\pi), \quad J_t(\pi) = \mathbb{E}_{s_t \sim D_t^\pi}\, \mathbb{E}_{a \sim \pi}"
        r"\Bigl[r - \beta \log \frac{\pi}{\pi_{\mathrm{ref}}}\Bigr]",
        "words": "Let a different policy win each timestep: the sum can only grow. The bound holds, and it is loose. The winner of "
        "step t walks to the best state for free, since J_t charges nothing before t. The numbers show the slack.",
        "source": f"{_TGDPO}, Theorem 4.1",
        "changed": r"\le \sum_t \max_\pi J_t(\pi)",
    },
    "relaxed_optimum": {
        "title": "The relaxation: D instead of D_t",
        "latex": r"\mathbb{E}_{s \sim D}\Bigl[\mathbb{E}_{a \sim \pi}[r(s,a)] - \beta \operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi_{\mathrm{ref}}(\cdot|s)\bigr)\Bigr] "
        r"= \mathbb{E}_{s \sim D}\Bigl[\beta \log Z(s) - \beta \operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)\Bigr], \quad \pi^* = \frac{\pi_{\mathrm{ref}}\, e^{r/\beta}}{Z}",
        "words": "Fix the states (here: those pi_ref visits). Now every state is a bandit of its own and the Gibbs trick works "
        "token by token. The price: pi* sees only the next token's reward. It is myopic.",
        "assumption": "The state distribution D does not depend on the policy.",
        "source": _TGDPO,
        "changed": r"\mathbb{E}_{s \sim D}",
    },
    "relaxation_error": {
        "title": "What the relaxation costs",
        "latex": r"J(\pi) - J_D(\pi) = \sum_t \sum_{s} \bigl(D_t^\pi(s) - D_t(s)\bigr)\, g_\pi(s), \quad g_\pi(s) = \mathbb{E}_{a \sim \pi}\Bigl[r - \beta \log \frac{\pi}{\pi_{\mathrm{ref}}}\Bigr]",
        "words": "The paper leaves this error open; in this world you can have it exactly. It is the shift of the visited states times "
        "what is earned there. The numbers follow it over beta: large where beta is small, since the policy moves further.",
        "source": _HERE,
        "changed": r"D_t^\pi(s) - D_t(s)",
    },
    "guided_objective": {
        "title": "Theorem 4.3: the guided optimum",
        "latex": r"\mathbb{E}_{a \sim \pi}\Bigl[\frac{r(s,a)}{\beta f(\hat r(s,a))} - \log \frac{\pi(a|s)}{\pi_{\mathrm{ref}}(a|s)}\Bigr] "
        r"= \log Z(s) - \operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr), \quad \pi^* = \frac{\pi_{\mathrm{ref}}\, e^{r/(\beta f(\hat r))}}{Z}",
        "words": "Give every token a beta of its own: f scales it, and r̂ is a token reward from a guide. Completing the KL works as before. Here "
        "f = 1 + alpha r̂, alpha small enough to keep f at 0.1 or more.",
        "assumption": "f > 0.",
        "source": f"{_TGDPO}, Theorem 4.3",
        "implements": "tpo_course.derivations.tgdpo.guided_optimum",
        "changed": r"\frac{r(s,a)}{\beta f(\hat r(s,a))}",
    },
    "guided_reward": {
        "title": "Token reward from policy",
        "latex": r"r(s,a) = \beta f(\hat r(s,a)) \log \frac{\pi^*(a|s)}{\pi_{\mathrm{ref}}(a|s)} + \beta f(\hat r(s,a)) \log Z(s)",
        "words": "Solve for r. Beside DPO's version two things changed: f multiplies the log-ratio, and Z belongs to a state, "
        "scaled by an f that depends on the token.",
        "source": f"{_TGDPO}, Theorem 4.3",
        "changed": r"+ \beta f(\hat r(s,a)) \log Z(s)",
    },
    "f_must_be_positive": {
        "title": "Why f must stay positive",
        "latex": r"\beta\, \frac{\partial \log \pi^*(a|s)}{\partial r(s,a)} = \frac{1 - \pi^*(a|s)}{f(\hat r(s,a))}",
        "words": "A better token should become more likely. It does where f > 0; where f < 0 it becomes less likely. The check gives "
        "token 0 a negative f on purpose: the formula holds, the sign is what you do not want.",
        "source": _HERE,
        "changed": r"f(\hat r(s,a))",
    },
    "guided_preference": {
        "title": "The preference: phi and delta",
        "latex": r"P(y_w \succ y_l \mid x) = \sigma(\varphi + \delta), \quad \varphi = \sum_t \beta f \log \frac{\pi^*(y_w^t|s_t^w)}{\pi_{\mathrm{ref}}(y_w^t|s_t^w)} "
        r"- \sum_t \beta f \log \frac{\pi^*(y_l^t|s_t^l)}{\pi_{\mathrm{ref}}(y_l^t|s_t^l)}, \quad \delta = \sum_t \beta f \log Z(s_t^w) - \sum_t \beta f \log Z(s_t^l)",
        "words": "Sum both rewards into Bradley-Terry. The states of the two responses differ after the first token, so their Z do "
        "not cancel. They are collected in delta, which does not contain the policy you train.",
        "assumption": "Bradley-Terry, gamma = 1, and one f for both responses.",
        "source": f"{_TGDPO}, Theorem 4.4",
        "changed": r"+ \delta",
    },
    "one_pair": {
        "title": "Theorem 4.4 for one pair: delta may go",
        "latex": r"\frac{\nabla \log \sigma(\varphi + \delta)}{\sigma(-(\varphi + \delta))} = \nabla \varphi = \frac{\nabla \log \sigma(\varphi)}{\sigma(-\varphi)}",
        "words": "The logistic function increases, so both versions order policies alike; and both gradients point along the gradient "
        "of phi, with positive lengths. For a single pair you lose nothing by dropping delta.",
        "source": f"{_TGDPO}, Theorem 4.4",
        "changed": r"\nabla \varphi",
    },
    "two_pairs": {
        "title": "For two pairs it may not",
        "latex": r"\arg\max_\varphi \bigl[\log \sigma(\varphi) + \tfrac12 \log \sigma(-\varphi)\bigr] = \log 2, \quad "
        r"\arg\max_\varphi \bigl[\log \sigma(\varphi + 2) + \tfrac12 \log \sigma(-\varphi - 1)\bigr] \approx -0.941",
        "words": "Two pairs disagree about one number phi, with weights 1 and 1/2. Each delta rescales its own pair's gradient, and the "
        "balance between the pairs moves: from .693 to -.941, even the sign flips. The theorem does not extend to a "
        "sum over pairs, which is what you train on.",
        "source": _HERE,
        "changed": r"\log \sigma(\varphi + 2)",
    },
    "delta_keeps_the_optimum": {
        "title": "How far the optimum moves",
        "latex": r"\nabla \mathbb{E}\bigl[-\log \sigma(\varphi + \delta)\bigr]\Big|_{\pi = \pi^*} = 0, \quad "
        r"\mathbb{E}\bigl[-\log \sigma(\varphi + \delta)\bigr]\Big|_{\pi = \pi^*} = \mathbb{E}[H(P)]",
        "words": "With delta kept, the guided pi* is the minimum. The numbers train without delta, as the loss does, and compare. Look "
        "at f = 1: with delta you get the myopic policy, without it DPO's optimum, the best policy there is. There, dropping "
        "delta undoes the damage of the relaxation: a repair, but not an equivalence.",
        "assumption": "gamma = 1, infinite data.",
        "source": _HERE,
        "changed": r"\varphi + \delta",
    },
    "loss": {
        "title": "The loss",
        "latex": r"L_{\mathrm{TGDPO}} = -\mathbb{E}\Bigl[\log \sigma\Bigl(\sum_t \beta f_w \log \frac{\pi(y_w^t|s_t^w)}{\pi_{\mathrm{ref}}(y_w^t|s_t^w)} "
        r"- \sum_t \beta f_l \log \frac{\pi(y_l^t|s_t^l)}{\pi_{\mathrm{ref}}(y_l^t|s_t^l)}\Bigr)\Bigr], \quad f_w = 1 + \alpha \hat r, \; f_l = 1 - \alpha \hat r, \; "
        r"\hat r = \hat\beta \log \frac{\hat\pi}{\pi_{\mathrm{ref}}}",
        "words": "Drop delta, and let a DPO model be the guide. The loss has two f, one per side, while the optimum was derived for one "
        "f: a single pi* cannot be optimal for both. The number shows the error of the probability if you pretend it is.",
        "assumption": "delta is dropped; f differs between the sides.",
        "source": _TGDPO,
        "implements": "tpo_lib.losses.tgdpo",
        "changed": r"f_w = 1 + \alpha \hat r, \; f_l = 1 - \alpha \hat r",
    },
    "gradient": {
        "title": "The gradient",
        "latex": r"\nabla L_{\mathrm{TGDPO}} = -\beta\, \mathbb{E}\Bigl[\sigma(-\varphi) \Bigl(\sum_t f_w \nabla \log \pi(y_w^t|s_t^w) - \sum_t f_l \nabla \log \pi(y_l^t|s_t^l)\Bigr)\Bigr]",
        "words": "DPO's gradient with one weight per token. The guide is frozen, so f carries no gradient.",
        "source": _TGDPO,
        "implements": "tpo_lib.losses.tgdpo",
        "changed": r"f_w \nabla \log \pi(y_w^t|s_t^w)",
    },
    "four_behaviours": {
        "title": "Four kinds of token",
        "latex": r"\frac{\partial \ell}{\partial \log \pi(y_w^t|s_t)} = -\beta\, \sigma(-\varphi)\, e^{\alpha \hat r(s_t, y_w^t)}, \quad "
        r"\frac{\partial \ell}{\partial \log \pi(y_l^t|s_t)} = +\beta\, \sigma(-\varphi)\, e^{-\alpha \hat r(s_t, y_l^t)}",
        "words": "Chosen and good: pushed up more. Chosen but bad: up less. Rejected but good: down less. Rejected and bad: down more. "
        "Shown for the exponential f, which is positive for every r̂; the linear f, 1 + alpha r̂, has the same signs.",
        "source": _TGDPO,
        "implements": "tpo_lib.losses.tgdpo",
        "changed": r"e^{\alpha \hat r(s_t, y_w^t)}",
    },
    "floor": {
        "title": "The floor under f",
        "latex": r"f_w = \max(1 + \alpha \hat r, \; 0.01), \quad f_l = \max(1 - \alpha \hat r, \; 0.01)",
        "words": "Nothing in the formula keeps 1 + alpha r̂ positive. On a token with f < 0 the push would reverse: a chosen token "
        "would be pushed down. The library floors f instead. The numbers count the tokens concerned (the check triples alpha).",
        "source": _HERE,
        "implements": "tpo_lib.losses.tgdpo",
        "changed": r"0.01",
    },
}
