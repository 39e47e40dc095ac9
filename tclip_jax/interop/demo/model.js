// Both towers in onnxruntime-web, and the choice of a backend that computes what the exported model computes.

import { readPicture } from "./pixels.js";
import { makeTokenizer } from "./tokenizer.js";

const BATCH = 16; // texts that run together

/**
 * Load the model on WebGPU where that is offered and right, and else in WebAssembly. `asked` may be "wasm", or "webgpu",
 * which also takes an adapter in software.
 *
 * The page embeds the reference inputs of demo.json, and compares with the embeddings that the export stored there.
 * Returns an object with `encodeImage`, `encodeTexts`, `backend`, `right`, `cosine` and `notes`, lines on what is wrong.
 */
export async function loadModel(demo, asked, report) {
  const gpu = asked !== "wasm" && (await hasWebGPU(asked === "webgpu"));
  const runtime = await loadRuntime(demo.runtime, gpu ? "webgpu" : "wasm", report);
  const notes = [];
  let tokenize;
  for (const backend of gpu ? ["webgpu", "wasm"] : ["wasm"]) {
    const last = backend === "wasm";
    const towers = {};
    try {
      await openTowers(towers, runtime, demo, backend, report);
      // Last, as the towers need the most memory.
      tokenize ??= makeTokenizer(await (await fetchOk("tokenizer.json")).json(), demo.context_length);
      const model = { backend, ...encoders(runtime, towers, demo, tokenize) };
      report("Comparing with the reference…");
      const cosine = await compare(model, demo.reference);
      const right = cosine >= demo.min_cosine; // false for NaN
      if (right || last) {
        const wrong = `This browser computes other embeddings than the exported model (cosine ${show(cosine)})`;
        if (!right) notes.push(`${wrong}: do not trust the results.`);
        return { ...model, right, cosine, notes };
      }
      const wrong = `WebGPU computes wrong embeddings here (cosine ${show(cosine)} to the exported model's)`;
      notes.push(`${wrong}, so WebAssembly runs instead.`);
    } catch (error) {
      if (last) throw error;
      notes.push(`WebGPU fails here, so WebAssembly runs instead: ${error.message ?? error}`);
    }
    await Promise.all(Object.values(towers).map((session) => session.release()));
  }
}

const show = (cosine) => cosine.toFixed(4);

/** A WebGPU in software is slower than WebAssembly. */
async function hasWebGPU(software) {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter) && (software || !adapter.info?.isFallbackAdapter);
  } catch {
    return false;
  }
}

/** Import onnxruntime-web. The files must have the hashes that the export wrote, wherever they come from. */
async function loadRuntime({ base, files }, kind, report) {
  report("Loading ONNX Runtime…");
  const [code, binary] = await Promise.all(
    files[kind].map(({ file, integrity }) => fetchOk(base + file, { integrity })),
  );
  const url = URL.createObjectURL(new Blob([await code.blob()], { type: "text/javascript" }));
  const runtime = await import(url);
  runtime.env.logLevel = "error";
  runtime.env.wasm.wasmBinary = await binary.arrayBuffer();
  return runtime;
}

/** Open the towers one after the other, and keep no copy of what was downloaded. */
async function openTowers(towers, runtime, demo, backend, report) {
  for (const [tower, { file, bytes }] of Object.entries(demo.towers)) {
    report(`Loading the ${tower} model: ${(bytes / 1e6).toFixed(1)} MB…`);
    const content = await download(file, bytes);
    const options = { executionProviders: [backend], logSeverityLevel: 3 };
    towers[tower] = await runtime.InferenceSession.create(content, options);
    content.buffer.transfer?.(0); // frees it now; the garbage collector would wait
    runtime.env.wasm.wasmBinary = undefined; // it was compiled with the first session
  }
}

/** Return the bytes of a file. Where browsers can, they are read through one small buffer, as others become garbage. */
async function download(file, bytes) {
  const response = await fetchOk(file);
  const reader = byteReader(response.body);
  const content = new Uint8Array(reader ? bytes : await response.arrayBuffer());
  let length = reader ? 0 : content.length;
  let buffer = new ArrayBuffer(2 ** 20);
  for (let part; reader && !(part = await reader.read(new Uint8Array(buffer))).done; buffer = part.value.buffer) {
    if (length + part.value.length <= bytes) content.set(part.value, length);
    length += part.value.length;
  }
  if (length !== bytes) throw new Error(`${file} is not what the export wrote: it has ${length} bytes, not ${bytes}.`);
  return content;
}

function byteReader(body) {
  try {
    return body.getReader({ mode: "byob" });
  } catch {
    return null;
  }
}

function encoders(runtime, { image, text }, demo, tokenize) {
  const { Tensor } = runtime;
  return {
    /** Return the embedding of a picture (a Blob), of length 1. */
    async encodeImage(blob) {
      const pixels = new Tensor("float32", await readPicture(blob, demo.preprocess), [1, 3, ...demo.preprocess.size]);
      const [embedding] = await rows(image, { pixel_values: pixels });
      return embedding;
    },
    /** Return the embeddings of texts, of length 1. */
    async encodeTexts(texts) {
      const embeddings = [];
      for (let i = 0; i < texts.length; i += BATCH) {
        let ids = texts.slice(i, i + BATCH).map(tokenize);
        const length = demo.padded ? demo.context_length : Math.max(...ids.map((row) => row.length));
        ids = ids.map((row) => [...row, ...new Array(length - row.length).fill(0)]);
        const shape = [ids.length, length];
        const values = BigInt64Array.from(ids.flat(), BigInt);
        const feeds = { input_ids: new Tensor("int64", values, shape) };
        feeds.attention_mask = new Tensor("int64", new BigInt64Array(values.length).fill(1n), shape);
        embeddings.push(...(await rows(text, feeds)));
      }
      return embeddings;
    },
  };
}

/** Run a tower and return its embeddings, each of length 1. */
async function rows(session, feeds) {
  const [name] = session.outputNames;
  const output = (await session.run(feeds))[name];
  const [count, width] = output.dims;
  return Array.from({ length: count }, (_, i) => {
    const row = output.data.slice(i * width, (i + 1) * width);
    const norm = Math.hypot(...row);
    return row.map((value) => value / norm);
  });
}

/** Return the smallest cosine between the embeddings of the reference inputs and those that were stored. */
async function compare(model, { pictures, captions, image, text }) {
  const found = await model.encodeTexts(captions);
  for (const picture of pictures) found.push(await model.encodeImage(await (await fetch(picture)).blob()));
  return Math.min(...[...text, ...image].map((expected, i) => dot(expected, found[i])));
}

export function dot(a, b) {
  return a.reduce((sum, value, i) => sum + value * b[i], 0);
}

async function fetchOk(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error(`${url} cannot be loaded, or is not the file that the export named.`);
  }
  if (!response.ok) throw new Error(`${url} cannot be loaded: the server answers ${response.status}.`);
  return response;
}
