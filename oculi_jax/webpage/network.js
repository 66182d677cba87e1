// ---------------------------------------------------------------- a circuit

/** A circuit's nodes and lines. Pointing at a node, or the arrow keys, show its edges; a click keeps it, and Escape lets it go. */
function drawNetwork() {
  const { kind, caption, largest: most, size: [width, height], box: [wide, high], bands, nodes, edges } = data.network;
  const picture = byId("network"), details = byId("network-details"), left = 64;
  /** An element of a picture. */
  function shape(name, attributes = {}, ...children) {
    const made = document.createElementNS(picture.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const shareOf = (score) => score === null || !most ? 0 : Math.abs(score) / most;
  const thick = (score) => score === null ? 1.25 : 0.75 + 5.25 * shareOf(score);
  const sideOf = (score) => score === null ? "" : score < 0 ? "below" : "above";
  const written = (score) => score === null ? "no score" : minus(`${score > 0 ? "+" : ""}${Number(score.toPrecision(3))}`);
  const portName = { q: "queries", k: "keys", v: "values" };

  byId("network-caption").textContent = caption;
  picture.setAttribute("width", width + left);
  picture.setAttribute("height", height);
  picture.setAttribute("viewBox", `${-left} 0 ${width + left} ${height}`);
  for (const [i, [label, high_, low]] of bands.entries()) {
    if (i % 2) picture.append(shape("rect", { class: "band", x: -left, y: high_, width: width + left, height: low - high_ }));
    picture.append(shape("text", { class: "band-name", x: 4 - left, y: (high_ + low) / 2 + 4 }, label));
  }

  /** Of points, every second stretch goes straight up, and the others are curves that begin and end upright. */
  const pathOf = (points) => points.map(([x, y], i) => {
    if (i === 0) return `M${x} ${y}`;
    const [before, at] = points[i - 1], middle = (at + y) / 2;
    return i % 2 ? `C${before} ${middle} ${x} ${middle} ${x} ${y}` : `L${x} ${y}`;
  }).join("");
  const markOf = (port, x, y) => shape("path", { class: `port ${port}`, d: { q: `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z`, k: `M${x - 3.5} ${y - 3.5}h7v7h-7z`, v: `M${x} ${y - 4}l4.5 8h-9z` }[port] });
  const lines = edges.map(([name, , , , score, points]) => shape("path", {
    class: `line ${sideOf(score)}`, d: pathOf(points), "stroke-width": thick(score).toFixed(2), "data-edge": name,
  }, shape("title", {}, `${name}: ${written(score)}`)));
  const marks = edges.map(([, , , port, , points]) => port ? markOf(port, ...points.at(-1)) : null);
  picture.append(...edges.map((_, e) => e).sort((a, b) => shareOf(edges[a][4]) - shareOf(edges[b][4])).map((e) => lines[e]));

  const boxes = nodes.map(([name, x, y, score], i) => {
    const made = shape("g", { class: "node", role: "gridcell", "data-node": name },
      shape("rect", { x: x - wide / 2, y: y - high / 2, width: wide, height: high, rx: 4 }), shape("text", { x, y }, name));
    if (kind !== "edges" && score !== null) shadeSigned(made, most ? score / most : 0);
    if (kind !== "edges") made.classList.toggle("unknown", score === null);
    const own = edges.filter(([, begin, end]) => begin === i || end === i).length;
    made.setAttribute("aria-label", kind === "edges" ? `${name}: ${own} ${own === 1 ? "edge" : "edges"}` : `${name}: ${written(score)}`);
    return made;
  });
  const levels = [...new Set(nodes.map(([, , y]) => y))].sort((a, b) => a - b);
  const rows = levels.map((level) => nodes.map((_, i) => i).filter((i) => nodes[i][2] === level).sort((a, b) => nodes[a][1] - nodes[b][1]));
  picture.append(...rows.map((row) => shape("g", { role: "row" }, ...row.map((i) => boxes[i]))), ...marks.filter(Boolean));

  // ------------------------------------------------------------ what is told

  const bySize = (list) => list.sort((a, b) => shareOf(edges[b][4]) - shareOf(edges[a][4]));
  const all = edges.map((_, e) => e);
  function rowOf(name, score, port = "") {
    const bar = element("td", { class: sideOf(score) }, meter(shareOf(score)));
    return element("tr", {}, element("th", { scope: "row", title: name }, name, " ", element("small", {}, portName[port] ?? "")), bar, element("td", { class: "number" }, score === null ? "–" : written(score)));
  }
  function told(title, list, nameOf, portOf = () => "", count = 12) {
    if (!list.length) return [];
    const rest = list.length - count;
    return [element("h3", {}, title), element("table", { class: "ranking" }, ...bySize(list).slice(0, count).map((e) => rowOf(nameOf(e), edges[e][4], portOf(e)))),
      ...rest > 0 ? [element("p", { class: "soft" }, `and ${rest} smaller`)] : []];
  }
  const nameAt = (end) => (e) => nodes[edges[e][end]][0], portAt = (e) => edges[e][3];
  function mark(chosen, near) {
    boxes.forEach((made, i) => { made.classList.toggle("chosen", i === chosen); made.classList.toggle("away", near !== null && i !== chosen && !near.has(i)); });
    edges.forEach(([, begin, end], e) => {
      const away = near !== null && begin !== chosen && end !== chosen;
      lines[e].classList.toggle("away", away);
      marks[e]?.classList.toggle("away", away);
    });
  }
  function showAll() {
    const strong = nodes.map((_, i) => i).filter((i) => nodes[i][3] !== null).sort((a, b) => shareOf(nodes[b][3]) - shareOf(nodes[a][3])).slice(0, 12);
    const ranking = strong.length ? [element("h3", {}, "Largest"), element("table", { class: "ranking" }, ...strong.map((i) => rowOf(nodes[i][0], nodes[i][3])))] : [];
    mark(null, null);
    details.replaceChildren(
      element("p", {}, nodes.length ? `Point at a node${edges.length ? " for its edges" : ""}; a click keeps it, and Escape lets it go.` : "Nothing is kept."),
      ...most === null ? [] : edges.length ? told("Largest edges", [...all], (e) => edges[e][0]) : ranking);
  }
  function showNode(i) {
    const into = all.filter((e) => edges[e][2] === i), out = all.filter((e) => edges[e][1] === i), [name, , , score] = nodes[i];
    mark(i, kind === "edges" ? new Set([...into.map((e) => edges[e][1]), ...out.map((e) => edges[e][2])]) : null);
    details.replaceChildren(element("p", {}, element("b", {}, name), kind === "edges" ? "" : `: ${written(score)}`), ...told("It is told by", into, nameAt(1), portAt), ...told("It tells", out, nameAt(2), portAt));
  }

  let kept = false;
  const letGo = () => { kept = false; showAll(); };
  if (nodes.length) {
    navigate(picture, rows.map((row) => row.map((i) => boxes[i])), { show: (r, c) => showNode(rows[r][c]) });
    picture.addEventListener("focusin", () => { kept = true; });
    picture.addEventListener("pointerleave", () => { if (!kept) showAll(); });
    picture.addEventListener("pointerover", (event) => { if (!kept && !event.target.closest(".node")) showAll(); });
    picture.addEventListener("click", (event) => { if (!event.target.closest(".node")) { document.activeElement.blur(); letGo(); } });
    picture.addEventListener("keydown", (event) => { if (event.key === "Escape") { document.activeElement.blur(); letGo(); } });
  }
  showAll();

  // ------------------------------------------------------------ legend

  const sample = (score) => shape("svg", { viewBox: "0 0 32 12", "aria-hidden": "true" }, shape("path", { class: `line ${sideOf(score)}`, d: "M0 6H32", "stroke-width": thick(score) }));
  const entry = (picture_, text) => element("span", {}, picture_, text);
  const scores = edges.map(([, , , , score]) => score).filter((score) => score !== null), entries = [];
  for (const [sign, what] of [[1, "raises the metric"], [-1, "lowers it"]]) {
    const own = Math.max(0, ...scores.map((score) => sign * score));
    if (own > 0) entries.push(entry(sample(sign * own), `${what}: ${written(sign * own)}`));
  }
  if (scores.length < edges.length) entries.push(entry(sample(null), "no score"));
  for (const [port, what] of Object.entries(portName)) {
    if (edges.some((edge) => edge[3] === port)) entries.push(entry(shape("svg", { viewBox: "0 0 32 12", "aria-hidden": "true" }, markOf(port, 16, 6)), `arrives at ${what}`));
  }
  const where = byId("network-legend");
  if (entries.length) where.replaceChildren(element("div", { class: "legend" }, ...entries));
  else if (most) legend(where, "score: raises the metric, or lowers it", signedTicks(most), true);
}
