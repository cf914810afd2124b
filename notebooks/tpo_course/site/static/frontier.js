// The frontier lab: where every objective ends in the exact world, from the stored grid.
"use strict";
const MILLI = 1000;
const AXES = { beta: short, alpha: short, guide: ({ beta, updates, run_beta }) => `β̂ ${short(beta)}, ${updates ? `${updates} updates` : "optimum"}${run_beta ? ", r̂ with the run's β" : ""}`, data: ({ pairs, noise }) => `${pairs ? `${pairs} pairs` : "all pairs"}${noise ? `, ${short(100 * noise)}% swapped` : ""}` };

// The stored run of an objective at the places of the sliders, in nats and units of reward.
function run(name, at) {
  const key = data.reads[name].map((axis) => at[axis]).join(",");
  const kept = data.runs[name][key];
  const optimum = (data.optima[name] ?? {})[key];
  return {
    name, key,
    kl: kept.kl.map((v) => v / MILLI), reward: kept.return.map((v) => v / MILLI),
    logratio: kept.logratio.map((v) => v / 100), loss: kept.loss, floor: kept.floor ?? null,
    optimum: optimum ? optimum.map((v) => v / MILLI) : null,
  };
}

const front = { kl: data.front.kl.map((v) => v / MILLI), reward: data.front.return.map((v) => v / MILLI) };
const names = Object.keys(data.reads);
const label = (name) => data.look[name].label;
const highest = Math.max(...front.reward);
const furthest = Math.max(...names.flatMap((name) => Object.values(data.runs[name]).flatMap((kept) => kept.kl))) / MILLI;

function frontAt(kl) { // the return that the front has at a KL, by straight lines over its root
  const at = front.kl.findIndex((each) => each >= kl);
  if (at < 1) return at === 0 ? front.reward[0] : front.reward.at(-1);
  const [a, b] = [front.kl[at - 1], front.kl[at]];
  const share = b > a ? (Math.sqrt(kl) - Math.sqrt(a)) / (Math.sqrt(b) - Math.sqrt(a)) : 0;
  return front.reward[at - 1] + share * (front.reward[at] - front.reward[at - 1]);
}

function plane(found, chosen, before) {
  const ends = found.map((each) => `${label(each.name)} ${each.reward.at(-1).toFixed(2)} at ${each.kl.at(-1).toFixed(2)}`);
  const plot = new Plot({
    title: "Return against KL: the exact front, every objective's way and its end", words: `Return at KL, in nats: ${ends.join("; ")}.`,
    x: [0, furthest * 1.02], y: [Math.min(0, ...[...found, ...before].flatMap((each) => each.reward)) - 0.1, highest + 0.1], bend: Math.sqrt, width: 640, height: 380,
    xticks: [0, 0.1, 0.5, 1, 2, 5, 10, 20].filter((t) => t <= furthest).map((t) => [t, String(t)]),
    xlabel: "KL(policy ‖ reference), nats, on a root scale", ylabel: "expected return",
  });
  plot.figure.classList.add("wide");
  plot.curve(front.kl, front.reward, { stroke: "currentColor", "stroke-width": 3, opacity: 0.55 });
  for (const each of before) {
    plot.curve(each.kl, each.reward, { stroke: "currentColor", "stroke-width": 1, opacity: 0.5, "stroke-dasharray": "3 3" });
    plot.point(each.kl.at(-1), each.reward.at(-1), data.look[each.name], 5, { fill: "none", stroke: "currentColor", "stroke-dasharray": "2 2" });
  }
  for (const each of found) {
    const style = data.look[each.name];
    plot.curve(each.kl, each.reward, { stroke: style.colour, "stroke-width": each.name === chosen ? 3 : 1.5 });
    if (each.optimum) plot.point(...each.optimum, style, 9, { fill: "none", stroke: style.colour, "stroke-width": 2 });
    plot.point(each.kl.at(-1), each.reward.at(-1), style, each.name === chosen ? 7 : 5, { stroke: "currentColor" });
  }
  plot.point(front.kl[0], front.reward[0], { marker: "*", colour: "currentColor" }, 6);
  return plot.figure;
}

// (S, V) of one objective: reference, policy, the implicit reward beta log(pi/pi_ref) and the true one.
function tree(found, beta) {
  const width = data.tokens.length;
  const rows = found.logratio.map((logratio, i) => {
    const ref = data.ref[i] / 1e5;
    return { state: data.states[Math.floor(i / width)], token: data.tokens[i % width], ref, policy: ref * Math.exp(logratio), implicit: beta * logratio, reward: data.reward[i] / MILLI };
  });
  return rows;
}

function treeTable(found, beta) {
  const rows = tree(found, beta).map((row) => [`${row.state} → ${row.token}`, row.ref.toFixed(3), row.policy.toFixed(3), signed(row.implicit, 2), signed(row.reward, 2)]);
  return table(["state → token", "π_ref", "π", "implicit reward β log π/π_ref", "true reward R"], rows);
}

