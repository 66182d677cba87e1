"use strict";
// Draws the report from the JSON in #data. Texts of prompt and vocabulary reach the page only as textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const { model, words, tokens, target, attribution } = data;
const nTokens = tokens.length, nLayers = model.layers, nHeads = model.heads;
const byId = (id) => document.getElementById(id);

// ---------------------------------------------------------------- elements and numbers

/** An element with attributes and children; strings become text nodes. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A token's text, its ␣ set back a little. */
function token(word) {
  const parts = words[word].split(/(␣+)/).filter(Boolean);
  return element("span", { class: "token" }, ...parts.map((part) => part[0] === "␣" ? element("span", { class: "space" }, part) : part));
}

const quoted = (word) => `“${words[word]}”`;
const minus = (text) => text.replaceAll("-", "−");
const fixed = (value, digits = 3) => minus(value.toFixed(digits));
/** What would round to zero, with one digit that is none. */
const small = (value) => Math.abs(value) < 5e-4 ? minus(String(Number(value.toPrecision(1)))) : fixed(value);
/** With its sign, and none where it rounds to zero. */
function signed(value, digits = 3) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : minus(value > 0 ? `+${text}` : text);
}
const largest = (numbers) => numbers.flat(2).reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
const headName = (layer, head) => `L${layer}H${head}`;

/** Shades a cell by v from 0 to 1, or from −1 to 1; the class says which ink stands on it, as page.css has it. */
function shade(cell, v) {
  const size = Math.min(Math.abs(v), 1);
  cell.classList.add("shade");
  cell.classList.toggle("mid", size >= 0.495 && size < 0.76);
  cell.classList.toggle("strong", size >= 0.76);
  cell.classList.toggle("below", v < 0);
  cell.style.setProperty("--v", size.toFixed(4));
}
/** The same for numbers with a sign, which have a colour on either side of zero. */
function shadeSigned(cell, v) {
  shade(cell, v);
  cell.classList.toggle("above", v > 0);
}

function meter(value) {
  const bar = element("i");
  bar.style.setProperty("--v", Math.min(value, 1).toFixed(4));
  return element("div", { class: "meter", "aria-hidden": "true" }, bar);
}

/** A row of a ranking: a name, a bar, a number. */
const ranked = (name, value) => element("tr", {},
  element("th", { scope: "row" }, ...name), element("td", {}, meter(value)), element("td", { class: "number" }, fixed(value)));

/** A colour scale with its ticks: [[label, place from 0 to 1], …]. */
function legend(where, text, ticks, hasSign = false) {
  const marks = ticks.map(([label, at]) => {
    const mark = element("span", {}, label);
    mark.style.setProperty("--at", at);
    return mark;
  });
  const ramp = element("div", { class: hasSign ? "ramp signed" : "ramp", "aria-hidden": "true" }, element("i"), element("span", { class: "ticks" }, ...marks));
  where.replaceChildren(element("div", { class: "legend" }, element("span", {}, text), ramp));
}
const signedTicks = (most) => [[`−${fixed(most, 2)}`, 0], ["0", 0.5], [`+${fixed(most, 2)}`, 1]];

// ---------------------------------------------------------------- grids with arrow keys

/**
 * Makes a list of rows of cells one tab stop: arrow keys, Home and End move between cells.
 * show(row, column) is called for the cell under the pointer or in focus, and when the pointer leaves for the last one in focus;
 * choose(row, column) on a click, Enter or Space. With `mark`, the last one in focus is the selected one.
 */
