// What the labs share: controls, pictures as SVG, tables, and the one line that says the numbers.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const room = document.getElementById("lab");

// Elements.

function make(name, given = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "rect", "circle", "text", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(given)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function place(...sections) { room.replaceChildren(...sections); }

// Numbers as Python prints them.

function signed(value, digits) {
  const text = value.toFixed(digits);
  return Number(text) < 0 ? text : `+${text.replace("-", "")}`;
}

function short(value, digits = 3) { // as "%.3g"
  if (value === 0 || !Number.isFinite(value)) return String(value === 0 ? 0 : value);
  const power = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
  if (power < -4 || power >= digits) {
    const [head, tail] = value.toExponential(digits - 1).split("e");
    return `${Number(head)}e${tail.replace(/^([+-])(\d)$/, "$10$2")}`;
  }
  return String(Number(value.toPrecision(digits)));
}

// Controls: {name: {label, value, options | min, max, step, log}} -> {values(), set(values), enable(names)}.

class Controls {
  constructor(known, moved) {
    this.box = make("div", { class: "controls" });
    this.made = {};
    for (const [name, each] of Object.entries(known)) {
      const input = each.options ? this.choice(each) : this.range(each);
      const shown = make("output", { for: `control-${name}` });
      input.id = `control-${name}`;
      const label = make("label", { for: input.id }, each.label);
      this.box.append(make("div", { class: "control" }, label, input, ...(each.options ? [] : [shown])));
      this.made[name] = { each, input, shown };
      input.addEventListener("input", () => { this.say(name); moved(name); });
      this.put(name, each.value);
    }
  }

  choice({ options }) {
    return make("select", {}, ...options.map(([words, value]) => make("option", { value }, words)));
  }

  range({ min, max, step, stops }) {
    return make("input", stops ? { type: "range", min: 0, max: stops.length - 1, step: 1 } : { type: "range", min, max, step });
  }

  value(name) {
    const { each, input } = this.made[name];
    if (each.options) return input.value;
    if (each.stops) return each.stops[input.value].value;
    return each.log ? 10 ** Number(input.value) : Number(input.value);
  }

  values() { return Object.fromEntries(Object.keys(this.made).map((name) => [name, this.value(name)])); }

  put(name, value) {
    const { each, input } = this.made[name];
    if (each.stops) input.value = Math.max(0, each.stops.findIndex((stop) => stop.value === value));
    else input.value = each.log ? Math.log10(value) : value;
    this.say(name);
  }

  stops(name, stops) { // another set of values; the one it is at stays if it can
    const { each, input } = this.made[name];
    const before = each.stops && each.stops[input.value] ? each.stops[input.value].value : null;
    each.stops = stops;
    input.max = stops.length - 1;
    const at = stops.findIndex((stop) => stop.value === before);
    input.value = at < 0 ? Math.floor(stops.length / 2) : at;
    input.disabled = stops.length < 2;
    this.say(name);
  }

  enable(names) {
    for (const [name, { input }] of Object.entries(this.made)) input.disabled = !names.has(name);
  }

  say(name) {
    const { each, input, shown } = this.made[name];
    if (each.options) return;
    const words = each.stops ? each.stops[input.value].words : short(this.value(name));
    shown.textContent = words;
    input.setAttribute("aria-valuetext", words);
  }
}

// Pictures.

const MARGIN = { left: 54, right: 12, top: 10, bottom: 40 };

function ticks(low, high, count = 8) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(i * step);
  return found;
}

class Plot {
  // x, y: [low, high]; bend: a scale of x, e.g. Math.sqrt. `words` is what a screen reader says.
  constructor({ title, words, x, y, xlabel = "", ylabel = "", width = 420, height = 290, bend = (v) => v, xticks = null, yticks = null, left = MARGIN.left }) {
    this.svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
    const [right, low] = [width - MARGIN.right, height - MARGIN.bottom];
    const span = bend(x[1]) - bend(x[0]);
    this.x = (value) => left + ((right - left) * (bend(value) - bend(x[0]))) / span;
    this.y = (value) => low - ((low - MARGIN.top) * (value - y[0])) / (y[1] - y[0]);
    this.edge = { left, right, low, top: MARGIN.top };
    for (const [at, name] of xticks ?? ticks(...x).map((t) => [t, short(t)])) {
      if (name !== null && !xticks) this.line(at, y[0], at, y[1], { class: "grid" });
      this.note(this.x(at), low + 16, name ?? "", { "text-anchor": "middle" });
    }
    for (const [at, name] of yticks ?? ticks(...y).map((t) => [t, short(t)])) {
      if (!yticks) this.line(x[0], at, x[1], at, { class: "grid" });
      this.note(left - 6, this.y(at) + 4, name, { "text-anchor": "end" });
    }
    this.line(x[0], y[0], x[1], y[0], { class: "axis" });
    this.line(x[0], y[0], x[0], y[1], { class: "axis" });
    this.note((left + right) / 2, height - 6, xlabel, { "text-anchor": "middle" });
    this.note(13, (MARGIN.top + low) / 2, ylabel, { "text-anchor": "middle", transform: `rotate(-90 13 ${(MARGIN.top + low) / 2})` });
    this.figure = make("figure", {}, make("figcaption", {}, title), this.svg);
  }

