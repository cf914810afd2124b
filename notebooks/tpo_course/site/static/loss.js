// The loss lab: the objectives' losses of one pair, their slopes, and the coefficient of every token, by formula.
"use strict";

const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
const minusLogSigmoid = (x) => Math.max(-x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const sum = (numbers) => numbers.reduce((all, each) => all + each, 0);

// Weight f of every token: 1 +- alpha r_hat or its exponential, never below the floor.
function weights(shares, sign, { guide, alpha, shaping }) {
  return shares.map((share) => {
    const scaled = sign * alpha * guide * share;
    return Math.max(shaping === "exp" ? Math.exp(scaled) : 1 + scaled, data.floor);
  });
}

const bradleyTerry = (margin) => [minusLogSigmoid(margin), -sigmoid(-margin)]; // loss, d loss / d margin

// Of one objective: `token(hyper, shares, sign)` what a nat of every token's log-probability adds to its side's reward, `from`
// what that is counted from, `kl` what a nat of SeqKL adds on the chosen and the rejected side, `flows` whether gradient flows
// through either, `loss` of the margin.
const even = (hyper, shares) => shares.map(() => hyper.beta);
const plain = { token: even, kl: () => 0, flows: [false, false], loss: bradleyTerry };
const OBJECTIVES = {
  dpo: plain,
  tdpo1: { ...plain, kl: ({ beta }) => beta, flows: [true, true] },
  tdpo2: { ...plain, kl: ({ beta, alpha }) => beta * alpha, flows: [false, true] },
  tgdpo: { ...plain, token: (hyper, shares, sign) => weights(shares, sign, hyper).map((f) => hyper.beta * f) },
  simpo: { ...plain, absolute: true, token: ({ beta }, shares) => shares.map(() => beta / shares.length), loss: (margin, { gamma }) => bradleyTerry(margin - gamma) },
  ipo: { ...plain, loss: (margin, { beta }) => [(margin / beta - 1 / (2 * beta)) ** 2, (2 * (margin / beta - 1 / (2 * beta))) / beta] },
};

function side(objective, hyper, words, logratio, seqKl, sign) {
  const shares = Object.values(words);
  const nat = objective.token(hyper, shares, sign);
  const each = logratio / shares.length + (objective.absolute ? data.ref_logp : 0); // nats a token, spread evenly
  return { nat, logps: sum(nat.map((weight) => weight * each)), kl: objective.kl(hyper) * seqKl, count: shares.length };
}

// Everything that is shown of one objective: loss, slope, margin and its terms, coefficients on log pi and KL, weights f.
function compute(name, now) {
  const objective = OBJECTIVES[name];
  const chosen = side(objective, now, data.chosen, now.chosen_logratio, now.chosen_kl, 1);
  const rejected = side(objective, now, data.rejected, now.rejected_logratio, now.rejected_kl, -1);
  const terms = [chosen.logps, -rejected.logps, chosen.kl, -rejected.kl];
  const margin = sum(terms);
  const [loss, slope] = objective.loss(margin, now);
  const held = objective.flows.map((flows, i) => (flows ? (i ? -1 : 1) * slope * objective.kl(now) : 0));
  const reads = data.objectives[name].needs.includes("kl");
  return {
    name, loss, slope, margin, terms,
    logps: [...chosen.nat.map((w) => slope * w), ...rejected.nat.map((w) => -slope * w)],
    kl: reads ? [...Array(chosen.count).fill(held[0]), ...Array(rejected.count).fill(held[1])] : null,
    weights: name === "tgdpo" ? [...weights(Object.values(data.chosen), 1, now), ...weights(Object.values(data.rejected), -1, now)] : null,
  };
}

// The smallest SeqKL that a response's log-ratio leaves possible: `tpo_course.coefficients.least_kl`.
function leastKl(logratio, tokens) {
  const [x, p] = [logratio / tokens, Math.exp(data.ref_logp)];
  if (x + data.ref_logp >= 0) return Infinity;
  return Math.max(0, tokens * (-p * x + (1 - p) * (Math.log1p(-p) - Math.log1p(-Math.exp(x + data.ref_logp)))));
}

// Whether a policy can have these log-ratios and KLs, in words.
function reach(now) {
  const [least, wrong] = [[], []];
  for (const side of ["chosen", "rejected"]) {
    const [x, kl, tokens] = [now[`${side}_logratio`], now[`${side}_kl`], Object.keys(data[side]).length];
    const [most, needed] = [-data.ref_logp * tokens, leastKl(x, tokens)];
    least.push(`${needed.toFixed(2)} (${side})`);
    if (x >= most) wrong.push(`log-ratio ${signed(x, 1)} (${side}): at ${most.toFixed(0)} nats every token has probability 1`);
    else if (kl < needed) wrong.push(`SeqKL ${kl.toFixed(1)} (${side}): at log-ratio ${signed(x, 1)} it is at least ${needed.toFixed(2)} nats`);
  }
  if (wrong.length) return `Out of reach (✕): ${wrong.join("; ")}.`;
  return `Within reach: these log-ratios need a SeqKL of ${least.join(" and ")} nats or more.`;
}

// Pictures.

const label = (name) => data.look[name].label;
const count = Object.keys(data.chosen).length;
const tokens = [...Object.keys(data.chosen), ...Object.keys(data.rejected)];
const spots = tokens.map((_, i) => i + (i < count ? 0 : 0.8));
const range = (numbers, sign = true) => {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)].map((n) => (sign && n >= 0 ? "+" : "") + short(n));
  return low === high ? `${low} on every token` : `${low} to ${high}`;
};

