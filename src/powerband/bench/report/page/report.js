// The page of one run: fills in its texts, draws its charts, and draws them anew for another load, theme or for paper.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { node, row, fillFacts, digits } = Drawing;
  const place = (id) => document.getElementById(id);
  const HEADINGS = ["", "mean", "p50", "p90", "p95", "p99", "p99, 95 % interval"];
  const CURVES = ["ttft", "tpot", "itl", "stall", "e2e"];
  let shownCharts = [];

  // charts: [caption, description, options]. All have their places before the first is drawn, so that none changes size.
  function drawAll(where, charts) {
    const inner = charts.map(() => node("div", [], "chart"));
    where.replaceChildren(...charts.map(([caption], i) => node("figure", [node("figcaption", caption), inner[i]])));
    return charts.map(([, description, options], i) => Drawing.draw(inner[i], description, options));
  }

  function showPoint(point) {
    Drawing.forget(shownCharts);
    shownCharts = [];
    const badge = place("verdict");
    badge.textContent = point.verdict;
    badge.className = `badge ${point.verdict}`;
    place("sentence").textContent = point.sentence;
    place("tiles").replaceChildren(...point.tiles.map(([name, value, note]) => node("div", [node("dt", name), node("dd", value), node("dd", note)])));
    place("latencies").replaceChildren(node("thead", row(HEADINGS, "th")), node("tbody", point.rows.map((cells) => row(cells))));
    showQuantiles(point);
    const options = Charts.timeline(point, data.slo);
    place("timeline").style.height = `${options.height}px`;
    shownCharts.push(Drawing.draw(place("timeline"), "Arrivals, requests in flight, output tokens and first tokens over time.", options));
    showFailures(point);
    showLengths(point);
    showSlowest(point);
    showMisses(point);
    fillFacts(place("basis"), point.facts);
  }

  function showQuantiles(point) {
    const charts = CURVES.filter((curve) => point.quantiles[curve]).map((name) => {
      const limit = data.slo ? data.slo.limits[name] : undefined;
      const unit = name === "itl" ? "tokens" : "requests";
      const options = Charts.quantiles(data.grid, point.quantiles[name], limit, data.slo ? data.slo.attainment : undefined, unit);
      return [data.names[name], `${data.names[name]}: share of ${unit} by how long they took; the table above has the percentiles.`, options];
    });
    shownCharts.push(...drawAll(place("quantiles"), charts));
  }

  function showSlowest(point) {
    const where = place("slowest");
    where.style.height = `${60 + 23 * point.slowest.length}px`;
    where.parentElement.hidden = !point.slowest.length;
    if (point.slowest.length) shownCharts.push(Drawing.draw(where, "The slowest requests, chunk by chunk.", Charts.slowest(point.slowest)));
  }

  function showMisses(point) {
    const most = Math.max(...point.misses.map(([, count]) => count), 1);
    const bars = point.misses.map(([name, count]) => {
      const fill = node("div", [], "fill");
      fill.style.width = `${(count / most) * 100}%`;
      return node("div", [node("span", name), node("div", fill, "track"), node("span", count.toLocaleString("en"), "count")], "bar");
    });
    const without = data.slo ? "Not one request that counts missed the SLO." : "There is no SLO to miss.";
    place("misses").replaceChildren(...(bars.length ? bars : [node("p", without, "note")]));
  }

  function showFailures({ failures }) {
    place("failures-card").hidden = !failures.length;
    place("failures").replaceChildren(...failures.map((one) => {
      const [first, last] = one.scheduled_s;
      const when = first === last ? `arrival at ${digits(first)} s` : `arrivals from ${digits(first)} s to ${digits(last)} s`;
      const begun = one.begun ? `; of ${one.begun.toLocaleString("en")} the first tokens had come` : "; no token had come";
      return node("li", [
        node("strong", `${one.count.toLocaleString("en")} × ${one.kind}${one.status ? `, HTTP ${one.status}` : ""}`),
        node("p", one.message || "The server gave no message.", "seen"),
        node("p", `${when}${begun}`, "note"),
      ]);
    }));
  }

  function showLengths({ lengths }) {
    place("lengths-card").hidden = !lengths.length;
    const charts = lengths.map((one) => [one.name, `${one.name}: requests by their length, asked for and got; the table below has the figures.`, Charts.lengths(one)]);
    shownCharts.push(...drawAll(place("lengths"), charts));
    const rows = lengths.flatMap((one) => one.rows.map(([side, ...cells]) => row([`${one.name}, ${side}`, ...cells])));
    place("lengths-table").replaceChildren(node("thead", row(["", "requests", "mean", "p50", "p95", "maximum", "in all"], "th")), node("tbody", rows));
  }

  function showLoads() {
    const points = data.points.slice().sort((a, b) => a.offered.value - b.offered.value);
    const headings = ["load", "verdict", "SLO kept", "goodput", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "tokens/s"];
    const rows = data.points.map(({ verdict, load_row: [label, , ...cells] }) => row([label, node("strong", verdict, verdict), ...cells]));
    place("loads-table").replaceChildren(node("thead", row(headings, "th")), node("tbody", rows));
    place("loads").hidden = false;
    drawLoads(points);
    const choice = place("choice");
    choice.replaceChildren(...data.points.map((point, i) => Object.assign(node("option", `${point.label} (${point.verdict})`), { value: String(i) })));
    const choose = (i) => {
      rows.forEach((made, j) => { made.className = i === j ? "chosen" : ""; });
      showPoint(data.points[i]);
    };
    choice.addEventListener("change", () => choose(Number(choice.value)));
    // The last load that passed says most; else the first.
    const passed = points.filter((point) => point.verdict === "PASS").pop();
    choice.value = String(Math.max(data.points.indexOf(passed), 0));
    choose(Number(choice.value));
  }

  function drawLoads(points) {
    const charts = [];
    const axisName = points[0].offered.kind === "rate" ? "requests/s offered" : "users";
    const series = (value) => points.map((point) => [point.offered.value, value(point)]);
    const percentile = (name, i) => series((point) => (point.percentiles[name] || [])[i] ?? null);
    const times = { isLog: true, tick: Drawing.tick, shown: Drawing.time };
    const limit = (name) => (data.slo && data.slo.limits[name] ? { limit: data.slo.limits[name], limitText: `SLO ${Drawing.tick(data.slo.limits[name])}` } : {});
    if (data.slo) {
      const lines = [["goodput", "blue", series((point) => point.goodput)]];
      if (points[0].offered.kind === "rate") lines.push(["all that was offered", "grey", series((point) => point.offered.value), true]);
      charts.push(["Goodput, requests/s", "Goodput against offered load.", Charts.overLoads(axisName, lines, { shown: Drawing.digits })]);
      const kept = [["SLO kept", "blue", series((point) => (point.attainment === null ? null : point.attainment * 100))]];
      const band = points.filter((point) => point.attainment_interval).map((point) => [point.offered.value, ...point.attainment_interval.map((share) => share * 100)]);
      const must = { limit: data.slo.attainment * 100, limitText: `${+(data.slo.attainment * 100).toFixed(2)} % must`, most: 100, band, limitPlace: "insideEndBottom", shown: (value) => `${Drawing.digits(value)} %`, tick: "{value} %" };
      charts.push(["Requests that kept the SLO, with 95 % interval", "SLO attainment against offered load.", Charts.overLoads(axisName, kept, must)]);
    }
    for (const name of ["ttft", "tpot"]) {
      const lines = [["p50", "blue", percentile(name, 0)], ["p90", "purple", percentile(name, 1)], ["p99", "orange", percentile(name, 3)]].filter(([, , values]) => values.some(([, value]) => value !== null));
      charts.push([data.names[name], `${data.names[name]} against offered load.`, Charts.overLoads(axisName, lines, { ...times, ...limit(name) })]);
    }
    if (!data.slo) {
      const lines = [["output tokens/s", "green", series((point) => point.output_tokens_per_s)]];
      charts.push(["Output tokens/s", "Throughput against offered load.", Charts.overLoads(axisName, lines, { shown: Drawing.digits })]);
    }
    drawAll(place("loads-charts"), charts);
  }

  function showDefinitions() {
    place("before").textContent = data.definitions.before;
    place("after").textContent = data.definitions.after;
    place("definitions").replaceChildren(...data.definitions.rows.flatMap(([name, formula, note, elsewhere]) => [
      node("dt", name), node("dd", [node("code", formula), note ? `. ${note}` : "", elsewhere ? ` Elsewhere: ${elsewhere}.` : ""]),
    ]));
  }

  place("subject").textContent = data.subject;
  place("headline").textContent = data.headline;
  place("headline").hidden = !data.headline;
  fillFacts(place("facts"), data.facts);
  place("workload").textContent = JSON.stringify(data.workload, null, 2);
  showDefinitions();
  if (data.points.length > 1) showLoads();
  else showPoint(data.points[0]);
})();
