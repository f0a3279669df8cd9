// The page of a plan: its texts, filters, chart, side panel and table, and what happens when one deployment is chosen.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { node, row, fillFacts, time, digits } = Drawing;
  const { money, share } = Charts;
  const place = (id) => document.getElementById(id);
  const MOST_ROWS = 100;
  const asked = Estimates.asked(data);
  let question = { ...asked };
  let shown = Estimates.answer(data, question);
  let ways = Charts.axesOf(data, shown.evaluations, question);
  const way = (key) => ways.find((one) => one.key === key);
  const kinds = new Map([...new Set(data.evaluations.map((one) => one.group))].sort((a, b) => a.includes(" + ") - b.includes(" + ") || (a < b ? -1 : 1)).map((name, i) => [name, i]));
  const FILTERS = [["group", "Device"], ["engine", "Engine"], ["precision", "Precision"]];
  const ROWS = [["best", "the frontier of those that keep the SLO"], ["frontier", "the whole frontier"], ["good", "all that keep the SLO"], ["all", "all"]];
  const state = {
    x: way(data.axes[0]) || ways[0], y: way(data.axes[1]) || ways[1], off: { group: new Set(), engine: new Set(), precision: new Set() },
    selected: data.recommended ?? data.roles.nearest ?? (data.evaluations.length ? 0 : null), // its place among those shown
    rows: data.evaluations.some((one) => one.meets_slo) ? "best" : "frontier", isWhole: false, sort: ["usd_per_hour", 1],
  };
  let chart = null;

  const isShown = (one) => FILTERS.every(([key]) => !state.off[key].has(one[key]));
  const unbroken = (words) => words.replace(/ (ms|s|%)(?=[\s;)]|$)/g, "\u00a0$1");
  // A figure that is there and has no value never ends; one that is not there was not predicted.
  const without = (each, one) => (each.isTime && each.key in one.figures ? "∞" : "–");
  const text = (number) => data.texts[number];
  const roleOf = (i) => (i === shown.recommended ? "recommended" : (Object.entries(shown.roles).find(([, j]) => j === i) || [""])[0]);

  function showTexts() {
    place("headline").textContent = data.headline;
    place("question").textContent = data.question;
    place("tiles").replaceChildren(...data.tiles.map(([name, value, note]) => node("div", [node("dt", name), node("dd", unbroken(value)), node("dd", unbroken(note))])));
    place("reasons").replaceChildren(...data.reasons.map((reason) => node("li", reason)));
    fillFacts(place("facts"), data.facts);
    place("workload").textContent = JSON.stringify(data.workload, null, 2);
    const notes = [
      ["Bands", "Nine measurements in ten lie within. A deployment keeps the SLO if it does so at the worse end of its bands."],
      ["Frontier", "Coloured: no other costs no more and is no slower, in TTFT and in TPOT. Grey: another does. Hollow: the SLO is missed. The line joins the best by the two axes among those that keep the SLO."],
      ["Holds up to", "The rate up to which the SLO is kept."],
      ["Estimate", "At another rate or under another SLO than was asked, figures are those of the closed form, corrected by what simulations found, and on straight lines between the points at which it was computed. No simulation has confirmed them."],
      ["Closed form", "A quick estimate for every deployment. Those that could be chosen are simulated: the engine's own scheduler plays the load, request by request."],
    ];
    place("definitions").replaceChildren(...notes.flatMap(([name, note]) => [node("dt", name), node("dd", note)]),
      ...data.definitions.flatMap(([name, formula, note]) => [node("dt", name), node("dd", [node("code", formula), `. ${note}`])]));
  }

  function showPruned() {
    place("pruned-card").hidden = !data.pruned.length;
    const total = data.pruned.reduce((sum, [, count]) => sum + count, 0);
    place("pruned-note").textContent = `${total.toLocaleString("en")} deployments that cannot be, by reason.`;
    place("pruned").replaceChildren(...data.pruned.map(([reason, count, members]) => {
      const items = members.map(([what, detail, times]) => node("li", `${times > 1 ? `${times} × ` : ""}${what}${detail ? `: ${detail}` : ""}`));
      return node("details", [node("summary", [node("span", count.toLocaleString("en"), "count"), reason]), node("ul", items)]);
    }));
  }

  function showFilters() {
    const groups = FILTERS.map(([key, name]) => {
      const values = key === "group" ? [...kinds.keys()] : [...new Set(shown.evaluations.map((one) => one[key]))].sort();
      if (values.length < 2 && key !== "group") return null;
      const chips = values.map((value) => {
        const chip = node("button", key === "group" ? [Charts.swatch(kinds.get(value)), value] : value, "chip");
        chip.type = "button";
        chip.setAttribute("aria-pressed", "true");
        chip.addEventListener("click", () => {
          const off = state.off[key];
          if (!off.delete(value)) off.add(value);
          chip.setAttribute("aria-pressed", String(!off.has(value)));
          refresh();
        });
        return chip;
      });
      return node("div", [node("span", name, "name"), ...chips]);
    });
    place("filters").replaceChildren(...groups.filter(Boolean));
  }

  function fillAxes() {
    for (const which of ["x", "y"]) {
      const select = place(which);
      select.addEventListener("change", () => { state[which] = way(select.value); drawFrontier(); });
    }
    place("bands").addEventListener("change", drawFrontier);
    place("far").addEventListener("change", drawFrontier);
  }

  function showAxes() {
    for (const which of ["x", "y"]) {
      const select = place(which);
      select.replaceChildren(...ways.map((one) => Object.assign(node("option", one.name), { value: one.key })));
      state[which] = way(state[which].key) || ways[0];
      select.value = state[which].key;
    }
  }

  function drawFrontier() {
    const all = shown.evaluations.map((one, i) => ({ one, i, x: state.x.value(one), y: state.y.value(one) })).filter(({ one }) => isShown(one));
    const points = all.filter(({ x, y }) => typeof x === "number" && typeof y === "number");
    const hasAll = place("far").checked;
    const ranges = { x: Charts.reach(points, state.x, "x", hasAll), y: Charts.reach(points, state.y, "y", hasAll) };
    const isInside = (value, range) => value >= (range.min ?? -Infinity) && value <= (range.max ?? Infinity);
    const drawn = points.filter(({ x, y }) => isInside(x, ranges.x) && isInside(y, ranges.y));
    const hasGood = points.some(({ one }) => one.meets_slo);
    const view = {
      x: state.x, y: state.y, points: drawn, kinds, selected: state.selected, recommended: shown.recommended, roles: shown.roles,
      hasBands: place("bands").checked, hasGood, ranges, tip,
    };
    state.line = Charts.best(drawn.filter(({ one }) => !hasGood || one.meets_slo), state.x, state.y);
    if (chart) Drawing.forget([chart]);
    const words = `Deployments by ${state.x.name} and ${state.y.name}. The table below holds the same figures; the arrow keys walk along the frontier.`;
    chart = Drawing.draw(place("frontier"), words, Charts.frontier(view));
    chart.chart.on("click", (event) => { if (event.data && event.data.i !== undefined) select(event.data.i); });
    const endless = all.length - points.length, far = points.length - drawn.length;
    const notes = ["Filled: keeps the SLO. Hollow: misses it. Grey: another costs no more and is no slower."];
    if (far) notes.push(`${far.toLocaleString("en")} far off ${far === 1 ? "is" : "are"} not drawn.`);
    if (endless) notes.push(`Requests pile up without an end, or a figure is not known, for ${endless.toLocaleString("en")} more.`);
    place("plot-note").textContent = notes.join(" ");
  }

  function tip(i) {
    const one = shown.evaluations[i];
    const lines = [one.name, `${one.limits} requests/tokens a step`, ""];
    for (const each of ways) {
      const value = each.value(one);
      if (each.key === "devices" || each.key === "output_tokens_per_s") continue;
      lines.push(`${each.short}: ${value === null ? without(each, one) : each.shown(value) + bandText(each, one)}`);
    }
    lines.push("", one.meets_slo ? "keeps the SLO" : "misses the SLO", `what binds: ${text(one.binds)}`);
    const role = roleOf(i);
    if (role) lines.splice(1, 0, role);
    return lines.join("\n");
  }

  // In the unit of its upper end.
  function bandText(each, one) {
    const band = each.band && each.band(one);
    if (!band) return "";
    const [, low, high] = band;
    if (high === null) return ` (${each.shown(low)}–∞)`;
    if (each.isTime) {
      const [factor, unit] = high >= 0.9995 ? [1, "s"] : [1000, "ms"];
      return ` (${digits(low * factor)}–${digits(high * factor)} ${unit})`;
    }
    if (each.isShare) return share(low) === share(high) ? "" : ` (${share(low).replace(" %", "")}–${share(high)})`;
    return digits(low) === digits(high) ? "" : ` (${digits(low)}–${digits(high)})`;
  }

  function select(i) {
    state.selected = i;
    history.replaceState(null, "", `#${shown.evaluations[i].id}`);
    place("spoken").textContent = tip(i);
    drawFrontier();
    showPanel();
    for (const made of place("table").querySelectorAll("tbody tr")) made.classList.toggle("chosen", made.dataset.i === String(i));
  }

  function showPanel() {
    const panel = place("panel");
    panel.hidden = state.selected === null;
    if (panel.hidden) return;
    const one = shown.evaluations[state.selected];
    const other = shown.recommended !== null && shown.recommended !== state.selected ? shown.evaluations[shown.recommended] : null;
    const role = roleOf(state.selected);
    const marks = [
      role && node("li", role, "mark strong"), node("li", one.meets_slo ? "keeps the SLO" : "misses the SLO", one.meets_slo ? "mark good" : "mark bad"),
      one.dominated && state.selected !== shown.recommended && node("li", "another costs no more and is no slower", "mark"), node("li", methodOf(one), "mark"),
    ].filter(Boolean);
    const notes = one.notes.map((number) => node("li", text(number)));
    panel.replaceChildren(
      node("h3", one.name), node("ul", marks, "marks"), comparison(one, other),
      node("h4", "Where a replica's time goes"), ...operators(one, other), node("p", `What binds: ${text(one.binds)}.${other ? " The mark is the recommended one's share." : ""}`, "note"),
      ...deploying(one),
      node("h4", "Set-up"), node("ul", [...one.setting.map((number) => node("li", settingText(one, text(number)))),
        node("li", `${digits(one.weights_bytes / 1e9)} GB of weights a device`), node("li", `${one.kv_tokens.toLocaleString("en")} tokens of KV cache a replica`)]),
      ...(notes.length ? [node("h4", "Notes"), node("ul", notes)] : []),
    );
  }

  function comparison(one, other) {
    const rows = ways.map((each) => {
      const value = each.value(one);
      const band = value === null ? "" : bandText(each, one).trim().replace(/^\(|\)$/g, "");
      const isPrice = each.key === "usd_per_hour" && one.prices.length > 0;
      const under = [...(band ? [node("span", band, "band")] : []), ...(isPrice ? [node("span", priceText(one), "band from")] : [])];
      const cells = [node("td", each.short), node("td", [value === null ? without(each, one) : each.shown(value), ...under])];
      if (other) cells.push(node("td", each.value(other) === null ? without(each, other) : each.shown(each.value(other))), difference(each, value, each.value(other)));
      return node("tr", cells);
    });
    return node("table", [node("thead", row(other ? ["", "this", "recommended", ""] : ["", "this"], "th")), node("tbody", rows)]);
  }

  const methodOf = (one) => one.how ?? text(one.method);
  // Machine and origin on a line each.
  const priceLines = (one) => node("span", one.prices.flatMap((number) => text(number).split(/(?<=:) /).map((words) => node("span", words, "band"))), "from");
  const priceText = (one) => one.prices.map(text).join(" + ") || "–";
  // The plan's first line of a set-up counts its replicas.
  const settingText = (one, words) => (one.isPlanned === false ? words.replace(/^\d+ × /, `${one.count} × `) : words);

  // The command and the plan file of a deployment.
  function deploying(one) {
    const file = Estimates.planFile(data, one, question);
    const code = node("code", Estimates.command(data, question, one.id));
    code.id = "pick-command";
    const copy = copying("Copy", () => code.textContent, code);
    const yaml = node("pre", file);
    yaml.id = "plan-file";
    const download = Object.assign(node("button", "Download plan.yaml", "plain"), { type: "button" });
    download.addEventListener("click", () => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([file], { type: "application/yaml" })), download: "plan.yaml" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
    const all = [
      node("h4", "Its plan, by a command or as a file"), node("div", [code, copy], "command"),
      node("div", [download, copying("Copy the file", () => file, yaml)], "buttons"),
      node("details", [node("summary", "plan.yaml"), yaml]), node("p", ["Then: ", node("code", "powerband deploy plan.yaml")], "note"),
    ];
    return [...all, ...(Estimates.notes(data, one).length ? [node("p", Estimates.notes(data, one).join(" "), "note")] : [])];
  }

  // A button that copies; where the browser does not let it, the text is selected to be copied by hand.
  function copying(name, textOf, where) {
    const button = Object.assign(node("button", name, "plain"), { type: "button" });
    button.addEventListener("click", () => copy(button, name, textOf(), where));
    return button;
  }

  async function copy(button, name, words, where) {
    try {
      await navigator.clipboard.writeText(words);
      button.textContent = "Copied";
    } catch {
      const details = where.closest("details");
      if (details) details.open = true;
      getSelection().selectAllChildren(where);
      button.textContent = "Selected: Ctrl+C";
    }
    setTimeout(() => { button.textContent = name; }, 2500);
  }

  function difference(each, ours, theirs) {
    if (ours === null || theirs === null || !theirs) return node("td", "");
    const change = each.isShare ? ours - theirs : ours / theirs - 1;
    if (Math.abs(change) < 0.005) return node("td", "=");
    const factor = ours / theirs;
    const words = each.isShare ? `${change > 0 ? "+" : "−"}${Math.abs(change * 100).toFixed(1)} pt` : factor >= 3 ? `× ${digits(factor)}` : `${change > 0 ? "+" : "−"}${Math.round(Math.abs(change) * 100)} %`;
    return node("td", words, change * each.better > 0 ? "better" : "worse");
  }

  function operators(one, other) {
    const theirs = new Map(other ? other.operators : []);
    const most = Math.max(...one.operators.map(([, part]) => part), ...theirs.values(), 0.01);
    return one.operators.map(([name, part]) => {
      const fill = node("div", [], "fill");
      fill.style.width = `${(part / most) * 100}%`;
      const track = node("div", [fill], "track");
      if (theirs.has(name)) {
        const mark = node("div", [], "other");
        mark.style.left = `calc(${(theirs.get(name) / most) * 100}% - 1px)`;
        track.append(mark);
      }
      return node("div", [node("span", text(name)), track, node("span", `${(part * 100).toFixed(part < 0.0995 ? 1 : 0)} %`, "count")], "bar");
    });
  }

  // [heading, text of a cell, value to sort by, is it text?]
  function columns() {
    const figure = ([key, heading]) => {
      const each = way(key);
      const shownOf = (one) => (each.value(one) === null ? without(each, one) : each.shown(each.value(one)));
      return each && [heading || each.short, key === "usd_per_hour" ? (one) => node("span", [shownOf(one), priceLines(one)]) : shownOf, (one) => each.value(one) ?? Infinity, false, key];
    };
    return [
      ["deployment", null, (one) => one.group + one.devices, true, "name"], ["TP×PP×n", (one) => one.layout, (one) => one.layout, true, "layout"],
      ["precision", (one) => one.precision, (one) => one.precision, true, "precision"], ["seqs/tokens", (one) => one.limits, (one) => one.limits, true, "limits"],
      ...[["usd_per_hour", "$/hour"], ["usd_per_million_tokens", "$/Mtok"], ["ttft_s"], ["tpot_s"], ...(data.slo.limits.e2e ? [["e2e_s"]] : []), ["attainment", "SLO kept"], ["capacity", "holds/s"]].map(figure).filter(Boolean),
      ["by", (one) => methodOf(one), (one) => methodOf(one), true, "method"],
    ];
  }

  function showTable() {
    const wanted = { best: (one) => !one.dominated && one.meets_slo, frontier: (one) => !one.dominated, good: (one) => one.meets_slo, all: () => true }[state.rows];
    const found = shown.evaluations.map((one, i) => [one, i]).filter(([one, i]) => isShown(one) && (wanted(one) || roleOf(i)));
    const all = columns();
    const [, , key] = all.find((column) => column[4] === state.sort[0]) || all[0];
    found.sort(([a], [b]) => { const [x, y] = [key(a), key(b)]; return state.sort[1] * (x < y ? -1 : x > y ? 1 : 0); });
    const cut = state.isWhole ? found : found.slice(0, MOST_ROWS);
    const headings = all.map(([name, , , isText, id]) => {
      const button = Object.assign(node("button", name + (id === state.sort[0] ? (state.sort[1] > 0 ? " ↑" : " ↓") : "")), { type: "button" });
      button.addEventListener("click", () => {
        state.sort = [id, id === state.sort[0] ? -state.sort[1] : 1];
        showTable();
        place("table").querySelector(`th[data-id="${id}"] button`).focus();
      });
      const heading = node("th", button, isText ? "text" : "");
      heading.dataset.id = id;
      heading.scope = "col";
      if (id === state.sort[0]) heading.setAttribute("aria-sort", state.sort[1] > 0 ? "ascending" : "descending");
      return heading;
    });
    place("table").replaceChildren(node("thead", node("tr", headings)), node("tbody", cut.map(([one, i]) => tableRow(one, i, all))));
    place("rows-note").textContent = `${found.length.toLocaleString("en")} of ${shown.evaluations.length.toLocaleString("en")}`;
    place("more").hidden = cut.length === found.length;
    place("more-button").textContent = `Show all ${found.length.toLocaleString("en")}`;
  }

  function tableRow(one, i, all) {
    const role = roleOf(i);
    const engine = new Set(shown.evaluations.map((each) => each.engine)).size > 1 ? `${one.engine}, ` : "";
    const pick = Object.assign(node("button", [Charts.swatch(kinds.get(one.group), one.dominated && i !== shown.recommended), `${engine}${one.devices_text}`, ...(role ? [node("span", role, "role")] : [])], "pick"), { type: "button" });
    const made = node("tr", [node("td", pick), ...all.slice(1).map(([, cell, , isText]) => node("td", cell(one), isText ? "text" : ""))], one.meets_slo ? "" : "misses");
    made.dataset.i = String(i);
    made.classList.toggle("chosen", i === state.selected);
    made.addEventListener("click", () => select(i));
    return made;
  }

  function refresh() {
    drawFrontier();
    showTable();
  }

  // An id, or a place among the plan's own.
  function fromHash() {
    const words = decodeURIComponent(location.hash.slice(1));
    const i = /^\d+$/.test(words) ? Number(words) : shown.evaluations.findIndex((one) => one.id === words);
    if (words && i >= 0 && i < shown.evaluations.length) state.selected = i;
  }

  // Sliders: in the middle what was asked; each step a factor. At its right end a limit is none.
  const STEPS = 200, MIDDLE = 100, SPAN = 8;
  const SLIDERS = {
    rate: { middle: asked.rate, shown: (value) => `${Number(value.toPrecision(3))}/s` },
    ttft: { middle: asked.ttft, shown: time },
    tpot: { middle: asked.tpot, shown: time },
  };

  function middleOf(name) {
    const figures = data.evaluations.map((one) => one.figures[`${name}_s`]).filter(Boolean).map(([value]) => value).sort((a, b) => a - b);
    return SLIDERS[name].middle ?? figures[Math.floor(figures.length / 2)] ?? 1;
  }

  function valueOf(name, step) {
    if (name !== "rate" && step === STEPS) return null;
    if (step === MIDDLE && SLIDERS[name].middle !== null) return SLIDERS[name].middle;
    return Number((middleOf(name) * SPAN ** ((step - MIDDLE) / MIDDLE)).toPrecision(3));
  }

  function showSliders() {
    for (const name of Object.keys(SLIDERS)) {
      const value = question[name], words = value === null ? "no limit" : SLIDERS[name].shown(value);
      const first = asked[name] === null ? "none" : SLIDERS[name].shown(asked[name]);
      place(`${name}-shown`).textContent = value === asked[name] ? words : `${words} (asked: ${first})`;
      place(name).setAttribute("aria-valuetext", words);
    }
  }

  function resetSliders() {
    for (const name of Object.keys(SLIDERS)) place(name).value = asked[name] === null ? STEPS : MIDDLE;
  }

  function ask() {
    const id = state.selected === null ? null : shown.evaluations[state.selected].id;
    question = Object.fromEntries(Object.keys(SLIDERS).map((name) => [name, valueOf(name, Number(place(name).value))]));
    shown = Estimates.answer(data, question);
    ways = Charts.axesOf(data, shown.evaluations, question);
    const same = shown.evaluations.findIndex((one) => one.id === id);
    state.selected = shown.isMoved || same < 0 ? shown.recommended ?? (same < 0 ? null : same) : same;
    showAnswer();
    showAxes();
    refresh();
    showPanel();
  }

  function showAnswer() {
    showSliders();
    const best = shown.recommended === null ? null : shown.evaluations[shown.recommended];
    const kept = shown.evaluations.filter((one) => one.meets_slo).length;
    const price = best && best.usd_per_hour !== null ? ` for ${money(best.usd_per_hour)} an hour` : "";
    const verb = best && Estimates.isSimulated(data, best) ? "keeps the SLO (simulated)" : "should keep the SLO (an estimate)";
    place("answer").textContent = best ? `${best.name}${price} ${verb}.` : "Nothing keeps this SLO at this rate, of the devices on offer.";
    const all = shown.evaluations.length.toLocaleString("en");
    place("answer-how").textContent = shown.isMoved
      ? `${kept.toLocaleString("en")} of ${all} deployments keep it. Simulated was the rate of ${SLIDERS.rate.shown(asked.rate)}${data.evaluations.some((one) => one.simulated.length > 1) ? ", and for the recommended deployment some others" : ""}: what follows from these requests is marked 'simulation'. All else is 'estimate': the closed form, on straight lines between points that it was computed at, times the errors that simulations found in it.`
      : `${kept.toLocaleString("en")} of ${all} deployments keep the SLO as it was asked. Move a slider, and chart, table and recommendation follow.`;
    place("again").hidden = !shown.isMoved;
    place("again-command").textContent = Estimates.command(data, question, "");
  }

  function connectSliders() {
    place("what-if-card").hidden = !data.curves.length;
    resetSliders();
    for (const name of Object.keys(SLIDERS)) place(name).addEventListener("input", ask);
    place("reset").addEventListener("click", () => { resetSliders(); ask(); place("rate").focus(); });
    for (const button of document.querySelectorAll("[data-copies]")) {
      const source = place(button.dataset.copies);
      button.addEventListener("click", () => copy(button, "Copy", source.textContent, source));
    }
  }

  showTexts();
  showPruned();
  showFilters();
  fillAxes();
  showAxes();
  fromHash();
  connectSliders();
  showAnswer();
  place("shown-rows").replaceChildren(...ROWS.map(([value, name]) => Object.assign(node("option", name), { value })));
  place("shown-rows").value = state.rows;
  place("shown-rows").addEventListener("change", (event) => { state.rows = event.target.value; state.isWhole = false; showTable(); });
  place("more-button").addEventListener("click", () => { state.isWhole = true; showTable(); });
  window.addEventListener("hashchange", () => { fromHash(); refresh(); showPanel(); });
  place("frontier").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !state.line.length) return;
    event.preventDefault();
    const at = state.line.findIndex(({ i }) => i === state.selected);
    select(state.line[at < 0 ? 0 : Math.min(Math.max(at + step, 0), state.line.length - 1)].i);
  });
  refresh();
  showPanel();
})();