function lossPlot(found, now, before) {
  const far = Math.max(4, 1.25 * Math.abs(found.margin), 1.25 * Math.abs(before?.margin ?? 0));
  const xs = [...Array(121).keys()].map((i) => -far + (i * far) / 60);
  const ys = xs.map((x) => OBJECTIVES[found.name].loss(x, now)[0]);
  const top = Math.max(...ys, found.loss, before?.loss ?? 0);
  const plot = new Plot({ title: `Loss ${short(found.loss)}, slope ${short(found.slope)}`, words: `The loss over the margin; this pair stands at a margin of ${signed(found.margin, 3)}.`, x: [-far, far], y: [-0.05 * top, 1.04 * top], xlabel: "margin, nats", ylabel: "loss, nats" });
  plot.curve(xs, ys, { stroke: "currentColor" });
  const step = 0.3 * far;
  plot.line(found.margin - step, found.loss - found.slope * step, found.margin + step, found.loss + found.slope * step, { stroke: data.look[found.name].colour, "stroke-width": 2, "stroke-dasharray": "6 4" });
  if (before) plot.point(before.margin, before.loss, data.look[found.name], 6, { fill: "none", stroke: "currentColor", "stroke-dasharray": "2 2" });
  plot.point(found.margin, found.loss, data.look[found.name], 7, { stroke: "currentColor" });
  if (reach(now).startsWith("Out")) plot.note(plot.x(found.margin), plot.y(found.loss) - 10, "✕", { "text-anchor": "middle" });
  return plot.figure;
}

function termsPlot(found) {
  const score = OBJECTIVES[found.name].absolute ? "mean log π" : "log-ratio";
  const rows = [[`chosen ${score}`, found.terms[0]], [`rejected ${score}`, found.terms[1]], ["chosen KL", found.terms[2]], ["rejected KL", found.terms[3]], ["margin", found.margin]];
  const reach = 1.6 * Math.max(1, ...rows.map(([, value]) => Math.abs(value)));
  const plot = new Plot({ title: "What the margin is made of", words: rows.map(([name, value]) => `${name} ${signed(value, 3)}`).join(", "), x: [-reach, reach], y: [0, 5], xlabel: "nats", yticks: rows.map(([name], i) => [4.5 - i, name]), left: 130 });
  rows.forEach(([, value], i) => {
    const y = plot.y(4.5 - i);
    plot.across(y, 22, value, { fill: i === 4 ? "currentColor" : data.look[found.name].colour, opacity: i === 2 || i === 3 ? 0.5 : 1 });
    plot.note(plot.x(value < 0 ? 0.04 * reach : -0.04 * reach), y + 4, found.kl === null && (i === 2 || i === 3) ? "not read" : signed(value, 3), { "text-anchor": value < 0 ? "start" : "end" });
  });
  plot.line(0, 0, 0, 5, { class: "axis" });
  return plot.figure;
}

