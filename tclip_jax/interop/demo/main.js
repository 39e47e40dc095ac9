// The page: pictures and texts in, probabilities and ranks out.

import { drawOn } from "./digit.js";
import { dot, loadModel } from "./model.js";

const TOP = 5; // labels that a card shows

const $ = (id) => document.getElementById(id);
const texts = new Map(); // text -> its embedding
const pictures = []; // { name, embedding, figure, caption }
let drawing = null; // a picture that stands beside its canvas
let mode = "classify";
let model, demo;
let busy = Promise.resolve();

/** Run jobs one after the other, as sessions do not run at the same time. */
function enqueue(job) {
  busy = busy.then(job).catch((error) => problem(error.message ?? String(error)));
}

async function start() {
  const began = performance.now();
  const response = await fetch("demo.json");
  if (!response.ok) throw new Error(`demo.json cannot be loaded: the server answers ${response.status}.`);
  demo = await response.json();
  $("labels").value = demo.labels.join("\n");
  $("template").value = demo.template;
  $("drawing").hidden = !demo.digits;
  $("query").placeholder = demo.template.replace("{}", demo.labels[0]);
  model = await loadModel(demo, new URLSearchParams(location.search).get("backend"), report);
  const bytes = Object.values(demo.towers).reduce((sum, tower) => sum + tower.bytes, 0);
  fact("Backend", { webgpu: "WebGPU", wasm: "WebAssembly" }[model.backend]);
  fact("Model", `${(bytes / 1e6).toFixed(1)} MB`);
  fact("Ternary", `${(100 * demo.ternary).toFixed(1)} %`);
  fact("Loaded in", time(performance.now() - began));
  const checked = `Checked: embeddings of test inputs are those of the exported model (cosine ${model.cosine.toFixed(5)}).`;
  report(model.right ? checked : "");
  model.notes.forEach(problem);
  for (const { url, name } of demo.samples) {
    enqueue(async () => pictures.push(await embed(await (await fetch(url)).blob(), name)));
  }
  enqueue(update);
}

/** Return a picture with its embedding and its figure. */
async function embed(blob, name) {
  const image = new Image();
  image.alt = name;
  image.src = URL.createObjectURL(blob);
  try {
    const embedding = await timed("Picture", () => model.encodeImage(blob));
    await image.decode();
    image.className = image.naturalWidth < 64 ? "tiny" : "";
    const caption = element("figcaption");
    const figure = element("figure", "card");
    figure.append(image, caption);
    return { name, embedding, figure, caption };
  } catch (error) {
    throw new Error(`${name}: ${error.message ?? error}`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** Embed the texts that are new, and show all pictures. */
async function update() {
  const labels = [...new Set(lines($("labels").value))];
  $("bare").hidden = $("template").value.includes("{}");
  const template = $("bare").hidden ? $("template").value : "{}";
  const captions = labels.map((label) => template.replaceAll("{}", () => label));
  const queries = lines($("query").value);
  const wanted = mode === "classify" ? captions : queries;
  const unknown = [...new Set(wanted)].filter((text) => !texts.has(text));
  if (unknown.length) {
    const embeddings = await timed("Text", () => model.encodeTexts(unknown), unknown.length);
    unknown.forEach((text, i) => texts.set(text, embeddings[i]));
  }
  const embeddings = wanted.map((text) => texts.get(text));
  const shown = [...pictures];
  if (mode === "classify") {
    for (const picture of drawing ? [drawing, ...shown] : shown) {
      describe(picture, "", classify(picture, labels, embeddings));
    }
  } else {
    const [query] = embeddings;
    const score = ({ embedding }) => (query ? dot(embedding, query) : 0);
    const bars = (picture) => [["similarity", score(picture).toFixed(3), Math.max(0, score(picture))]].slice(query ? 0 : 1);
    shown.sort((a, b) => score(b) - score(a));
    shown.forEach((picture, i) => describe(picture, query ? `no. ${i + 1}` : "", bars(picture)));
    if (drawing) describe(drawing, "", bars(drawing));
  }
  $("drawn").replaceChildren(...(drawing ? [drawing.figure] : []));
  $("pictures").replaceChildren(...shown.map((picture) => picture.figure));
  if (!shown.length) $("pictures").append(element("p", "empty", "Add pictures to see what the model makes of them."));
}

/** Return the most probable labels of a picture, as bars. */
function classify({ embedding }, labels, embeddings) {
  const probabilities = softmax(embeddings.map((text) => demo.logit_scale * dot(embedding, text)));
  const order = labels.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  return order.slice(0, TOP).map((i) => [labels[i], `${(100 * probabilities[i]).toFixed(1)} %`, probabilities[i]]);
}

/** Write the caption of a picture: its name, its rank, and bars of label, value and length. */
function describe({ name, caption }, rank, bars) {
  const title = element("div", "name");
  title.append(element("span", "", name), element("span", "", rank));
  caption.replaceChildren(title);
  for (const [label, value, share] of bars) {
    const bar = element("div", "bar");
    const track = element("div", "track");
    track.append(element("div"));
    track.firstChild.style.width = `${100 * share}%`;
    bar.append(element("span", "", label), element("span", "", value), track);
    caption.append(bar);
  }
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/** Run a job and show how long it took, per item; the page gets a chance to paint before. */
async function timed(name, job, count = 1) {
  await new Promise((resolve) => setTimeout(resolve));
  const began = performance.now();
  const result = await job();
  fact(name, time((performance.now() - began) / count));
  return result;
}

const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function fact(name, value) {
  let entry = $("facts").querySelector(`[data-name="${name}"]`);
  if (!entry) {
    entry = element("div");
    entry.dataset.name = name;
    entry.append(element("dt", "", name), element("dd"));
    $("facts").append(entry);
  }
  entry.lastChild.textContent = value;
}

function report(text) {
  $("status").textContent = text;
}

function problem(text) {
  $("problems").append(element("p", "problem", text));
}

function addFiles(files) {
  $("problems").replaceChildren();
  for (const file of files) {
    enqueue(async () => {
      pictures.unshift(await embed(file, file.name));
      await update();
    });
  }
}

function choose(chosen) {
  mode = chosen;
  for (const name of ["classify", "search"]) {
    $(name).setAttribute("aria-selected", String(name === mode));
    $(`${name}-inputs`).hidden = name !== mode;
  }
  enqueue(update);
}

let waiting;
for (const id of ["labels", "template", "query"]) {
  $(id).addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => enqueue(update), 250);
  });
}
$("classify").addEventListener("click", () => choose("classify"));
$("search").addEventListener("click", () => choose("search"));
$("files").addEventListener("change", () => addFiles($("files").files));
document.addEventListener("paste", ({ clipboardData }) => addFiles(clipboardData.files));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", type === "dragover");
    if (type === "drop") addFiles(event.dataTransfer.files);
  });
}
drawOn($("canvas"), $("clear"), (blob) =>
  enqueue(async () => {
    drawing = blob && (await embed(blob, "what the model sees"));
    await update();
  }),
);
busy = start().catch((error) => {
  report("");
  problem(error.message ?? String(error));
  return new Promise(() => {}); // nothing can run without the model
});
