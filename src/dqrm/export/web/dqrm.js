// A model of this folder, for a page of your own:
//
//     import { Model } from "./web/dqrm.js";
//     const model = await Model.load((done, total) => console.log(done / total));
//     const { probabilities } = await model.score([{ user: "7", ad: "3", price: 12 }]);
//
// Rows hold raw values by column name, as in the log; a missing value is null.

export class Model {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #next = 0;

  // Download (or take from the browser's cache) and open the model. progress: called with bytes so far and in all.
  static async load(progress = () => {}) {
    const model = new Model();
    model.#listen(progress);
    try {
      const { spec, milliseconds } = await model.#ask({ type: "load" });
      return Object.assign(model, { spec, milliseconds });
    } catch (error) {
      model.close();
      throw error;
    }
  }

  // {probabilities: Float32Array, milliseconds} of rows, in order.
  score(rows) {
    return this.#ask({ type: "score", rows });
  }

  // End the worker, which frees the model's memory.
  close() {
    this.#worker.terminate();
  }

  #ask(message) {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ ...message, id });
    });
  }

  #listen(progress) {
    this.#worker.onmessage = ({ data }) => {
      if (data.type === "progress") return progress(data.done, data.total);
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.type === "result") resolve(data.result);
      else reject(Object.assign(new Error(data.message), { memory: data.memory }));
    };
    this.#worker.onerror = (event) => {
      const error = new Error(event.message || "the worker could not be started; open the page from a server, not a file");
      for (const { reject } of this.#waiting.values()) reject(error);
      this.#waiting.clear();
    };
  }
}