function tokenPlot(found) {
  const all = [...found.logps, ...(found.kl ?? [])];
  const reach = 1.25 * Math.max(...all.map(Math.abs)) || 1;
  const both = found.kl !== null;
  const plot = new Plot({ title: `Coefficient of every token: on log π${both ? ", beside it (hollow) on KL" : ""}. Below 0 training raises it`, words: `Coefficients on log π: chosen ${range(found.logps.slice(0, count))}, rejected ${range(found.logps.slice(count))}.`, x: [-0.7, spots.at(-1) + 0.7], y: [-reach, reach], width: 760, height: 250, xticks: spots.map((at, i) => [at, tokens[i]]), ylabel: "d loss / d ·" });
  plot.figure.classList.add("wide");
  const colour = data.look[found.name].colour;
  spots.forEach((at, i) => {
    plot.bar(plot.x(at) - (both ? 10 : 0), both ? 18 : 32, found.logps[i], { fill: colour });
    if (both) plot.bar(plot.x(at) + 10, 18, found.kl[i], { fill: "none", stroke: colour, "stroke-width": 2 });
  });
  plot.line(-0.7, 0, spots.at(-1) + 0.7, 0, { class: "axis" });
  return plot.figure;
}

function weightPlot(found) {
  const top = Math.max(2.1, 1.15 * Math.max(...found.weights));
  const low = found.weights.filter((f) => f <= data.floor).length;
  const plot = new Plot({ title: `Weight f of every token: ${low} of ${tokens.length} on the floor ${data.floor} (▼)`, words: `Weights f: chosen ${range(found.weights.slice(0, count), false)}, rejected ${range(found.weights.slice(count), false)}.`, x: [-0.7, spots.at(-1) + 0.7], y: [0, top], width: 760, height: 200, xticks: spots.map((at, i) => [at, tokens[i]]), ylabel: "weight f" });
  plot.figure.classList.add("wide");
  spots.forEach((at, i) => {
    plot.bar(plot.x(at), 32, found.weights[i], { fill: data.look.tgdpo.colour });
    if (found.weights[i] <= data.floor) plot.point(at, data.floor + 0.04 * top, { marker: "v", colour: "currentColor" }, 6);
  });
  plot.line(-0.7, 1, spots.at(-1) + 0.7, 1, { stroke: "currentColor", "stroke-dasharray": "5 4" });
  return plot.figure;
}

// All objectives side by side, as `tpo_course.widgets.loss_columns` has them: a column each, and above it where they stand.

const [REACH, TOP] = [6, 6.2]; // nats of margin and of loss that the curve shows
const names = Object.keys(data.objectives);

function curvePlot(states, before) {
  const plot = new Plot({ title: "One curve for all but IPO, whose loss is a square", words: `The loss over the margin, and on it ${names.filter((name) => name !== "ipo").map(label).join(", ")}.`, x: [-REACH, REACH], y: [-0.2, TOP], width: 760, height: 260, xlabel: "margin (SimPO: less its γₘ), nats", ylabel: "loss, nats" });
  plot.figure.classList.add("wide");
  const xs = [...Array(121).keys()].map((i) => -REACH + (i * REACH) / 60);
  plot.curve(xs, xs.map((x) => bradleyTerry(x)[0]), { stroke: "currentColor" });
  for (const [shown, given] of [[before, { fill: "none", stroke: "currentColor", "stroke-dasharray": "2 2" }], [states, { stroke: "currentColor" }]]) {
    for (const { found, now } of shown.filter((each) => each.found.name !== "ipo")) {
      const x = found.margin - ("gamma" in data.objectives[found.name].hyper ? now.gamma : 0);
      plot.point(Math.max(-REACH, Math.min(REACH, x)), Math.min(found.loss, TOP), data.look[found.name], 6, given); // beyond, at the edge
    }
  }
  plot.figure.append(legend(Object.fromEntries(names.filter((name) => name !== "ipo").map((name) => [name, data.look[name]]))));
  return plot.figure;
}

