"use strict";
// What a device holds: at the peak, by kind, and over the step, in the program's order.

const CHART = 190;

function memorySection() {
  const home = section("memory"),
    limit = plan.available_bytes;
  const kinds = kindsHeld();
  const whole = Math.max(plan.peak_bytes, limit || 0);
  const parts = kinds.map((kind) => ({
    name: kind,
    size: plan.held_bytes[kind] || 0,
    colour: kindColour(kind),
    title: `${kind} ${showBytes(plan.held_bytes[kind] || 0)}`,
  }));
  const words = parts
    .filter((part) => part.size)
    .map((part) => part.title)
    .join(", ");
  const held = bar(parts, whole, `${showBytes(plan.peak_bytes)}: ${words}`);
  if (limit && limit < whole)
    held.append(el("b", { style: `left: ${(100 * limit) / whole}%`, title: `there is ${showBytes(limit)}` }));
  home.append(held, memoryWords());
  const rows = kinds.map((kind) => [
    key(kind, kindColour(kind)),
    figure(`/held_bytes/${kind}`),
    showPercent(plan.held_bytes[kind] / (plan.peak_bytes || 1)),
  ]);
  home.append(
    table(
      plan.moments.length ? "At the peak, from the bottom of the chart up" : "At the peak",
      ["", ["a device", "number"], ["share", "number"]],
      rows,
    ),
  );
  if (plan.moments.length) home.append(...chartOverTime());
  if (plan.saved.length) home.append(savedTable());
}

function kindsHeld() {
  const here = Object.keys(plan.held_bytes);
  return [...KINDS.filter((kind) => here.includes(kind)), ...here.filter((kind) => !KINDS.includes(kind))];
}

function memoryWords() {
  const limit = plan.available_bytes;
  const between = plan.peak_bytes - sum(Object.values(plan.held_bytes));
  const gaps = between > plan.peak_bytes / 200 ? ` ${showBytes(between)} of it are results, and gaps between buffers.` : "";
  if (limit === null) return el("p", {}, figure("/peak_bytes"), " on a device; how much there is, is not known.", gaps);
  const full = plan.peak_bytes > limit;
  const left = full
    ? `${showBytes(plan.peak_bytes - limit)} more than there is.`
    : `${showBytes(limit - plan.peak_bytes)} left.`;
  const of = [figure("/peak_bytes"), " of ", figure("/available_bytes"), `: ${left}${gaps}`];
  return el("p", full ? { class: "over" } : {}, of);
}

function chartOverTime() {
  const picture = el("div", {}),
    readout = el("p", { class: "readout", "aria-live": "polite" });
  whenWide(picture, (width) => picture.replaceChildren(memoryPicture(width, readout)));
  return [
    el("h3", {}, "Over the step"),
    el("p", { class: "note" }, "In the program's order, not in time: of each loop one turn."),
    picture,
    readout,
  ];
}

function totalOf(moment) {
  return sum(Object.values(moment.by_kind));
}

function memoryPicture(width, readout) {
  const moments = plan.moments,
    limit = plan.available_bytes,
    kinds = kindsHeld();
  const highest = Math.max(...moments.map(totalOf), 1);
  const near = limit !== null && limit < 3 * highest;
  const most = Math.max(highest, near ? limit : 0) * 1.08;
  const x = (i) => (i / moments.length) * width,
    y = (bytes) => 14 + CHART * (1 - bytes / most),
    bottom = 14 + CHART;
  const picture = draw("svg", {
    viewBox: `0 0 ${width} ${bottom + 40}`,
    height: bottom + 40,
    role: "group",
    tabindex: "0",
    "aria-label": `Memory over the step: at most ${showBytes(Math.round(highest))}. Arrow keys go through it.`,
  });
  const below = moments.map(() => 0);
  for (const kind of kinds) {
    const floor = [...below];
    moments.forEach((moment, i) => {
      below[i] += moment.by_kind[kind] || 0;
    });
    picture.append(draw("path", { d: area(floor, below, x, y), style: `fill: ${kindColour(kind)}` }));
  }
  picture.append(draw("line", { class: "line", x1: 0, x2: width, y1: bottom, y2: bottom }), ...levels(most, width, y));
  if (near) {
    picture.append(
      draw("line", { class: "limit", x1: 0, x2: width, y1: y(limit), y2: y(limit) }),
      draw(
        "text",
        { class: "limit-text", x: width, y: y(limit) - 4, "text-anchor": "end" },
        `there is ${showBytes(limit)}`,
      ),
    );
  } else if (limit !== null) {
    picture.append(
      draw(
        "text",
        { class: "limit-text", x: width, y: 10, "text-anchor": "end" },
        `there is ${showBytes(limit)}, far above`,
      ),
    );
  }
  picture.append(...phases(x, bottom + 6));
  const cursor = draw("line", { class: "cursor", y1: 14, y2: bottom, visibility: "hidden" });
  picture.append(cursor);
  followMemory(picture, cursor, width, readout);
  return picture;
}

