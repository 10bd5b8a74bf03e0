"use strict";

/** Of the photograph where a pixel does not look. */
const DARK = 0.7;

// What a section's JSON holds: of some rows and columns of pixels (`rows`, `columns`) the windows on the grid of the
// features (`windows`: first and last of each, by axis), and the weights of each pixel, in bytes, of its largest. A key's
// weight stands at its row and column modulo `modulus`: no window holds two keys that would share a place.

/** The bytes of base64 of zlib. */
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The index of the position that is nearest. */
function nearest(positions, wanted) {
  let best = 0;
  positions.forEach((position, index) => {
    if (Math.abs(position - wanted) < Math.abs(positions[best] - wanted)) best = index;
  });
  return best;
}

/** Where the i-th of the rows and the j-th of the columns look: a window of keys, and its weights row by row. */
function windowOf(data, bytes, i, j) {
  const [top, bottom] = data.windows[0].map((edge) => edge[i]);
  const [left, right] = data.windows[1].map((edge) => edge[j]);
  const [rows, columns] = data.modulus;
  const first = (i * data.columns.length + j) * rows * columns;
  const weights = [];
  for (let row = top; row < bottom; row++)
    for (let column = left; column < right; column++)
      weights.push(bytes[first + (row % rows) * columns + (column % columns)]);
  return { top, bottom, left, right, weights };
}

/** How many of the largest weights are half of all. */
function holdingHalf(weights) {
  const sorted = [...weights].sort((a, b) => b - a);
  const half = sorted.reduce((sum, weight) => sum + weight, 0) / 2;
  let count = 0;
  for (let sum = 0; sum < half; count++) sum += sorted[count];
  return count;
}

/** Darkens the photograph but where the pixel looks, by how much. */
function draw(canvas, data, seen, row, column) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const [high, wide] = [height / data.grid[0], width / data.grid[1]];
  context.clearRect(0, 0, width, height);
  context.fillStyle = `rgba(0, 0, 0, ${DARK})`;
  context.fillRect(0, 0, width, height);
  let index = 0;
  for (let r = seen.top; r < seen.bottom; r++) {
    for (let c = seen.left; c < seen.right; c++) {
      const cell = [c * wide, r * high, wide, high];
      context.clearRect(...cell);
      context.fillStyle = `rgba(0, 0, 0, ${DARK * (1 - seen.weights[index++] / 255)})`;
      context.fillRect(...cell);
    }
  }
  context.lineWidth = 1.5;
  context.strokeStyle = "#fff";
  context.strokeRect(
    seen.left * wide, seen.top * high, (seen.right - seen.left) * wide, (seen.bottom - seen.top) * high,
  );
  context.beginPath();
  context.arc(column + 0.5, row + 0.5, 5, 0, 2 * Math.PI);
  context.fillStyle = "#ff6a00";
  context.fill();
  context.stroke();
}

async function start(section) {
  const find = (selector) => section.querySelector(selector);
  const data = JSON.parse(find("script").textContent);
  const pictures = [...section.querySelectorAll(".wipe img")];
  const [left, right, slider, edge] = [".left", ".right", "input", ".edge"].map(find);

  function wipe() {
    for (const picture of pictures) {
      const name = picture.alt;
      picture.hidden = name !== left.value && name !== right.value;
      picture.style.zIndex = name === right.value ? 1 : 0;
      picture.style.clipPath = name === right.value && name !== left.value ? `inset(0 0 0 ${slider.value}%)` : "";
    }
    edge.style.left = `calc(${slider.value}% - 1px)`;
  }
  for (const control of [left, right, slider]) control.addEventListener("input", wipe);
  wipe();

  const [look, canvas, told] = [".look", "canvas", "output"].map(find);
  find(".look img").src = pictures[0].src;
  const bytes = await inflate(data.weights);
  let [i, j] = [data.rows.length >> 1, data.columns.length >> 1];

  function show() {
    const [row, column] = [data.rows[i], data.columns[j]];
    const seen = windowOf(data, bytes, i, j);
    draw(canvas, data, seen, row, column);
    const size = `${seen.bottom - seen.top} x ${seen.right - seen.left}`;
    told.value = `The pixel in row ${row}, column ${column} sees ${size} cells of the features (the frame); ` +
      `half of its weight is on ${holdingHalf(seen.weights)} of them.`;
  }
  for (const panel of [look, find(".wipe")]) {
    panel.addEventListener("click", (event) => {
      const box = panel.getBoundingClientRect();
      i = nearest(data.rows, ((event.clientY - box.top) / box.height) * data.size[0]);
      j = nearest(data.columns, ((event.clientX - box.left) / box.width) * data.size[1]);
      show();
    });
  }
  look.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    i = Math.min(Math.max(i + step[0], 0), data.rows.length - 1);
    j = Math.min(Math.max(j + step[1], 0), data.columns.length - 1);
    show();
  });
  show();
}

document.querySelectorAll("section").forEach(start);
