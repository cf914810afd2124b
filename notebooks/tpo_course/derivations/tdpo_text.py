"""The equations and words of derivation 4, by step; `tdpo` holds the numbers."""

from __future__ import annotations

_TDPO = "TDPO, arXiv 2404.11999"
_HERE = "derived here"

TEXTS: dict[str, dict[str, str]] = {
    "policy_improvement": {
        "title": "Policy improvement",
        "latex": r"\mathbb{E}_{z \sim \pi'}[A_\pi(s,z)] \ge 0 \;\; \forall s \quad \Rightarrow \quad V_{\pi'}(s) \ge V_\pi(s) \;\; \forall s",
        "words": "If the new policy gains at every single token, judged by the old policy's advantages, it gains in total. The "
        "performance difference is a sum of such gains. Checked for pi' = pi exp(A/beta) normalised: premise and conclusion.",
        "source": _TDPO,
        "changed": r"V_{\pi'}(s) \ge V_\pi(s)",
    },
    "state_objective": {
        "title": "An objective for every state",
        "latex": r"\mathbb{E}_{z \sim \pi}[A_{\mathrm{ref}}(s,z)] - \beta \operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi_{\mathrm{ref}}(\cdot|s)\bigr) "
        r"= \beta \log Z(s) - V_{\mathrm{ref}}(s) - \beta \operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)",
        "words": "Gain as much advantage as you can in each state, and pay beta KL there. Completing the KL works as it did for "
        "DPO, now state by state, with Z(s) the mean of exp(Q/beta) under the reference.",
        "assumption": "Advantages are those of pi_ref: the rest of the response is written by the reference.",
        "source": _TDPO,
        "changed": r"\operatorname{KL}\bigl(\pi(\cdot|s) \,\|\, \pi_{\mathrm{ref}}(\cdot|s)\bigr)",
    },
    "closed_form": {
        "title": "The closed form",
        "latex": r"\pi^*(z|s) = \frac{\pi_{\mathrm{ref}}(z|s)\, e^{Q_{\mathrm{ref}}(s,z)/\beta}}{Z(s)} "
        r"= \frac{\pi_{\mathrm{ref}}(z|s)\, e^{A_{\mathrm{ref}}(s,z)/\beta}}{\sum_a \pi_{\mathrm{ref}}(a|s)\, e^{A_{\mathrm{ref}}(s,a)/\beta}}",
        "words": "Tilt the reference by Q, or by A: V(s) cancels in the normalisation. Autograd agrees that the objective is flat "
        "at pi* in every state.",
        "source": _TDPO,
        "implements": "tpo_course.world.TokenWorld.one_step_optimum",
        "changed": r"e^{Q_{\mathrm{ref}}(s,z)/\beta}",
    },
    "regret_preference": {
        "title": "Bradley-Terry is regret preference",
        "latex": r"P(y_w \succ y_l \mid x) = \sigma\Bigl(\sum_t \gamma^t A_\pi(s_t^w, y_w^t) - \sum_t \gamma^t A_\pi(s_t^l, y_l^t)\Bigr)",
        "words": "Replace both rewards by their sums of advantages. Each sum loses the same V(s_0), so the gap stays. This holds "
        "for the advantages of any policy; checked for the reference and for a random one.",
        "assumption": "Bradley-Terry, and both responses start at the same s_0.",
        "source": _TDPO,
        "changed": r"A_\pi(s_t^w, y_w^t)",
    },
    "value_and_partition": {
        "title": "The partition function, without Z",
        "latex": r"V_{\mathrm{ref}}(s) = \beta \log Z(s) - \beta \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)",
        "words": "Take logarithms of the closed form and average over pi_ref: Q averages to V, the log-ratio to minus a KL. Now Z(s) "
        "can be traded for a KL you can compute. Note the direction: the reference comes first.",
        "source": _TDPO,
        "changed": r"\operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)",
    },
    "advantage_from_policy": {
        "title": "Advantage from policy",
        "latex": r"A_{\mathrm{ref}}(s,z) = \beta \log \frac{\pi^*(z|s)}{\pi_{\mathrm{ref}}(z|s)} "
        r"+ \beta \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)",
        "words": "Subtract the last line from Q = beta log-ratio + beta log Z. The KL is what makes the advantages average to zero "
        "under the reference. It differs from state to state, so it will not cancel between two responses.",
        "source": _TDPO,
        "changed": r"+ \beta \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s) \,\|\, \pi^*(\cdot|s)\bigr)",
    },
    "reward_from_policy": {
        "title": "Reward from policy",
        "latex": r"r(x,y) = V_{\mathrm{ref}}(s_0) + \beta \sum_t \gamma^t \log \frac{\pi^*(y^t|s_t)}{\pi_{\mathrm{ref}}(y^t|s_t)} "
        r"+ \beta \sum_t \gamma^t \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s_t) \,\|\, \pi^*(\cdot|s_t)\bigr)",
        "words": "Sum the advantages along the response. At gamma = 1 the last sum is the sequential KL, SeqKL(x, y; ref || pi*).",
        "source": _TDPO,
        "changed": r"\beta \sum_t \gamma^t \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s_t) \,\|\, \pi^*(\cdot|s_t)\bigr)",
    },
    "preference": {
        "title": "The preference, without Z and without Q",
        "latex": r"P(y_w \succ y_l \mid x) = \sigma(u - \delta), \quad u = \beta \log \frac{\pi^*(y_w|x)}{\pi_{\mathrm{ref}}(y_w|x)} "
        r"- \beta \log \frac{\pi^*(y_l|x)}{\pi_{\mathrm{ref}}(y_l|x)}, \quad \delta = \beta \operatorname{SeqKL}(x,y_l) - \beta \operatorname{SeqKL}(x,y_w)",
        "words": "V(s_0) cancels, the rest does not. u is DPO's margin, delta is new. The numbers show what happens if you "
        "use this form in a world with a discount: it fails, because its sums carry no gamma.",
        "assumption": "gamma = 1.",
        "source": _TDPO,
        "changed": r"- \delta",
    },
    "tdpo1_loss": {
        "title": "TDPO1",
        "latex": r"L_{\mathrm{TDPO1}}(\pi) = -\mathbb{E}[\log \sigma(u - \delta)]",
        "words": "Put your policy where pi* stood. Left: the loss that trains language models. Right: u and delta from whole "
        "responses.",
        "source": _TDPO,
        "implements": "tpo_lib.losses.tdpo1",
        "changed": r"\log \sigma(u - \delta)",
    },
    "tdpo1_minimum": {
        "title": "What TDPO1 finds",
        "latex": r"L_{\mathrm{TDPO1}}(\pi^*) = \mathbb{E}[H(P)], \quad \nabla L_{\mathrm{TDPO1}}(\pi^*) = 0",
        "words": "With all pairs, TDPO1 reaches the smallest possible loss at the one-step pi*. TDPO2, below, does not rest there: "
        "its slope at pi* is not zero. The derivation is TDPO1's; TDPO2 is a change of the training dynamics.",
        "assumption": "gamma = 1, infinite data.",
        "source": _HERE,
        "implements": "tpo_lib.losses.tdpo1",
        "changed": r"\nabla L_{\mathrm{TDPO1}}(\pi^*) = 0",
    },
    "margin_is_linear": {
        "title": "TDPO1's margin is linear in the logits",
        "latex": r"\log \pi(y^t|s) + \operatorname{KL}\bigl(\pi_{\mathrm{ref}}(\cdot|s) \,\|\, \pi(\cdot|s)\bigr) "
        r"= z_{y^t}(s) - \mathbb{E}_{a \sim \pi_{\mathrm{ref}}}[z_a(s)] - H\bigl(\pi_{\mathrm{ref}}(\cdot|s)\bigr)",
        "words": "Write log pi = z - logsumexp(z). The log-likelihood brings one logsumexp with a minus, the KL one with a plus: "
        "they cancel. The loss is a logistic regression on logits, with no softmax of the policy in its margin.",
        "source": _HERE,
        "implements": "tpo_lib.stats.token_stats",
        "changed": r"z_{y^t}(s) - \mathbb{E}_{a \sim \pi_{\mathrm{ref}}}[z_a(s)]",
    },
    "tdpo1_gradient": {
        "title": "TDPO1's gradient",
        "latex": r"\nabla_z L_{\mathrm{TDPO1}} = -\beta\, \mathbb{E}\Bigl[\sigma(-(u-\delta)) \Bigl(\sum_t \bigl(e_{y_w^t} - \pi_{\mathrm{ref}}(\cdot|s_t^w)\bigr) "
        r"- \sum_t \bigl(e_{y_l^t} - \pi_{\mathrm{ref}}(\cdot|s_t^l)\bigr)\Bigr)\Bigr]",
        "words": "DPO's logit gradient is e_y - pi, which fades once the policy is sure of y. Here pi_ref stands in its place: the "
        "push never fades, however far you have gone. Only the pair's weight can stop it.",
        "source": _HERE,
        "implements": "tpo_lib.losses.tdpo1",
        "changed": r"\pi_{\mathrm{ref}}(\cdot|s_t^w)",
    },
    "rewards_kl_of_chosen": {
        "title": "It rewards divergence on the chosen side",
        "latex": r"\frac{\partial \ell_{\mathrm{TDPO1}}}{\partial \operatorname{SeqKL}(x,y_w)} = -\beta\, \sigma(-(u-\delta)) < 0, \quad "
        r"\frac{\partial \ell_{\mathrm{TDPO1}}}{\partial \operatorname{SeqKL}(x,y_l)} = +\beta\, \sigma(-(u-\delta))",
        "words": "A larger KL along the chosen response lowers the loss. You wanted to hold the policy back and the loss pays it to "
        "leave. The numbers train three losses for 100 steps from the reference (Adam) and read the chosen SeqKL.",
        "source": _HERE,
        "implements": "tpo_lib.losses.tdpo1",
        "changed": r"-\beta\, \sigma(-(u-\delta)) < 0",
    },
    "stop_gradient": {
        "title": "TDPO2 stops that gradient",
        "latex": r"\nabla L_{\mathrm{TDPO1}} - \nabla L_{\mathrm{TDPO2}}\big|_{\alpha=1} "
        r"= -\beta\, \mathbb{E}\bigl[\sigma(-(u-\delta))\, \nabla \operatorname{SeqKL}(x,y_w)\bigr], \quad L_{\mathrm{TDPO1}} = L_{\mathrm{TDPO2}}\big|_{\alpha=1}",
        "words": "Hold the chosen SeqKL constant in the backward pass. The value of the loss is the same, the reward for divergence "
        "is gone, and the difference is exactly this term. (The gradient of a state's KL by its logits is pi - pi_ref.)",
        "source": _TDPO,
        "implements": "tpo_lib.losses.tdpo2",
        "changed": r"\nabla \operatorname{SeqKL}(x,y_w)",
    },
    "tdpo2_loss": {
        "title": "TDPO2 and its alpha",
        "latex": r"L_{\mathrm{TDPO2}}(\pi) = -\mathbb{E}[\log \sigma(u - \alpha \delta_2)], \quad "
        r"\delta_2 = \beta \operatorname{SeqKL}(x,y_l) - \mathrm{sg}\bigl[\beta \operatorname{SeqKL}(x,y_w)\bigr]",
        "words": "alpha scales the KL terms: 0 is DPO, 1 is TDPO1's value. It is a knob, no consequence of the derivation: "
        "at alpha other than 1 the probability is no longer the model's.",
        "source": _TDPO,
        "implements": "tpo_lib.losses.tdpo2",
        "changed": r"\alpha \delta_2",
    },
    "tdpo2_gradient": {
        "title": "TDPO2's gradient",
        "latex": r"\nabla L_{\mathrm{TDPO2}} = -\beta\, \mathbb{E}\bigl[\sigma(-(u-\alpha\delta_2)) \bigl(\nabla \log \pi(y_w|x) - \nabla \log \pi(y_l|x) "
        r"- \alpha \nabla \operatorname{SeqKL}(x,y_l)\bigr)\bigr]",
        "words": "DPO's gradient, plus a pull back to the reference along the rejected response, where DPO drifts furthest.",
        "source": _HERE,
        "implements": "tpo_lib.losses.tdpo2",
        "changed": r"- \alpha \nabla \operatorname{SeqKL}(x,y_l)",
    },
    "one_step_is_not_optimal": {
        "title": "The one-step pi* is not the optimum",
        "latex": r"J(\pi^*_{\mathrm{opt}}) - J(\pi^*_{\mathrm{one}}) = \beta \sum_t \gamma^t\, \mathbb{E}_{s_t \sim D_t^{\mathrm{one}}} "
        r"\operatorname{KL}\bigl(\pi^*_{\mathrm{one}}(\cdot|s_t) \,\|\, \pi^*_{\mathrm{opt}}(\cdot|s_t)\bigr)",
        "words": "TDPO's pi* assumes that pi_ref writes the rest, so it uses Q_ref. The optimum of the regularised return uses Q*. "
        "The gap is exact; the numbers give both values over beta. As beta grows the two meet.",
        "source": _HERE,
        "implements": "tpo_course.world.TokenWorld.one_step_optimum",
        "changed": r"\operatorname{KL}\bigl(\pi^*_{\mathrm{one}}(\cdot|s_t) \,\|\, \pi^*_{\mathrm{opt}}(\cdot|s_t)\bigr)",
    },
}
