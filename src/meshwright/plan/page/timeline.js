"use strict";
// The timeline: a lane for each unit of a device. A loop is drawn once: one of its turns, stretched over the time of
// all, so that what is wide on the picture takes long.

const LANE = 18,
  LABEL = 15,
  STRIP = 17;

function timelineSection() {
  const home = section("timeline");
  if (!plan.timeline.length) {
    home.append(el("p", { class: "note" }, "The timeline needs a machine: .on('v5p') or another one."));
    return;
  }
  const views = [{ name: "Whole call", spans: plan.timeline, seconds: plan.seconds }, ...loopViews(plan.timeline)];
  const picture = el("div", {});
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const longest = el("div", {});
  const buttons = views.map((view) =>
    el("button", { type: "button", "aria-pressed": "false", click: () => show(view) }, view.name),
  );
  let shown = views[0];
  function show(view) {
    shown = view;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(views[i] === view)));
    longest.replaceChildren(longestTable(view));
    if (picture.clientWidth) picture.replaceChildren(timelinePicture(view, picture.clientWidth, readout));
  }
  home.append(
    el(
      "p",
      { class: "note" },
      "A loop is drawn once: one turn, stretched over the time of all its turns. Choose one to see a turn alone.",
    ),
    el("div", { class: "controls" }, buttons),
    picture,
    readout,
    longest,
  );
  show(shown);
  whenWide(picture, () => show(shown));
}

function loopViews(spans) {
  const loops = [];
  (function walk(these) {
    for (const span of these) {
      if (!span.inside.length) continue;
      if (span.seconds > plan.seconds / 200) loops.push(span);
      walk(span.inside);
    }
  })(spans);
  return loops.slice(0, 6).map((loop) => ({
    name: [loop.turns > 1 ? `One turn of ${loop.turns}` : `The ${loop.name}`, ...loopWords(loop).slice(0, 1)].join(": "),
    spans: loop.inside,
    seconds: loop.seconds / loop.turns,
  }));
}

// What a loop is, in words, the longest first: a place of the program, or what the plan calls it.
function loopWords(loop) {
  if (loop.name === "pipeline") return [];
  if (!["loop", "branch"].includes(loop.name)) return [loop.name];
  return [`${placeOf(loop)}, ${loop.direction}`, loop.direction];
}

function lanesOf(spans, found = new Set()) {
  for (const span of spans) {
    if (span.inside.length) lanesOf(span.inside, found);
    else found.add(span.stream);
  }
  return [...COLOURS.keys()].filter((name) => found.has(name));
}

function depthOf(spans) {
  return Math.max(0, ...spans.filter((span) => span.inside.length).map((span) => 1 + depthOf(span.inside)));
}

// Where everything stands: bars on the lanes, and a box for each loop. Bars too thin to be seen apart are one.
function placed(view, width) {
  const bars = [],
    loops = [],
    last = {};
  (function place(spans, x, seconds, extent, depth, turns) {
    for (const span of spans) {
      const from = x + (span.start_seconds / seconds) * extent;
      const long = (span.seconds / seconds) * extent;
      if (span.inside.length) {
        loops.push({ span, x: from, width: long, depth });
        place(span.inside, from, span.seconds / span.turns, long, depth + 1, turns * span.turns);
        continue;
      }
      const before = last[span.stream];
      if (before && from + long - before.x < 1.2 && from - before.x - before.width < 1) {
        before.width = Math.max(before.width, from + long - before.x);
        before.spans.push({ span, turns });
      } else {
        bars.push((last[span.stream] = { stream: span.stream, x: from, width: long, spans: [{ span, turns }] }));
      }
    }
  })(view.spans, 0, view.seconds || 1, width, 0, 1);
  return { bars, loops };
}

function timelinePicture(view, width, readout) {
  const lanes = lanesOf(view.spans),
    { bars, loops } = placed(view, width);
  const top = depthOf(view.spans) * STRIP + 4,
    row = LANE + LABEL;
  const bottom = top + lanes.length * row;
  const picture = draw("svg", {
    viewBox: `0 0 ${width} ${bottom + 22}`,
    height: bottom + 22,
    role: "group",
    tabindex: "0",
    "aria-label": `Timeline of ${showSeconds(view.seconds)}: lanes ${lanes.join(", ")}. Arrow keys go through it.`,
  });
  picture.append(
    ...lanes.map((_, i) => draw("rect", { class: "lane", x: 0, y: top + i * row + LABEL, width, height: LANE })),
  );
  picture.append(...loops.flatMap((loop) => loopBox(loop, bottom)));
  const rects = bars.map((each) =>
    draw("rect", {
      x: each.x,
      y: top + lanes.indexOf(each.stream) * row + LABEL,
      width: Math.max(0.8, each.width),
      height: LANE,
      style: `fill: ${COLOURS.get(each.stream)}`,
    }),
  );
  const names = lanes.map((name, i) =>
    draw("text", { class: "over-text", x: 0, y: top + i * row + LABEL - 4 }, laneText(name)),
  );
  picture.append(...rects, ...names, ...ticks(view.seconds, width, bottom));
  follow(picture, bars, rects, readout);
  return picture;
}

