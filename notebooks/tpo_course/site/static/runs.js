// The run browser: finished runs over objective, beta and alpha.
"use strict";
const said = ({ mean, low, high }) => `${mean.toFixed(2)} [${low.toFixed(2)}, ${high.toFixed(2)}]`;
const values = (runs, name) => [...new Set(runs.map((run) => run[name]))].sort((a, b) => a - b).map((value) => ({ value, words: short(value) }));
const highest = Math.max(...data.runs.map((run) => run.metrics.kl.high));
const NAMES = ["loss, nats (IPO's is a square)", "reward margin, nats", "share of pairs ranked right"];

function plane(run) {
  const rewards = [data.start, ...data.runs].flatMap(({ metrics }) => [metrics.reward.low, metrics.reward.high]);
  const style = data.look[run.objective];
  const { kl, reward } = run.metrics;
  const plot = new Plot({
    title: "Reward against KL: this run large, with its intervals, the others faint",
    words: `${style.label}: reward ${said(reward)} at a KL of ${said(kl)} nats, among ${data.runs.length} runs.`,
    x: [0, highest * 1.02], y: [Math.min(...rewards) - 0.02, 1], bend: Math.sqrt, width: 640, height: 360,
    xticks: [0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100].filter((t) => t <= highest).map((t) => [t, String(t)]),
    xlabel: "KL(policy ‖ reference), nats, on a root scale", ylabel: "reward",
  });
  plot.figure.classList.add("wide");
  for (const other of data.runs) if (other !== run) plot.point(other.metrics.kl.mean, other.metrics.reward.mean, data.look[other.objective], 4, { opacity: 0.45 });
  plot.point(0, data.start.metrics.reward.mean, { marker: "*", colour: "currentColor" }, 6);
  const bars = { stroke: style.colour, "stroke-width": 2 };
  plot.line(kl.low, reward.mean, kl.high, reward.mean, bars);
  plot.line(kl.mean, reward.low, kl.mean, reward.high, bars);
  plot.point(kl.mean, reward.mean, style, 8, { stroke: "currentColor", "stroke-width": 1.5 });
  return plot.figure;
}

function curves(run) {
  const style = data.look[run.objective];
  return NAMES.map((name, column) => {
    const [xs, ys] = [run.training.map((_, i) => i + 1), run.training.map((row) => row[column])];
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    const room_ = (high - low || 1) * 0.08;
    const plot = new Plot({ title: name, words: `${name}: from ${short(ys[0])} to ${short(ys.at(-1))} in ${ys.length} updates.`, x: [0, ys.length], y: [low - room_, high + room_], xlabel: "update", height: 250 });
    plot.curve(xs, ys, { stroke: style.colour });
    xs.forEach((x, i) => plot.point(x, ys[i], style, 3));
    return plot.figure;
  });
}

function written(run) {
  const pairs = data.start.samples.slice(0, 3).map((before, i) => [before, run.samples[i]]);
  return pairs.map(([before, after]) => make("div", { class: "sample" },
    make("p", {}, make("b", {}, `${before.prompt} …`)),
    make("p", {}, `start (${before.reward.toFixed(2)}): ${before.text}`),
    make("p", {}, `${data.look[run.objective].label} (${after.reward.toFixed(2)}): ${after.text}`)));
}

const names = Object.keys(data.look);
const controls = new Controls({
  objective: { label: "objective", value: names[0], options: names.map((name) => [data.look[name].label, name]) },
  beta: { label: "beta", value: 0.1, stops: [{ value: 0.1, words: "0.1" }] },
  alpha: { label: "alpha", value: 0, stops: [{ value: 0, words: "0" }] },
}, follow);
const [text, plots, samples] = [facts(), make("div", { class: "plots" }), make("div")];
place(controls.box, text, legend(data.look, [{ label: "start", marker: "*", colour: "currentColor" }]), plots, make("h2", {}, "What it writes"), samples);

function chosen() {
  const now = controls.values();
  return data.runs.find((run) => run.objective === now.objective && run.beta === now.beta && run.alpha === now.alpha);
}

function follow(moved) {
  const mine = data.runs.filter((run) => run.objective === controls.value("objective"));
  if (moved === "objective") controls.stops("beta", values(mine, "beta"));
  if (moved !== "alpha") controls.stops("alpha", values(mine.filter((run) => run.beta === controls.value("beta")), "alpha"));
  draw(chosen());
}

function draw(run) {
  const { metrics } = run;
  const start = data.start.metrics;
  const settings = `beta ${short(run.beta)}${controls.made.alpha.input.disabled ? "" : `, alpha ${short(run.alpha)}`}`;
  text.textContent = `${data.look[run.objective].label}, ${settings}: reward ${said(metrics.reward)} from ${said(start.reward)}, KL(policy ‖ reference) ${said(metrics.kl)} nats, SeqKL chosen ${metrics.seqkl_chosen.mean.toFixed(1)}, rejected ${metrics.seqkl_rejected.mean.toFixed(1)} nats, entropy ${metrics.entropy.mean.toFixed(2)} nats a token (${start.entropy.mean.toFixed(2)} at the start).`;
  plots.replaceChildren(plane(run), ...curves(run));
  samples.replaceChildren(...written(run));
}

follow("objective");
window.lab = { controls, follow, chosen, text: () => text.textContent };
