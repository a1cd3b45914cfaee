"use strict";
// From the top: what runs where, the figures that matter most, where the time goes, and what is probably not as it
// should be.

function heading() {
  const num = Object.values(plan.mesh).reduce((a, b) => a * b, 1);
  const sizes = Object.entries(plan.mesh)
    .map(([axis, size]) => `${axis}=${size}`)
    .join(", ");
  const on = plan.machine ? `${plan.machine}, ` : "";
  document.title = `Plan of ${plan.name}`;
  section("title").textContent = `Plan of ${plan.name}`;
  section("where").textContent =
    `on ${on}${counted(num, "device")}${sizes ? `: ${sizes}` : ""} — figures of one device in one call`;
}

function headline() {
  const timed = plan.seconds !== null;
  const full = plan.available_bytes !== null && plan.peak_bytes > plan.available_bytes;
  const sent = sum(plan.traffic.map((t) => t.sent_bytes));
  const parts = [
    ["time", timed ? bounded(figure("/seconds")) : figure("/seconds"), timed ? `mostly ${plan.bottleneck}` : ".on('v5p') or another machine tells it"],
    ["MFU", figure("/mfu"), ["HFU ", figure("/hfu")]],
    ["work", bounded(figure("/flops/total")), extraWork()],
    [
      "memory",
      el("span", full ? { class: "over" } : {}, bounded(figure("/peak_bytes"), plan.complete ? "" : "at least")),
      plan.available_bytes === null ? "" : [full ? "more than the " : "of ", figure("/available_bytes")],
    ],
    ["sent", bounded(showBytes(sent)), counted(sum(plan.traffic.map((t) => t.runs)), "collective")],
    [
      "warnings",
      el("a", { href: "#warnings" }, String(plan.warnings.length)),
      plan.warnings.length ? kindsOfWarnings() : "none",
    ],
  ];
  section("headline").append(
    ...parts.map(([name, value, note]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note))),
    ),
  );
}

// A figure, and how it is to be read where it is not exact.
function bounded(figure, bound = plan.bound) {
  return bound ? [el("span", { class: "bound" }, bound), " ", figure] : figure;
}

function extraWork() {
  const notes = ["recomputed", "duplicated"]
    .filter((kind) => plan.flops[kind] > plan.flops.total / 200)
    .map((kind) => `${showPercent(plan.flops[kind] / Math.max(1, plan.flops.total))} ${kind}`);
  return notes.join(", ") || "none recomputed or duplicated";
}

function kindsOfWarnings() {
  return [...new Set(plan.warnings.map((w) => w.kind.replaceAll("_", " ")))].join(", ");
}

function timeSection() {
  const home = section("time");
  if (plan.seconds === null) {
    home.append(
      el(
        "p",
        { class: "note" },
        "Nothing is known of a machine: .on('v5p') or another one tells the time. The work by kind:",
      ),
      workTable(),
    );
    return;
  }
  const names = Object.keys(plan.parts_seconds);
  const parts = names.map((name) => ({
    name,
    size: plan.parts_seconds[name],
    colour: COLOURS.get(name),
    title: `${name} ${showSeconds(plan.parts_seconds[name])}`,
  }));
  const words = parts
    .filter((p) => p.size > 0)
    .map((p) => p.title)
    .join(", ");
  home.append(bar(parts, plan.seconds, `${showSeconds(plan.seconds)}: ${words}`));
  const rows = names.map((name) => timeRow(name));
  const time = table(
    "What the time goes to; of a network, what no computation hides",
    [
      "",
      ["time", "number"],
      ["share", "number"],
      ["network busy", "number"],
      ["hidden", "number"],
      ["crosses", "nowrap"],
    ],
    rows,
  );
  home.append(el("div", { class: "tables" }, time, workTable()));
}

function timeRow(name) {
  const seconds = plan.parts_seconds[name];
  const busy = plan.axis_seconds[name];
  const hidden = busy === undefined ? "" : showPercent(busy ? 1 - plan.axis_exposed_seconds[name] / busy : 0);
  return [
    key(name, COLOURS.get(name)),
    figure(`/parts_seconds/${name}`),
    showPercent(seconds / (plan.seconds || 1)),
    busy === undefined ? "" : figure(`/axis_seconds/${name}`),
    hidden,
    plan.paths[name] || "",
  ];
}

function workTable() {
  const kinds = ["matmul", "convolution", "elementwise", "recomputed", "duplicated"].filter((kind) => plan.flops[kind]);
  const rows = kinds.map((kind) => [
    kind,
    figure(`/flops/${kind}`),
    showPercent(plan.flops[kind] / Math.max(1, plan.flops.total)),
  ]);
  return table(
    "Work: what is recomputed or duplicated is among the others",
    ["", ["work", "number"], ["share", "number"]],
    rows,
  );
}

const SEVERE = ["unknown", "memory", "duplicated", "slow_network", "gathered"];

function warningsSection() {
  const home = section("warnings");
  if (!plan.warnings.length) home.append(el("p", { class: "fine" }, "No warnings."));
  home.append(
    ...plan.warnings.map((warning, i) => {
      const severe = SEVERE.includes(warning.kind);
      const cost = [
        figure(`/warnings/${i}/num_bytes`),
        ...(warning.seconds ? [", ", figure(`/warnings/${i}/seconds`)] : []),
      ];
      return el(
        "div",
        { class: severe ? "warning severe" : "warning" },
        el(
          "h3",
          {},
          "▲ ",
          el("b", {}, warning.kind.replaceAll("_", " ")),
          warning.file ? ` ${placeOf(warning)} ` : " ",
          el("small", {}, ...cost),
        ),
        el("p", {}, warning.message),
        el("p", {}, "→ ", warning.remedy),
      );
    }),
  );
}
