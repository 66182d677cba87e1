// What a report shows beside the lens and the attention patterns.

const { model, attribution } = data;

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

// ---------------------------------------------------------------- heads: scores, ablation, attribution

const missing = (layer, head) => attention.places.has(headName(layer, head)) ? "" : " Its pattern is not in this page.";

/** Shows one line about the head under the pointer or in focus. */
const tell = (id, sentence) => (layer, head) => { byId(id).textContent = `${headName(layer, head)}: ${sentence(layer, head)}${missing(layer, head)}`; };

function drawHeads() {
  const most = largest(data.ablation), kept = attention.heads;
  byId("attention-selection").textContent = {
    all: "",
    given: `This page holds ${kept.length === 1 ? "the one head that was" : `the ${kept.length} heads that were`} asked for, and fades the others.`,
    strongest: `This page holds ${kept.length} of ${nLayers * nHeads} heads, the strongest by ablation and by score, and fades the others; --heads names those it is to hold.`,
  }[attention.selection];
  drawPicker({
    room: 440,
    paint(cell, layer, head) {
      shadeSigned(cell, data.ablation[layer][head] / most);
      cell.title = headName(layer, head);
      const absent = missing(layer, head);
      if (absent) cell.setAttribute("aria-disabled", "true");
      return `${signed(data.ablation[layer][head])} on the lead without it.${absent}`;
    },
  });
  whenChosen.push((layer, head) => {
    const score = data.scores.kinds.reduce((best, kind) => kind.name !== "uniform" && kind.values[layer][head] > best.values[layer][head] ? kind : best);
    const facts = [
      ["head", headName(layer, head)],
      ["highest score", `${score.label} ${fixed(score.values[layer][head], 2)} ± ${fixed(score.errors[layer][head], 2)}`],
      ["without it", `${signed(data.ablation[layer][head])} on the lead`],
      ["adds directly", `${signed(attribution.heads[layer][head])} to the logit`],
    ];
    byId("head-card").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  });
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
  markIn(grid);
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
  markIn(headGrid(`${id}-grid`, {
    paint(cell, layer, head) {
      shadeSigned(cell, values[layer][head] / most);
      cell.title = `${headName(layer, head)} ${signed(values[layer][head])}`;
      return signed(values[layer][head], 2);
    },
    show, choose: chooseHead, start: state.head,
  }));
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
    "What each part of the model adds to the logit of ", token(target.word), attribution.capped ? ", before the final soft cap," : "",
    " directly: its output through the final norm, with the scale that the norm has in this run, and the unembedding. What it does by way of later parts is theirs.");
  byId("parts").append(
    element("tbody", {}, element("tr", {}, element("th", { scope: "row" }, "embedding"), share(embedding, range), element("td"))),
    element("tbody", {},
      element("tr", {}, ...["layer", "attention", "MLP"].map((name) => element("th", { scope: "col" }, name))),
      ...attn.map((value, layer) => element("tr", {}, element("th", { scope: "row" }, `L${layer}`), share(value, range), share(mlp[layer], range)))));
  const beside = Math.abs(other) >= 5e-4 ? `, rounding of the stream ${signed(other)}` : "";
  byId("parts-sum").textContent =
    `Embedding ${signed(embedding)}, attention ${signed(sum(attn))}, MLPs ${signed(sum(mlp))}${beside}: ` +
    `the parts sum to ${signed(embedding + sum(attn) + sum(mlp) + other)}, and miss the logit ${signed(attribution.logit)}${attribution.capped ? " before the soft cap" : ""} by ${minus(error.toExponential(1))}.`;
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
drawHeads();
drawScores();
drawAblation();
drawAttribution();
chooseHead(...state.head);
setUpTheme();
