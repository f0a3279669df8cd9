// What each chart of a run shows, as options for ECharts.
"use strict";

const Charts = (() => {
  const { base, axis, timeAxis, logAxis, limitLine, time, digits, tick } = Drawing;

  // Values spread over more than a factor of 30 are read better on a logarithmic axis (which begins at the first percent).
  function isWide(values) {
    const positive = values.filter((value) => value > 0);
    return positive.length > 1 && positive[positive.length - 1] / positive[0] > 30;
  }

  // One figure: the share of requests that took at most so long.
  function quantiles(grid, values, limit, attainment, unit) {
    return (c) => {
      const isLog = isWide(limit === undefined ? values.slice(2) : [...values.slice(2), Math.max(limit, values[values.length - 1])]);
      const data = values.map((value, i) => [isLog ? Math.max(value, 1e-6) : value, grid[i]]);
      const line = { type: "line", data, showSymbol: false, clip: true, lineStyle: { color: c.blue, width: 2 }, itemStyle: { color: c.blue } };
      const marks = [];
      if (limit !== undefined) {
        marks.push({ xAxis: limit, label: { formatter: `SLO ${tick(limit)}`, position: "insideMiddleTop" } });
        marks.push({ yAxis: attainment * 100, label: { formatter: `${+(attainment * 100).toFixed(2)} % must`, position: "insideStartBottom" } });
        line.markLine = { ...limitLine(c, "", null), data: marks };
        line.markLine.label = { color: c.orange, fontSize: 11 };
      }
      const reach = limit === undefined ? undefined : Math.max(limit * 1.15, data[data.length - 1][0]);
      return {
        ...base(c),
        grid: { left: 44, right: 16, top: 16, bottom: 26 },
        tooltip: {
          ...base(c).tooltip, trigger: "axis", axisPointer: { type: "line", lineStyle: { color: c.grey } },
          formatter: (items) => `${digits(items[0].value[1])} % of ${unit}: at most ${time(items[0].value[0])}`,
        },
        xAxis: isLog ? logAxis(c, [data[2][0], reach ?? data[data.length - 1][0]], tick) : timeAxis(c, false, { max: reach, min: 0 }),
        yAxis: axis(c, { type: "value", min: 0, max: 100, interval: 25, axisLabel: { color: c.muted, fontSize: 11, formatter: "{value} %" } }),
        series: [line],
      };
    };
  }

  // Panels on one time axis: arrivals, in flight, tokens, first tokens; below them what the server says.
  function timeline(point, slo) {
    const bins = point.timeline;
    const at = (values) => values.map((value, i) => [i * bins.width_s, value]);
    const told = (name) => point.server.times_s.map((t, i) => [t, point.server[name][i]]);
    const panels = [
      { name: "arrivals / s", height: 80, lines: [["arrivals", at(bins.arrivals), "blue", true]] },
      { name: "in flight (client)", height: 80, lines: [["in flight", at(bins.in_flight), "purple", true]] },
      { name: "output tokens / s", height: 80, lines: [["tokens/s", at(bins.tokens), "green", true]] },
      { name: "TTFT of each request", height: 190, isScatter: true },
    ];
    if (point.server && (point.server.running || point.server.waiting)) {
      const lines = [["running", "blue"], ["waiting", "orange"]].filter(([name]) => point.server[name]);
      panels.push({ name: "server: running (blue), waiting (orange)", height: 90, lines: lines.map(([name, colour]) => [`server: ${name}`, told(name), colour, false]) });
    }
    if (point.server && point.server.kv_usage) {
      const used = told("kv_usage").map(([t, value]) => [t, value === null ? null : value * 100]);
      panels.push({ name: "server: KV cache used, %", height: 80, lines: [["KV cache %", used, "purple", true]], most: 100 });
    }
    const options = (c) => timelineOptions(c, point, slo, panels, bins.arrivals.length * bins.width_s);
    options.height = panels.reduce((sum, panel) => sum + panel.height + 42, 8);
    return options;
  }

  function timelineOptions(c, point, slo, panels, end) {
    const [from, to] = point.window;
    const shading = { silent: true, itemStyle: { color: c.shade }, data: [[{ xAxis: 0 }, { xAxis: from }], [{ xAxis: to }, { xAxis: end }]] };
    const grids = [], xs = [], ys = [], titles = [], series = [];
    let top = 26;
    panels.forEach((panel, i) => {
      const isLast = i === panels.length - 1;
      grids.push({ left: 56, right: 18, top, height: panel.height });
      titles.push({ text: panel.name, left: 0, top: top - 24, textStyle: { fontSize: 12, fontWeight: 600, color: c.muted } });
      xs.push(axis(c, {
        type: "value", gridIndex: i, min: 0, max: end, splitLine: { show: false },
        axisLabel: { show: isLast, color: c.muted, fontSize: 11, formatter: "{value} s", hideOverlap: true, showMaxLabel: false },
      }));
      if (panel.isScatter) {
        const times = point.scatter.kept.concat(point.scatter.missed).map((pair) => pair[1]);
        ys.push(logAxis(c, slo && slo.limits.ttft ? [...times, slo.limits.ttft] : times, tick, { gridIndex: i }));
        series.push(...scatterSeries(c, point, slo, i, shading));
      } else {
        ys.push(axis(c, { type: "value", gridIndex: i, min: 0, max: panel.most, splitNumber: 2 }));
        panel.lines.forEach(([name, data, colour, isFilled], number) => series.push({
          type: "line", name, data, xAxisIndex: i, yAxisIndex: i, showSymbol: false, connectNulls: true,
          lineStyle: { color: c[colour], width: 1.4 }, itemStyle: { color: c[colour] },
          areaStyle: isFilled ? { color: c[colour], opacity: 0.14 } : undefined,
          markArea: number === 0 ? shading : undefined,
        }));
      }
      top += panel.height + 42;
    });
    return {
      ...base(c),
      title: titles, grid: grids, xAxis: xs, yAxis: ys, series,
      axisPointer: { link: [{ xAxisIndex: "all" }], lineStyle: { color: c.grey } },
      dataZoom: [{ type: "inside", xAxisIndex: panels.map((_, i) => i), zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
      tooltip: { ...base(c).tooltip, trigger: "axis", axisPointer: { type: "line" }, formatter: timelineTip },
    };
  }

  function timelineTip(items) {
    const seen = new Map(); // one request is enough of a crowd at the same moment
    for (const item of items.slice().sort((a, b) => a.seriesIndex - b.seriesIndex)) if (!seen.has(item.seriesName)) seen.set(item.seriesName, item);
    const lines = [`${digits(items[0].value[0])} s`];
    for (const [name, item] of seen) {
      const value = item.value[1];
      const text = item.seriesType === "scatter" ? time(value) : Number.isInteger(value) ? value.toLocaleString("en") : digits(value);
      lines.push(name === "failed" ? "a request that failed" : `${name}: ${text}`);
    }
    return lines.join("\n");
  }

  function scatterSeries(c, point, slo, index, shading) {
    const { kept, missed, failed } = point.scatter;
    const all = kept.concat(missed).map((pair) => pair[1]);
    const floor = all.length ? Math.min(...all) : 0.001;
    const limit = slo ? slo.limits.ttft : undefined;
    const common = { type: "scatter", xAxisIndex: index, yAxisIndex: index, symbolSize: all.length > 3000 ? 3 : 4.5 };
    const first = { ...common, name: slo ? "TTFT (SLO kept)" : "TTFT", data: kept, itemStyle: { color: c.blue, opacity: 0.55 }, markArea: shading };
    if (limit !== undefined) first.markLine = limitLine(c, `SLO ${tick(limit)}`, { yAxis: limit });
    return [
      first,
      { ...common, name: "TTFT (SLO missed)", data: missed, symbol: "diamond", symbolSize: 6, itemStyle: { color: c.orange, opacity: 0.8 } },
      { ...common, name: "failed", data: failed.map((t) => [t, floor]), symbol: "path://M0,0L2,0L5,3L8,0L10,0L6,5L10,10L8,10L5,7L2,10L0,10L4,5Z", symbolSize: 8, itemStyle: { color: c.orange } },
    ];
  }

  // Requests as bars from their scheduled arrival, with a tick for each chunk.
  function slowest(requests) {
    return (c) => {
      const names = requests.map((request) => `#${request.index}`);
      const bar = (name, colour, values, opacity = 1) => ({
        type: "bar", name, stack: "all", barWidth: 12, data: values, itemStyle: { color: colour, opacity }, emphasis: { disabled: true },
      });
      const firsts = requests.map((request) => request.chunks_s[0]);
      const ends = requests.map((request) => request.chunks_s[request.chunks_s.length - 1]);
      const ticks = requests.flatMap((request, i) => request.chunks_s.map((t) => [t, i]));
      return {
        ...base(c),
        legend: { top: 0, left: 50, textStyle: { color: c.muted, fontSize: 12 }, selectedMode: false, itemWidth: 14, itemHeight: 10 },
        grid: { left: 56, right: 18, top: 30, bottom: 26 },
        tooltip: { ...base(c).tooltip, trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => requestTip(requests[items[0].dataIndex]) },
        xAxis: timeAxis(c, false, {}),
        yAxis: axis(c, { type: "category", data: names, inverse: true, splitLine: { show: false } }),
        series: [
          bar("sent late by the client", c.grey, requests.map((request) => request.sent_s)),
          bar("until the first token", c.orange, firsts.map((t, i) => t - requests[i].sent_s), 0.85),
          bar("answering", c.blue, ends.map((t, i) => t - firsts[i]), 0.35),
          { type: "scatter", name: "chunk", data: ticks, symbol: "rect", symbolSize: [1.4, 12], itemStyle: { color: c.blue }, silent: true, tooltip: { show: false } },
        ],
      };
    };
  }

  function requestTip(request) {
    const end = request.chunks_s[request.chunks_s.length - 1];
    return [
      `request ${request.index}, scheduled at ${digits(request.scheduled_s)} s`,
      `${request.prompt_tokens} prompt tokens (${request.cached_tokens} cached), ${request.output_tokens} output tokens`,
      `first token after ${time(request.chunks_s[0])}, last after ${time(end)}`,
      request.missed.length ? `missed: ${request.missed.join(", ")}` : "kept the SLO, where there is one",
    ].join("\n");
  }

  // Requests by their length, asked for and got. found: see `length_distributions`.
  function lengths(found) {
    return (c) => {
      const { edges } = found;
      const first = edges[0], last = edges[edges.length - 1];
      const isLog = last / first >= 8;
      const steps = (counts) => [...counts.map((count, i) => [edges[i], count]), [last, counts[counts.length - 1]]];
      const series = (name, counts, colour, more) => ({ type: "line", step: "end", name, data: steps(counts), showSymbol: false, itemStyle: { color: colour }, ...more });
      const whole = (value) => Math.round(value).toLocaleString("en");
      const at = (x) => Math.max(edges.findIndex((edge) => edge > x) - 1, 0);
      const bin = (i) => (edges[i + 1] - edges[i] <= 1 ? whole(edges[i]) : `${whole(edges[i])} to ${whole(edges[i + 1] - 1)}`);
      return {
        ...base(c),
        legend: { top: 0, right: 0, textStyle: { color: c.muted, fontSize: 11 }, itemWidth: 16, itemHeight: 8, selectedMode: false },
        grid: { left: 44, right: 16, top: 26, bottom: 40 },
        tooltip: {
          ...base(c).tooltip, trigger: "axis", axisPointer: { type: "line", lineStyle: { color: c.grey } },
          formatter: (items) => { const i = Math.min(at(items[0].value[0]), found.got.length - 1); return `${bin(i)} tokens\nasked: ${found.asked[i]} requests\ngot: ${found.got[i]}`; },
        },
        xAxis: isLog ? logAxis(c, [first, last], whole, { name: "tokens", nameLocation: "middle", nameGap: 24 }) : axis(c, { type: "value", min: first, max: last, minInterval: 1, splitLine: { show: false }, name: "tokens", nameLocation: "middle", nameGap: 24 }),
        yAxis: axis(c, { type: "value", min: 0, minInterval: 1, splitNumber: 3 }),
        series: [
          series("got", found.got, c.blue, { lineStyle: { width: 0 }, areaStyle: { color: c.blue, opacity: 0.45 } }),
          series("asked", found.asked, c.orange, { lineStyle: { color: c.orange, width: 1.8 } }),
        ],
      };
    };
  }

  // Several loads: lines of [load, value], a band of an interval, a limit.
  function overLoads(axisName, lines, more = {}) {
    return (c) => ({
      ...base(c),
      legend: lines.length > 1 ? { top: 0, right: 0, textStyle: { color: c.muted, fontSize: 11 }, itemWidth: 16, itemHeight: 8 } : undefined,
      grid: { left: 52, right: 16, top: 28, bottom: 40 },
      tooltip: {
        ...base(c).tooltip, trigger: "axis",
        formatter: (items) => [`${digits(items[0].value[0])} ${axisName}`, ...items.filter((i) => i.seriesName[0] !== "\u0000").map((i) => `${i.seriesName}: ${more.shown(i.value[1])}`)].join("\n"),
      },
      xAxis: axis(c, { type: "value", name: axisName, nameLocation: "middle", nameGap: 24, min: 0, splitLine: { show: false } }),
      yAxis: more.isLog
        ? logAxis(c, [...lines.flatMap(([, , data]) => data.map(([, value]) => value)), ...(more.limit ? [more.limit] : [])], more.tick)
        : axis(c, { type: "value", min: 0, max: more.most, axisLabel: { color: c.muted, fontSize: 11, formatter: more.tick } }),
      series: [...(more.band ? bandSeries(c, more.band) : []), ...lines.map((line, i) => lineSeries(c, line, i === 0 ? more : {}))],
    });
  }

  function lineSeries(c, [name, colour, data, isDashed], more) {
    return {
      type: "line", name, data, connectNulls: true, symbol: isDashed ? "none" : "circle", symbolSize: 6,
      lineStyle: { color: c[colour], width: isDashed ? 1 : 2, type: isDashed ? "dashed" : "solid" }, itemStyle: { color: c[colour] },
      markLine: more.limit === undefined ? undefined : limitLine(c, more.limitText, { yAxis: more.limit }, more.limitPlace || "insideStartTop"),
    };
  }

  function bandSeries(c, band) {
    const common = { type: "line", stack: "band", symbol: "none", lineStyle: { opacity: 0 }, silent: true };
    return [
      { ...common, name: "\u0000low", data: band.map(([x, low]) => [x, low]) },
      { ...common, name: "\u0000high", data: band.map(([x, low, high]) => [x, high - low]), areaStyle: { color: c.blue, opacity: 0.15 } },
    ];
  }

  return { quantiles, lengths, timeline, slowest, overLoads };
})();
