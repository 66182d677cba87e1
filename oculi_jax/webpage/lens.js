// ---------------------------------------------------------------- lens

function drawLens() {
  const table = byId("lens-grid"), details = byId("lens-details"), lens = data.lens;
  table.setAttribute("role", "grid");
  table.setAttribute("aria-labelledby", "lens-heading");
  const cells = lens.words.map((row, layer) => row.map((top, t) => {
    const p = lens.probabilities[layer][t][0];
    const cell = element("td", { role: "gridcell", "aria-label": `layer ${layers[layer]}, after ${quoted(tokens[t])}: ${quoted(top[0])} ${fixed(p)}` }, words[top[0]]);
    cell.classList.toggle("goal", top[0] === target?.word);
    shade(cell, p);
    return cell;
  }));
  table.append(
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"),
      ...tokens.map((word, t) => element("th", { scope: "col", title: words[word] }, element("small", {}, String(lens.positions[t])), token(word))))),
    element("tbody", {}, ...cells.map((row, layer) => element("tr", {}, element("th", { scope: "row" }, String(layers[layer])), ...row))));
  function show(layer, t) {
    const top = lens.words[layer][t], p = lens.probabilities[layer][t];
    details.replaceChildren(
      element("p", {}, "After ", token(tokens[t]), ` (position ${lens.positions[t]}), at layer ${layers[layer]}:`),
      element("table", { class: "ranking" }, ...top.map((word, k) => ranked([token(word)], p[k]))),
      ...target ? [element("p", { class: "soft" }, "The target ", token(target.word), ` has ${fixed(lens.target[layer][t])}.`)] : []);
  }
  navigate(table, cells, { show, start: [nLayers - 1, nTokens - 1], mark: true });
  details.classList.toggle("afloat", nLayers > 12);
  byId("lens-box").scrollLeft = byId("lens-box").scrollWidth;  // to the last token, whose answer is the model's
  legend(byId("lens-legend"), "probability", [["0", 0], ["0.5", 0.5], ["1", 1]]);
}

