"use strict";
// Figures as the terminal's report writes them, and where each of them stands in the data.

const plan = JSON.parse(document.getElementById("plan").textContent);
const UNKNOWN = "N/A";

// As Python rounds: JavaScript rounds what lies exactly in the middle up, Python to the even digit.
function fixed(x, digits) {
  const exact = x.toFixed(digits + 40 > 100 ? 100 : digits + 40);
  const cut = exact.length - 40;
  if (!/^50*$/.test(exact.slice(cut))) return x.toFixed(digits);
  const down = digits ? exact.slice(0, cut) : exact.slice(0, cut - 1);
  return Number(down.at(-1)) % 2 ? x.toFixed(digits) : down;
}

function showBytes(num) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let size = num,
    i = 0;
  while (size >= 1024 && i < units.length - 1) {
    size /= 1024;
    i += 1;
  }
  return i ? `${fixed(size, size < 10 ? 2 : size < 100 ? 1 : 0)} ${units[i]}` : `${num} B`;
}

function showSeconds(seconds) {
  if (seconds === null) return UNKNOWN;
  const [unit, size] = [
    ["s", 1],
    ["ms", 1e-3],
    ["µs", 1e-6],
  ].find(([name, least]) => seconds >= least || name === "µs");
  const number = seconds / size;
  return `${fixed(number, number >= 100 || number === 0 ? 0 : number >= 10 ? 1 : 2)} ${unit}`;
}

function showFlops(num) {
  const found = [
    ["P", 1e15],
    ["T", 1e12],
    ["G", 1e9],
    ["M", 1e6],
  ].find(([, size]) => num >= size);
  if (!found) return `${fixed(num, 0)} FLOP`;
  const number = num / found[1];
  return `${fixed(number, number >= 100 ? 0 : number >= 10 ? 1 : 2)} ${found[0]}FLOP`;
}

function showPercent(share) {
  return share === null ? UNKNOWN : `${fixed(share * 100, 0)}%`;
}

function counted(num, thing) {
  return `${num} ${thing}${num === 1 ? "" : "s"}`;
}

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}

function showRate(num) {
  return `${fixed(num / 1e9, num < 1e10 ? 2 : 0)} GB/s`;
}

function shownAs(path) {
  const [last, before] = path.split("/").reverse();
  const of = `${before} ${last}`;
  if (/per_second$/.test(last)) return showRate;
  if (before === "figures" && last.endsWith("flops")) return (num) => `${showFlops(num)}/s`;
  if (/seconds/.test(of)) return showSeconds;
  if (/bytes/.test(of)) return (num) => (num === null ? UNKNOWN : showBytes(num));
  if (/flops/.test(of)) return showFlops;
  if (/mfu|hfu|bubble$|^matmul$/.test(last) && before !== "flops") return showPercent;
  return String;
}

function valueAt(path) {
  return path
    .split("/")
    .slice(1)
    .reduce((found, key) => found[key], plan);
}

// A figure of the plan: the text that a person reads, with the value and its place in the JSON (a JSON pointer).
function figure(path) {
  const value = valueAt(path);
  return el("data", { value, "data-at": path }, shownAs(path)(value));
}

function placeOf(at) {
  return at.file ? `${at.file.split(/[\\/]/).pop()}:${at.line}` : "elsewhere";
}
