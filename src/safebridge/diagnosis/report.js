"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

const show = (value, unit) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3)) + unit;

/* Move from layer to layer by pointer or arrow keys; the numbers stand below the chart. */
function watchChart(chart) {
  const figure = data.curves[chart.dataset.key];
  const plot = chart.querySelector(".plot");
  const readout = chart.querySelector(".readout");
  const cursor = document.createElement("i");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  const count = figure.layers.length;
  let place = -1;
  function move(to) {
    place = Math.min(count - 1, Math.max(0, to));
    cursor.hidden = false;
    cursor.style.left = (count > 1 ? (100 * place) / (count - 1) : 0) + "%";
    readout.textContent = "layer " + figure.layers[place] + ": " + figure.curves.map((curve) => {
      const at = curve.layers.indexOf(figure.layers[place]);
      if (at < 0) return curve.name + " –";
      const band = curve.low[at] === curve.high[at] ? ""
        : " [" + show(curve.low[at], "") + ", " + show(curve.high[at], "") + "]";
      return curve.name + " " + show(curve.values[at], figure.unit) + band;
    }).join("; ");
  }
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    move(Math.round(((event.clientX - box.left) / box.width) * (count - 1)));
  });
  chart.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: count - 1 };
    if (event.key in steps) {
      event.preventDefault();
      move(steps[event.key]);
    }
  });
}

/* The same for maps, in two directions. */
function watchMap(map) {
  const figure = data.sites[map.dataset.key];
  const rows = figure.maps[map.dataset.map];
  const field = map.querySelector(".field");
  const readout = map.querySelector(".readout");
  const cursor = document.createElement("i");
  cursor.className = "cell";
  cursor.hidden = true;
  field.append(cursor);
  let row = 0;
  let column = -1;
  function move(toRow, toColumn) {
    row = Math.min(rows.length - 1, Math.max(0, toRow));
    column = Math.min(rows[0].length - 1, Math.max(0, toColumn));
    cursor.hidden = false;
    cursor.style.left = (100 * column) / rows[0].length + "%";
    cursor.style.top = (100 * row) / rows.length + "%";
    cursor.style.width = 100 / rows[0].length + "%";
    cursor.style.height = 100 / rows.length + "%";
    readout.textContent = "layer " + figure.layers[row] + ", head " + column + ": "
      + rows[row][column].toFixed(2);
  }
  field.addEventListener("pointermove", (event) => {
    const box = field.getBoundingClientRect();
    move(Math.floor(((event.clientY - box.top) / box.height) * rows.length),
      Math.floor(((event.clientX - box.left) / box.width) * rows[0].length));
  });
  map.addEventListener("keydown", (event) => {
    const steps = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
    };
    if (event.key in steps) {
      event.preventDefault();
      move(...steps[event.key]);
    }
  });
}

/* Harmful pictures are blurred until somebody asks for one. */
function watchVeil(veil) {
  veil.addEventListener("click", () => {
    const shown = veil.getAttribute("aria-pressed") === "true";
    veil.setAttribute("aria-pressed", String(!shown));
  });
}

function watchFilters() {
  const filters = [...document.querySelectorAll("select[data-filter]")];
  const count = document.getElementById("sample-count");
  function apply() {
    const chosen = Object.fromEntries(filters.map((one) => [one.dataset.filter, one.value]));
    let visible = 0;
    for (const sample of document.querySelectorAll(".sample")) {
      const fits = Object.entries(chosen).every(([name, value]) =>
        !value || (sample.dataset[name] || "").split(" ").includes(value));
      sample.hidden = !fits;
      visible += fits;
    }
    for (const row of document.querySelectorAll(".bar-row[data-category]")) {
      row.hidden = Boolean(chosen.category) && row.dataset.category !== chosen.category;
    }
    if (count) count.textContent = visible + " shown";
  }
  for (const filter of filters) filter.addEventListener("change", apply);
  apply();
}

document.querySelectorAll(".chart").forEach(watchChart);
document.querySelectorAll(".map").forEach(watchMap);
document.querySelectorAll(".veil").forEach(watchVeil);
watchFilters();
document.documentElement.dataset.ready = "yes";
