// The chart of a plan: deployments by two of their figures, the line of the best, limits, bands.
"use strict";

const Charts = (() => {
  const { base, axis, ticksBetween, time, digits, tick } = Drawing;
  // By device: colour and shape, so that neither alone must tell them apart.
  const SHAPES = ["circle", "triangle", "rect", "diamond", "path://M0,10L5,0L10,10L5,7Z", "path://M3,0L7,0L7,3L10,3L10,7L7,7L7,10L3,10L3,7L0,7L0,3L3,3Z", "path://M0,0L10,0L5,10Z", "path://M2.5,0L7.5,0L10,5L7.5,10L2.5,10L0,5Z"];
  const OUTLINES = ["M5,0A5,5,0,1,1,4.99,0Z", "M5,0L10,10L0,10Z", "M0,0L10,0L10,10L0,10Z", "M5,0L10,5L5,10L0,5Z", ...SHAPES.slice(4).map((path) => path.slice(7))];

  function money(value) {
    if (value === null || value === undefined) return "–";
    if (value >= 999.5) return `$${Math.round(value).toLocaleString("en")}`;
    return value >= 0.095 ? `$${value.toFixed(2)}` : `$${Number(value.toPrecision(3))}`;
  }

  function share(value) {
    if (value === 0 || value === 1) return `${value * 100} %`;
    return `${Math.min(Math.max(value * 100, 0.1), 99.9).toFixed(1)} %`;
  }

  function shortMoney(value) {
    return `$${Number(value.toPrecision(3)).toLocaleString("en")}`;
  }

  // What can be laid along an axis. better: -1 where less is better. limit: [value, text]. question: see Estimates.
  function axesOf(data, evaluations, question) {
    const { attainment } = data.slo;
    const limits = { ...data.slo.limits, ttft: question.ttft, tpot: question.tpot };
    const p = data.percentile;
    const figure = (name) => (one) => (one.figures[name] ? one.figures[name][0] : null);
    const latency = (key, name, label) => ({
      key, short: `${name} ${p}`, name: `${label} (${name}) ${p}`, better: -1, isTime: true, shown: time, tick, value: figure(key),
      band: (one) => one.figures[key], limit: limits[key.slice(0, -2)] ? [limits[key.slice(0, -2)], `SLO ${tick(limits[key.slice(0, -2)])}`] : null,
    });
    return [
      { key: "usd_per_hour", short: "cost an hour", name: "cost an hour", better: -1, shown: money, tick: shortMoney, value: (one) => one.usd_per_hour, limit: data.budget === null ? null : [data.budget, `budget ${money(data.budget)}`] },
      { key: "usd_per_million_tokens", short: "cost per Mtok", name: "cost per million output tokens", better: -1, shown: money, tick: shortMoney, value: (one) => one.usd_per_million_tokens },
      latency("ttft_s", "TTFT", "time to first token"),
      latency("tpot_s", "TPOT", "time per output token"),
      latency("e2e_s", "E2E", "whole answer"),
      { key: "attainment", short: "keep the SLO", name: "requests that keep the SLO", better: 1, isShare: true, shown: share, tick: (value) => `${Number((value * 100).toPrecision(3))} %`, value: figure("attainment"), band: (one) => one.figures.attainment, limit: Object.values(limits).some(Boolean) ? [attainment, `${+(attainment * 100).toFixed(2)} % must`] : null },
      { key: "capacity", short: "holds up to", name: "holds up to, arrivals/s", better: 1, shown: (value) => `${digits(value)}/s`, tick: (value) => `${Number(value.toPrecision(3))}`, value: figure("capacity"), band: (one) => one.figures.capacity, limit: [question.rate, `${Number(question.rate.toPrecision(3))}/s asked`] },
      { key: "output_tokens_per_s", short: "output tokens/s", name: "output tokens/s at the asked rate", better: 1, shown: digits, tick: (value) => value.toLocaleString("en"), value: figure("output_tokens_per_s"), band: (one) => one.figures.output_tokens_per_s },
      { key: "devices", short: "devices", name: "devices", better: -1, shown: (value) => String(value), tick: (value) => String(value), value: (one) => one.devices },
    ].filter((one) => evaluations.some((evaluation) => typeof one.value(evaluation) === "number"));
  }

  // The best by both axes: no other of these is better by one and as good by the other. Sorted along x.
  function best(points, x, y) {
    const ordered = points.slice().sort((a, b) => x.better * (b.x - a.x) || y.better * (b.y - a.y));
    const found = [];
    for (const point of ordered) {
      const last = found[found.length - 1];
      if (!last || y.better * (point.y - last.y) > 0) found.push(point);
    }
    return found.sort((a, b) => a.x - b.x);
  }

  // How far an axis reaches: by what keeps the SLO and what is near its limit; what lies beyond is told, not drawn.
  function reach(points, way, of, hasAll) {
    const values = points.map((point) => point[of]).filter((value) => value > 0 || way.isShare);
    if (!values.length) return {};
    const limit = way.limit ? way.limit[0] : undefined;
    const least = Math.min(...values, limit ?? Infinity), most = Math.max(...values);
    if (way.isShare) return hasAll ? { min: 0, max: 1 } : { min: Math.max(0, Math.floor((Math.min(limit ?? 1, 1) - 0.25) * 20) / 20), max: 1 };
    let to = most;
    if (!hasAll && way.better < 0) {
      const good = points.filter((point) => point.one.meets_slo).map((point) => point[of]).sort((a, b) => a - b);
      const near = good.length ? good[Math.floor(good.length * 0.95)] * 1.25 : values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
      to = Math.min(most, Math.max((limit ?? 0) * 3, near));
    }
    to = Math.max(to, limit ?? 0);
    return to / least > 8 ? { ticks: ticksBetween(least / 1.25, to * 1.25), min: least / 1.25, max: to * 1.25 } : { min: 0, max: way.key === "devices" ? Math.floor(to) + 1 : to * 1.06 };
  }

  // view: {x, y, points: [{x, y, i, one}], kinds: name → number, selected, recommended, roles, hasBands, ranges, tip}
  function frontier(view) {
    return (c) => {
      const style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(`--${name}`).trim();
      const line = best(view.points.filter((point) => !view.hasGood || point.one.meets_slo), view.x, view.y);
      const narrow = window.innerWidth < 640;
      return {
        ...base(c),
        grid: { left: 58, right: narrow ? 12 : 22, top: 40, bottom: 48 },
        xAxis: valueAxis(c, view.x, view.ranges.x, { name: view.x.name, nameLocation: "middle", nameGap: 30 }),
        yAxis: valueAxis(c, view.y, view.ranges.y, { name: view.y.name, nameLocation: "end", nameGap: 22, nameTextStyle: { align: "left", padding: [0, 0, 0, -50], color: c.muted, fontSize: 12 } }),
        tooltip: { ...base(c).tooltip, trigger: "item", padding: [8, 11], formatter: (item) => (item.data && item.data.i !== undefined ? view.tip(item.data.i) : "") },
        series: [
          ...limitSeries(c, view),
          {
            type: "line", name: "frontier", data: line.map((point) => [point.x, point.y]), step: view.x.better < 0 ? "end" : "start", symbol: "none", silent: true, z: 2,
            lineStyle: { color: c.ink, width: 1.5, opacity: 0.5 },
          },
          ...(view.hasBands ? [bandSeries(c, view, new Set(line.map((point) => point.i)))] : []),
          pointSeries(c, view, colour),
          ...markSeries(c, view),
        ],
      };
    };
  }

  function valueAxis(c, way, range, more) {
    const isRound = Boolean(range.ticks) || way.isShare || way.key === "devices"; // else the end is wherever the points end
    const tick = (value) => (value === range.max && !isRound ? "" : way.tick(value));
    const labels = { axisLabel: { color: c.muted, fontSize: 11, hideOverlap: true, formatter: tick, showMaxLabel: isRound, customValues: range.ticks }, axisTick: { show: false, customValues: range.ticks } };
    const isWhole = way.key === "devices";
    return axis(c, {
      type: range.ticks ? "log" : "value", min: range.min, max: range.max, minInterval: isWhole ? 1 : undefined, nameTextStyle: { color: c.muted, fontSize: 12 },
      splitLine: { lineStyle: { color: c.line, width: 0.6 } }, ...labels, ...more,
    });
  }

  function pointSeries(c, view, colour) {
    const data = view.points.map((point) => {
      const kind = view.kinds.get(point.one.group) % SHAPES.length;
      const isQuiet = point.one.dominated && point.i !== view.recommended;
      const fill = isQuiet ? colour("quiet") : colour(`kind${kind}`);
      return {
        value: [point.x, point.y], i: point.i, symbol: SHAPES[kind], symbolSize: isQuiet ? 6.5 : 10.5,
        itemStyle: point.one.meets_slo ? { color: fill, opacity: isQuiet ? 0.6 : 1, borderWidth: 0 } : { color: c.card, borderColor: fill, borderWidth: isQuiet ? 1 : 1.6, opacity: isQuiet ? 0.6 : 1 },
        isQuiet,
      };
    });
    data.sort((a, b) => b.isQuiet - a.isQuiet); // what is worth looking at on top
    return { type: "scatter", name: "deployments", data, z: 4, cursor: "pointer", emphasis: { scale: 1.5 }, large: false, progressive: 0 };
  }

  // Bands as lines with gaps between them: of the best, and of what is selected.
  function bandSeries(c, view, chosen) {
    const data = [];
    for (const { i, one, x, y } of view.points) {
      if (!chosen.has(i) && i !== view.selected) continue;
      const [across, up] = [view.x.band && view.x.band(one), view.y.band && view.y.band(one)];
      const end = (value, range) => (value === null ? range.max : value);
      if (across) data.push([across[1], y], [end(across[2], view.ranges.x), y], [null, null]);
      if (up) data.push([x, up[1]], [x, end(up[2], view.ranges.y)], [null, null]);
    }
    return { type: "line", name: "bands", data, symbol: "none", silent: true, connectNulls: false, z: 3, lineStyle: { color: c.muted, width: 1.2, opacity: 0.75 } };
  }

  function limitSeries(c, view) {
    const marks = [];
    if (view.x.limit) marks.push({ xAxis: view.x.limit[0], label: { formatter: view.x.limit[1], position: "insideEndTop", rotate: 90, distance: [4, 12] } });
    if (view.y.limit) marks.push({ yAxis: view.y.limit[0], label: { formatter: view.y.limit[1], position: "insideEndTop" } });
    return [{ type: "line", name: "limits", data: [], markLine: { symbol: "none", silent: true, precision: 9, animation: false, lineStyle: { color: c.orange, type: "dashed", width: 1.4 }, label: { color: c.orange, fontSize: 11 }, data: marks } }];
  }

  // Rings: the recommended one with its name, and what is selected.
  function markSeries(c, view) {
    const ring = (point, text, more) => ({
      value: [point.x, point.y], i: point.i, symbol: "circle", symbolSize: 19, itemStyle: { color: "transparent", borderColor: c.ink, borderWidth: 2, ...more },
      label: { show: Boolean(text), formatter: text, position: "top", distance: 5, color: c.ink, fontSize: 12, fontWeight: 650, backgroundColor: c.card, padding: [1, 4], borderRadius: 3, opacity: 0.92 },
    });
    const at = (i) => view.points.find((point) => point.i === i);
    const found = [];
    if (at(view.recommended)) found.push(ring(at(view.recommended), "recommended", {}));
    for (const [role, i] of Object.entries(view.roles)) {
      if (i !== view.recommended && at(i)) found.push(ring(at(i), role, { borderColor: "transparent" }));
    }
    if (view.selected !== view.recommended && at(view.selected)) found.push(ring(at(view.selected), "", { borderType: [3, 2], borderWidth: 1.8 }));
    return [{ type: "scatter", name: "marks", data: found, z: 5, cursor: "pointer", labelLayout: { hideOverlap: true, moveOverlap: "shiftY" } }];
  }

  // The shape of a kind as an element, for chips and rows.
  function swatch(kind, isQuiet) {
    const svg = document.getElementById("swatch").content.querySelector("svg").cloneNode(true);
    const path = svg.querySelector("path");
    path.setAttribute("d", OUTLINES[kind % OUTLINES.length]);
    path.style.fill = isQuiet ? "var(--quiet)" : `var(--kind${kind % SHAPES.length})`;
    return svg;
  }

  return { axesOf, best, reach, frontier, swatch, money, share };
})();