function creditPlot(found, beta) {
  const rows = tree(found, beta);
  const [xs, ys] = [rows.map((row) => row.reward), rows.map((row) => row.implicit)];
  const [low, high] = [Math.min(...xs, ...ys), Math.max(...xs, ...ys)].map((v) => v * 1.08);
  const plot = new Plot({ title: `Credit of every token under ${label(found.name)}: implicit against true reward`, words: `${rows.length} tokens; implicit rewards from ${short(Math.min(...ys))} to ${short(Math.max(...ys))}.`, x: [low, high], y: [low, high], xlabel: "true reward R(s, a)", ylabel: "β log π/π_ref", height: 340 });
  plot.line(low, low, high, high, { stroke: "currentColor", "stroke-dasharray": "5 4" });
  rows.forEach((row) => plot.point(row.reward, row.implicit, data.look[found.name], 4));
  return plot.figure;
}

// The grid's stops of a slider, and the one off the grid that a preset stands at.
const START = { beta: 2, alpha: 2, guide: 1, data: 0 };
const onGrid = (axis, at) => at < data.stops[axis];
const stops = (axis, now) => data.axes[axis].map((value, at) => ({ value: at, size: value, words: `${AXES[axis](value)}${onGrid(axis, at) ? "" : " (preset)"}` })).filter(({ value }) => onGrid(axis, value) || value === now).sort((a, b) => a.size - b.size || 0);
const controls = new Controls({
  preset: { label: "what goes wrong", value: "", options: [["nothing chosen", ""], ...Object.keys(data.presets).map((name) => [name, name])] },
  objective: { label: "look closer at", value: names[0], options: names.map((name) => [label(name), name]) },
  ...Object.fromEntries(Object.keys(data.axes).map((axis) => [axis, { label: axis, value: START[axis], stops: stops(axis) }])),
}, follow);
const [says, text, plots, all, leaves] = [facts(), facts(), make("div", { class: "plots" }), make("div"), make("div")];
const ends = () => names.map((name) => run(name, controls.values()));
const pinned = pin(ends, draw);
place(controls.box, pinned.box, says, text, legend(data.look, [{ label: "reference", marker: "*", colour: "currentColor" }]), make("p", { class: "note" }, "Thick grey: the front, which no policy lies above. Hollow: the optimum, where it is known. Dashed: what was pinned. What an objective does not read leaves it where it is."), plots, make("h2", {}, "Where each ends"), all, make("h2", {}, "Its tree of tokens"), leaves);

function follow(moved) { // a preset puts every slider; a slider that moves leaves it, and one off the grid goes back to the start
  if (moved !== "objective") {
    const preset = moved === "preset" ? data.presets[controls.value("preset")] : undefined;
    controls.put(...(preset ? ["objective", preset.show] : ["preset", ""]));
    const before = controls.values();
    for (const axis of Object.keys(data.axes)) {
      const at = preset ? preset.at[axis] : onGrid(axis, before[axis]) ? before[axis] : START[axis];
      controls.stops(axis, stops(axis, at));
      controls.put(axis, at);
    }
  }
  draw();
}

function draw() {
  const preset = data.presets[controls.value("preset")];
  says.textContent = preset ? preset.words : "All settings are where the lab begins, or where you moved them.";
  const at = controls.values();
  const [chosen, beta] = [at.objective, data.axes.beta[at.beta]];
  const [found, before] = [ends(), pinned.state ?? []];
  const mine = found.find((each) => each.name === chosen);
  const [kl, reward] = [mine.kl.at(-1), mine.reward.at(-1)];
  const floor = mine.floor === null ? "" : ` ${short(100 * mine.floor)}% of its tokens stand on the floor of f.`;
  const words = Object.keys(data.axes).map((axis) => `${axis} ${AXES[axis](data.axes[axis][at[axis]])}`).join("; ");
  text.textContent = `${words}. ${label(chosen)} ends at a return of ${reward.toFixed(2)} and a KL of ${kl.toFixed(2)} nats; the front has ${frontAt(kl).toFixed(2)} there. Loss ${short(mine.loss, 4)}.${floor}`;
  plots.replaceChildren(plane(found, chosen, before), creditPlot(mine, beta));
  const beside = (each, of) => {
    const old = before.find((one) => one.name === each.name);
    return each[of].at(-1).toFixed(2) + (old ? ` (${signed(each[of].at(-1) - old[of].at(-1), 2)})` : "");
  };
  const rows = found.map((each) => [label(each.name), data.reads[each.name].join(", "), beside(each, "kl"), beside(each, "reward"), frontAt(each.kl.at(-1)).toFixed(2), each.optimum ? each.optimum.map((v) => v.toFixed(2)).join(", ") : "–", short(each.loss, 4)]);
  all.replaceChildren(table(["objective", "reads", "KL, nats", "return", "front there", "optimum: KL, return", "loss"], rows, names.indexOf(chosen)));
  leaves.replaceChildren(treeTable(mine, beta));
}

draw();
window.lab = { controls, run, tree, frontAt, draw, text: () => text.textContent };
