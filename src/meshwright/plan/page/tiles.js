"use strict";
// Tiles: which device holds which part of a tensor, and which rows and columns of a large picture to show.

const MOST = 8;
const axisNames = Object.keys(plan.mesh);
const axisSizes = Object.values(plan.mesh);
const numDevices = axisSizes.reduce((a, b) => a * b, 1);

// A device's place along each axis.
function placeOn(device) {
  const place = {};
  let left = device;
  for (let i = axisNames.length - 1; i >= 0; i -= 1) {
    place[axisNames[i]] = left % axisSizes[i];
    left = Math.floor(left / axisSizes[i]);
  }
  return place;
}

// Which part of each dim a device holds.
function partsOf(tensor, device) {
  const place = placeOn(device);
  return tensor.axes.map((axes) => axes.reduce((part, axis) => part * plan.mesh[axis] + place[axis], 0));
}

function numParts(tensor) {
  return tensor.axes.map((axes) => axes.reduce((num, axis) => num * plan.mesh[axis], 1));
}

function sliceText(tensor, dim, part) {
  const size = tensor.shape[dim] / numParts(tensor)[dim];
  return `${part * size}:${(part + 1) * size}`;
}

// The devices of every tile, by the parts of its dims.
function owners(tensor) {
  const found = new Map();
  for (let device = 0; device < numDevices; device += 1) {
    const tile = partsOf(tensor, device).join(",");
    if (found.has(tile)) found.get(tile).push(device);
    else found.set(tile, [device]);
  }
  return found;
}

function showIds(ids) {
  const runs = [];
  for (const id of ids) {
    if (runs.length && runs.at(-1).at(-1) === id - 1) runs.at(-1).push(id);
    else runs.push([id]);
  }
  const texts = runs.map((run) => (run.length > 2 ? `${run[0]}-${run.at(-1)}` : run.join(",")));
  return texts.length > 3 ? [texts[0], "…", texts.at(-1)].join(",") : texts.join(",");
}

// Which of so many rows or columns to show: the first, the chosen one and the last; null stands for others.
function few(num, chosen, fit = MOST) {
  if (num <= Math.min(fit, MOST)) return [...Array(num).keys()];
  const first = Array(Math.max(1, Math.min(fit, 6) - 2)).keys();
  const shown = [...new Set([...first, chosen, num - 1])].sort((a, b) => a - b);
  return shown.flatMap((i, n) => (n && i > shown[n - 1] + 1 ? [null, i] : [i]));
}
// A map of the tensor: the hue says where down, the lightness where across. Near colours are near slices.
function tileColour({ across, down }, parts) {
  const share = (cut) => (cut ? parts[cut.dim] / cut.num : 0);
  const [hue, light] = down ? [share(down), share(across)] : [share(across), 0.4];
  return `--hue: ${Math.round(40 + 300 * hue)}; --light: ${light.toFixed(3)}`;
}
