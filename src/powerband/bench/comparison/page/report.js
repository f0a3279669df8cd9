// The page of a comparison: its texts, tables and charts.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { node, row, fillFacts } = Drawing;
  const place = (id) => document.getElementById(id);
  const heading = (name, i) => node("th", [Charts.key(i), name]);
  const first = data.names[0];

  function kind(verdict) {
    return verdict.startsWith("faster") ? "faster" : verdict.startsWith("slower") ? "slower" : "unsure";
  }

  function figureRows(figure) {
    return figure.rows.map(([statistic, value, others]) => node("tr", [
      node("td", `${figure.name} ${statistic}`), node("td", value),
      ...others.flatMap(([theirs, ratio, spread, verdict]) => [
        node("td", theirs),
        node("td", [ratio, ...(spread ? [node("span", spread, "spread")] : [])]),
        node("td", verdict, kind(verdict)),
      ]),
    ]));
  }

  function rateRows(load) {
    return load.rates.map(([name, value, others]) => node("tr", [node("td", name), node("td", value), ...others.flatMap(([theirs, ratio]) => [node("td", theirs), node("td", ratio), node("td", "")])]));
  }

  function showLoad(load) {
    const headings = [node("th", ""), heading(first, 0), ...data.names.slice(1).flatMap((name, i) => [heading(name, i + 1), node("th", `over ${first}`), node("th", "it is")])];
    const table = node("table", [node("thead", node("tr", headings)), node("tbody", [...load.figures.flatMap(figureRows), ...rateRows(load)])]);
    const curves = load.figures.filter((figure) => figure.quantiles.some(Boolean));
    const places = curves.map(() => node("div", [], "chart"));
    const figures = curves.map((figure, i) => node("figure", [node("figcaption", figure.name), places[i]]));
    const unpaired = data.names.slice(1).filter((_, i) => load.paired[i] === false);
    const pairs = unpaired.length ? `Requests of ${unpaired.join(", ")} are others than those of ${first}: compared as groups, not pair by pair.` : "The runs sent the same requests, which are compared pair by pair.";
    place("loads").append(node("section", [
      node("h2", load.label), node("p", pairs, "note"), node("div", table, "scroll"),
      node("p", "The curves: how large a share of requests took at most so long.", "note"), node("div", figures, "charts"),
    ], "card"));
    curves.forEach((figure, i) => Drawing.draw(places[i], `${figure.name}: share of requests by how long they took, a line for each run; the table above has median and 99th percentile.`, Charts.quantiles(data.grid, data.names, figure.quantiles, figure.limit)));
  }

  place("title").textContent = `${data.names.slice(1).join(", ")} compared with ${first}`;
  place("warnings-card").hidden = !data.warnings.length;
  place("warnings").replaceChildren(...data.warnings.map((warning) => node("li", warning)));
  data.loads.forEach(showLoad);
  place("no-settings").hidden = data.settings.length > 0;
  place("settings").hidden = !data.settings.length;
  place("settings").replaceChildren(node("thead", node("tr", [node("th", ""), ...data.names.map(heading)])), node("tbody", data.settings.map(([name, values]) => row([name, ...values]))));
  fillFacts(place("same"), data.same);
  place("runs").replaceChildren(...data.runs.flatMap(({ name, facts }, i) => {
    const list = node("dl", [], "facts");
    fillFacts(list, facts);
    return [node("h3", [Charts.key(i), name]), list];
  }));
  place("note").textContent = data.note;
})();
