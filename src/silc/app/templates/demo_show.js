// What the page shows: the picture with what a tab's answer says of it, legends, and what lies under the pointer.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Everything that depends on the tab, the picture and the answer.
function show() {
  const answer = answers[tab], mapped = tab !== "what" && tab !== "search";
  $("second").hidden = tab !== "alike";
  $("pair").classList.toggle("two", tab === "alike");
  $("scale").hidden = !answer || !["where", "alike"].includes(tab);
  for (const id of ["opacity-box", "detail-box", "save"]) $(id).hidden = !mapped;
  $("detail-box").hidden = !mapped || (tab === "parts" && about.head);
  $("smooth-box").hidden = !["where", "alike"].includes(tab);
  $("save").disabled = !answer;
  if (tab !== "alike" || patch === null) $("readout").textContent = answer && mapped ? HINTS[tab] : "";
  legends[tab](answer);
  tell(answer);
  paint();
  if (tab === "alike" && answer && patch !== null) describe(answer);
}

const HINTS = {
  where: "Point at the picture to read its values.",
  alike: "Point at a patch.",
  parts: "Point at the picture or at a class.",
};

function tell(answer) {
  if (!answer) return void ($("status").textContent = picture || tab === "search" ? "" : "Choose a picture.");
  const grid = answer.grid ? `, ${answer.grid[0]} × ${answer.grid[1]} patches` : "";
  $("status").textContent =
    `Answered in ${duration(answer.waited)}, of which ${duration(answer.seconds)} in the model${grid}.`;
}

const duration = (seconds) => (seconds < 1 ? `${Math.ceil(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`);

// The picture, and over it what the tab's answer says.
function paint() {
  if (!picture) return;
  const context = view.getContext("2d"), answer = answers[tab];
  plain(context);
  const over = answer && overlays[tab] && overlays[tab](answer);
  if (over) {
    context.globalAlpha = $("opacity").value / 100;
    context.drawImage(picture.grey, 0, 0); // so that the picture's own colours are not taken for the scale's
    context.drawImage(over, 0, 0, view.width, view.height);
    context.globalAlpha = 1;
  }
  if (tab === "alike" && answer && patch !== null) {
    for (const one of [context, second.getContext("2d")]) outline(one, answer.rows, answer.columns, patch);
  }
}

function plain(context) {
  const { width, height } = context.canvas;
  context.globalAlpha = 1;
  context.fillStyle = "#fff"; // what is clear in a picture is white to the model
  context.fillRect(0, 0, width, height);
  context.drawImage(picture.image, 0, 0, width, height);
}

// Values of an answer's patches at all pixels of the page's picture; the last few are kept, for the pointer.
function folded(answer, values) {
  const smooth = $("smooth").checked, key = `${smooth} ${view.width} ${view.height}`;
  const kept = folds.get(values);
  if (kept && kept.key === key) return kept.out;
  const out = spread(values, answer.rows, answer.columns, view.height, view.width, smooth);
  if (folds.size > 40) folds.clear();
  folds.set(values, { key, out });
  return out;
}

const overlays = {
  where(answer) {
    return heatLayer(folded(answer, answer.maps[chosen]), view.height, view.width, answer.low, answer.high, table);
  },
  alike(answer) {
    const { rows, columns } = answer, context = second.getContext("2d"), smooth = $("smooth").checked;
    context.drawImage(colourLayer(answer.colours, rows, columns, view.height, view.width, smooth), 0, 0);
    if (patch === null) return null;
    answer.like = likeness(answer.features, rows * columns, answer.size, patch);
    const low = Math.min(...answer.like);
    ends(low, 1);
    return heatLayer(spread(answer.like, rows, columns, view.height, view.width, smooth), view.height, view.width, low, 1, table);
  },
  parts(answer) {
    return layer(answer.rows, answer.columns, (k, data, at) => {
      const of = owner(answer, k);
      const colour = of < 0 ? [0, 0, 0] : answer.colours[of];
      for (let c = 0; c < 3; c++) data[at + c] = colour[c];
      data[at + 3] = lit === null || lit === of ? 255 : 40;
    });
  },
};

