// What the pages of all rooms share: putting text in, writing numbers, drawing charts in the colours of the theme.
// Text goes into text nodes or to a canvas only, also that of tooltips.
"use strict";

const Drawing = (() => {
  const COLOURS = ["card", "ink", "muted", "line", "shade", "blue", "orange", "green", "purple", "grey"]; // of style.css
  const drawn = []; // {chart, node, options}: to be drawn anew in other colours or for paper

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  // As the table writes times: three digits that count.
  function time(seconds) {
    if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
    return Math.abs(seconds) >= 0.9995 ? `${digits(seconds)} s` : `${digits(seconds * 1000)} ms`;
  }

  function digits(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 99.95 || size === 0) return Math.round(value).toLocaleString("en");
    return value.toFixed(size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3);
  }

  // Without the zeros that an axis does not need.
  function tick(seconds) {
    return seconds >= 1 ? `${Number(seconds.toPrecision(3))} s` : `${Number((seconds * 1000).toPrecision(3))} ms`;
  }

  function draw(node, description, options) {
    const chart = echarts.init(node, null, { renderer: "canvas" });
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", description);
    const entry = { chart, node, options };
    drawn.push(entry);
    chart.setOption(options(colours()), true);
    return entry;
  }

  function redraw() {
    const now = colours();
    for (const { chart, options } of drawn) {
      chart.resize();
      chart.setOption(options(now), true);
    }
  }

  function forget(entries) {
    for (const entry of entries) {
      entry.chart.dispose();
      drawn.splice(drawn.indexOf(entry), 1);
    }
  }

  function base(c) {
    return {
      animation: false,
      textStyle: { color: c.ink, fontFamily: "system-ui, sans-serif" },
      tooltip: {
        renderMode: "richText", confine: true, backgroundColor: c.card, borderColor: c.line,
        textStyle: { color: c.ink, fontSize: 12 },
      },
    };
  }

  function axis(c, more) {
    return {
      axisLine: { lineStyle: { color: c.line } }, axisTick: { show: false }, splitLine: { lineStyle: { color: c.line, width: 0.6 } },
      axisLabel: { color: c.muted, fontSize: 11, hideOverlap: true }, nameTextStyle: { color: c.muted, fontSize: 11 }, ...more,
    };
  }

  function limitLine(c, text, where, position = "insideEndTop") {
    return {
      symbol: "none", silent: true, animation: false, precision: 9, lineStyle: { color: c.orange, type: "dashed", width: 1.5 },
      label: { formatter: text, color: c.orange, fontSize: 11, position }, data: [where],
    };
  }

  function timeAxis(c, isLog, more) {
    return axis(c, { type: isLog ? "log" : "value", axisLabel: { color: c.muted, fontSize: 11, hideOverlap: true, formatter: tick }, ...more });
  }

  // Of a logarithmic axis: 1, 2, 5, 10 …; of a long one, powers of ten.
  function ticksBetween(from, to) {
    const found = [];
    const steps = to / from > 3000 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(from)); power <= Math.ceil(Math.log10(to)); power++) {
      found.push(...steps.map((step) => Number(`${step}e${power}`)).filter((value) => value >= from * 0.999999 && value <= to * 1.000001));
    }
    return found;
  }

  // A logarithmic axis of what these values span, from a round number to a round number; more: as of `axis`.
  function logAxis(c, values, shown, more = {}) {
    const positive = values.filter((value) => value > 0);
    const least = positive.length ? Math.min(...positive) : 1, most = positive.length ? Math.max(...positive) : 10;
    const round = [1, 2, 5].flatMap((step) => [Math.floor(Math.log10(least)), Math.ceil(Math.log10(least)), Math.floor(Math.log10(most)), Math.ceil(Math.log10(most))].map((power) => Number(`${step}e${power}`))).sort((a, b) => a - b);
    const min = round.filter((value) => value <= least * 1.000001).pop() ?? least;
    const max = round.find((value) => value >= most && value > min) ?? most;
    const ticks = ticksBetween(min, max);
    return axis(c, {
      type: "log", min, max, axisTick: { show: false, customValues: ticks }, minorTick: { show: false },
      axisLabel: { color: c.muted, fontSize: 11, hideOverlap: true, formatter: shown, customValues: ticks }, ...more,
    });
  }

  // Text from anywhere becomes text, never markup.
  function node(tag, children = [], className = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    for (const child of Array.isArray(children) ? children : [children]) {
      made.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return made;
  }

  function row(cells, tag = "td") {
    return node("tr", cells.map((cell) => node(tag, cell)));
  }

  // facts: [name, text]
  function fillFacts(where, facts) {
    where.replaceChildren(...facts.flatMap(([name, text]) => [node("dt", name), node("dd", text)]));
  }

  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 100);
  });
  window.addEventListener("beforeprint", redraw);
  window.addEventListener("afterprint", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.matchMedia("print").addEventListener("change", redraw);

  return { draw, redraw, forget, base, axis, timeAxis, ticksBetween, logAxis, limitLine, time, digits, tick, node, row, fillFacts };
})();
