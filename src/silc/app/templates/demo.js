// The page: one picture, a tab for each question, and what was answered to it last.

const LONG = 800; // of the picture on the page, in its own pixels
const THUMB = 96;
const TABS = ["where", "alike", "parts", "what", "search"];
const $ = (id) => document.getElementById(id);
const view = $("view"), second = $("colours");
let about, table;
let tab = "where";
let picture = null; // { blob, image, id, name }
let answers = {}; // by tab, of this picture
let chosen = 0; // the text whose map is shown
let lit = null; // the class that is pointed at in the legend
let patch = null, held = false; // of "What looks like this?"
const turns = { picture: 0, question: 0 }; // what an earlier one brings is not shown
const busy = { picture: 0, question: 0 }; // how many are under way; questions about a picture wait for it
const folds = new Map(); // values at pixels, by what they were made of

// ---------------------------------------------------------------- asking

class Told extends Error {} // a sentence for the reader

async function post(path, body, kind) {
  let reply;
  try {
    reply = await fetch(path, { method: "POST", headers: { "Content-Type": kind }, body });
  } catch {
    throw new Told("The demo does not answer. Is it still running?");
  }
  const found = await reply.json();
  if (reply.ok) return found;
  const error = new Told(sentence(found.error));
  error.status = reply.status;
  throw error;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

async function send(blob) {
  if (blob.size > about.largest) throw new Told(`This file is too large: at most ${about.largest >> 20} MB.`);
  return (await post("/picture", blob, "application/octet-stream")).picture;
}

async function ask(path, question, again = true) {
  const body = JSON.stringify({ ...question, picture: picture && picture.id, detail: Number($("detail").value) });
  try {
    return await post(path, body, "application/json");
  } catch (error) {
    if (error.status !== 410 || !again) throw error;
    picture.id = await send(picture.blob); // it made room for others, or was started anew
    return ask(path, question, false);
  }
}

// Run a job that brings a picture or the answer to a question: the last of its kind counts, and its failure is told.
async function work(kind, job) {
  const mine = ++turns[kind], current = () => mine === turns[kind];
  busy[kind] += 1;
  document.body.classList.add("busy");
  $("status").textContent = "Looking …";
  try {
    await job(current);
    if (current()) $("error").hidden = true;
  } catch (error) {
    if (!(error instanceof Told)) throw error;
    if (current()) {
      $("error").textContent = error.message;
      $("error").hidden = false;
      $("status").textContent = "";
    }
  } finally {
    busy[kind] -= 1;
    if (!busy.picture && !busy.question) document.body.classList.remove("busy");
  }
}

const listed = (id) => $(id).value.split(",").map((text) => text.trim()).filter(Boolean);

const QUESTIONS = {
  where: () => listed("texts").length && ["/heat", { texts: listed("texts") }],
  alike: () => ["/patches", {}],
  parts: () => listed("labels").length && ["/segment", { texts: listed("labels") }],
  what: () => listed("names").length && ["/classify", { texts: listed("names") }],
  search: () => $("query").value.trim() && ["/search", { texts: [$("query").value] }],
};

const ready = {
  where(found) {
    const { shape, values } = unpack(found.maps);
    const [count, rows, columns] = shape;
    const maps = Array.from({ length: count }, (_, i) => values.subarray(i * rows * columns, (i + 1) * rows * columns));
    const ends = maps.map((map) => [Math.min(...map), Math.max(...map)]);
    chosen = Math.min(chosen, count - 1);
    return { ...found, maps, rows, columns, ends, low: Math.min(...ends.flat()), high: Math.max(...ends.flat()) };
  },
  alike(found) {
    const { shape, values } = unpack(found.features);
    const [rows, columns] = found.grid;
    [patch, held] = [null, false];
    return { ...found, rows, columns, size: shape[1], features: values, colours: unpack(found.colours).values };
  },
  parts(found) {
    const { shape, values } = unpack(found.label);
    lit = null;
    return { ...found, rows: shape[0], columns: shape[1], label: values, score: unpack(found.score).values };
  },
  what: (found) => found,
  search: (found) => found,
};

// Ask what the open tab asks, unless it was answered.
function look(anew = false) {
  const of = tab, question = QUESTIONS[of](), on = of === "search" ? null : picture;
  if (anew) delete answers[of];
  if ((of !== "search" && (!picture || busy.picture)) || !question || answers[of]) return show();
  return work("question", async (current) => {
    const began = performance.now(), found = await ask(...question);
    if (!current() || (on && on !== picture)) return;
    answers[of] = { ...ready[of](found), waited: (performance.now() - began) / 1000 };
    show();
  });
}

// ---------------------------------------------------------------- pictures

// Take a picture from what promises its file.
function load(name, file, example = null) {
  return work("picture", async (current) => {
    const blob = await file, id = await send(blob);
    let image;
    try {
      image = await createImageBitmap(blob);
    } catch {
      throw new Told("This browser cannot show the picture.");
    }
    if (!current()) return;
    picture = { blob, image, id, name };
    answers = answers.search ? { search: answers.search } : {};
    [patch, held] = [null, false];
    const scale = LONG / Math.max(image.width, image.height);
    for (const canvas of [view, second]) {
      canvas.width = Math.max(1, Math.round(image.width * scale));
      canvas.height = Math.max(1, Math.round(image.height * scale));
    }
    const base = element("canvas", { width: view.width, height: view.height });
    plain(base.getContext("2d"));
    picture.grey = greyed(base);
    for (const button of document.querySelectorAll("[data-url]")) {
      button.setAttribute("aria-pressed", String(button.dataset.url === (example && example.url)));
    }
    if (example && example.texts) suggest(example);
    show();
  }).then(() => picture && look());
}

// Texts that suit an example, where the reader has written none.
function suggest(example) {
  for (const [id, text] of [["texts", example.texts], ["labels", example.labels], ["names", example.labels]]) {
    if (!$(id).dataset.own) $(id).value = text;
  }
}

const pick = (example) => load(example.name, fetched(example.url), example);

async function fetched(url) {
  const reply = await fetch(url).catch(() => null);
  if (!reply) throw new Told("The demo does not answer. Is it still running?");
  if (!reply.ok) throw new Told(sentence((await reply.json()).error));
  return reply.blob();
}

function given(files) {
  const file = [...files].find((one) => one.type.startsWith("image/")) || files[0];
  return load(file ? file.name : "", file || Promise.reject(new Told("Give a picture as a file: the demo opens no addresses.")));
}

function thumbnail(example, caption = []) {
  const button = element("button", { type: "button" }), image = element("img", { src: example.thumb, alt: example.name });
  image.loading = "lazy";
  button.title = example.name;
  button.dataset.url = example.url;
  button.setAttribute("aria-pressed", "false");
  button.append(image, ...caption);
  button.addEventListener("click", () => pick(example));
  return button;
}

function open(name) {
  tab = name;
  for (const one of TABS) {
    $(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
    $(`panel-${one}`).hidden = one !== name;
  }
  $("mark").hidden = true;
  look();
}

const plainly = (text) => text.replace(/[^\p{L}\p{N}]+/gu, " ").trim().replaceAll(" ", "-");

function save() {
  view.toBlob((blob) => {
    const stem = picture.name.replace(/^.*\//, "").replace(/\.[a-z]+$/i, "");
    const of = tab === "where" ? answers.where.texts[chosen] : tab;
    const link = element("a", { href: URL.createObjectURL(blob), download: `${plainly(`${stem} ${of}`)}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

// ---------------------------------------------------------------- beginning

function listen() {
  const tabs = TABS.map((name) => $(`tab-${name}`));
  for (const [i, name] of TABS.entries()) {
    tabs[i].addEventListener("click", () => open(name));
    tabs[i].addEventListener("keydown", (event) => {
      const there = tabs.filter((one) => !one.hidden), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = there[(there.indexOf(tabs[i]) + step + there.length) % there.length];
      next.focus();
      next.click();
    });
  }
  for (const form of document.forms) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      look(true);
    });
    form.querySelector("input").addEventListener("input", (event) => (event.target.dataset.own = "yes"));
  }
  for (const canvas of [view, second]) {
    canvas.addEventListener("pointermove", (event) => point(canvas, event));
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("click", (event) => {
      point(canvas, event);
      if (tab === "alike" && patch !== null) held = !held;
    });
  }
  view.addEventListener("keydown", move);
  $("opacity").addEventListener("input", paint);
  $("smooth").addEventListener("change", paint);
  $("floor").addEventListener("input", show);
  $("detail").addEventListener("change", () => {
    for (const of of ["where", "alike", "parts"]) delete answers[of];
    look();
  });
  $("save").addEventListener("click", save);
  $("file").addEventListener("change", (event) => {
    given(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => event.clipboardData.files.length && given(event.clipboardData.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    given(event.dataTransfer.files);
  });
}

async function begin() {
  about = await (await fetch("/about")).json();
  table = ramp(about.heat);
  $("limits").textContent = about.limits;
  $("tab-search").hidden = !about.pictures;
  $("ramp").getContext("2d").drawImage(heatLayer(Float32Array.from({ length: 256 }, (_, i) => i), 1, 256, 0, 255, table), 0, 0);
  for (const detail of about.details) {
    const size = detail * about.size, option = element("option", { value: detail }, `×${detail} (${size} px)`);
    option.selected = detail === about.detail;
    $("detail").append(option);
  }
  $("examples").append(...about.examples.map((example) => thumbnail(example)));
  listen();
  open("where");
  await pick(about.examples[0]);
}