// The class of a pixel of the label map; -1 where the best score is below the reader's floor.
function owner(answer, pixel) {
  return answer.ruled && answer.score[pixel] < 2.55 * $("floor").value ? -1 : answer.label[pixel];
}

function ends(low, high) {
  $("low").textContent = low.toFixed(2);
  $("high").textContent = high.toFixed(2);
}

// ---------------------------------------------------------------- legends

let listing = null; // the answer whose hits are shown

const legends = {
  where(answer) {
    $("heats").replaceChildren(...(answer ? answer.maps.map((_, i) => heatRow(answer, i)) : []));
    if (answer) ends(answer.low, answer.high);
  },
  alike(answer) {
    const shares = answer ? answer.shares.map((share) => `${Math.round(100 * share)}%`).join(", ") : "";
    $("directions").textContent = answer ? `The three directions hold ${shares} of the variance.` : "";
    if (answer) ends(-1, 1);
  },
  parts(answer) {
    $("rule").hidden = !answer || !answer.ruled;
    const floor = Number($("floor").value);
    $("floor-value").textContent = floor ? `${floor}%` : "(off)";
    $("classes").replaceChildren(...(answer ? classRows(answer) : []));
  },
  what(answer) {
    $("chances").textContent = about.sigmoid
      ? "The probability of each label for itself (a sigmoid): they need not sum to one, and may all be low. Beside it the cosine."
      : "The share of each label among them all (a softmax): it always sums to one, so one of them wins. Beside it the cosine.";
    $("scores").replaceChildren(...(answer ? answer.scores.map(scoreRow) : []));
  },
  search(answer) {
    $("folder").textContent = `The best of ${about.pictures.toLocaleString("en")} pictures. A click looks closer.`;
    if (listing === answer) return; // a picture chosen among them leaves them as they are
    listing = answer;
    $("hits").replaceChildren(...(answer ? answer.hits.map(hit) : []));
  },
};

function heatRow(answer, i) {
  const [low, high] = answer.ends[i], mini = element("canvas", { "aria-hidden": "true" });
  const scale = THUMB / Math.max(view.width, view.height);
  mini.width = Math.max(1, Math.round(view.width * scale));
  mini.height = Math.max(1, Math.round(view.height * scale));
  const context = mini.getContext("2d");
  plain(context);
  context.globalAlpha = 0.75;
  const map = spread(answer.maps[i], answer.rows, answer.columns, mini.height, mini.width, true);
  context.drawImage(heatLayer(map, mini.height, mini.width, answer.low, answer.high, table), 0, 0);
  const range = element("small", {}, `${low.toFixed(2)} to ${high.toFixed(2)}`);
  const row = element("button", { type: "button", "aria-pressed": String(i === chosen) }, mini,
    element("b", {}, answer.texts[i]), range, element("span"));
  row.addEventListener("click", () => {
    chosen = i;
    for (const [j, other] of [...$("heats").children].entries()) other.setAttribute("aria-pressed", String(j === i));
    paint();
  });
  return row;
}