// Between two rows of heights, each of which holds until the next.
function area(floor, top, x, y) {
  const there = top.flatMap((bytes, i) => [
    `${x(i).toFixed(1)},${y(bytes).toFixed(1)}`,
    `${x(i + 1).toFixed(1)},${y(bytes).toFixed(1)}`,
  ]);
  const back = floor
    .flatMap((bytes, i) => [
      `${x(i).toFixed(1)},${y(bytes).toFixed(1)}`,
      `${x(i + 1).toFixed(1)},${y(bytes).toFixed(1)}`,
    ])
    .reverse();
  return `M${there.join("L")}L${back.join("L")}Z`;
}

function levels(most, width, y) {
  const unit = 2 ** Math.floor(Math.log2(most / 3 || 1));
  const found = [];
  for (let bytes = unit; bytes < most; bytes += unit) {
    found.push(
      draw("line", { class: "line", x1: 0, x2: width, y1: y(bytes), y2: y(bytes), "stroke-dasharray": "1 4" }),
      draw("text", { class: "over-text", x: 2, y: y(bytes) - 3 }, showBytes(unit < 1 ? bytes : Math.round(bytes))),
    );
  }
  return found;
}

// Which pass the program is in; what is computed again belongs to the backward pass.
function phases(x, y) {
  const runs = [];
  plan.moments.forEach((moment, i) => {
    const name = moment.origin.direction === "recompute" ? "backward" : moment.origin.direction;
    if (runs.length && runs.at(-1).name === name) runs.at(-1).end = i + 1;
    else runs.push({ name, start: i, end: i + 1 });
  });
  return runs.flatMap((run) => {
    const wide = x(run.end) - x(run.start);
    const box = draw("rect", { class: "phase", x: x(run.start), y, width: wide, height: 20 });
    return run.name.length * 6.5 + 8 < wide ? [box, draw("text", { x: x(run.start) + 5, y: y + 14 }, run.name)] : [box];
  });
}

function followMemory(picture, cursor, width, readout) {
  const num = plan.moments.length;
  let at = plan.moments.reduce((best, moment, i) => (totalOf(moment) > totalOf(plan.moments[best]) ? i : best), 0);
  function show(i) {
    at = Math.min(num - 1, Math.max(0, i));
    const moment = plan.moments[at],
      middle = ((at + 0.5) / num) * width;
    cursor.setAttribute("x1", middle);
    cursor.setAttribute("x2", middle);
    cursor.setAttribute("visibility", "visible");
    const parts = kindsHeld()
      .filter((kind) => moment.by_kind[kind])
      .map((kind) => `${kind} ${showBytes(moment.by_kind[kind])}`);
    const { direction, operation } = moment.origin;
    const where = ` in the ${direction} pass, at ${operation}, ${placeOf(moment.origin)}: `;
    readout.replaceChildren(el("b", {}, showBytes(totalOf(moment))), where, parts.join(", "));
  }
  const pointed = (event) => {
    const box = picture.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * num));
  };
  picture.addEventListener("pointermove", pointed);
  picture.addEventListener("pointerdown", pointed);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  show(at);
}

function savedTable() {
  const rows = plan.saved.map((saved, i) => [
    el(
      "span",
      {},
      saved.operation,
      saved.dims.length ? ` (${saved.dims.join(", ")})` : "",
      el("small", {}, placeOf(saved.origin)),
    ),
    figure(`/saved/${i}/num_bytes`),
    el("code", { class: "clip" }, codeAt(saved.origin)),
  ]);
  const columns = [
    ["", "what"],
    ["a device", "number"],
    ["code", "wide aside"],
  ];
  return table("Saved for the backward pass, in all turns of loops", columns, rows, 8);
}