function navigate(container, cells, { show, choose = () => {}, start = [0, 0], mark = false }) {
  const places = new Map();
  cells.forEach((row, r) => row.forEach((cell, c) => { places.set(cell, [r, c]); cell.tabIndex = -1; }));
  let pinned = start;
  const at = ([r, c]) => cells[r][c];
  const placeOf = (event) => places.get(event.target.closest("[role=gridcell], [role=option]"));
  function pin(place) {
    at(pinned).tabIndex = -1;
    if (mark) at(pinned).setAttribute("aria-selected", "false");
    pinned = place;
    at(pinned).tabIndex = 0;
    if (mark) at(pinned).setAttribute("aria-selected", "true");
    show(...pinned);
  }
  container.addEventListener("pointerover", (event) => { const place = placeOf(event); if (place) show(...place); });
  container.addEventListener("pointerleave", () => show(...pinned));
  container.addEventListener("focusin", (event) => { const place = placeOf(event); if (place) pin(place); });
  container.addEventListener("click", (event) => {
    const place = placeOf(event);
    if (!place) return;
    at(place).focus({ preventScroll: true });
    choose(...place);
  });
  container.addEventListener("keydown", (event) => {
    if (event.ctrlKey && !["Home", "End"].includes(event.key) || event.altKey || event.metaKey) return;
    let [r, c] = pinned;
    if (event.key === "Enter" || event.key === " ") choose(r, c);
    else if (event.key === "ArrowRight") c += 1;
    else if (event.key === "ArrowLeft") c -= 1;
    else if (event.key === "ArrowDown") r += 1;
    else if (event.key === "ArrowUp") r -= 1;
    else if (event.key === "Home") [r, c] = [event.ctrlKey ? 0 : r, 0];
    else if (event.key === "End") [r, c] = [event.ctrlKey ? cells.length - 1 : r, cells[r].length - 1];
    else return;
    event.preventDefault();
    r = Math.max(0, Math.min(cells.length - 1, r));
    c = Math.max(0, Math.min(cells[r].length - 1, c));
    at([r, c]).focus();
  });
  pin(start);
  return { pin, pinned: () => pinned };
}

/** Grids over layers and heads; the chosen head is marked in all of them. */
const headGrids = [];

/** Builds a layers × heads grid. paint(cell, layer, head) shades a cell and returns its number as text. */
function headGrid(id, { paint, show, choose, numbers = nHeads <= 9, room = 500, ...options }) {
  const table = byId(id);
  table.setAttribute("role", "grid");
  const wide = numbers ? 40 : Math.max(12, Math.min(28, Math.floor(room / nHeads) - 2));
  table.style.setProperty("--wide", `${wide}px`);
  table.classList.toggle("numbers", numbers);
  // Where columns are narrow their numbers stand alone, and every second one where two digits would touch.
  const text = (head) => wide >= 24 ? `H${head}` : wide >= 16 || head % 2 === 0 ? String(head) : "";
  const label = (head) => element("th", { scope: "col", "aria-label": `H${head}` }, text(head));
  const heads = Array.from({ length: nHeads }, (_, head) => label(head));
  const cells = Array.from({ length: nLayers }, () => Array.from({ length: nHeads }, () => element("td", { role: "gridcell" })));
  table.replaceChildren(
    element("thead", {}, element("tr", {}, element("td"), ...heads)),
    element("tbody", {}, ...cells.map((row, layer) => element("tr", {}, element("th", { scope: "row" }, `L${layer}`), ...row))),
  );
  function repaint() {
    cells.forEach((row, layer) => row.forEach((cell, head) => {
      const text = paint(cell, layer, head);
      cell.setAttribute("aria-label", `${headName(layer, head)}: ${text}`);
      if (numbers) cell.textContent = text;
    }));
  }
  repaint();
  const keys = navigate(table, cells, { show, choose, ...options });
  const grid = { cells, repaint, ...keys };
  headGrids.push(grid);
  return grid;
}

// ---------------------------------------------------------------- header

function drawHeader() {
  document.title = `${model.name}: ${data.prompt.replaceAll("\n", " ").slice(0, 60)} – Oculi report`;
  byId("model-name").textContent = model.name;
  const many = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
  byId("model-sizes").textContent = [
    `${(model.parameters / 1e6).toPrecision(3)} million parameters (${model.dtype})`, many(model.layers, "layer"),
    `${many(model.heads, "head")} in each (${model.kvHeads} for keys and values)`, `width ${model.width}`, `MLP width ${model.mlp}`,
    `${model.vocabulary.toLocaleString("en")} tokens in its vocabulary`,
  ].join(" · ");
  byId("prompt").textContent = data.prompt;
  byId("target-line").append(
    "Target: ", token(target.word), target.chosen ? "" : ", the likeliest next token",
    `. Its probability is ${fixed(Math.exp(target.logProbability))} (log-probability ${small(target.logProbability)} nats), its logit ${fixed(target.logit)}.`);
  byId("next").append(...data.next.words.map((word, k) => ranked([token(word)], data.next.probabilities[k])));
}

// ---------------------------------------------------------------- lens

