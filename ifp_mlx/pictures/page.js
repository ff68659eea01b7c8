"use strict";
// Draws the strips: every unit of every layer, from the bits in the page.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { names, layers, channels, unit } = data;
  const bytes = Uint8Array.from(atob(data.bits), (c) => c.charCodeAt(0));
  const keeps = (task, layer, channel) => {
    const bit = (task * layers + layer) * channels + channel;
    return (bytes[bit >> 3] >> (bit & 7)) & 1;
  };
  const count = new Uint16Array(layers * channels);
  for (let l = 0; l < layers; l++)
    for (let c = 0; c < channels; c++)
      for (let t = 0; t < names.length; t++) count[l * channels + c] += keeps(t, l, c);

  // Most shared first, then by which tasks keep a unit, then as in the model.
  const compare = (l) => (a, b) => {
    const more = count[l * channels + b] - count[l * channels + a];
    if (more) return more;
    for (let t = 0; t < names.length; t++) {
      const first = keeps(t, l, b) - keeps(t, l, a);
      if (first) return first;
    }
    return a - b;
  };
  const plain = Array.from({ length: channels }, (_, c) => c);
  const sorted = Array.from({ length: layers }, (_, l) => [...plain].sort(compare(l)));

  const colour = (name) => {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name);
    const n = parseInt(value.trim().slice(1), 16);
    return [n >> 16, (n >> 8) & 255, n & 255];
  };
  const kindOf = (task, layer, channel) => {
    if (!keeps(task, layer, channel)) return 0;
    const by = count[layer * channels + channel];
    return by === names.length ? 1 : by === 1 ? 3 : 2;
  };
  const isSorted = () => document.querySelector("[name=order]:checked").value === "sorted";
  const orderOf = (layer) => (isSorted() ? sorted[layer] : plain);

  // One row of pixels: each is the mean colour of the units it stands for.
  const paintRow = (image, width, y, height, task, layer, palette) => {
    const order = orderOf(layer);
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * channels) / width);
      const to = Math.max(from + 1, Math.floor(((x + 1) * channels) / width));
      const sum = [0, 0, 0];
      for (let i = from; i < to; i++) {
        const rgb = palette[kindOf(task, layer, order[i])];
        for (let n = 0; n < 3; n++) sum[n] += rgb[n];
      }
      for (let row = y; row < y + height; row++) {
        const at = 4 * (row * width + x);
        for (let n = 0; n < 3; n++) image.data[at + n] = sum[n] / (to - from);
        image.data[at + 3] = 255;
      }
    }
  };
  const paint = (canvas, task, shown, rowHeight, gap) => {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const step = Math.max(1, Math.round(rowHeight * ratio));
    canvas.width = width;
    canvas.height = step * shown.length;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, canvas.height);
    const palette = ["--none", "--all", "--some", "--own"].map(colour);
    shown.forEach((layer, n) => {
      paintRow(image, width, n * step, step - (step > 3 ? gap : 0), task, layer, palette);
    });
    context.putImageData(image, 0, 0);
  };

  const everything = Array.from({ length: layers }, (_, l) => l);
  const strips = [...document.querySelectorAll("canvas.strips")];
  const closeUps = [...document.querySelectorAll("canvas.close")];
  const slider = document.getElementById("layer");
  const drawStrips = () => {
    const height = Math.max(3, Math.min(9, 300 / layers));
    for (const canvas of strips) paint(canvas, +canvas.dataset.task, everything, height, 1);
  };
  const drawCloseUps = () => {
    document.getElementById("layer-number").textContent = slider.value;
    for (const canvas of closeUps) paint(canvas, +canvas.dataset.task, [+slider.value], 20, 0);
  };
  const drawAll = () => { drawStrips(); drawCloseUps(); };

  const said = document.getElementById("said");
  const place = (event, rows) => {
    const box = event.currentTarget.getBoundingClientRect();
    const x = Math.min(channels - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * channels)));
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows.length);
    const layer = rows[Math.min(rows.length - 1, Math.max(0, row))];
    return [layer, orderOf(layer)[x]];
  };
  const tell = (layer, channel) => {
    const by = names.filter((_, t) => keeps(t, layer, channel));
    said.textContent = `layer ${layer}, ${unit} ${channel}: kept by ${by.join(", ") || "none"}`;
  };
  for (const canvas of strips) {
    canvas.addEventListener("mousemove", (e) => tell(...place(e, everything)));
    canvas.addEventListener("click", (e) => { slider.value = place(e, everything)[0]; drawCloseUps(); });
  }
  for (const canvas of closeUps)
    canvas.addEventListener("mousemove", (e) => tell(...place(e, [+slider.value])));
  slider.addEventListener("input", drawCloseUps);
  for (const choice of document.querySelectorAll("[name=order]"))
    choice.addEventListener("change", drawAll);
  window.addEventListener("resize", drawAll);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
