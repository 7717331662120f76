"use strict";
/* Elements, words for figures, and the small charts. Everything is drawn anew from its data. */

const $ = id => document.getElementById(id);

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* Three figures at most, as people read them. */
function number(value) {
  if (!Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

function latency(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (seconds >= 9.995) return `${seconds.toFixed(1)} s`;
  if (seconds >= 0.9995) return `${seconds.toFixed(2)} s`;
  const ms = seconds * 1e3;
  return ms >= 99.95 ? `${ms.toFixed(0)} ms` : ms >= 0.095 ? `${ms.toFixed(1)} ms` : `${(ms * 1e3).toFixed(0)} µs`;
}

function bytes(value) {
  let unit = 0;
  while (value >= 1000 && unit < 4) { value /= 1000; unit += 1; }
  return `${number(value)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

/* What an element shows when pointed at, or focused: a function that returns nodes. */
const tips = new WeakMap();

function showTip(event) {
  const target = event.target.closest?.("[data-tip]");
  const tip = $("tip");
  if (!target || !tips.has(target)) { tip.hidden = true; return; }
  tip.replaceChildren(...tips.get(target)());
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const x = event.clientX || box.left + box.width / 2, y = event.clientY || box.bottom;
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? Math.max(8, y - tip.offsetHeight - 12) : y + 18}px`;
}

function withTip(target, words) {
  target.setAttribute("data-tip", "");
  tips.set(target, words);
  return target;
}

/* How large a figure was over the window: what its line shows without a scale. */
function spanTip(name, points) {
  const values = points.map(point => point.value), mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return [element("b", "", name), element("div", "", `mean ${number(mean)} · peak ${number(Math.max(...values, 0))} in this window`)];
}

/* A line over the window's time with the area below it, from zero to its largest value. points: [{at, value}]. */
function sparkline(points, from, to, colour = "line") {
  const width = 200, height = 36, top = Math.max(...points.map(point => point.value), 1e-9);
  const made = svg("svg", { class: `spark ${colour}`, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  if (points.length < 2) return made;
  const x = at => (at - from) / (to - from) * width, y = value => height - 2 - value / top * (height - 5);
  const line = points.map(point => `${x(point.at).toFixed(1)},${y(point.value).toFixed(1)}`).join(" ");
  const left = x(points[0].at).toFixed(1), right = x(points.at(-1).at).toFixed(1);
  made.append(svg("polygon", { points: `${left},${height} ${line} ${right},${height}` }), svg("polyline", { points: line }));
  return made;
}

/* 1, 2 and 5 times powers of ten from low to high. */
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const digit of [1, 2, 5]) {
      const tick = digit * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 6 ? ticks.filter((_, index) => index % Math.ceil(ticks.length / 6) === 0) : ticks;
}

/* One mark a request over its time of arrival, on a logarithmic axis: a dot when it kept the objectives, a cross when
   not, and a line at the objective. */
function scatter(host, requests, field, limit, from, to, isMet, tip) {
  const width = host.clientWidth || 480, height = 150, left = 52, right = 8, top = 8, bottom = 20;
  const known = requests.filter(one => one[field] !== null && one[field] > 0 && one.arrival_unix_s >= from);
  const values = known.map(one => one[field]).concat(limit ? [limit] : []);
  const made = svg("svg", { class: "scatter", width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${known.length} requests over time` });
  if (!values.length) { host.replaceChildren(element("p", "empty", "no requests in this window yet")); return; }
  const low = Math.min(...values) / 1.3, high = Math.max(...values) * 1.3;
  const x = at => left + (at - from) / (to - from) * (width - left - right);
  const y = value => top + (1 - Math.log(value / low) / Math.log(high / low)) * (height - top - bottom);
  for (const tick of logTicks(low, high))
    made.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, axisLatency(tick)));
  for (const [at, words, anchor] of [[from, `${number((to - from) / 60)} min ago`, "start"], [to, "now", "end"]])
    made.append(svg("text", { class: "tick", x: x(at), y: height - 5, "text-anchor": anchor }, words));
  for (const one of known) {
    const cx = x(one.arrival_unix_s).toFixed(1), cy = y(one[field]).toFixed(1);
    const mark = isMet(one) ? svg("circle", { class: "kept", cx, cy, r: 3 })
      : svg("path", { class: "missed", d: `M${cx} ${cy}m-3.2-3.2l6.4 6.4m0-6.4l-6.4 6.4` });
    made.append(withTip(mark, () => tip(one)));
  }
  if (limit) made.append(svg("line", { class: "limit", x1: left, x2: width - right, y1: y(limit), y2: y(limit) }),
    svg("text", { class: "limit-name", x: width - right - 2, y: y(limit) - 4, "text-anchor": "end" }, `objective ${latency(limit)}`));
  host.replaceChildren(made);
}

const axisLatency = seconds => seconds >= 1 ? `${seconds} s` : seconds >= 1e-3 ? `${Math.round(seconds * 1e3)} ms` : `${Math.round(seconds * 1e6)} µs`;

/* A stacked bar of the stages' seconds; `scale` seconds fill its width. */
function stageBar(request, stages, scale) {
  const bar = element("div", "stages");
  for (const stage of stages) {
    const seconds = request.stages[stage.name] ?? 0;
    if (seconds <= 0) continue;
    const part = element("i", `stage-${stage.name}`);
    part.style.width = `${seconds / scale * 100}%`;
    bar.append(part);
  }
  if (!COMPLETE.has(request.finish_reason)) bar.append(...ending(request, scale));
  return bar;
}

/* The rest of the bar of a request that failed or was aborted: how long it still waited, and why it ended. */
function ending(request, scale) {
  const rest = element("i", "stage-lost");
  rest.style.width = `${lostSeconds(request) / scale * 100}%`;
  return [rest, element("span", "failure", ` ${request.finish_reason}${request.error ? `: ${request.error}` : ""}`)];
}

/* Where a time axis from zero is labelled: at most so many round numbers of seconds. */
function timeTicks(scale, most) {
  const rough = scale / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(digit => digit * power).find(one => one >= rough);
  return Array.from({ length: Math.floor(scale / step) + 1 }, (_, index) => index * step);
}
