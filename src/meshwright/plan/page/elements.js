"use strict";
// Elements: the few forms that every section is made of, and the colour of each thing.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  return filled(node, attributes, children);
}

function draw(tag, attributes, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child !== null));
  return node;
}

function section(id) {
  return document.getElementById(id);
}

const axesShown = [...new Set([...Object.keys(plan.mesh), ...plan.traffic.map((t) => t.axes)])];
const COLOURS = new Map([
  ["compute", "var(--compute)"],
  ["HBM", "var(--hbm)"],
  ["bubble", "var(--bubble)"],
  ...axesShown.map((axes, i) => [axes, `var(--axis-${i % 7})`]),
]);
const KINDS = [
  "parameters", "optimizer state", "other arguments", "parameter copies", "gradients", "saved activations",
  "temporaries", "outputs",
];

function kindColour(kind) {
  const i = KINDS.indexOf(kind);
  return `var(--kind-${i >= 0 ? i : Object.keys(plan.held_bytes).indexOf(kind) % KINDS.length})`;
}

function key(name, colour) {
  return el("span", { class: "key", style: `--of: ${colour}` }, name);
}

// Parts of a whole, side by side. `label` says the same in words.
function bar(parts, whole, label, small) {
  const pieces = parts
    .filter((part) => part.size > 0)
    .map((part) =>
      el("i", {
        style: `--of: ${part.colour}; width: ${(100 * part.size) / (whole || 1)}%`,
        title: part.title || part.name,
      }),
    );
  return el("div", { class: small ? "bar small" : "bar", role: "img", "aria-label": label }, pieces);
}

// A table. A column is its name, or [name, class]; the first cell of a row is its header. Of a long one the rows after
// `most` wait for a button.
function table(caption, columns, rows, most = Infinity) {
  const named = columns.map((column) => (Array.isArray(column) ? column : [column, ""]));
  const head = el(
    "tr",
    {},
    named.map(([name, kind]) => el("th", { scope: "col", class: kind || null }, name)),
  );
  const body = el(
    "tbody",
    {},
    rows.map((cells, i) => tableRow(cells, named, i >= most)),
  );
  const region = el(
    "div",
    {},
    el("p", { class: "caption" }, caption),
    el(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": caption },
      el("table", { "aria-label": caption }, el("thead", {}, head), body),
    ),
  );
  if (rows.length <= most) return region;
  const all = el(
    "button",
    {
      class: "more",
      type: "button",
      click: () => {
        body.querySelectorAll("tr[hidden]").forEach((row) => row.removeAttribute("hidden"));
        all.remove();
      },
    },
    `Show all ${rows.length}`,
  );
  region.append(all);
  return region;
}

function tableRow(cells, columns, hidden) {
  const row = el("tr", hidden ? { hidden: "" } : {});
  cells.forEach((cell, i) => {
    const kind = columns[i][1] || null;
    row.append(
      el(i ? "td" : "th", i ? { class: kind } : { scope: "row", class: kind }, cell === undefined ? null : cell),
    );
  });
  return row;
}

// Calls `paint(width)` now and whenever the element's width changes.
function whenWide(element, paint) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(element.clientWidth);
    if (width && width !== last) paint((last = width));
  }).observe(element);
}