function drawLens() {
  const table = byId("lens-grid"), details = byId("lens-details"), lens = data.lens;
  table.setAttribute("role", "grid");
  table.setAttribute("aria-labelledby", "lens-heading");
  const cells = lens.words.map((row, layer) => row.map((top, t) => {
    const p = lens.probabilities[layer][t][0];
    const cell = element("td", { role: "gridcell", "aria-label": `layer ${layer}, after ${quoted(tokens[t])}: ${quoted(top[0])} ${fixed(p)}` }, words[top[0]]);
    cell.classList.toggle("goal", top[0] === target.word);
    shade(cell, p);
    return cell;
  }));
  table.append(
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"),
      ...tokens.map((word, t) => element("th", { scope: "col", title: words[word] }, element("small", {}, String(t)), token(word))))),
    element("tbody", {}, ...cells.map((row, layer) => element("tr", {}, element("th", { scope: "row" }, String(layer)), ...row))));
  function show(layer, t) {
    const top = lens.words[layer][t], p = lens.probabilities[layer][t];
    details.replaceChildren(
      element("p", {}, "After ", token(tokens[t]), ` (position ${t}), at layer ${layer}:`),
      element("table", { class: "ranking" }, ...top.map((word, k) => ranked([token(word)], p[k]))),
      element("p", { class: "soft" }, "The target ", token(target.word), ` has ${fixed(lens.target[layer][t])}.`));
  }
  navigate(table, cells, { show, start: [nLayers - 1, nTokens - 1], mark: true });
  details.classList.toggle("afloat", nLayers > 12);
  byId("lens-box").scrollLeft = byId("lens-box").scrollWidth;  // to the last token, whose answer is the model's
  legend(byId("lens-legend"), "probability", [["0", 0], ["0.5", 0.5], ["1", 1]]);
}

// ---------------------------------------------------------------- attention

const attention = {
  ...data.attention,
  weights: unpack(data.attention.weights),
  places: new Map(data.attention.heads.map(([layer, head], place) => [headName(layer, head), place])),
};
// The chosen head and where its weights begin, the row that is shown, and the key under the pointer.
const state = { head: firstHead(), begin: 0, row: nTokens - 1, hovered: null };

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}
/** How much position t attends to s in the chosen head; only the triangle s ≤ t is kept. */
const weight = (t, s) => attention.weights[state.begin + t * (t + 1) / 2 + s] / 65535;
/** Of the heads whose patterns are here, the one whose ablation does most. */
function firstHead() {
  const does = ([layer, head]) => Math.abs(data.ablation[layer][head]);
  return data.attention.heads.reduce((best, head) => does(head) > does(best) ? head : best);
}

const chips = tokens.map((word, t) => element("li", { role: "option", id: `token-${t}` }, token(word), element("small")));

function showRow(t) {
  state.row = t;
  chips.forEach((chip, s) => {
    const seen = s <= t, w = seen ? weight(t, s) : 0;
    chip.setAttribute("aria-selected", s === t);
    chip.setAttribute("aria-label", `${quoted(tokens[s])}, position ${s}${seen ? `: ${fixed(w)}` : ", later"}`);
    chip.classList.toggle("later", !seen);
    shade(chip, Math.sqrt(w));
    chip.lastChild.textContent = seen ? fixed(w) : "later";
  });
  const order = Array.from({ length: t + 1 }, (_, s) => s).sort((a, b) => weight(t, b) - weight(t, a)).slice(0, 8);
  const rows = order.map((s) => ranked([token(tokens[s]), " ", element("small", {}, String(s))], weight(t, s)));
  const pointed = state.hovered === null ? [] : [element("p", {}, token(tokens[state.hovered]), ` (position ${state.hovered}): ${fixed(weight(t, state.hovered))}`)];
  byId("row-details").replaceChildren(
    element("p", {}, token(tokens[t]), ` (position ${t}) in ${headName(...state.head)} attends to:`), ...pointed,
    element("table", { class: "ranking" }, ...rows),
    element("p", { class: "soft" }, t + 1 > order.length ? `The ${order.length} largest of ${t + 1}. Each row sums to 1.` : "The row sums to 1."));
  drawMatrix();
}

