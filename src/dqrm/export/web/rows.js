// Rows of raw values -> the inputs of the model, as dqrm makes them of a log.

import * as cells from "./cells.js";
import { crc32, splitmix64, xxh64 } from "./hashes.js";

const utf8 = new TextEncoder();

// Functions from a key to its table rows (an array), one for each categorical column.
// spec: model.json. ids: the bytes of ids.bin (ArrayBuffer); not needed where ids are hashed.
export function rowMaps(spec, ids) {
  return spec.categorical.map((column) => {
    const table = column.hash ? null : vocabulary(column.vocabulary, ids);
    if (column.hash) return (key) => hashed(column, key);
    if (column.modulo === null) return (key) => [table(key)];
    return (key) => [table(modulo(column.kind, key, column.modulo))];
  });
}

function hashed({ kind, hash }, key) {
  const rows = [];
  for (let j = 0; j < hash.hashes; j++) {
    const seed = BigInt(hash.seed) + (BigInt(j) << 32n);
    const missing = kind === "text" ? key === "" : BigInt(key) === 0n;
    rows.push(missing ? 0 : Number(xxh64(keyBytes(kind, key), seed) % BigInt(hash.rows - 1)) + 1);
  }
  return rows;
}

function keyBytes(kind, key) {
  if (kind === "text") return utf8.encode(key);
  const bytes = new Uint8Array(kind === "hex*hex" ? 8 : 4);
  for (let at = 0, rest = BigInt(key); at < bytes.length; at++, rest >>= 8n) bytes[at] = Number(rest & 255n);
  return bytes;
}

function modulo(kind, key, rows) {
  if (kind === "text") return crc32(utf8.encode(key)) % rows;
  return kind === "hex*hex" ? Number(splitmix64(key) % BigInt(rows)) : key % rows;
}

// The table row of each key of a vocabulary, 0 for unknown ones: a binary search over sorted keys, which stay bytes.
function vocabulary({ keys, count, keys_at, rows_at, text_at, text_bytes }, ids) {
  const rows = new Int32Array(ids, rows_at, count);
  if (keys === "text") {
    const starts = new Uint32Array(ids, keys_at, count + 1);
    const text = new Uint8Array(ids, text_at, text_bytes);
    return (key) => {
      const wanted = utf8.encode(key);
      return find(rows, (at) => compareBytes(text, starts[at], starts[at + 1], wanted));
    };
  }
  const sorted = new (keys === "uint64" ? BigUint64Array : Uint32Array)(ids, keys_at, count);
  return (key) => find(rows, (at) => (sorted[at] < key ? -1 : sorted[at] > key ? 1 : 0));
}

// compare: of the key at a place with the wanted one, below 0 where it is smaller.
function find(rows, compare) {
  let low = 0;
  let high = rows.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const order = compare(middle);
    if (order === 0) return rows[middle];
    if (order < 0) low = middle + 1;
    else high = middle;
  }
  return 0;
}

function compareBytes(text, start, end, wanted) {
  const common = Math.min(end - start, wanted.length);
  for (let at = 0; at < common; at++) if (text[start + at] !== wanted[at]) return text[start + at] - wanted[at];
  return end - start - wanted.length;
}

// {dense: Float32Array [B, D], ids: BigInt64Array [B, S], bags: [{values, offsets}]} of rows, objects by column name.
// maps: of `rowMaps`. Throws RowError where a row lacks a column, or a value is none of its column.
export function encode(spec, maps, rows) {
  const single = spec.categorical.filter((column) => !column.multi).length;
  const dense = new Float32Array(rows.length * spec.dense.length);
  const ids = new BigInt64Array(rows.length * single);
  const bags = spec.categorical.slice(single).map(() => ({ values: [], offsets: [] }));
  rows.forEach((row, n) => {
    requireColumns(spec, row, n + 1);
    spec.dense.forEach((name, at) => (dense[n * spec.dense.length + at] = denseValue(spec, name, row[name])));
    spec.categorical.forEach((column, at) => {
      const found = keysOf(spec, column, row).map(maps[at]).flat();
      if (at < single) return void (ids[n * single + at] = BigInt(found[0]));
      bags[at - single].offsets.push(BigInt(bags[at - single].values.length));
      for (const value of found) bags[at - single].values.push(BigInt(value));
    });
  });
  const typed = bags.map(({ values, offsets }) => ({
    values: BigInt64Array.from(values),
    offsets: BigInt64Array.from(offsets),
  }));
  return { dense, ids, bags: typed };
}

function requireColumns(spec, row, number) {
  if (row === null || typeof row !== "object" || Array.isArray(row))
    throw new cells.RowError(`row ${number} is ${cells.shown(row)}, expected an object of values by column name`);
  for (const { name } of spec.columns)
    if (!Object.hasOwn(row, name))
      throw new cells.RowError(`row ${number} has no '${name}'; a value that is missing is given as null`);
}

function denseValue({ layout, markers, dense_transform }, name, value) {
  const number = layout === "criteo" ? cells.criteoNumber(value, name, markers) : cells.number(value, name, markers);
  return dense_transform === "log1p" ? Math.log1p(Math.max(number, 0)) : number;
}

function keysOf({ layout, markers, multi_separator, hexadecimal }, { name, parts, kind, lists }, row) {
  if (lists) return cells.keys(row[name], name, multi_separator, markers);
  if (kind === "id") return [cells.id(row[name], name)];
  if (kind === "hex") return [cells.criteoHex(row[name], name, markers)];
  if (kind === "hex*hex") {
    const [high, low] = parts.map((part) => BigInt(cells.criteoHex(row[part], part, markers)));
    return [high && low ? (high << 32n) + low : 0n];
  }
  const texts = parts.map((part) => {
    if (layout !== "criteo") return cells.key(row[part], part, markers);
    if (hexadecimal.includes(part)) cells.criteoHex(row[part], part, markers);
    return cells.criteoPart(row[part], part, markers, hexadecimal.includes(part));
  });
  return [texts.includes("") ? "" : texts.join("\x1f")];
}
