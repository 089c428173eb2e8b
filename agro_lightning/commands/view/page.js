"use strict";
// Every text comes from a model or a file and enters the page by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 40;
const byId = (id) => document.getElementById(id);
function number(x) {
  if (x === null || x === undefined) return "–";
  return x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

function make(tag, text, parent, name) {
  const node = document.createElement(tag);
  if (text !== null && text !== undefined) node.textContent = text;
  if (name) node.className = name;
  if (parent) parent.append(node);
  return node;
}

// ---------------------------------------------------------------- tabs
const tabs = [["completions", "Completions"], ["curves", "Curves"], ["gap", "Engine gap"], ["settings", "Settings"]];
const drawn = new Set();
function open(id) {
  for (const [other] of tabs) {
    byId(other).hidden = other !== id;
    byId("tab-" + other).setAttribute("aria-selected", String(other === id));
  }
  if (!drawn.has(id)) {
    drawn.add(id);
    ({ curves: drawCurves, gap: drawGap, settings: drawSettings, completions: drawCompletions })[id]();
  }
}

// ---------------------------------------------------------------- completions
function prepare() {
  for (const group of data.groups) {
    for (const row of group.rows) {
      row.s = null;
      if (row.policy === null) continue;
      row.s = 0;
      row.policy.forEach((p, i) => {
        if (p !== null) row.s += (p - row.reference[i]) / 1000;
      });
    }
  }
}

const filters = {};
function field(name, label, input) {
  const box = make("label", label, byId("filters"));
  input.id = "filter-" + name;
  input.addEventListener("input", refilter);
  box.append(input);
  filters[name] = input;
}
function range(name, label) {
  for (const [end, word] of [["from", "≥"], ["to", "≤"]]) {
    const input = document.createElement("input");
    input.type = "number";
    input.step = "any";
    field(name + "-" + end, label + " " + word, input);
  }
}
function choice(name, label, options) {
  const select = document.createElement("select");
  for (const [value, text] of [["", "all"], ...options]) make("option", text, select).value = value;
  field(name, label, select);
}

function accepts() {
  const bound = (name) => (filters[name].value === "" ? null : Number(filters[name].value));
  const [lowR, highR, lowS, highS] = ["reward-from", "reward-to", "s-from", "s-to"].map(bound);
  const source = filters.source.value, finish = filters.truncated.value, step = filters.step.value;
  const text = filters.text.value.toLowerCase();
  const inside = (x, low, high) =>
    (low === null && high === null) || (x !== null && (low === null || x >= low) && (high === null || x <= high));
  return (group, row) =>
    inside(row.reward, lowR, highR) && inside(row.s, lowS, highS) &&
    (source === "" || row.source === JSON.parse(source)) &&
    (finish === "" || (row.finish === "length") === (finish === "yes")) &&
    (step === "" || group.step === Number(step)) &&
    (text === "" || group.prompt.toLowerCase().includes(text) || textOf(row).toLowerCase().includes(text));
}
const textOf = (row) => row.tokens.map((token) => data.vocabulary[token]).join("");

let matches = [], next = 0;
function refilter() {
  const keep = accepts();
  matches = [];
  let count = 0;
  for (const group of data.groups) {
    const rows = group.rows.filter((row) => keep(group, row));
    if (rows.length) matches.push([group, rows]);
    count += rows.length;
  }
  byId("shown").textContent = `${count} completions of ${matches.length} prompts`;
  byId("groups").replaceChildren();
  next = 0;
  addPage();
}
function addPage() {
  for (const [group, rows] of matches.slice(next, next + PAGE)) byId("groups").append(summaryOf(group, rows));
  next += PAGE;
}

function summaryOf(group, rows) {
  const box = make("details", null, null, "group"), head = make("summary", null, box);
  make("b", group.step === null ? "no step" : `step ${group.step}`, head);
  make("span", group.prompt, head, "prompt");
  const rewards = rows.map((row) => row.reward), s = rows.map((row) => row.s).filter((x) => x !== null);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const spread = s.length ? `, s ${number(Math.min(...s))} to ${number(Math.max(...s))}` : "";
  make("span", `${rows.length}/${group.rows.length}, reward ${number(mean)}${spread}`, head, "numbers");
  box.addEventListener("toggle", () => {
    if (box.open && box.childElementCount === 1) box.append(insideOf(group, rows));
  });
  return box;
}

function insideOf(group, rows) {
  const inside = make("div", null, null, "inside");
  const answers = group.answers.length ? `, answer ${group.answers.join(" or ")}` : "";
  make("div", `prompt ${group.id}${answers}, file ${group.file}`, inside, "numbers");
  make("pre", group.prompt, inside);
  for (const row of rows) {
    const box = make("div", null, inside, "row"), facts = make("div", null, box, "facts");
    make("b", `reward ${number(row.reward)}`, facts);
    const parts = Object.entries(row.parts).map(([name, value]) => `${name} ${number(value)}`).join(", ");
    const version = row.version < 0 ? "" : `, version ${row.version}`;
    const finish = row.finish === "length" ? "truncated" : "ended";
    const by = row.s === null ? "no log-probs" : row.by === "sampler" ? "log π as sampled" :
      `log π of step ${data.checkpoint ?? "?"}`;
    facts.append(` ${parts ? `(${parts})` : ""} · s ${number(row.s)} · ${row.source}${version} · ${finish}, ` +
      `${row.tokens.length} tokens · ${by}`);
    const tokens = make("pre", null, box, "tokens");
    row.tokens.forEach((token, i) => {
      const span = make("span", visible(data.vocabulary[token]), tokens);
      if (row.chosen) span.className = row.chosen[i] ? "chosen" : "given";
      if (row.policy !== null && row.policy[i] !== null) span.style.backgroundColor = colour((row.policy[i] - row.reference[i]) / 1000);
    });
    tokens.row = row;
  }
  return inside;
}
const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
function colour(d) {
  const strength = Math.sqrt(Math.min(1, Math.abs(d) / 2));
  return d >= 0 ? `rgba(49, 130, 206, ${0.75 * strength})` : `rgba(221, 107, 32, ${0.75 * strength})`;
}

function tip(event) {
  const span = event.target, row = span.parentElement && span.parentElement.row;
  byId("tip").hidden = !row;
  if (!row) return;
  const i = Array.prototype.indexOf.call(span.parentElement.children, span);
  const lines = [`token ${i + 1}: ${JSON.stringify(data.vocabulary[row.tokens[i]])}`];
  if (row.policy !== null && row.policy[i] !== null) {
    const [p, q] = [row.policy[i] / 1000, row.reference[i] / 1000];
    lines.push(`log π ${p.toFixed(3)}, log π_ref ${q.toFixed(3)}, difference ${(p - q).toFixed(3)}`);
  }
  if (row.chosen) lines.push(row.chosen[i] ? "chosen by the policy" : "given, not trained on");
  byId("tip").textContent = lines.join("\n");
  byId("tip").style.left = Math.min(event.clientX + 12, window.innerWidth - 380) + "px";
  byId("tip").style.top = event.clientY + 16 + "px";
}

function drawCompletions() {
  if (!data.groups.length) {
    make("p", "No completions: the run has neither samples nor a replay buffer yet.", byId("groups"), "none");
    byId("filters").hidden = true;
    return;
  }
  prepare();
  const unique = (values) => [...new Set(values)];
  range("reward", "reward");
  range("s", "s");
  const sources = unique(data.groups.flatMap((group) => group.rows.map((row) => row.source))).sort();
  choice("source", "source", sources.map((name) => [JSON.stringify(name), name]));
  choice("truncated", "truncated", [["yes", "yes"], ["no", "no"]]);
  const steps = unique(data.groups.map((group) => group.step)).filter((step) => step !== null).sort((a, b) => a - b);
  choice("step", "step", steps.map((step) => [String(step), String(step)]));
  const text = document.createElement("input");
  text.type = "search";
  field("text", "text", text);
  make("span", null, byId("filters"), "").id = "shown";
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const legend = byId("legend");
  legend.append("A token's colour is log π − log π_ref in nats: ");
  for (const d of [-2, -1, -0.3, 0.3, 1, 2]) make("span", String(d), legend).style.backgroundColor = colour(d);
  legend.append(" (s is their sum).");
  if (data.groups.some((group) => group.rows.some((row) => row.chosen))) {
    legend.append(" A line under a token: the policy chose it; dots: it was given, and is not trained on.");
  }
  byId("groups").addEventListener("mouseover", tip);
  byId("groups").addEventListener("mouseleave", () => (byId("tip").hidden = true));
  refilter();
  byId("groups").firstElementChild.open = true;
  new IntersectionObserver((seen) => seen.some((e) => e.isIntersecting) && addPage(), { rootMargin: "600px" })
    .observe(byId("more"));
}

// ---------------------------------------------------------------- curves
const FIRST = ["train/reward", "val/greedy_accuracy", "val/sampled_accuracy", "train/objective", "train/log_ratio",
  "train/kl", "train/entropy", "train/completion_length", "train/truncated_fraction"];
function svg(tag, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}
function chart(name, parent) {
  const [xs, ys] = data.curves[name], figure = make("figure", null, parent);
  const caption = make("figcaption", name, figure);
  make("span", `last ${number(ys[ys.length - 1])}`, caption);
  const [w, h, left, bottom] = [340, 170, 48, 18], picture = svg("svg", { viewBox: `0 0 ${w} ${h}` }, figure);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const [first, last] = [xs[0], Math.max(xs[xs.length - 1], xs[0] + 1)];
  const x = (v) => left + ((v - first) / (last - first)) * (w - left - 6);
  const y = (v) => 6 + (1 - (v - low) / (high - low)) * (h - bottom - 12);
  for (const v of [low, (low + high) / 2, high]) {
    svg("line", { x1: left, x2: w - 6, y1: y(v), y2: y(v), stroke: "#e3e7ec" }, picture);
    svg("text", { x: left - 4, y: y(v) + 3, "text-anchor": "end" }, picture).textContent = number(v);
  }
  svg("text", { x: left, y: h - 3 }, picture).textContent = number(first);
  svg("text", { x: w - 6, y: h - 3, "text-anchor": "end" }, picture).textContent = `step ${number(last)}`;
  const points = xs.map((v, i) => `${x(v).toFixed(1)},${y(ys[i]).toFixed(1)}`);
  if (points.length === 1 || name.startsWith("val/")) {
    xs.forEach((v, i) => svg("circle", { cx: x(v), cy: y(ys[i]), r: 2.5, fill: "#2b6cb0" }, picture));
  }
  svg("polyline", { points: points.join(" "), fill: "none", stroke: "#2b6cb0", "stroke-width": 1.5 }, picture);
}
function charts(names, title, parent) {
  if (!names.length) return;
  make("h2", title, parent);
  const box = make("div", null, parent, "charts");
  for (const name of names) chart(name, box);
}
const curveNames = () => Object.keys(data.curves || {});
function drawCurves() {
  const names = curveNames(), first = FIRST.filter((name) => names.includes(name));
  if (!names.length) make("p", "No metrics.csv.", byId("curves"), "none");
  charts(first, "At a glance", byId("curves"));
  const rest = names.filter((name) => !first.includes(name)).sort();
  const timed = rest.filter((name) => name.includes("seconds") || name.includes("memory"));
  charts(rest.filter((name) => name.includes("reward")), "Rewards", byId("curves"));
  charts(rest.filter((name) => !name.includes("reward") && !timed.includes(name)), "All others", byId("curves"));
  charts(timed, "Time and memory", byId("curves"));
}
function drawGap() {
  const names = curveNames().filter((name) => name.includes("logprob_gap")), box = byId("gap");
  if (!names.length) {
    make("p", "No engine has given log-probs of its own, or there is no metrics.csv.", box, "none");
    return;
  }
  const most = data.curves[names.find((name) => name.endsWith("gap_max")) || names[0]][1];
  make("p", `Trainer minus engine log-prob of fresh tokens, in nats; at most ${number(Math.max(...most))} on a token.`, box);
  charts(names, "Engine gap", box);
}

// ---------------------------------------------------------------- settings
function drawSettings() {
  const box = byId("settings");
  for (const [title, text] of [["summary.json", data.summary], ["config.yaml", data.settings]]) {
    if (!text) continue;
    make("h2", title, box);
    make("pre", text, box);
  }
  if (!box.childElementCount) make("p", "A buffer has no settings.", box, "none");
}

document.title = `${data.name} · agro-lightning`;
byId("name").textContent = data.name;
const shownRows = data.groups.reduce((sum, group) => sum + group.rows.length, 0);
byId("about").textContent = `${shownRows} of ${data.found} completions` +
  (data.unread ? `; ${data.unread} rows or files could not be read` : "");
for (const [id, title] of tabs) {
  const button = make("button", title, byId("tabs"));
  button.id = "tab-" + id;
  button.addEventListener("click", () => open(id));
}
open("completions");