  line(x1, y1, x2, y2, given) {
    this.svg.append(make("line", { x1: this.x(x1), y1: this.y(y1), x2: this.x(x2), y2: this.y(y2), ...given }));
  }

  curve(xs, ys, given) {
    const d = xs.map((x, i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(ys[i]).toFixed(1)}`).join("");
    this.svg.append(make("path", { d, fill: "none", "stroke-width": 2, ...given }));
  }

  point(x, y, look, size = 5, given = {}) { this.svg.append(mark(look.marker, this.x(x), this.y(y), size, { fill: look.colour, ...given })); }

  note(x, y, words, given = {}) { this.svg.append(make("text", { x, y, ...given }, words)); }

  bar(at, width, value, given) { // upright, from 0
    const [a, b] = [this.y(0), this.y(value)];
    this.svg.append(make("rect", { x: at - width / 2, y: Math.min(a, b), width, height: Math.max(Math.abs(a - b), 0.01), ...given }));
  }

  across(at, height, value, given) { // lying, from 0
    const [a, b] = [this.x(0), this.x(value)];
    this.svg.append(make("rect", { x: Math.min(a, b), y: at - height / 2, width: Math.max(Math.abs(a - b), 0.01), height, ...given }));
  }
}

function mark(kind, x, y, r, given) { // the markers of the course's figures
  const shape = (points) => make("path", { d: `M${points.map(([a, b]) => `${(x + r * a).toFixed(1)} ${(y + r * b).toFixed(1)}`).join("L")}Z`, ...given });
  if (kind === "s") return shape([[-1, -1], [1, -1], [1, 1], [-1, 1]]);
  if (kind === "D") return shape([[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]);
  if (kind === "^") return shape([[0, -1.2], [1.2, 1], [-1.2, 1]]);
  if (kind === "v") return shape([[0, 1.2], [1.2, -1], [-1.2, -1]]);
  if (kind === ">") return shape([[1.2, 0], [-1, 1.2], [-1, -1.2]]);
  if (kind === "*") return shape([...Array(10).keys()].map((i) => [(i % 2 ? 0.6 : 1.5) * Math.sin((i * Math.PI) / 5), -(i % 2 ? 0.6 : 1.5) * Math.cos((i * Math.PI) / 5)]));
  return make("circle", { cx: x, cy: y, r, ...given });
}

function legend(looks, more = []) {
  const items = [...Object.values(looks), ...more].map((look) => make("span", {}, make("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, mark(look.marker, 8, 8, 5, { fill: look.colour })), ` ${look.label}`));
  return make("div", { class: "legend" }, ...items);
}

function table(heads, rows, now = -1) {
  const head = make("tr", {}, ...heads.map((words) => make("th", { scope: "col" }, words)));
  const body = rows.map(([first, ...rest], i) => make("tr", i === now ? { class: "now" } : {}, make("th", { scope: "row" }, first), ...rest.map((words) => make("td", {}, words))));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

// Two buttons: `state` is what `now()` gave when the first was pressed, null once the second is.
function pin(now, draw) {
  const buttons = ["Pin this state", "Unpin"].map((words) => make("button", { type: "button" }, words));
  const pinned = { state: null, box: make("div", { class: "pins" }, ...buttons) };
  const keep = (state) => { pinned.state = state; buttons[1].disabled = state === null; draw(); };
  buttons[0].addEventListener("click", () => keep(now()));
  buttons[1].addEventListener("click", () => keep(null));
  buttons[1].disabled = true;
  return pinned;
}

function facts() { return make("div", { class: "facts", role: "status" }); }
