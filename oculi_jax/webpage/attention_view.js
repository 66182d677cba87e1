// Attention alone: every head is a small picture of its pattern in the grid.

/** Draws a head's pattern, from one colour to another, into a canvas of as many pixels as tokens, which the style fits to its cell. */
function thumbnail(place, low, high) {
  const canvas = element("canvas", { width: nTokens, height: nTokens, "aria-hidden": "true" }), pen = canvas.getContext("2d");
  const picture = pen.createImageData(nTokens, nTokens);
  const begin = place * nTokens * (nTokens + 1) / 2;
  for (let t = 0; t < nTokens; t += 1) {
    for (let s = 0; s < nTokens; s += 1) {
      const v = s <= t ? Math.sqrt(attention.weights[begin + t * (t + 1) / 2 + s] / 65535) : 0, pixel = 4 * (t * nTokens + s);
      for (let i = 0; i < 3; i += 1) picture.data[pixel + i] = low[i] + (high[i] - low[i]) * v;
      picture.data[pixel + 3] = 255;
    }
  }
  pen.putImageData(picture, 0, 0);
  return canvas;
}

function drawThumbnails() {
  const [low, high] = ["--low", "--high"].map(colour);
  attention.heads.forEach(([layer, head], place) => {
    document.querySelector(`#picker [aria-label^="${headName(layer, head)}:"]`).replaceChildren(thumbnail(place, low, high));
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
