"use strict";
// Every page draws itself from the JSON in #data. Texts of prompt and vocabulary reach it only as textContent.

const data = JSON.parse(document.getElementById("data").textContent);
// Texts, and places among them: of the prompt and, where there is one, of an answer; true layer numbers; heads in each.
const { words, tokens, target, layers, heads: nHeads } = data;
const nTokens = tokens.length, nLayers = layers.length;
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

/** Shades a cell by v from 0 to 1, or from −1 to 1; the class says which ink stands on it, as the style has it. */
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

/** Builds a layers × heads grid. paint(cell, row, head) shades a cell and returns what it says. */
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
    element("tbody", {}, ...cells.map((row, layer) => element("tr", {}, element("th", { scope: "row" }, `L${layers[layer]}`), ...row))),
  );
  function repaint() {
    cells.forEach((row, layer) => row.forEach((cell, head) => {
      const text = paint(cell, layer, head);
      cell.setAttribute("aria-label", `${headName(layers[layer], head)}: ${text}`);
      if (numbers) cell.textContent = text;
    }));
  }
  repaint();
  const keys = navigate(table, cells, { show, choose, ...options });
  return { cells, repaint, ...keys };
}