/** The colours that the page's style holds now, as [r, g, b]. */
function colour(name) {
  const probe = document.body.appendChild(element("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}
const css = (rgb) => `rgb(${rgb.map(Math.round).join(" ")})`;

const FONT = "11px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace";
/** What is drawn once for a head, a theme and a width: sizes in CSS pixels, colours, and the weights as a picture. */
const matrix = { size: 0, left: 0, top: 0, ink: "", soft: "", weights: document.createElement("canvas") };

function label(t) {
  const text = words[tokens[t]];
  return text.length > 12 ? `${text.slice(0, 11)}…` : text;
}

function paintWeights() {
  const canvas = byId("matrix"), picture = matrix.weights, dense = window.devicePixelRatio || 1;
  const [low, high, ink, soft] = ["--low", "--high", "--ink", "--soft"].map(colour);
  const ruler = canvas.getContext("2d");
  ruler.font = FONT;
  const left = Math.ceil(Math.max(...tokens.map((_, t) => ruler.measureText(label(t)).width))) + 10;
  const smallest = nTokens <= 32 ? 13 : nTokens <= 64 ? 8 : nTokens <= 160 ? 6 : 3;
  const size = Math.max(smallest, Math.min(34, Math.floor((byId("matrix-box").clientWidth - left - 12) / nTokens)));
  Object.assign(matrix, { size, left, top: left, ink: css(ink), soft: css(soft) });
  const side = left + size * nTokens + 4;
  canvas.width = canvas.height = side * dense;
  canvas.style.width = canvas.style.height = `${side}px`;
  picture.width = picture.height = size * nTokens * dense;
  const pen = picture.getContext("2d"), gap = size >= 8 ? 1 : 0;
  pen.scale(dense, dense);
  for (let t = 0; t < nTokens; t += 1) {
    for (let s = 0; s <= t; s += 1) {
      const v = Math.sqrt(weight(t, s));
      pen.fillStyle = css(low.map((x, i) => x + (high[i] - x) * v));
      pen.fillRect(s * size, t * size, size - gap, size - gap);
    }
  }
  drawMatrix();
}

/** The picture of the weights with labels, the row that is shown and the key under the pointer. */
function drawMatrix() {
  const canvas = byId("matrix"), pen = canvas.getContext("2d"), dense = window.devicePixelRatio || 1;
  const { size, left, top, ink, soft } = matrix, { row, hovered } = state;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(matrix.weights, left * dense, top * dense);
  pen.scale(dense, dense);
  pen.font = FONT;
  pen.textBaseline = "middle";
  // Every label where there is room, else every n-th and the marked one, without those that it would touch.
  const step = Math.ceil(13 / size);
  const labelled = (t, marked) => t === marked || t % step === 0 && (step === 1 || marked === null || Math.abs(t - marked) >= step);
  for (let t = 0; t < nTokens; t += 1) {
    const middle = (t + 0.5) * size;
    if (labelled(t, row)) {
      pen.fillStyle = t === row ? ink : soft;
      pen.textAlign = "right";
      pen.fillText(label(t), left - 5, top + middle);
    }
    if (labelled(t, hovered)) {
      pen.fillStyle = t === hovered ? ink : soft;
      pen.textAlign = "left";
      pen.save();
      pen.translate(left + middle, top - 5);
      pen.rotate(-Math.PI / 2);
      pen.fillText(label(t), 0, 0);
      pen.restore();
    }
  }
  pen.strokeStyle = ink;
  pen.lineWidth = 2;
  pen.strokeRect(left - 1, top + row * size - 1, (row + 1) * size + 1, size + 1);
  if (hovered !== null) pen.strokeRect(left + hovered * size - 1, top + row * size - 1, size + 1, size + 1);
  canvas.setAttribute("aria-label",
    `Attention pattern of ${headName(...state.head)}: queries down, keys across. The row of ${quoted(tokens[row])}, position ${row}, is marked.`);
}

function drawAttention() {
  const list = byId("chips"), select = byId("head-select"), canvas = byId("matrix"), kept = attention.heads;
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-labelledby", "chips-heading");
  list.setAttribute("aria-orientation", "horizontal");
  list.append(...chips);
  list.classList.toggle("many", nTokens > 120);
  const rows = navigate(list, [chips], { show: (_, t) => showRow(t), start: [0, nTokens - 1] });

  byId("attention-selection").textContent = {
    all: "",
    given: `This page holds ${kept.length === 1 ? "the one head that was" : `the ${kept.length} heads that were`} asked for, and fades the others.`,
    strongest: `This page holds ${kept.length} of ${nLayers * nHeads} heads, the strongest by ablation and by score, and fades the others; --heads names those it is to hold.`,
  }[attention.selection];
  select.append(...kept.map(([layer, head]) => element("option", { value: headName(layer, head) }, headName(layer, head))));
  select.addEventListener("change", () => chooseHead(...kept[select.selectedIndex]));
  const turn = (by) => chooseHead(...kept[(select.selectedIndex + by + kept.length) % kept.length]);
  byId("head-before").addEventListener("click", () => turn(-1));
  byId("head-after").addEventListener("click", () => turn(1));

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const t = Math.floor((event.clientY - box.top - matrix.top) / matrix.size);
    const s = Math.floor((event.clientX - box.left - matrix.left) / matrix.size);
    if (t < 0 || t >= nTokens) return;
    const hovered = s >= 0 && s <= t ? s : null;
    if (t === state.row && hovered === state.hovered) return;
    state.hovered = hovered;
    showRow(t);
  });
  canvas.addEventListener("pointerleave", () => { state.hovered = null; showRow(rows.pinned()[1]); });
  canvas.addEventListener("click", () => rows.pin([0, state.row]));
  legend(byId("matrix-legend"), "weight; shades follow its square root, so that small ones show",
    [0, 0.04, 0.25, 0.5, 1].map((w) => [String(w), Math.sqrt(w)]));
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width === width) return;  // its height is the picture's own doing
    width = contentRect.width;
    paintWeights();
  }).observe(byId("matrix-box"));
}