// A number over its colour: orange and dashed below 0, blue and solid above, full at `largest`.
function push(words, value, largest) {
  const share = largest ? Math.min(1, Math.abs(value) / largest) : 0;
  return make("span", { class: value >= 0 ? "push" : "push down", style: `--share: ${share.toFixed(2)}` }, words);
}

function tokenCell({ found }, old, i) {
  const largest = (numbers) => Math.max(...numbers.map(Math.abs));
  const parts = [push(signed(found.logps[i], 4), found.logps[i], largest(found.logps))];
  const small = (...words) => parts.push(" ", make("small", {}, ...words));
  const [held, pulls] = [found.kl && found.kl.slice(0, count), found.kl && found.kl.slice(count)].map((side) => side && side.some((k) => k !== 0));
  if (found.kl) small(`KL ${i < count && pulls && !held ? "held" : signed(found.kl[i], 4)}`);
  if (found.weights) small(push(`f ${found.weights[i].toFixed(2)}${found.weights[i] <= data.floor ? "▼" : ""}`, found.weights[i] - 1, largest(found.weights.map((f) => f - 1))));
  if (old) parts.push(" ", make("small", { class: "was" }, `was ${signed(old.found.logps[i], 4)}`));
  return parts;
}

function columns(states, before) {
  const line = (words, cells) => make("tr", {}, make("th", { scope: "row" }, words), ...cells.map((parts) => make("td", {}, ...parts)));
  const used = ({ found, now }) => Object.entries(data.objectives[found.name].hyper).filter(([name]) => typeof now[name] === "number").map(([name, symbol]) => `${symbol} ${short(now[name])}`);
  const heads = states.map((each) => make("th", { scope: "col" }, make("span", { style: `border-bottom: 3px solid ${data.look[each.found.name].colour}` }, label(each.found.name)), make("br"), make("small", {}, used(each).join(", "))));
  const change = (value) => (value < 0 ? "" : "+") + short(value, 2);
  const number = (of) => states.map(({ found }, i) => [short(found[of], 4), ...(before.length ? [" ", make("small", { class: "was" }, `was ${short(before[i].found[of])}, ${change(found[of] - before[i].found[of])}`)] : [])]);
  const numbers = [["loss, nats", "loss"], ["margin, nats", "margin"], ["d loss / d margin", "slope"]].map(([words, of]) => line(words, number(of)));
  const part = (side, from, to) => make("tbody", {}, make("tr", {}, make("th", { scope: "rowgroup" }, make("b", {}, side), ": d loss / d log π"), make("td", { colspan: states.length })), ...tokens.slice(from, to).map((word, i) => line(word, states.map((each, n) => tokenCell(each, before[n], from + i)))));
  return make("table", { class: "columns" }, make("thead", {}, make("tr", {}, make("td", {}), ...heads)), make("tbody", {}, ...numbers), part("chosen", 0, count), part("rejected", count, tokens.length));
}

const NOTE = "Below 0 (orange, dashed): training raises it; above 0 (blue, solid): it lowers it; full colour is a column's largest. KL: the coefficient on the token's KL. f: TGDPO's weight, coloured from 1. One β for all; SimPO's multiplies a mean.";

// The numbers in sentences, without what is said of single tokens.
function sideBySide(states, before) {
  const said = states.map(({ found }, i) => `${label(found.name)} loss ${short(found.loss, 4)}${before.length ? ` (${signed(found.loss - before[i].found.loss, 3)} since the pinned state)` : ""}, margin ${signed(found.margin, 3)}, slope ${short(found.slope)}`);
  return `${said.join("; ")}.`;
}

// The page.

