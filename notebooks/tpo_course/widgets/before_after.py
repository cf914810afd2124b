"""What two policies write after the same prompt, side by side, scored."""

from __future__ import annotations

import html
from operator import itemgetter
from typing import TYPE_CHECKING

import ipywidgets as w
from torch import Tensor

from tpo_course.widgets.parts import bundle, button, look, one_line, page, room, row

if TYPE_CHECKING:
    from tpo_lib.runs.lab import Laboratory

START = "start"
SAMPLES = 4


class BeforeAfter:
    """Sample from any two of a laboratory's runs, or from the start, with the same random numbers.

    Attributes:
        left, right: names of the runs; prompt: choose one, or type; seed: another one is another sample.
        sample_button, refresh_button: draw; read the list of runs again.
        page: the samples and their mean scores.
    """

    def __init__(self, lab: Laboratory) -> None:
        self.lab = lab
        wide = look("70px", "400px")
        self.left, self.right = w.Dropdown(description="left", **wide), w.Dropdown(description="right", **wide)
        prompts = lab.stage.held_out_prompts
        typed = {"placeholder": "type the beginning of a review, or choose one", "ensure_option": False}
        options = list(dict.fromkeys(prompts))
        self.prompt = w.Combobox(value=prompts[0], options=options, description="prompt", **typed, **wide)
        self.seed = w.IntSlider(0, min=0, max=99, description="seed", continuous_update=False, **wide)
        self.sample_button = button("Sample", self._sample, icon="random", button_style="primary")
        self.refresh_button = button("Reread runs", self._reread, icon="refresh")
        self.page = room(430)
        buttons = w.HBox([self.sample_button, self.refresh_button])
        self.box = w.VBox([row(self.left, self.right), row(self.prompt, self.seed), buttons, self.page])
        self._reread()

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to compare samples.", page=self.page.value)

    def _reread(self) -> None:
        names = [START, *self.lab.runs]
        for control, fallback in ((self.left, names[0]), (self.right, names[-1])):
            before = control.value
            control.options = names
            control.value = before if before in names and before != START else fallback
        self._sample()

    def _sample(self) -> None:
        prompt = self.prompt.value
        if not prompt.strip():
            self.page.value = "The prompt is empty: type the beginning of a review."
            return
        self.sample_button.disabled = True
        try:
            columns = [self._column(name, prompt) for name in (self.left.value, self.right.value)]
        finally:
            self.sample_button.disabled = False
        tokens = self.lab.stage.config.max_new_tokens
        said = f"Seed {self.seed.value}: {SAMPLES} samples of at most {tokens} tokens each."
        self.page.value = page(f'{said}<div style="display:flex;gap:24px">{"".join(columns)}</div>')

    def _column(self, name: str, prompt: str) -> str:
        from tpo_lib.pairing import score_samples  # brings datasets, which a laboratory has loaded
        from tpo_lib.sampling import generate

        stage = self.lab.stage
        policy = stage.start if name not in self.lab.runs else self.lab.runs[name].policy
        given = {"samples_per_prompt": SAMPLES, "max_new_tokens": stage.config.max_new_tokens, "seed": self.seed.value}
        drawn = generate(policy, stage.tokenizer, [prompt], **given)[0]
        scores = {
            kind: score_samples(scorer, stage.tokenizer, [prompt], [drawn])[0]
            for kind, scorer in {"reward": stage.reward, "judge": stage.judge}.items()
            if scorer is not None
        }

        def said(number) -> str:
            return ", ".join(f"{kind} {float(number(values)):.2f}" for kind, values in scores.items())

        rows = "".join(
            f"<p><small>{said(itemgetter(i))}</small><br><b>{html.escape(prompt)}</b> {one_line(completion.text)}</p>"
            for i, completion in enumerate(drawn)
        )
        return f'<div style="flex:1"><b>{html.escape(name)}</b>: mean {said(Tensor.mean)}{rows}</div>'


before_after = BeforeAfter  # as the chapters call it
