"use strict";
// A pipeline: which device does which pass when, to scale (without a machine, in ticks), and what each of them keeps.

const PASS = 20,
  MARGIN = 34;
const PASSES = [
  ["F", "forward", "var(--forward)"],
  ["B", "backward", "var(--backward)"],
];

function pipelineSection() {
  if (!plan.pipelines.length) {
    section("pipeline").remove();
    document.querySelector('nav a[href="#pipeline"]').remove();
    return;
  }
  section("pipeline").append(...plan.pipelines.flatMap((pipeline, i) => pipelineParts(pipeline, `/pipelines/${i}`)));
}

function pipelineParts(pipeline, path) {
  const picture = el("div", {});
  const timed = pipeline.seconds !== null;
  whenWide(picture, (width) => picture.replaceChildren(pipelinePicture(pipeline, width)));
  const inSeconds = timed ? ["; ", figure(`${path}/bubble`), " of ", figure(`${path}/seconds`)] : [];
  return [
    el(
      "p",
      {},
      `${pipeline.schedule}: `,
      figure(`${path}/num_microbatches`),
      ` microbatches through ${counted(pipeline.num_devices * pipeline.num_runs, "stage")} on `,
      figure(`${path}/num_devices`),
      " devices, in ",
      figure(`${path}/num_ticks`),
      " ticks. The bubble is ",
      figure(`${path}/ticks_bubble`),
      " of the ticks",
      inSeconds,
      ".",
    ),
    el(
      "p",
      { class: "note" },
      ...PASSES.flatMap(([, name, colour]) => [key(name, colour), " "]),
      timed ? "A number is a microbatch." : "A number is a microbatch; drawn in ticks, for no machine is known.",
    ),
    picture,
    pipelineTable(pipeline, path),
    el(
      "p",
      { class: "note" },
      "In work: microbatches whose pass backward is to come. Kept: inputs of stages; every device makes room for as " +
        "many as the one that keeps most, so that the memory is the same on each.",
    ),
  ];
}

function pipelinePicture(pipeline, width) {
  const timed = pipeline.seconds !== null;
  const whole = (timed ? pipeline.seconds : pipeline.num_ticks) || 1;
  const bottom = pipeline.devices.length * PASS,
    wide = width - MARGIN;
  const picture = draw("svg", {
    viewBox: `0 0 ${width} ${bottom + 22}`,
    height: bottom + 22,
    role: "img",
    "aria-label": `What each of ${pipeline.num_devices} devices does when: a row for each, passes from left to right.`,
  });
  pipeline.devices.forEach((device, d) => {
    picture.append(draw("rect", { class: "lane", x: MARGIN, y: d * PASS, width: wide, height: PASS - 2 }));
    picture.append(draw("text", { x: 0, y: d * PASS + 13 }, String(d)));
    const boxes = device.passes.map((p) => {
      const from = timed ? p.start_seconds : p.tick,
        long = timed ? p.seconds : 1;
      return { pass: p, x: MARGIN + (from / whole) * wide, width: (long / whole) * wide };
    });
    picture.append(...passShapes(pipeline, boxes, d), ...passNumbers(boxes, d));
  });
  const scale = draw("g", { transform: `translate(${MARGIN} 0)` });
  if (timed) scale.append(...ticks(whole, wide, bottom));
  else scale.append(draw("text", { x: 0, y: bottom + 18 }, `${pipeline.num_ticks} ticks`));
  picture.append(scale);
  return picture;
}

// One shape for all the passes of a device that are of one kind and of one of its runs: later runs are paler.
function passShapes(pipeline, boxes, d) {
  return PASSES.flatMap(([kind, , colour]) =>
    Array.from({ length: pipeline.num_runs }, (_, run) => {
      const mine = boxes.filter(
        (box) => box.pass.kind === kind && Math.floor(box.pass.stage / pipeline.num_devices) === run,
      );
      const outline = mine.map((box) => {
        const long = Math.max(0.5, box.width - 0.7);
        return `M${box.x.toFixed(2)} ${d * PASS}h${long.toFixed(2)}v${PASS - 2}h${(-long).toFixed(2)}z`;
      });
      const opacity = 1 - (0.55 * run) / pipeline.num_runs;
      return draw("path", { class: "pass", d: outline.join(""), style: `fill: ${colour}; fill-opacity: ${opacity}` });
    }),
  );
}

function passNumbers(boxes, d) {
  return boxes
    .filter((box) => box.width > 7 + 6 * String(box.pass.microbatch).length)
    .map((box) =>
      draw(
        "text",
        { class: "pass-text", x: box.x + box.width / 2, y: d * PASS + 13, "text-anchor": "middle" },
        String(box.pass.microbatch),
      ),
    );
}

function pipelineTable(pipeline, path) {
  const rows = pipeline.devices.map((device, d) => {
    const at = `${path}/devices/${d}`;
    return [
      String(d),
      device.stages.join(", "),
      figure(`${at}/forward`),
      figure(`${at}/backward`),
      figure(`${at}/busy_seconds`),
      figure(`${at}/flops`),
      figure(`${at}/in_work`),
      [figure(`${at}/kept`), device.kept ? [" (", figure(`${at}/kept_bytes`), ")"] : ""],
      figure(`${at}/memory_bytes`),
    ];
  });
  return table(
    "Each device along the pipeline",
    [
      "device",
      "stages",
      ["forward", "number"],
      ["backward", "number"],
      ["busy", "number"],
      ["work", "number"],
      ["in work", "number"],
      ["kept", "number"],
      ["memory", "number"],
    ],
    rows.map((cells) => cells.map((cell) => (Array.isArray(cell) ? el("span", {}, cell) : cell))),
    16,
  );
}
