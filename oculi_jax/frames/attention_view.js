// Attention alone: every head is a small picture of its pattern in the grid.

/** Draws a head's pattern into a canvas of as many pixels as tokens, which the style makes as large as its cell. */
function thumbnail(place) {
  const canvas = element("canvas", { width: nTokens, height: nTokens, "aria-hidden": "true" }), pen = canvas.getContext("2d");
  const [low, high] = [colour("--low"), colour("--high")], picture = pen.createImageData(nTokens, nTokens);
  const begin = place * nTokens * (nTokens + 1) / 2;
  for (let t = 0; t < nTokens; t += 1) {
    for (let s = 0; s < nTokens; s += 1) {
      const v = s <= t ? Math.sqrt(attention.weights[begin + t * (t + 1) / 2 + s] / 65535) : 0;
      picture.data.set([...low.map((x, i) => x + (high[i] - x) * v), 255], 4 * (t * nTokens + s));
    }
  }
  pen.putImageData(picture, 0, 0);
  return canvas;
}

function drawThumbnails() {
  attention.heads.forEach(([layer, head], place) => {
    document.querySelector(`#picker [aria-label^="${headName(layer, head)}:"]`).replaceChildren(thumbnail(place));
  });
}

drawAttention();
drawPicker({
  room: 440,
  paint(cell, row, head) {
    cell.title = headName(layers[row], head);
    return "its pattern";
  },
});
drawThumbnails();
chooseHead(...state.head);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawThumbnails(); paintWeights(); });