function laneText(name) {
  return plan.paths[name] ? `${name}: ${plan.paths[name]}` : name;
}

function loopBox(loop, bottom) {
  const y = loop.depth * STRIP + 1;
  const box = draw("rect", {
    class: "loop",
    x: loop.x + 0.5,
    y: y + 0.5,
    width: Math.max(1, loop.width - 1),
    height: bottom - y - 1,
    rx: 3,
  });
  const turns = loop.span.turns > 1 ? `× ${loop.span.turns}` : loop.span.name;
  const texts = [...loopWords(loop.span).map((words) => `${turns}  ${words}`), turns];
  const text = texts.find((words) => words.length * 6.3 + 10 < loop.width);
  return text ? [box, draw("text", { class: "loop-text", x: loop.x + 6, y: y + 13 }, text)] : [box];
}

function ticks(seconds, width, y) {
  const rough = (seconds * 90) / width,
    unit = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= rough) || seconds || 1;
  const found = [];
  for (let i = 0; i * step <= seconds * 1.0001; i += 1) {
    const x = ((i * step) / seconds) * width,
      text = i
        ? showSeconds(i * step)
            .replace(/(\.\d*?)0+ /, "$1 ")
            .replace(". ", " ")
        : "0";
    const anchor = x < 20 ? "start" : x > width - 30 ? "end" : "middle";
    found.push(
      draw("line", { class: "line", x1: x, x2: x, y1: y, y2: y + 5 }),
      draw("text", { x, y: y + 18, "text-anchor": anchor }, text),
    );
  }
  return found;
}

// What is under the pointer, or chosen by the arrow keys, in words.
function follow(picture, bars, rects, readout) {
  const order = bars.map((_, i) => i).sort((a, b) => bars[a].x - bars[b].x);
  let chosen = -1;
  readout.textContent = "Point at a bar, or use the arrow keys, to read what it is.";
  function choose(i) {
    if (chosen >= 0) rects[chosen].removeAttribute("class");
    chosen = i;
    rects[i].setAttribute("class", "chosen");
    readout.replaceChildren(...wordsOf(bars[i]));
  }
  rects.forEach((rect, i) =>
    ["pointerenter", "pointerdown"].forEach((event) => rect.addEventListener(event, () => choose(i))),
  );
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = chosen < 0 ? 0 : order.indexOf(chosen) + step;
    if (order[next] !== undefined) choose(order[next]);
  });
}

function wordsOf(drawn) {
  const { span, turns } = drawn.spans.reduce((a, b) => (b.span.seconds > a.span.seconds ? b : a));
  const num = sum(drawn.spans.map((each) => each.span.operations));
  const more = num > 1 ? ` and ${counted(num - 1, "more operation")}` : "";
  const all = sum(drawn.spans.map((each) => each.span.seconds));
  return [
    el("b", {}, `${span.name}${more}`),
    ` on ${drawn.stream}, ${span.direction}, ${placeOf(span)}: ${showSeconds(all)}`,
    turns > 1 ? ` a turn, ${showSeconds(all * turns)} in ${turns} turns` : "",
    el("br"),
    el("code", {}, codeAt(span)),
  ];
}

function codeAt(at) {
  const line = plan.lines.find((each) => each.file === at.file && each.line === at.line);
  return line ? line.code : "";
}

function longestTable(view) {
  const found = new Map();
  (function walk(spans, turns) {
    for (const span of spans) {
      if (span.inside.length) {
        walk(span.inside, turns * span.turns);
        continue;
      }
      const id = [span.stream, span.direction, span.file, span.line].join("\n");
      const each = found.get(id) || { span, seconds: 0, most: 0 };
      each.seconds += span.seconds * turns;
      if (span.seconds > each.most) Object.assign(each, { span, most: span.seconds });
      found.set(id, each);
    }
  })(view.spans, 1);
  const rows = [...found.values()]
    .sort((a, b) => b.seconds - a.seconds)
    .map(({ span, seconds }) => [
      el(
        "span",
        {},
        key(span.stream, COLOURS.get(span.stream)),
        `: mostly ${span.name}`,
        el("small", {}, `${placeOf(span)}, ${span.direction}`),
      ),
      showSeconds(seconds),
      showPercent(seconds / (view.seconds || 1)),
      el("code", { class: "clip" }, codeAt(span)),
    ]);
  return table(
    "What keeps the lanes busy longest, by lane, line and pass",
    [
      ["", "what"],
      ["busy", "number"],
      ["share", "number"],
      ["code", "wide aside"],
    ],
    rows,
    8,
  );
}