/** Makes a head the one whose pattern is shown, where the page holds it; every grid marks it and tells of it. */
function chooseHead(layer, head) {
  const place = attention.places.get(headName(layer, head));
  if (place === undefined) return;
  state.head = [layer, head];
  state.begin = place * nTokens * (nTokens + 1) / 2;
  byId("head-select").selectedIndex = place;
  for (const { cells, pin } of headGrids) {
    pin([layer, head]);
    cells.forEach((row, l) => row.forEach((cell, h) => cell.setAttribute("aria-selected", l === layer && h === head)));
  }
  const score = data.scores.kinds.reduce((best, kind) => kind.name !== "uniform" && kind.values[layer][head] > best.values[layer][head] ? kind : best);
  const facts = [
    ["head", headName(layer, head)],
    ["highest score", `${score.label} ${fixed(score.values[layer][head], 2)} ± ${fixed(score.errors[layer][head], 2)}`],
    ["without it", `${signed(data.ablation[layer][head])} on the lead`],
    ["adds directly", `${signed(attribution.heads[layer][head])} to the logit`],
  ];
  byId("head-card").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  paintWeights();
  showRow(state.row);
  const box = byId("picker-box"), cell = headGrids[0].cells[layer][head];
  if (cell.offsetTop < box.scrollTop || cell.offsetTop + 24 > box.scrollTop + box.clientHeight) box.scrollTop = cell.offsetTop - box.clientHeight / 2;
}

// ---------------------------------------------------------------- heads: scores, ablation, attribution

const missing = (layer, head) => attention.places.has(headName(layer, head)) ? "" : " Its pattern is not in this page.";

/** Shows one line about the head under the pointer or in focus. */
const tell = (id, sentence) => (layer, head) => { byId(id).textContent = `${headName(layer, head)}: ${sentence(layer, head)}${missing(layer, head)}`; };

function drawPicker() {
  const most = largest(data.ablation);
  const grid = headGrid("picker", {
    numbers: false, room: 440,
    paint(cell, layer, head) {
      shadeSigned(cell, data.ablation[layer][head] / most);
      cell.title = headName(layer, head);
      const absent = missing(layer, head);
      if (absent) cell.setAttribute("aria-disabled", "true");
      return `${signed(data.ablation[layer][head])} on the lead without it.${absent}`;
    },
    show() {},
    start: state.head,
  });
  // Here the focus is the choice, as in a list of radio buttons.
  byId("picker").addEventListener("focusin", () => chooseHead(...grid.pinned()));
}

function drawScores() {
  const { kinds, sequences, repeat } = data.scores, select = byId("score-select");
  let kind = kinds[0];
  byId("scores-lead").textContent =
    `What each head does on ${repeat} random tokens that are repeated once, where nothing but the repetition can be known: means of ${sequences} sequences.`;
  select.append(...kinds.map(({ name, label }) => element("option", { value: name }, label)));
  const show = tell("scores-details", (layer, head) =>
    `${kind.label} ${fixed(kind.values[layer][head])} ± ${fixed(kind.errors[layer][head])} (standard error).`);
  const grid = headGrid("scores-grid", {
    paint(cell, layer, head) {
      const value = kind.values[layer][head], error = kind.errors[layer][head];
      shade(cell, value);
      cell.title = `${headName(layer, head)} ${fixed(value)} ± ${fixed(error)}`;
      return fixed(value, 2);
    },
    show, choose: chooseHead, start: state.head,
  });
  function change() {
    kind = kinds[select.selectedIndex];
    byId("score-meaning").textContent = `Mean ${kind.meaning}; from 0 to 1.`;
    legend(byId("scores-legend"), kind.label, [["0", 0], ["0.5", 0.5], ["1", 1]]);
    grid.repaint();
    show(...grid.pinned());
  }
  select.addEventListener("change", change);
  change();
}

