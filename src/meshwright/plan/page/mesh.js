"use strict";
// The mesh and a tensor on it. Left the tensor, cut into tiles: its two most split dims span the grid, and each box
// names the devices that hold it. Right the devices, at their places along the axes. Choosing a device or a tile marks
// every device that holds the same.

function meshSection() {
  const home = section("mesh");
  home.append(axesTable());
  if (!plan.tensors.length) {
    home.append(el("p", { class: "note" }, "The program is given no tensor with names."));
    return;
  }
  const largest = plan.tensors.reduce((a, b) => (b.whole_bytes > a.whole_bytes ? b : a));
  const state = { tensor: largest, device: 0 };
  const choice = el(
    "select",
    {
      change: () => {
        state.tensor = plan.tensors[choice.value];
        paint();
      },
    },
    tensorOptions(largest),
  );
  const number = el("input", {
    type: "number",
    min: "0",
    max: String(numDevices - 1),
    value: "0",
    input: () => {
      const device = Number(number.value);
      if (number.value !== "" && device >= 0 && device < numDevices) {
        state.device = Math.floor(device);
        paint();
      }
    },
  });
  const words = el("p", { class: "readout", "aria-live": "polite" });
  const pictures = el("div", { class: "pictures" });
  function choose(device) {
    state.device = device;
    number.value = String(device);
    paint(true);
  }
  function paint(keep) {
    const focused = keep && document.activeElement.dataset.of;
    const wide = pictures.clientWidth || 360,
      width = wide > 760 ? wide / 2 - 18 : wide;
    pictures.replaceChildren(...picturesOf(state, width, choose));
    words.replaceChildren(...wordsOn(state));
    if (focused) pictures.querySelector(`[data-of="${focused}"]`)?.focus();
  }
  home.append(
    el("h3", {}, "Which device holds what"),
    el("div", { class: "controls" }, el("label", {}, "tensor", choice), el("label", {}, "device", number)),
    words,
    pictures,
    tensorsTable(),
  );
  paint();
  whenWide(pictures, () => paint());
}

function axesTable() {
  const strides = axisSizes.map((_, i) => axisSizes.slice(i + 1).reduce((a, b) => a * b, 1));
  const rows = axisNames.map((axis, i) => [
    key(axis, COLOURS.get(axis)),
    figure(`/mesh/${axis}`),
    strides[i] === 1 ? "neighbours" : `${strides[i]} apart`,
    plan.paths[axis] || UNKNOWN,
  ]);
  return table(
    `${counted(numDevices, "device")}, numbered by their places: the last axis first`,
    ["axis", ["size", "number"], ["its devices are", "nowrap"], ["crosses", "nowrap"]],
    rows,
  );
}

function tensorOptions(chosen) {
  const groups = new Map();
  plan.tensors.forEach((tensor, i) => {
    const group = tensor.path.split(".").slice(0, 2).join(".") || "arguments";
    if (!groups.has(group)) groups.set(group, el("optgroup", { label: group }));
    groups
      .get(group)
      .append(
        el("option", { value: i, ...(tensor === chosen ? { selected: "" } : {}) }, tensor.path || "(the argument)"),
      );
  });
  return [...groups.values()];
}

function wordsOn({ tensor, device }) {
  const at = placeOn(device),
    place = axisNames.map((axis) => `${axis}=${at[axis]}`).join(", ");
  const parts = partsOf(tensor, device),
    nums = numParts(tensor);
  const slices = tensor.dims
    .map((dim, i) => (nums[i] > 1 ? `${dim} ${sliceText(tensor, i, parts[i])}` : `all of ${dim}`))
    .join(", ");
  const same = owners(tensor).get(parts.join(","));
  const others = same.filter((other) => other !== device);
  const idle = axisNames.filter((axis) => plan.mesh[axis] > 1 && !tensor.axes.flat().includes(axis)).join(" x ");
  const shared = others.length
    ? `The same slice is on ${counted(others.length, "other device")}, along ${idle}: ${showIds(others)}.`
    : "No other device holds this slice.";
  return [
    el("b", {}, `Device ${device}`),
    ` (${place}) holds of `,
    el("code", {}, tensor.path || "the argument"),
    ` ${slices}. ${shared}`,
  ];
}