// Classes by their share, what belongs to none last.
function classRows(answer) {
  const counts = new Map([...answer.texts.keys(), -1].map((i) => [i, 0]));
  for (let k = 0; k < answer.label.length; k++) counts.set(owner(answer, k), counts.get(owner(answer, k)) + 1);
  const order = [...answer.texts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
  if (counts.get(-1)) order.push(-1);
  return order.map((i) => {
    const share = (100 * counts.get(i)) / answer.label.length, swatch = element("i");
    swatch.style.background = i < 0 ? "#000" : `rgb(${answer.colours[i].join(",")})`;
    const row = element("button", { type: "button" }, swatch, element("b", {}, i < 0 ? "none of them" : answer.texts[i]),
      element("span", {}, `${share.toFixed(1)}%`));
    row.dataset.of = i;
    row.classList.toggle("faint", !counts.get(i));
    for (const [event, value] of [["pointerenter", i], ["focus", i], ["pointerleave", null], ["blur", null]]) {
      row.addEventListener(event, () => {
        lit = value;
        paint();
      });
    }
    return row;
  });
}

function scoreRow(row) {
  const bar = element("i");
  bar.style.width = `${100 * row.probability}%`;
  const line = element("div", {}, element("b", {}, row.text), element("span", {}, `${(100 * row.probability).toFixed(1)}%`),
    element("small", {}, `cosine ${row.cosine.toFixed(3)}`));
  return element("li", {}, line, element("u", {}, bar));
}

function hit({ name, number, cosine }) {
  const example = { name, url: `/pictures/${number}`, thumb: `/thumbs/${number}` };
  return thumbnail(example, [element("span", {}, element("b", {}, cosine.toFixed(3)), ` ${name}`)]);
}

// ---------------------------------------------------------------- the pointer and the keys

// What lies under a place on the picture, told in words and on the scale.
function point(canvas, event) {
  const answer = answers[tab], box = canvas.getBoundingClientRect();
  if (!answer || !overlays[tab]) return;
  const u = Math.min(0.9999, Math.max(0, (event.clientX - box.left) / box.width));
  const v = Math.min(0.9999, Math.max(0, (event.clientY - box.top) / box.height));
  const pixel = Math.floor(v * view.height) * view.width + Math.floor(u * view.width);
  const cell = Math.floor(v * answer.rows) * answer.columns + Math.floor(u * answer.columns);
  if (tab === "where") {
    const values = answer.maps.map((map) => folded(answer, map)[pixel]);
    for (const [i, row] of [...$("heats").children].entries()) row.lastChild.textContent = values[i].toFixed(3);
    mark((values[chosen] - answer.low) / (answer.high - answer.low));
    $("readout").textContent = `“${answer.texts[chosen]}” here: ${values[chosen].toFixed(3)}`;
  } else if (tab === "parts") {
    const of = owner(answer, cell), share = Math.round(answer.score[cell] / 2.55);
    $("readout").textContent = `${of < 0 ? "None of them" : answer.texts[of]}: ${share}%`;
  } else if (held) {
    like(answer, cell);
  } else {
    take(answer, cell);
  }
}

function like(answer, cell) {
  const value = answer.like[cell], low = Math.min(...answer.like);
  mark((value - low) / Math.max(1 - low, 1e-9));
  $("readout").textContent = `Held. The patch under the pointer is like it by ${value.toFixed(3)}.`;
}

function take(answer, cell) {
  if (cell === patch) return;
  patch = cell;
  paint();
  describe(answer);
}

function describe(answer) {
  const others = [...answer.like].filter((_, i) => i !== patch).sort((a, b) => b - a);
  const row = Math.floor(patch / answer.columns) + 1, column = (patch % answer.columns) + 1;
  $("readout").textContent = others.length
    ? `Patch ${row}, ${column}: the nearest other is like it by ${others[0].toFixed(3)}, the median by ${others[others.length >> 1].toFixed(3)}.`
    : "There is one patch only.";
}

function mark(place) {
  $("mark").hidden = false;
  $("mark").style.left = `${100 * Math.max(0, Math.min(1, place))}%`;
}

function leave() {
  $("mark").hidden = true;
  if (tab === "where") for (const row of $("heats").children) row.lastChild.textContent = "";
  if (!answers[tab] || !HINTS[tab]) return;
  if (tab === "alike" && patch !== null) describe(answers.alike);
  else $("readout").textContent = HINTS[tab];
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function move(event) {
  const answer = answers[tab], step = STEPS[event.key];
  if (!answer || tab !== "alike") return;
  if (event.key === "Enter" || event.key === " ") held = !held;
  else if (step) {
    const { rows, columns } = answer, at = patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    const row = Math.max(0, Math.min(rows - 1, Math.floor(at / columns) + step[0]));
    const column = Math.max(0, Math.min(columns - 1, (at % columns) + step[1]));
    take(answer, row * columns + column);
  } else return;
  event.preventDefault();
}
