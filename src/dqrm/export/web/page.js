// The page: what the model is, a form for one row, a field for several.

import { Model } from "./dqrm.js";

// Larger models are downloaded when the reader says so: a phone may be on a metered line.
const ASK_ABOVE = 40e6;
const at = (id) => document.getElementById(id);
let spec, model;

const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);
const element = (name, ...content) => {
  const made = document.createElement(name);
  made.append(...content);
  return made;
};

async function start() {
  const response = await fetch("model.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`model.json: the server answered ${response.status}`);
  spec = await response.json();
  document.title = spec.title;
  document.querySelector("h1").textContent = spec.title;
  at("summary").textContent = spec.summary;
  at("size").textContent =
    `The model and its runtime are ${size(spec.download_bytes)} to download and take up to ` +
    `${size(spec.memory_bytes)} of memory while the page is open.`;
  describe();
  const memory = navigator.deviceMemory; // in GB, where the browser tells: 8 for 8 and more
  if (memory && memory < 8 && spec.memory_bytes > memory * 0.5e9)
    return fail(
      `This device has about ${memory} GB of memory, too little for a page to hold this model ` +
        `(${size(spec.memory_bytes)}). Open it on another device.`,
    );
  if (spec.download_bytes > ASK_ABOVE) {
    at("question").hidden = false;
    at("start").onclick = load;
  } else {
    await load();
  }
}

async function load() {
  at("question").hidden = true;
  at("progress").hidden = false;
  try {
    model = await Model.load((done, total) => {
      document.querySelector("progress").value = done / total;
      at("stage").textContent = done < total ? `${size(done)} of ${size(total)}` : "opening the model";
    });
  } catch (error) {
    at("progress").hidden = true;
    return fail(
      error.memory
        ? `This browser cannot hold the model: it takes about ${size(spec.memory_bytes)} of memory (${error.message}).`
        : `The model cannot be opened: ${error.message}`,
    );
  }
  at("progress").hidden = true;
  at("size").textContent += ` It was ready in ${(model.milliseconds.all / 1000).toFixed(2)} s.`;
  at("scoring").hidden = false;
  fill();
  document.body.dataset.ready = "true";
  await scoreForm();
}

function fail(sentence) {
  at("failed").textContent = sentence;
  at("failed").hidden = false;
}

function describe() {
  for (const [name, value] of Object.entries(spec.about)) {
    const head = element("th", name.replaceAll("_", " "));
    head.scope = "row";
    at("facts").append(element("tr", head, element("td", value)));
  }
  for (const { name, kind, rows } of spec.tables)
    at("columns").append(element("tr", element("td", name), element("td", kind), element("td", rows === null ? "" : rows.toLocaleString("en"))));
  for (const [n, { name, kind, examples }] of spec.columns.entries()) {
    const input = document.createElement("input");
    Object.assign(input, { name, inputMode: kind === "dense" ? "decimal" : "text" });
    input.setAttribute("list", `examples-${n}`);
    const list = element("datalist", ...examples.map((value) => Object.assign(document.createElement("option"), { value })));
    list.id = `examples-${n}`;
    at("fields").append(element("label", name, input, list));
  }
  at("about").hidden = false;
}

// One value of each column, the next ones at each call.
let turn = 0;
function fill() {
  for (const { name, examples } of spec.columns) at("row").elements.namedItem(name).value = examples[turn % examples.length] ?? "";
  turn++;
  at("json").value = JSON.stringify([rowOfForm()], null, 1);
}

function rowOfForm() {
  const values = [...at("fields").querySelectorAll("input")].map(({ name, value }) => [name, value === "" ? null : value]);
  return Object.fromEntries(values);
}

async function answer(work) {
  at("wrong").hidden = true;
  try {
    await work();
  } catch (error) {
    at("wrong").textContent = error.message;
    at("wrong").hidden = false;
  }
}

const scoreForm = () =>
  answer(async () => {
    at("result").textContent = "";
    const { probabilities, milliseconds } = await model.score([rowOfForm()]);
    at("result").append(
      "Probability of a click: ",
      element("strong", probabilities[0].toFixed(4)),
      " ",
      element("small", `computed in ${milliseconds.toFixed(2)} ms`),
    );
  });

at("row").addEventListener("submit", (event) => {
  event.preventDefault();
  scoreForm();
});
at("example").addEventListener("click", () => {
  fill();
  scoreForm();
});
at("score-json").addEventListener("click", () =>
  answer(async () => {
    at("results").hidden = true;
    const rows = [JSON.parse(at("json").value)].flat();
    const { probabilities, milliseconds } = await model.score(rows);
    at("results").textContent = `${[...probabilities].join("\n")}\n\n${rows.length} rows in ${milliseconds.toFixed(2)} ms`;
    at("results").hidden = false;
  }),
);

navigator.serviceWorker?.register("offline.js").catch(() => {}); // without it the page needs its server
start().catch((error) => fail(error.message));
