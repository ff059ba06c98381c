// The files of the model: from the browser's cache, or from the server with progress; checked by size and SHA-256.

const CACHE = "dqrm-files";
const fetched = [];

// The content of a file of the folder (ArrayBuffer). tell: called with the bytes so far.
export async function fileBytes(name, { bytes, sha256 }, tell) {
  // The digest in the address: a file that was replaced on the server is another file to every cache.
  const url = new URL(`${name}?v=${sha256}`, import.meta.url).href;
  const cache = await openCache();
  const known = await cache?.match(url);
  if (known) {
    const buffer = await known.arrayBuffer();
    if (buffer.byteLength === bytes) {
      tell(bytes);
      return buffer;
    }
    await cache.delete(url);
  }
  const response = await fetch(url, cache ? { cache: "no-store" } : {});
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  const buffer = await readBody(response.body, bytes, name, tell);
  if (!(await isIntact(buffer, sha256)))
    throw new Error(`${name} is not the file of this model: the folder on the server is incomplete or changing`);
  if (cache) fetched.push([url, buffer]);
  return buffer;
}

// Put what came from the server into the browser's cache: once the model is open, which then need not wait for it.
export async function keepFetched() {
  const cache = await openCache();
  for (let next; (next = fetched.shift()); )
    await cache?.put(next[0], new Response(next[1])).catch(() => {}); // without room it works all the same
}

// Delete what belongs to models that were here before.
export async function forgetOthers(digests) {
  const cache = await openCache();
  const folder = new URL(".", import.meta.url).href;
  for (const request of (await cache?.keys()) ?? []) {
    const digest = new URL(request.url).searchParams.get("v");
    if (request.url.startsWith(folder) && !digests.includes(digest)) await cache.delete(request);
  }
}

// The browser's cache; none where the page came neither by HTTPS nor from this machine.
async function openCache() {
  try {
    return await caches.open(CACHE);
  } catch {
    return null;
  }
}

async function readBody(body, bytes, name, tell) {
  const buffer = new ArrayBuffer(bytes);
  const target = new Uint8Array(buffer);
  const reader = body.getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read();
    if (!done && at + value.length <= bytes) {
      target.set(value, at);
      tell((at += value.length));
    } else if (done && at === bytes) {
      return buffer;
    } else {
      throw new Error(`${name} has ${done ? at : "more than " + bytes} bytes, expected ${bytes}`);
    }
  }
}

async function isIntact(buffer, sha256) {
  if (!globalThis.crypto?.subtle) return true; // not there where the cache is not, either
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}
