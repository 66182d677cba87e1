// ---------------------------------------------------------------- attention

const attention = {
  ...data.attention,
  weights: unpack(data.attention.weights),
  places: new Map(data.attention.heads.map(([layer, head], place) => [headName(layer, head), place])),
};
// The chosen head and where its weights begin, the row that is shown, and the key under the pointer.
const state = { head: attention.heads[attention.first], begin: 0, row: nTokens - 1, hovered: null };

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}
/** How much position t attends to s in the chosen head; only the triangle s ≤ t is kept. */
const weight = (t, s) => attention.weights[state.begin + t * (t + 1) / 2 + s] / 65535;

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
  const sum = Array.from({ length: t + 1 }, (_, s) => weight(t, s)).reduce((a, b) => a + b);
  const order = Array.from({ length: t + 1 }, (_, s) => s).sort((a, b) => weight(t, b) - weight(t, a)).slice(0, 8);
  const rows = order.map((s) => ranked([token(tokens[s]), " ", element("small", {}, String(s))], weight(t, s)));
  const pointed = state.hovered === null ? [] : [element("p", {}, token(tokens[state.hovered]), ` (position ${state.hovered}): ${fixed(weight(t, state.hovered))}`)];
  byId("row-details").replaceChildren(
    element("p", {}, token(tokens[t]), ` (position ${t}) in ${headName(...state.head)} attends to:`), ...pointed,
    element("table", { class: "ranking" }, ...rows),
    element("p", { class: "soft" }, `${t + 1 > order.length ? `The ${order.length} largest of ${t + 1}. ` : ""}The row sums to ${Math.abs(sum - 1) < 5e-3 ? 1 : fixed(sum, 2)}.`));
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

/** What else is done when a head is chosen: functions of its layer and number. */
const whenChosen = [];

/** Makes a head the one whose pattern is shown, where the page holds it. */
function chooseHead(layer, head) {
  const place = attention.places.get(headName(layer, head));
  if (place === undefined) return;
  state.head = [layer, head];
  state.begin = place * nTokens * (nTokens + 1) / 2;
  byId("head-select").selectedIndex = place;
  whenChosen.forEach((told) => told(layer, head));
  paintWeights();
  showRow(state.row);
}

/** Marks the chosen head in a grid of layers and heads. */
function markIn({ cells, pin }) {
  whenChosen.push((layer, head) => {
    const chosen = layers.indexOf(layer);
    pin([chosen, head]);
    cells.forEach((row, r) => row.forEach((cell, h) => cell.setAttribute("aria-selected", r === chosen && h === head)));
  });
}

/** The grid beside the pattern: its focus is the choice, as in a list of radio buttons, and its choice stays in sight. */
function drawPicker(options) {
  const grid = headGrid("picker", { numbers: false, show() {}, start: [layers.indexOf(state.head[0]), state.head[1]], ...options });
  const table = byId("picker"), box = byId("picker-box");
  table.addEventListener("focusin", () => { const [row, head] = grid.pinned(); chooseHead(layers[row], head); });
  markIn(grid);
  whenChosen.push((layer, head) => {
    const cell = grid.cells[layers.indexOf(layer)][head];
    if (cell.offsetTop < box.scrollTop || cell.offsetTop + 24 > box.scrollTop + box.clientHeight) box.scrollTop = cell.offsetTop - box.clientHeight / 2;
  });
}

