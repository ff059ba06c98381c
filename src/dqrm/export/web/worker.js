// Loads the model and scores rows, beside the page's own thread.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { fileBytes, forgetOthers, keepFetched } from "./files.js";
import { encode, rowMaps } from "./rows.js";

const MODEL = "model.onnx";
const TABLES = "model.onnx.data";
const IDS = "ids.bin";
const RUNTIME = "ort-wasm-simd-threaded.wasm";
let spec, maps, session;

async function load() {
  const began = performance.now();
  const response = await fetch(new URL("model.json", import.meta.url), { cache: "no-cache" });
  if (!response.ok) throw new Error(`model.json: the server answered ${response.status}`);
  spec = await response.json();
  const names = [RUNTIME, MODEL, ...(TABLES in spec.files ? [TABLES] : []), ...(IDS in spec.files ? [IDS] : [])];
  const total = names.reduce((sum, name) => sum + spec.files[name].bytes, 0);
  const done = {};
  const read = names.map((name) =>
    fileBytes(name, spec.files[name], (bytes) => {
      done[name] = bytes;
      const sum = Object.values(done).reduce((one, other) => one + other, 0);
      postMessage({ type: "progress", done: sum, total });
    }),
  );
  const bytes = Object.fromEntries((await Promise.all(read)).map((buffer, n) => [names[n], buffer]));
  const downloaded = performance.now();
  ort.env.wasm.numThreads = 1; // two are slower, and need headers that a plain server does not send
  ort.env.wasm.wasmBinary = bytes[RUNTIME];
  session = await ort.InferenceSession.create(new Uint8Array(bytes[MODEL]), {
    executionProviders: ["wasm"],
    externalData: TABLES in bytes ? [{ path: TABLES, data: new Uint8Array(bytes[TABLES]) }] : [],
  });
  ort.env.wasm.wasmBinary = undefined; // it is compiled
  maps = rowMaps(spec, bytes[IDS]);
  await score([Object.fromEntries(spec.columns.map(({ name }) => [name, spec.layout === "ids" ? 0 : null]))]);
  keepFetched().then(() => forgetOthers(names.map((name) => spec.files[name].sha256)));
  const ready = performance.now();
  return { spec, milliseconds: { files: downloaded - began, session: ready - downloaded, all: ready - began } };
}

async function score(rows) {
  const began = performance.now();
  if (!rows.length) return { probabilities: new Float32Array(0), milliseconds: 0 };
  const { dense, ids, bags } = encode(spec, maps, rows);
  const given = {
    dense: () => new ort.Tensor("float32", dense, [rows.length, spec.dense.length]),
    ids: () => new ort.Tensor("int64", ids, [rows.length, ids.length / rows.length]),
  };
  bags.forEach(({ values, offsets }, n) => {
    given[`values_${n}`] = () => new ort.Tensor("int64", values, [values.length]);
    given[`offsets_${n}`] = () => new ort.Tensor("int64", offsets, [offsets.length]);
  });
  const feeds = Object.fromEntries(session.inputNames.map((name) => [name, given[name]()]));
  const { probability } = await session.run(feeds, ["probability"]);
  return { probabilities: probability.data, milliseconds: performance.now() - began };
}

// One request after the other: a session runs one at a time.
let last = Promise.resolve();
onmessage = ({ data: { type, id, rows } }) => {
  last = last.then(async () => {
    try {
      postMessage({ type: "result", id, result: type === "load" ? await load() : await score(rows) });
    } catch (error) {
      const full = error instanceof RangeError || /memory|allocation|bad_alloc/i.test(error.message ?? String(error));
      postMessage({ type: "error", id, message: error.message ?? String(error), memory: type === "load" && full });
    }
  });
};
