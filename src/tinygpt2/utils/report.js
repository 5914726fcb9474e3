"use strict";
// Shows the values of the points next to the pointer, or of those that the arrow keys choose.
for (const figure of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector(".plot > svg");
  const tip = figure.querySelector(".tip");
  const marks = svg.appendChild(document.createElementNS(svg.namespaceURI, "g"));
  const [left, top, right, bottom] = chart.area;
  const points = chart.series.flatMap((series) => series.points.map((point) => ({ series, point })));
  points.sort((a, b) => a.point[0] - b.point[0]);
  let chosen = -1;

  const draw = (name, attributes) => {
    const element = marks.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  };
  const line = (text, strong) => {
    const element = document.createElement(strong ? "b" : "div");
    element.textContent = text;
    tip.append(element);
  };
  const hide = () => {
    marks.replaceChildren();
    tip.hidden = true;
    chosen = -1;
  };
  const show = (index) => {
    const { point: [x, y, label] } = points[index];
    // with lines, the points of all series above the same place; else those that lie on each other
    const near = ({ point }) => Math.abs(point[0] - x) < (chart.joined ? 0.6 : 6) && (chart.joined || Math.abs(point[1] - y) < 6);
    const together = points.filter(near);
    chosen = index;
    marks.replaceChildren();
    tip.replaceChildren();
    if (chart.joined) {
      line(`${chart.x}: ${label}`, true);
      draw("path", { class: "pointer", d: `M${x} ${top}V${bottom}` });
      for (const { series, point } of together) line(`${series.name}: ${point[3]}`);
      for (const [name, value] of chart.levels) line(`${name}: ${value}`);
    } else {
      for (const { series, point } of together) {
        line(series.name, true);
        line(`${chart.x}: ${point[2]}`);
        line(`${chart.y}: ${point[3]}`);
      }
    }
    for (const { point } of together) draw("circle", { class: "ring", cx: point[0], cy: point[1], r: chart.joined ? 5 : 9 });
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const beside = x * scale + 14;
    const fits = beside + tip.offsetWidth <= box.width;
    tip.style.left = `${Math.max(4, fits ? beside : x * scale - 14 - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(0, Math.min(y * scale - 20, box.height - tip.offsetHeight))}px`;
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let best = -1;
    let least = Infinity;
    points.forEach(({ point: [px, py] }, index) => {
      const distance = Math.abs(px - x) + (chart.joined ? 0.01 : 1) * Math.abs(py - y);
      if (distance < least) [best, least] = [index, distance];
    });
    if (best >= 0) show(best);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !points.length) return;
    event.preventDefault();
    let next = chosen;
    do next += step;
    while (chart.joined && points[next] && chosen >= 0 && Math.abs(points[next].point[0] - points[chosen].point[0]) < 0.6);
    show(Math.min(points.length - 1, Math.max(0, next)));
  });
}
