"use strict";
// Communication by axis and kind, the lines of source that cost the most with what they send, and the machine.

const NUM_LINES = 12;

function communicationSection() {
  const home = section("communication");
  if (!plan.traffic.length) {
    home.append(el("p", { class: "fine" }, "No device sends anything."));
    return;
  }
  const total = sum(plan.traffic.map((t) => t.sent_bytes));
  const parts = axesShown
    .map((axes) => ({
      name: axes,
      colour: COLOURS.get(axes),
      size: sum(plan.traffic.filter((t) => t.axes === axes).map((t) => t.sent_bytes)),
    }))
    .filter((part) => part.size);
  parts.forEach((part) => {
    part.title = `${part.name} ${showBytes(part.size)}`;
  });
  home.append(
    bar(parts, total, `Sent: ${parts.map((part) => part.title).join(", ")}`),
    el(
      "p",
      { class: "note" },
      `${showBytes(total)} sent by each device. Payload: the whole buffer that a group reduces, gathers or exchanges.`,
    ),
  );
  const rows = plan.traffic.map((t, i) => [
    el("span", {}, key(t.kind, COLOURS.get(t.axes)), ` over ${t.axes}`),
    figure(`/traffic/${i}/seconds`),
    figure(`/traffic/${i}/sent_bytes`),
    figure(`/traffic/${i}/payload_bytes`),
    runsOf(`/traffic/${i}`),
    plan.paths[t.axes] || "",
  ]);
  home.append(
    table(
      "By axis and kind, all runs",
      [
        ["", "what"],
        ["busy", "number"],
        ["sent", "number"],
        ["payload", "number"],
        ["runs", "number"],
        ["crosses", "nowrap"],
      ],
      rows,
    ),
  );
  if (plan.traffic.some((t) => !t.sure)) home.append(el("p", { class: "note" }, `+ ${whatPlusSays()}.`));
}

function whatPlusSays() {
  const says = [];
  if (plan.bound !== "at most") says.push("in a loop of unknown length: at least");
  if (plan.bound !== "at least") says.push("in a branch, of which one runs: at most");
  return says.join("; ");
}

function runsOf(path) {
  return el("span", {}, figure(`${path}/runs`), valueAt(path).sure ? "" : "+");
}

function sourceSection() {
  const home = section("source"),
    timed = plan.seconds !== null;
  const most = Math.max(...plan.lines.map((line) => costOf(line)), 0) || 1;
  home.append(
    el(
      "p",
      { class: "note" },
      "What each line costs in all passes, the most expensive first. Open one for its code and collectives.",
    ),
    el(
      "div",
      { class: "source-line heads", "aria-hidden": "true" },
      el("span", {}, "line"),
      el("span", {}, ""),
      el("span", { class: "number" }, timed ? "time" : "work"),
      el("span", { class: "number" }, "sent"),
    ),
  );
  const all = plan.lines.map((line, i) => sourceLine(line, i, most));
  const rest = all.slice(NUM_LINES);
  home.append(...all.slice(0, NUM_LINES));
  if (!rest.length) return;
  const button = el(
    "button",
    { class: "more", type: "button", click: () => button.replaceWith(...rest) },
    `Show all ${all.length}`,
  );
  home.append(button);
}

function costOf(line) {
  return line.seconds === null ? line.flops : sum(Object.values(line.seconds));
}

function sourceLine(line, i, most) {
  const parts =
    line.seconds === null
      ? [{ name: "work", size: line.flops, colour: COLOURS.get("compute") }]
      : Object.entries(line.seconds).map(([name, size]) => ({ name, size, colour: COLOURS.get(name) }));
  parts.forEach((part) => {
    part.title = `${part.name} ${line.seconds === null ? showFlops(part.size) : showSeconds(part.size)}`;
  });
  const cost = line.seconds === null ? figure(`/lines/${i}/flops`) : showSeconds(costOf(line));
  return el(
    "details",
    {},
    el(
      "summary",
      { class: "source-line" },
      el("span", { class: "place" }, placeOf(line)),
      bar(parts, most, parts.map((part) => part.title).join(", "), true),
      el("span", { class: "number" }, cost),
      el("span", { class: "number" }, line.sent_bytes ? figure(`/lines/${i}/sent_bytes`) : ""),
      el("span", { class: "code" }, line.code),
    ),
    el("div", { class: "opened" }, listing(line), figuresOf(line, i), collectivesOf(line)),
  );
}

function listing(line) {
  const around = Object.entries(line.around);
  if (!around.length) return el("p", { class: "note" }, "No line of the program is known for this.");
  const width = String(around.at(-1)[0]).length;
  return el(
    "pre",
    { tabindex: "0", "aria-label": `Source about line ${line.line}` },
    el(
      "code",
      {},
      around.flatMap(([number, text]) => {
        const here = Number(number) === line.line;
        return [
          el("span", here ? { class: "hit" } : {}, `${here ? "▸" : " "} ${String(number).padStart(width)}  ${text}`),
          "\n",
        ];
      }),
    ),
  );
}

function figuresOf(line, i) {
  const parts = Object.keys(line.seconds || {}).map((name) =>
    el("span", { class: "nowrap" }, key(name, COLOURS.get(name)), " ", figure(`/lines/${i}/seconds/${name}`)),
  );
  return el("p", { class: "chips" }, parts, el("span", { class: "nowrap" }, "work ", figure(`/lines/${i}/flops`)));
}

function collectivesOf(line) {
  const rows = plan.collectives
    .map((row, i) => [row, `/collectives/${i}`])
    .filter(([row]) => row.file === line.file && row.line === line.line);
  if (!rows.length) return el("p", { class: "note" }, "It sends nothing.");
  const cells = rows.map(([row, path]) => [
    collectiveName(row),
    figure(`${path}/seconds`),
    figure(`${path}/sent_bytes`),
    figure(`${path}/payload_bytes`),
    runsOf(path),
  ]);
  return table(
    "Its collectives, in the program's order: busy in all runs, sent and payload of one",
    [
      ["", "what"],
      ["busy", "number"],
      ["sent", "number"],
      ["payload", "number"],
      ["runs", "number"],
    ],
    cells,
    10,
  );
}

function collectiveName(row) {
  const dims = row.dims.length ? ` (${row.dims.join(", ")})` : "";
  return el(
    "span",
    {},
    key(row.kind, COLOURS.get(row.axes)),
    ` over ${row.axes}`,
    el("small", {}, `${row.direction}, ${row.operation}${dims}, ${row.dtype}`),
  );
}

function machineSection() {
  const home = section("machine");
  if (!plan.machine) {
    home.append(
      el(
        "p",
        { class: "note" },
        "No machine is known: plan.on('v5p'), plan.on('gpu:h100:64'), or a profile of mw.calibrate().",
      ),
    );
    return;
  }
  home.append(
    el(
      "p",
      { class: plan.unverified.length ? "note" : "fine" },
      plan.unverified.length
        ? `${plan.machine}: assumed or not checked: ${plan.unverified.join(", ")}.`
        : `Every figure of ${plan.machine} was checked against its source.`,
    ),
  );
  const rows = Object.keys(plan.figures).map((name) => [
    el("code", {}, name),
    figure(`/figures/${name}`),
    plan.unverified.includes(name) ? "assumed or not checked" : "",
  ]);
  home.append(table(`What a device of ${plan.machine} is taken for`, ["figure", ["value", "number"], ""], rows));
}