const ALL = data.controls.show.options.at(-1)[1];
const PAIR = ["chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"];
const settings = {};
for (const [name, each] of Object.entries(data.controls)) settings[name] = each;
const controls = new Controls(settings, follow);
const [text, plots, all] = [facts(), make("div", { class: "plots" }), make("div")];
const summary = make("section", {}, make("h2", {}, "All objectives on this pair"), all);
const wide = make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "table" }); // stays where it was moved to
const note = make("p", { class: "note" }, NOTE);
const pinned = pin(() => controls.values(), () => draw(controls.value("objective")));
place(controls.box, pinned.box, text, plots, wide, note, summary);

// What an objective is computed with: the sliders are of TDPO2 and TGDPO both where they share a name.
function setting(name, now = controls.values()) {
  return { ...now, alpha: Number(now.alpha), shaping: now.shaping ?? "linear", name };
}

function follow(moved) {
  if (moved === "situation") (data.situations[controls.value("situation")] ?? []).forEach((value, i) => controls.put(PAIR[i], value));
  else if (PAIR.includes(moved)) controls.made.situation.input.value = data.controls.situation.options.at(-1)[1];
  draw(controls.value("objective"));
}

function read(name) { // the controls that an objective reads
  const { needs, hyper } = data.objectives[name];
  return ["show", "objective", "situation", ...PAIR.slice(0, 2), ...Object.keys(hyper), ...(needs.includes("kl") ? PAIR.slice(2) : []), ...(needs.includes("guide_logps") ? ["guide"] : [])];
}

function draw(name) {
  const every = controls.value("show") === ALL;
  for (const [part, shown] of [[wide, every], [note, every], [summary, !every]]) part.hidden = !shown;
  if (every) drawAll();
  else drawOne(name);
}

function drawAll() {
  controls.enable(new Set(names.flatMap(read).filter((each) => each !== "objective")));
  const at = (values) => names.map((each) => { const now = setting(each, values); return { now, found: compute(each, now) }; });
  const [states, before] = [at(), pinned.state ? at(pinned.state) : []];
  text.replaceChildren(make("div", {}, sideBySide(states, before)), make("div", {}, reach(states[0].now)));
  plots.replaceChildren(curvePlot(states, before));
  wide.replaceChildren(columns(states, before));
}

function drawOne(name) {
  controls.enable(new Set(read(name)));
  const now = setting(name);
  const found = compute(name, now);
  const was = (each) => pinned.state && compute(each, setting(each, pinned.state));
  const before = was(name);
  const lines = [
    `${label(name)}: margin ${signed(found.margin, 3)} nats, loss ${short(found.loss, 4)} nats, slope of the loss ${short(found.slope)}.`,
    `Coefficients on log π: chosen ${range(found.logps.slice(0, count))}, rejected ${range(found.logps.slice(count))}. Training raises what has a negative one.`,
    found.kl ? `Coefficients on KL: chosen ${range(found.kl.slice(0, count))}, rejected ${range(found.kl.slice(count))}.` : `KL: ${label(name)} reads none.`,
    reach(now),
  ];
  if (before) lines.push(`Since the pinned state: ${["loss", "margin", "slope"].map((each) => `${each} ${signed(found[each] - before[each], 3)}`).join(", ")}.`);
  text.replaceChildren(...lines.map((line) => make("div", {}, line)));
  plots.replaceChildren(lossPlot(found, now, before), termsPlot(found), tokenPlot(found), ...(found.weights ? [weightPlot(found)] : []));
  const rows = names.map((each) => {
    const [one, old] = [compute(each, setting(each)), was(each)];
    const beside = (say, of) => say(one[of]) + (old ? ` (was ${say(old[of])})` : "");
    return [label(each), beside((v) => signed(v, 3), "margin"), beside((v) => short(v, 4), "loss"), beside(short, "slope"), range(one.logps.slice(0, count)), range(one.logps.slice(count)), one.kl ? `${short(one.kl[0])}, ${short(one.kl.at(-1))}` : "not read"];
  });
  all.replaceChildren(table(["objective", "margin", "loss", "slope", "log π chosen", "log π rejected", "KL chosen, rejected"], rows, names.indexOf(name)));
}

draw(controls.value("objective"));
window.lab = { controls, compute, reach, setting, follow, text: () => text.textContent };
