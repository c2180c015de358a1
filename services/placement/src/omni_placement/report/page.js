// Names the cell of a heat map under the pointer, or the one moved to with the arrow keys.
"use strict";

const maps = JSON.parse(document.getElementById("maps").textContent);
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;

const plain = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 1 });
const ratio = new Intl.NumberFormat("en-GB", { maximumSignificantDigits: 3 });

const ONE = { tokens: "token", copies: "copy", experts: "expert" };

function meanOf(row) {
  const known = row.filter((value) => value !== null);
  return known.reduce((sum, value) => sum + value, 0) / Math.max(known.length, 1);
}

function textOf(map, row, column) {
  const value = map.values[row][column];
  const place = `${map.row} ${row} · ${map.column} ${column}`;
  if (value === null) return `${place}\nholds no routed expert`;
  const mean = map.isRelative ? meanOf(map.values[row]) : 0;
  const unit = value === 1 ? ONE[map.unit] : map.unit;
  return `${place}\n${plain.format(value)} ${unit}` + (mean > 0 ? ` · ${ratio.format(value / mean)}× the mean` : "");
}

function attach(area) {
  const map = maps[Number(area.dataset.map)];
  const rows = map.values.length, columns = map.values[0].length;
  const mark = area.appendChild(document.createElement("div"));
  mark.className = "mark";
  mark.hidden = true;
  let at = [0, 0];

  function show(row, column) {
    at = [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1)];
    const box = area.getBoundingClientRect(), height = box.height / rows, width = box.width / columns;
    Object.assign(mark.style, {
      left: `${at[1] * width}px`, top: `${at[0] * height}px`, width: `${width}px`, height: `${height}px`,
    });
    tip.textContent = textOf(map, ...at);
    tip.hidden = mark.hidden = false;
    const x = box.left + (at[1] + 1) * width + 12, y = box.top + at[0] * height - 8;
    tip.style.left = `${Math.max(4, Math.min(x, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(y, window.innerHeight - tip.offsetHeight - 8))}px`;
    area.setAttribute("aria-label", tip.textContent.replace("\n", ": "));
  }

  function hide() {
    tip.hidden = mark.hidden = true;
  }

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    show(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return hide();
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    show(at[0] + step[0], at[1] + step[1]);
  });
}

document.querySelectorAll(".cells").forEach(attach);
