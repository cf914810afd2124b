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

// The page.

const PAIR = ["chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"];
const settings = {};
for (const [name, each] of Object.entries(data.controls)) settings[name] = each;
const controls = new Controls(settings, follow);
const [text, plots, all] = [facts(), make("div", { class: "plots" }), make("div")];
const pinned = pin(() => controls.values(), () => draw(controls.value("objective")));
place(controls.box, pinned.box, text, plots, make("h2", {}, "All objectives on this pair"), all);

// What an objective is computed with: the sliders are of TDPO2 and TGDPO both where they share a name.
function setting(name, now = controls.values()) {
  return { ...now, alpha: Number(now.alpha), shaping: now.shaping ?? "linear", name };
}

function follow(moved) {
  if (moved === "situation") (data.situations[controls.value("situation")] ?? []).forEach((value, i) => controls.put(PAIR[i], value));
  else if (PAIR.includes(moved)) controls.made.situation.input.value = data.controls.situation.options.at(-1)[1];
  draw(controls.value("objective"));
}

function draw(name) {
  const { needs, hyper } = data.objectives[name];
  const read = new Set(["objective", "situation", ...PAIR.slice(0, 2), ...hyper]);
  if (needs.includes("kl")) PAIR.slice(2).forEach((each) => read.add(each));
  if (needs.includes("guide_logps")) read.add("guide");
  controls.enable(read);
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
  const names = Object.keys(data.objectives);
  const rows = names.map((each) => {
    const [one, old] = [compute(each, setting(each)), was(each)];
    const beside = (say, of) => say(one[of]) + (old ? ` (was ${say(old[of])})` : "");
    return [label(each), beside((v) => signed(v, 3), "margin"), beside((v) => short(v, 4), "loss"), beside(short, "slope"), range(one.logps.slice(0, count)), range(one.logps.slice(count)), one.kl ? `${short(one.kl[0])}, ${short(one.kl.at(-1))}` : "not read"];
  });
  all.replaceChildren(table(["objective", "margin", "loss", "slope", "log π chosen", "log π rejected", "KL chosen, rejected"], rows, names.indexOf(name)));
}

draw(controls.value("objective"));
window.lab = { controls, compute, reach, setting, follow, text: () => text.textContent };
