"use strict";
// Arrays to pictures. Nothing here knows of tabs or of the server.

const KINDS = { float32: Float32Array, uint8: Uint8Array, int8: Int8Array };

// An array as the server packs it: { shape, values }.
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  return { shape: packed.shape, values: new KINDS[packed.type](bytes.buffer) };
}

// The stops of a colour scale, dark to bright -> 256 colours.
function ramp(stops) {
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1);
    const first = Math.min(stops.length - 2, Math.floor(place));
    for (let c = 0; c < 3; c++) {
      table[3 * i + c] = stops[first][c] + (place - first) * (stops[first + 1][c] - stops[first][c]);
    }
  }
  return table;
}

// Where each of `length` pixels lies among `count` patches: the two it is between, and how far it is from the first.
// Pixels count by their middles, as the model's own maps do.
function places(length, count, smooth) {
  const first = new Int32Array(length), second = new Int32Array(length), share = new Float32Array(length);
  for (let i = 0; i < length; i++) {
    const at = ((i + 0.5) * count) / length;
    const from = smooth ? Math.max(0, at - 0.5) : Math.floor(at);
    first[i] = Math.min(count - 1, Math.floor(from));
    second[i] = Math.min(count - 1, first[i] + 1);
    share[i] = smooth ? from - first[i] : 0;
  }
  return { first, second, share };
}

// One value at every pixel from one at every patch.
function spread(values, rows, columns, height, width, smooth) {
  const y = places(height, rows, smooth), x = places(width, columns, smooth);
  const out = new Float32Array(height * width);
  for (let i = 0, k = 0; i < height; i++) {
    const up = y.first[i] * columns, down = y.second[i] * columns, v = y.share[i];
    for (let j = 0; j < width; j++, k++) {
      const left = x.first[j], right = x.second[j], u = x.share[j];
      const above = values[up + left] * (1 - u) + values[up + right] * u;
      out[k] = v ? above * (1 - v) + (values[down + left] * (1 - u) + values[down + right] * u) * v : above;
    }
  }
  return out;
}

// A canvas of that size, its pixels filled by paint(pixel's number, RGBA bytes, their offset).
function layer(height, width, paint) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let k = 0; k < height * width; k++) paint(k, image.data, 4 * k);
  context.putImageData(image, 0, 0);
  return canvas;
}

// A canvas without its colours.
function greyed(canvas) {
  const { width, height } = canvas, from = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  return layer(height, width, (k, data, at) => {
    data[at] = data[at + 1] = data[at + 2] = (from[at] + from[at + 1] + from[at + 2]) / 3;
    data[at + 3] = 255;
  });
}

// Values at pixels in the colours of a scale from low to high.
function heatLayer(values, height, width, low, high, table) {
  const factor = 255 / Math.max(high - low, 1e-9);
  return layer(height, width, (k, data, at) => {
    const level = 3 * Math.max(0, Math.min(255, Math.round((values[k] - low) * factor)));
    data[at] = table[level];
    data[at + 1] = table[level + 1];
    data[at + 2] = table[level + 2];
    data[at + 3] = 255;
  });
}

// Three bytes a patch as colours.
function colourLayer(bytes, rows, columns, height, width, smooth) {
  const parts = [0, 1, 2].map((c) => {
    const one = Float32Array.from({ length: rows * columns }, (_, i) => bytes[3 * i + c]);
    return spread(one, rows, columns, height, width, smooth);
  });
  return layer(height, width, (k, data, at) => {
    for (let c = 0; c < 3; c++) data[at + c] = parts[c][k];
    data[at + 3] = 255;
  });
}

// Cosine of one patch with all of them; the features are whole numbers of any length.
function likeness(features, count, size, patch) {
  const out = new Float32Array(count), from = patch * size;
  let own = 0;
  for (let c = 0; c < size; c++) own += features[from + c] ** 2;
  for (let i = 0; i < count; i++) {
    let dot = 0, length = 0;
    for (let c = 0, at = i * size; c < size; c++, at++) {
      dot += features[from + c] * features[at];
      length += features[at] ** 2;
    }
    out[i] = dot / Math.max(Math.sqrt(own * length), 1e-9);
  }
  return out;
}

// The edge of a patch, visible on dark and on light.
function outline(context, rows, columns, patch) {
  const { width, height } = context.canvas;
  const w = width / columns, h = height / rows;
  const box = [(patch % columns) * w, Math.floor(patch / columns) * h, w, h];
  context.lineWidth = 5;
  context.strokeStyle = "#000";
  context.strokeRect(...box);
  context.lineWidth = 2.5;
  context.strokeStyle = "#fff";
  context.strokeRect(...box);
}