function picturesOf(state, width, choose) {
  const cuts = state.tensor.dims
    .map((name, dim) => ({ name, dim, num: numParts(state.tensor)[dim] }))
    .filter((cut) => cut.num > 1);
  const chosen = [...cuts]
    .sort((a, b) => b.num - a.num)
    .slice(0, 2)
    .sort((a, b) => a.dim - b.dim);
  const grid = { cuts, across: chosen.at(-1) || null, down: chosen.length === 2 ? chosen[0] : null };
  return [tensorPicture(state, grid, width, choose), meshPicture(state, grid, width, choose)];
}

function tensorPicture({ tensor, device }, grid, width, choose) {
  const mine = partsOf(tensor, device),
    found = owners(tensor),
    { across, down } = grid;
  const columns = few(across ? across.num : 1, across ? mine[across.dim] : 0, Math.floor((width - 90) / 76));
  const rows = few(down ? down.num : 1, down ? mine[down.dim] : 0);
  const over = (cut) => `${cut.name} over ${tensor.axes[cut.dim].join(" x ")}`;
  const further = grid.cuts.filter((cut) => cut !== across && cut !== down);
  const caption = !across
    ? "Whole on every device"
    : [
        down ? `↓ ${over(down)}` : "",
        `→ ${over(across)}`,
        further.length ? `also cut: ${further.map(over).join(", ")}` : "",
      ]
        .filter(Boolean)
        .join(" · ");
  const body = rows.map((i) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, down && i !== null ? sliceText(tensor, down.dim, i) : ""),
      columns.map((j) => {
        if (i === null || j === null) return el("td", { class: "gap" }, i === null ? "⋮" : "⋯");
        const parts = mine.map((part, dim) => (across && dim === across.dim ? j : down && dim === down.dim ? i : part));
        const ids = found.get(parts.join(",")),
          held = ids.includes(device);
        return el(
          "td",
          {},
          box(`tile-${i}-${j}`, showIds(ids), tileColour(grid, parts), held, held, () =>
            choose(held ? device : ids[0]),
          ),
        );
      }),
    ),
  );
  const head = el(
    "tr",
    {},
    el("td", {}),
    columns.map((j) => el("th", { scope: "col" }, across && j !== null ? sliceText(tensor, across.dim, j) : "")),
  );
  return titled("The tensor, and the devices of each tile", caption, el("thead", {}, head), el("tbody", {}, body));
}

function titled(title, note, ...parts) {
  return el(
    "div",
    { class: "picture" },
    el("p", { class: "caption" }, el("b", {}, title), el("br"), note),
    el("div", { class: "scroll" }, el("table", { class: "grid", "aria-label": title }, parts)),
  );
}

