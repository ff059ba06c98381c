// Values of a log's cells: their keys and numbers, by the rules of dqrm/data/cells.py (key version 2).

// What is wrong with a row, in one sentence.
export class RowError extends Error {}

const EXACT = 2 ** 53;
const FLOAT32_MAX = 3.4028234663852886e38;
const LARGEST_ID = 2 ** 32 - 1;
const NUMBER = /^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$/;

export const isMissing = (value) => value === null || value === undefined || Number.isNaN(value);

export function shown(value) {
  const text = typeof value === "bigint" ? String(value) : isMissing(value) ? "nothing" : JSON.stringify(value);
  return text.length <= 60 ? text : `${text.slice(0, 60)}...`;
}

function refuse(name, value, expected) {
  throw new RowError(`column ${name} holds ${shown(value)}, expected ${expected}`);
}

// The key of a value as text, "" where it is missing. markers: the texts that mean missing.
export function key(value, name, markers) {
  const text = canonical(value, name);
  return markers.includes(text) ? "" : text;
}

function canonical(value, name) {
  if (isMissing(value)) return "";
  if (typeof value === "string") {
    if (value.isWellFormed && !value.isWellFormed()) refuse(name, value, "text in Unicode");
    const whole = /^-?(?:0|[1-9][0-9]*)\.0+$/.test(value) ? value.replace(/\.0+$/, "") : value;
    return whole === "-0" && value !== "-0" ? "0" : whole;
  }
  if (typeof value === "boolean" || typeof value === "bigint") return String(value);
  if (typeof value !== "number") refuse(name, value, "one number or text per row");
  if (Math.abs(value) >= EXACT) refuse(name, value, "whole numbers of 2^53 and more as text: JavaScript rounds them");
  return withoutExponent(String(value === 0 ? 0 : value));
}

// As 0.00001 rather than 1e-5.
function withoutExponent(digits) {
  const parts = /^(-?)(\d)(?:\.(\d+))?e-(\d+)$/.exec(digits);
  return parts ? `${parts[1]}0.${"0".repeat(parts[4] - 1)}${parts[2]}${parts[3] ?? ""}` : digits;
}

// The keys of a cell that holds several ids: a list, or text that is split at the separator.
export function keys(value, name, separator, markers) {
  if (isMissing(value)) return [];
  if (!Array.isArray(value) && typeof value !== "string") refuse(name, value, "a list or text");
  const entries = Array.isArray(value) ? value : value.split(separator);
  return entries.map((entry) => key(entry, name, markers)).filter((text) => text !== "");
}

// The number in a cell, 0 where it is missing.
export function number(value, name, markers) {
  if (isMissing(value)) return 0;
  if (typeof value === "boolean" && !markers.includes(String(value))) return Number(value);
  if (typeof value === "bigint") value = Number(value);
  if (typeof value === "number") {
    if (!(Math.abs(value) <= FLOAT32_MAX)) refuse(name, value, "a finite number within float32's range or nothing");
    if (markers.length && Math.abs(value) < EXACT && key(value, name, markers) === "") return 0;
    return value;
  }
  if (key(value, name, markers) === "") return 0;
  const text = typeof value === "string" ? value.trim() : "";
  if (/^[+-]?nan$/i.test(text)) return 0;
  const parsed = NUMBER.test(text) ? Number(text) : NaN;
  if (!(Math.abs(parsed) <= FLOAT32_MAX)) refuse(name, value, "a finite number within float32's range or nothing");
  return parsed;
}

// Criteo's layout has text: whole numbers, and categories of up to 8 hexadecimal digits.
export function criteoNumber(value, name, markers) {
  const text = key(value, name, markers);
  if (text === "") return 0;
  const whole = /^[+-]?\d+$/.test(text) ? BigInt(text.replace("+", "")) : null;
  if (whole === null || whole !== BigInt.asIntN(64, whole)) refuse(name, value, "a whole number or nothing");
  return Number(whole);
}

export function criteoHex(value, name, markers) {
  if (!isMissing(value) && typeof value !== "string") refuse(name, value, "hexadecimal text, as \"68fd1e64\"");
  const text = key(value, name, markers);
  if (text === "") return 0;
  if (!/^[0-9a-fA-F]{1,8}$/.test(text)) refuse(name, value, "up to 8 hexadecimal digits or nothing");
  return parseInt(text, 16);
}

// The text of a part of a cross in Criteo's layout.
export function criteoPart(value, name, markers, hexadecimal) {
  const text = key(value, name, markers);
  return hexadecimal && text !== "" ? text.toLowerCase().padStart(8, "0") : text;
}

// Categories that are numbers already.
export function id(value, name) {
  const given = typeof value === "string" && NUMBER.test(value) ? Number(value) : value;
  const number = typeof given === "boolean" || typeof given === "bigint" ? Number(given) : given;
  if (!Number.isInteger(number) || number < 0 || number > LARGEST_ID)
    refuse(name, value, `a whole number from 0 to ${LARGEST_ID}`);
  return number;
}