function drawSigned(id, values, sentence, legendText) {
  const most = largest(values);
  const show = tell(`${id}-details`, sentence);
  headGrid(`${id}-grid`, {
    paint(cell, layer, head) {
      shadeSigned(cell, values[layer][head] / most);
      cell.title = `${headName(layer, head)} ${signed(values[layer][head])}`;
      return signed(values[layer][head], 2);
    },
    show, choose: chooseHead, start: state.head,
  });
  legend(byId(`${id}-legend`), legendText, signedTicks(most), true);
}

function drawAblation() {
  const lead = target.logit - data.rival.logit;
  byId("ablation-lead").append(
    "How the lead of ", token(target.word), " over ", token(data.rival.word),
    `, the likeliest other token, changes when one head's output is set to zero: the difference of their logits, ${signed(lead)} in the plain run. Blue: it falls, the head helps. Orange: it rises.`);
  drawSigned("ablation", data.ablation, (layer, head) => {
    return `without it ${signed(data.ablation[layer][head])}, so that the lead is ${signed(lead + data.ablation[layer][head])}.`;
  }, "change of the lead, logits");
}

// ---------------------------------------------------------------- attribution

/** A bar from zero, on a scale from least to most that all bars share, and its number. */
function share(value, [least, most]) {
  const bar = element("i", { class: value < 0 ? "below" : "above", "aria-hidden": "true" }), place = (x) => (x - least) / (most - least);
  bar.style.setProperty("--zero", place(0).toFixed(4));
  bar.style.setProperty("--from", place(Math.min(value, 0)).toFixed(4));
  bar.style.setProperty("--size", (Math.abs(value) / (most - least)).toFixed(4));
  return element("td", {}, element("div", { class: "share" }, bar, element("span", {}, signed(value))));
}

function drawAttribution() {
  const { embedding, attention: attn, mlp, other, bias, error } = attribution, sum = (list) => list.reduce((a, b) => a + b, 0);
  const all = [0, embedding, ...attn, ...mlp], range = [Math.min(...all), Math.max(...all) || 1];
  byId("attribution-lead").append(
    "What each part of the model adds to the logit of ", token(target.word),
    " directly: its output through the final norm, with the scale that the norm has in this run, and the unembedding. What it does by way of later parts is theirs.");
  byId("parts").append(
    element("tbody", {}, element("tr", {}, element("th", { scope: "row" }, "embedding"), share(embedding, range), element("td"))),
    element("tbody", {},
      element("tr", {}, ...["layer", "attention", "MLP"].map((name) => element("th", { scope: "col" }, name))),
      ...attn.map((value, layer) => element("tr", {}, element("th", { scope: "row" }, `L${layer}`), share(value, range), share(mlp[layer], range)))));
  const beside = Math.abs(other) >= 5e-4 ? `, rounding of the stream ${signed(other)}` : "";
  byId("parts-sum").textContent =
    `Embedding ${signed(embedding)}, attention ${signed(sum(attn))}, MLPs ${signed(sum(mlp))}${beside}: ` +
    `the parts sum to ${signed(embedding + sum(attn) + sum(mlp) + other)}, and miss the logit ${signed(target.logit)} by ${minus(error.toExponential(1))}.`;
  drawSigned("shares", attribution.heads, (layer, head) => `adds ${signed(attribution.heads[layer][head])} to the logit.`, "adds to the logit");
  if (Math.abs(bias) >= 5e-4) byId("shares-legend").append(element("p", { class: "soft small" }, `Biases of the output projections, which belong to no head: ${signed(bias)}.`));
}

// ---------------------------------------------------------------- theme

function setUpTheme() {
  const button = byId("theme"), system = window.matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const follow = () => { button.setAttribute("aria-pressed", isDark()); paintWeights(); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; follow(); });
  system.addEventListener("change", follow);
  // Paper is white, whatever the screen is.
  let before;
  window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; follow(); });
  window.addEventListener("afterprint", () => { if (before) root.dataset.theme = before; else delete root.dataset.theme; follow(); });
  follow();
}

drawHeader();
drawLens();
drawAttention();
drawPicker();
drawScores();
drawAblation();
drawAttribution();
chooseHead(...state.head);
setUpTheme();