// The devices: the last axis across, the one before it down; of further axes a block for each of their places.
function meshPicture(state, grid, width, choose) {
  const last = axisNames.at(-1),
    before = axisNames.at(-2),
    outer = axisNames.slice(0, -2);
  const numOuter = outer.reduce((num, axis) => num * plan.mesh[axis], 1);
  const inner = numDevices / numOuter,
    here = placeOn(state.device);
  const columns = few(plan.mesh[last] || 1, here[last], Math.floor((width - 50) / 44));
  const rows = few(before ? plan.mesh[before] : 1, here[before], numOuter > 1 ? 4 : MOST);
  const blocks = few(numOuter, Math.floor(state.device / inner), 3).map((block) => {
    if (block === null)
      return el(
        "tbody",
        {},
        el("tr", {}, el("td", { class: "gap", colspan: columns.length + 1 }, "⋮ more like these")),
      );
    const head = outer.length
      ? [
          el(
            "tr",
            {},
            el(
              "th",
              { scope: "rowgroup", colspan: columns.length + 1, style: "text-align: left" },
              outer.map((axis) => `${axis}=${placeOn(block * inner)[axis]}`).join(", "),
            ),
          ),
        ]
      : [];
    return el(
      "tbody",
      {},
      head,
      rows.map((i) => meshRow(state, grid, block * inner, i, columns, choose)),
    );
  });
  const heads = el(
    "tr",
    {},
    el("td", {}),
    columns.map((j) => el("th", { scope: "col" }, j === null || !last ? "" : String(j))),
  );
  const along = [before ? `↓ ${before}` : "", last ? `→ ${last}` : ""].filter(Boolean).join(" · ");
  return titled(
    "The mesh, and the number of each device",
    `${along} · outlined: the same slice as the chosen device's`,
    el("thead", {}, heads),
    blocks,
  );
}

function meshRow(state, grid, first, i, columns, choose) {
  const last = axisNames.at(-1),
    before = axisNames.at(-2);
  const mine = partsOf(state.tensor, state.device).join(",");
  const cells = columns.map((j) => {
    if (i === null || j === null) return el("td", { class: "gap" }, i === null ? "⋮" : "⋯");
    const id = first + i * (plan.mesh[last] || 1) + j,
      parts = partsOf(state.tensor, id);
    return el(
      "td",
      {},
      box(`device-${id}`, String(id), tileColour(grid, parts), parts.join(",") === mine, id === state.device, () =>
        choose(id),
      ),
    );
  });
  return el("tr", {}, el("th", { scope: "row" }, before && i !== null ? String(i) : ""), cells);
}

function box(name, text, colour, same, pressed, choose) {
  return el(
    "button",
    {
      type: "button",
      class: same ? "same" : null,
      style: colour,
      "data-of": name,
      "aria-pressed": String(pressed),
      click: choose,
    },
    text,
  );
}

function tensorsTable() {
  const groups = new Map();
  plan.tensors.forEach((tensor, i) => {
    const id = JSON.stringify([tensor.dims, tensor.shape, tensor.axes, tensor.dtype]);
    if (groups.has(id)) groups.get(id).others += 1;
    else groups.set(id, { tensor, i, others: 0 });
  });
  const rows = [...groups.values()]
    .sort((a, b) => b.tensor.whole_bytes - a.tensor.whole_bytes)
    .map(({ tensor, i, others }) => [
      el("span", {}, pathOf(tensor), others ? ` and ${others} like it` : "", dimsOf(tensor)),
      figure(`/tensors/${i}/whole_bytes`),
      figure(`/tensors/${i}/device_bytes`),
      figure(`/tensors/${i}/num_copies`),
      tensor.dtype,
    ]);
  return table(
    "Tensors that the program is given. dim=size/axis: split over the axis; copies: devices with the same slice",
    [["tensor", "what long"], ["whole", "number"], ["a device", "number"], ["copies", "number"], "dtype"],
    rows,
    8,
  );
}

// It may be broken at its dots.
function pathOf(tensor) {
  const parts = (tensor.path || "(the argument)").split(".");
  return el(
    "code",
    {},
    parts.flatMap((part, i) => (i ? [el("wbr"), `.${part}`] : [part])),
  );
}

function dimsOf(tensor) {
  return el(
    "small",
    {},
    tensor.dims.flatMap((dim, i) => [
      el(
        "span",
        { class: "nowrap" },
        `${dim}=${tensor.shape[i]}`,
        ...tensor.axes[i].map((axis) =>
          el("b", { style: `color: color-mix(in oklab, ${COLOURS.get(axis)} 65%, var(--ink))` }, `/${axis}`),
        ),
      ),
      " ",
    ]),
  );
}
