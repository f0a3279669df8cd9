// Distributions of several runs in one chart, as options for ECharts.
"use strict";

const Charts = (() => {
  const { base, axis, timeAxis, logAxis, limitLine, time, digits, tick } = Drawing;
  const COLOURS = 6;
  const DASHES = ["solid", "dashed", "dotted"]; // so that colour alone need not tell runs apart

  const colourOf = (number) => getComputedStyle(document.documentElement).getPropertyValue(`--run${number % COLOURS}`).trim();
  const dashOf = (number) => DASHES[number % DASHES.length];

  // The share of requests that took at most so long. quantiles: of each run, or null.
  function quantiles(grid, names, found, limit) {
    return (c) => {
      const known = found.filter(Boolean);
      const positive = known.flatMap((values) => values.slice(2)).filter((value) => value > 0);
      const least = Math.min(...positive), most = Math.max(...positive);
      const isLog = most / least > 30;
      const series = found.map((values, i) => values && {
        type: "line", name: names[i], data: values.map((value, j) => [isLog ? Math.max(value, least) : value, grid[j]]), showSymbol: false,
        lineStyle: { color: colourOf(i), width: 2, type: dashOf(i) }, itemStyle: { color: colourOf(i) },
      }).filter(Boolean);
      if (limit && series.length) series[0].markLine = limitLine(c, `SLO ${tick(limit)}`, { xAxis: limit }, "insideMiddleTop");
      const reach = limit ? Math.max(most, limit) : most;
      return {
        ...base(c),
        grid: { left: 44, right: 16, top: 16, bottom: 26 },
        tooltip: {
          ...base(c).tooltip, trigger: "axis", axisPointer: { type: "line", lineStyle: { color: c.grey } },
          formatter: (items) => items.map((item) => `${item.seriesName}: ${digits(item.value[1])} % within ${time(item.value[0])}`).join("\n"),
        },
        xAxis: isLog ? logAxis(c, [least, reach], tick) : timeAxis(c, false, { min: 0, max: limit && limit > most ? limit * 1.15 : undefined }),
        yAxis: axis(c, { type: "value", min: 0, max: 100, interval: 25, axisLabel: { color: c.muted, fontSize: 11, formatter: "{value} %" } }),
        series,
      };
    };
  }

  // The line of a run in the charts, for headings.
  function key(number) {
    const made = document.createElement("span");
    made.className = "key";
    made.style.borderTopStyle = dashOf(number);
    made.style.borderTopColor = `var(--run${number % COLOURS})`;
    return made;
  }

  return { quantiles, key };
})();
