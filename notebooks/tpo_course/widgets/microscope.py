"""One pair under several objectives, token by token: what the policy does, and how hard the objective pushes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ipywidgets as w
import torch

from tpo_course.coefficients import coefficients
from tpo_course.widgets.parts import bundle, knob, look, on, page, room, row
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.runs import heatmap, plots
from tpo_lib.stats import split

if TYPE_CHECKING:
    from tpo_lib.runs.stage import Stage

QUANTITIES = {  # name: (what it is, unit)
    "log-ratio": ("log π_θ − log π_ref of the token", "nats"),
    "KL": ("KL(π_ref ‖ π_θ) at the token", "nats"),
    "weight f": ("TGDPO's weight of the token", ""),  # 1 is DPO's: colours go from there
    "coefficient": ("d loss / d log π_θ: negative is pushed up", ""),
    "KL coefficient": ("d loss / d KL: negative is pushed up", ""),
}
CENTRE = {"weight f": 1.0}  # where the colour is none; 0 for all others
LINE = 110  # characters that surely fit beside a label


class TokenMicroscope:
    """Look at held-out pairs token by token.

    Args:
        stage: pairs, tokenizer, reference and the reward; the token credit of an additive one is shown as the truth.
        policies: {objective: a policy}, one row each; several may be the same model.
        guide, guide_beta: TGDPO's; needed if there is a row for it.
        gamma: SimPO's margin.

    Attributes:
        pair, quantity, beta, alpha, token, printed: the controls; printed: every token's number behind it.
        page: the coloured tokens; facts: margins as text; numbers: the numbers of the token chosen, as text.

    Raises:
        ValueError: an objective is unknown, or TGDPO's row has no guide.
    """

    def __init__(
        self, stage: Stage, policies: Mapping[str, torch.nn.Module], *, guide=None, guide_beta=0.1, gamma=0.5
    ) -> None:
        unknown, known = [name for name in policies if name not in OBJECTIVES], ", ".join(OBJECTIVES)
        if unknown or not policies:
            raise ValueError(f"policies {unknown or dict(policies)}: name each by an objective, one of {known}")
        guided = [name for name in policies if "guide_logps" in OBJECTIVES[name].needs]
        if guided and guide is None:
            raise ValueError(f"the row {guided[0]} needs guide=, the frozen DPO model that its weights come from")
        self.stage, self.policies, self.guide = stage, dict(policies), guide
        self.fixed = {"guide_beta": guide_beta, "gamma": gamma, "shaping": "linear", "floor": F_FLOOR}
        self._stats: dict = {}
        self._busy = False
        wide, records = look("80px", "420px"), OBJECTIVES["tdpo2"].hyperparameters
        self.quantity = w.Dropdown(options=list(QUANTITIES), description="colour by", **wide)
        self.beta, self.alpha = (knob(records[name], name, steps=10, **wide) for name in ("beta", "alpha"))
        self.printed = w.Checkbox(value=True, description="numbers behind the tokens", indent=False)
        self.beta.continuous_update = self.alpha.continuous_update = True  # a move is answered while it goes on
        self.pair = w.IntSlider(
            0, min=0, max=len(stage.held_out_pairs) - 1, description="pair", continuous_update=False, **wide
        )
        self.token = w.IntSlider(0, min=0, max=1, description="token", **wide)
        self.page, self.facts, self.numbers = room(self._tallest()), room(48), room(24 * (len(self.policies) + 1))
        top = row(self.pair, self.quantity), row(self.beta, self.alpha), self.printed
        self.box = w.VBox([*top, self.page, self.facts, self.token, self.numbers])
        on([self.pair, self.quantity, self.beta, self.alpha], self._draw)
        on([self.token, self.printed], self._show_page)
        self._draw()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to use the microscope.", page=self.page.value)

    def _tallest(self) -> int:
        """Pixels that the longest pair takes, so that the page does not jump from one pair to the next."""
        decode = self.stage.tokenizer.decode
        sides = [(decode(pair.chosen_ids), decode(pair.rejected_ids)) for pair in self.stage.held_out_pairs]
        lines = max(sum(-(-len(text) // LINE) for text in texts) for texts in sides)
        return 140 + 26 * 2 * lines * (len(self.policies) + 1)  # a number takes as much as its token

    def _values(self) -> dict[str, dict[str, torch.Tensor | None]]:
        """{objective: {quantity: (T_w + T_l,) over chosen then rejected tokens}}."""
        from tpo_lib.evaluation import pair_stats  # brings datasets, which a stage has loaded

        pair, found = self.stage.held_out_pairs[self.pair.value], {}
        self._margins = {}
        for name, policy in self.policies.items():
            key = (self.pair.value, name)
            if key not in self._stats:
                guide = self.guide if "guide_logps" in OBJECTIVES[name].needs else None
                pad = self.stage.tokenizer.pad_token_id
                self._stats[key] = pair_stats(policy, self.stage.start, [pair], pad, guide=guide)
            chosen, rejected = split(self._stats[key])
            given = {"beta": self.beta.value, "alpha": self.alpha.value, **self.fixed}
            pushed = coefficients(name, chosen, rejected, **OBJECTIVES[name].settings(given))
            self._margins[name] = (pushed.margin.item(), pushed.output.loss.item())

            def both(left, right, chosen=chosen, rejected=rejected):
                return None if left is None else torch.cat([left[chosen.mask], right[rejected.mask]])

            found[name] = {
                "log-ratio": both(chosen.logps - chosen.ref_logps, rejected.logps - rejected.ref_logps),
                "KL": both(chosen.kl, rejected.kl),
                "weight f": both(pushed.chosen.weights, pushed.rejected.weights),
                "coefficient": both(pushed.chosen.logps, pushed.rejected.logps),
                "KL coefficient": both(pushed.chosen.kl, pushed.rejected.kl),
            }
        return found

    def _draw(self) -> None:
        from tpo_lib.files.tokens import token_method  # brings datasets, which a stage has loaded

        pair = self.stage.held_out_pairs[self.pair.value]
        self._ids = pair.chosen_ids + pair.rejected_ids
        self._cut = len(pair.chosen_ids)
        self._pieces = [self.stage.tokenizer.decode([i]) for i in self._ids]
        self._found = self._values()
        credit = token_method(self.stage.reward, "token_credit", self.stage.tokenizer)
        sides = (pair.chosen_ids, pair.rejected_ids)
        self._credit = credit and torch.cat([credit(torch.tensor(ids)) for ids in sides])
        facts = "; ".join(
            f"{plots.style_of(name).label}: margin {margin:.3f}, loss {loss:.3f} nats"
            for name, (margin, loss) in self._margins.items()
        )
        self.facts.value = page(f"beta = {self.beta.value:.3g}, alpha = {self.alpha.value:.3g}; {facts}.")
        self._busy = True  # a shorter pair moves the token, which shows the page
        self.token.max = len(self._ids) - 1
        self._busy = False
        self._show_page()

    def _show_page(self) -> None:
        if self._busy:
            return
        pair = self.stage.held_out_pairs[self.pair.value]
        words, unit = QUANTITIES[self.quantity.value]
        rows = {plots.style_of(name).label: values[self.quantity.value] for name, values in self._found.items()}
        centre = CENTRE.get(self.quantity.value, 0.0)
        largest = max((float((v - centre).abs().max()) for v in rows.values() if v is not None), default=0.0)
        prompt = self.stage.tokenizer.decode(pair.prompt_ids, skip_special_tokens=True)
        parts = [f"<p style='margin:0'><b>prompt</b> {html.escape(prompt)} …</p>"]
        for side, where in (("chosen", slice(0, self._cut)), ("rejected", slice(self._cut, None))):
            parts.append(f"<p style='margin:6px 0 0'><b>{side}</b></p>")
            if self._credit is not None:
                parts.append(self._row("true credit", self._credit, float(self._credit.abs().max()), where))
            parts += [self._row(label, values, largest, where, centre) for label, values in rows.items()]
        credit = "this reward does not tell what each token is worth"
        if self._credit is not None:
            credit = f"true credit of the reward: full colour = {float(self._credit.abs().max()):.3g} nats of log-odds"
        legend = (
            f"Colour: {words}, full colour {largest:.3g} {unit} from {centre:g}; {credit}. Blue with a solid line is above "
            f"{centre:g} (of a credit above 0), orange with a dashed line below. Hover over a token, or move the slider to "
            "frame it, for its numbers."
        )
        self.page.value = page(f"{''.join(parts)}<p style='margin:6px 0'><small>{legend}</small></p>")
        self.numbers.value = f'<div style="line-height:1.5">{self._text(self.token.value, "<br>")}</div>'

    def _row(self, label: str, values: torch.Tensor | None, largest: float, where: slice, centre: float = 0.0) -> str:
        """The tokens of one side, coloured by how far their values lie from `centre`, the values behind them."""
        head = f'<span style="display:inline-block;width:7.5em;text-indent:0"><small>{label}</small></span>'
        if values is None:
            return f'<div style="line-height:2">{head}<i>this objective has none</i></div>'
        spans = [
            heatmap.span(
                self._pieces[i], float(values[i]) - centre, largest, self._text(i, "\n"), framed=i == self.token.value
            )
            + (f"<sub>{float(values[i]):.2g}</sub>" if self.printed.value else "")
            for i in range(*where.indices(len(self._pieces)))
        ]
        return f'<div style="line-height:2;padding-left:7.5em;text-indent:-7.5em">{head}{"".join(spans)}</div>'

    def _text(self, index: int, separator: str) -> str:
        side, place = ("chosen", index) if index < self._cut else ("rejected", index - self._cut)
        credit = "" if self._credit is None else f": true credit {float(self._credit[index]):+.3f}"
        lines = [f"{side} token {place}, {self._pieces[index]!r}{credit}"]
        for name, values in self._found.items():
            numbers = [f"{key} {float(v[index]):+.3g}" for key, v in values.items() if v is not None]
            lines.append(f"{plots.style_of(name).label}: {', '.join(numbers)}")
        return separator.join(html.escape(line, quote=True) for line in lines)


token_microscope = TokenMicroscope  # as the chapters call it
