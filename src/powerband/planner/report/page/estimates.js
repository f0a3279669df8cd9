// What a plan's deployments do at another rate and under other limits, and their plan files and commands. No page here: pure
// functions of the page's data, so that they can be held against the planner's own.
"use strict";

const Estimates = (() => {
  const MARGIN = 1.05, SAME_PRICE = 1e-3; // as the planner's selection
  const MAX_RATIO = 1.5;

  // question: {rate, ttft, tpot}; a limit that is null is none.
  const asked = (data) => ({ rate: data.rate, ttft: data.slo.limits.ttft ?? null, tpot: data.slo.limits.tpot ?? null });
  const isSame = (a, b) => a.rate === b.rate && a.ttft === b.ttft && a.tpot === b.tpot;

  // Of one replica at one speed, on straight lines between the points; infinity: it never ends.
  function read(points, capacity, values, rate) {
    const at = rate / capacity;
    if (at > points[points.length - 1]) return Infinity;
    let place = 0;
    while (place < points.length && points[place] <= at) place++;
    if (place === 0 || place === points.length) return values[Math.max(place - 1, 0)] ?? Infinity;
    const [low, high] = [points[place - 1], points[place]];
    return values[place - 1] + ((at - low) / (high - low)) * (values[place] - values[place - 1]);
  }

  // speed: 0 as predicted, 1 at the slow edge, 2 at the fast one.
  function times(data, one, rate, speed) {
    const curve = data.curves[one.curve], each = rate / one.count, points = data.plan.points;
    const [ttft, tpot] = ["ttft_s", "tpot_s"].map((name, i) => read(points, curve.capacity[speed], curve[name][speed], each) * one.factors[i]);
    return { ttft, tpot, e2e: ttft + (curve.output - 1) * tpot };
  }

  function keeps(data, found, question) {
    const within = (value, limit) => limit === null || limit === undefined || value <= limit;
    return Number.isFinite(found.ttft) && within(found.ttft, question.ttft) && within(found.tpot, question.tpot) && within(found.e2e, data.slo.limits.e2e);
  }

  function keptRate(data, one, question, speed) {
    const most = data.curves[one.curve].capacity[speed] * one.count;
    let low = 0, high = most;
    for (let i = 0; i < 40; i++) {
      const middle = (low + high) / 2;
      if (keeps(data, times(data, one, middle, speed), question)) low = middle;
      else high = middle;
    }
    return low > most * 1e-4 ? low : 0;
  }

  // What simulations at the slow edge say of limits: [highest rate that is kept, lowest that is missed].
  function simulated(one, question) {
    const isKept = (limits) => limits.some(([ttft, tpot]) => (question.ttft === null || ttft <= question.ttft) && (question.tpot === null || tpot <= question.tpot));
    const rates = (wanted) => one.simulated.filter(([, limits]) => isKept(limits) === wanted).map(([rate]) => rate);
    return [Math.max(0, ...rates(true)), Math.min(Infinity, ...rates(false))];
  }

  // Up to which rate: [as predicted, at the slow edge, at the fast one].
  function capacity(data, one, question) {
    const [value, slow, fast] = [0, 1, 2].map((speed) => keptRate(data, one, question, speed));
    const [kept, missed] = simulated(one, question);
    let low = Math.max(slow, kept);
    if (missed < Infinity) low = Math.min(low, kept > 0 && kept < missed ? kept : missed * 0.99);
    const most = Math.max(value, low);
    return [most, low, Math.max(most, Math.min(fast, value * MAX_RATIO))];
  }

  // [whether the SLO is kept at the slow edge, by which method]
  function judged(data, one, question) {
    const [kept, missed] = simulated(one, question);
    const exact = one.simulated.find(([rate]) => rate === question.rate);
    if (exact) return [kept >= question.rate && !(missed <= question.rate), "simulation"];
    if (question.rate >= missed) return [false, "simulation"];
    if (question.rate <= kept) return [true, "simulation"];
    if (kept > 0 && missed < Infinity) return [false, "simulation"]; // between the two: only what was kept is promised
    return one.curve === undefined ? [null, "unknown"] : [keeps(data, times(data, one, question.rate, 1), question), "estimate"];
  }

  // A deployment at a question; null: nothing is known of it there.
  function at(data, one, question) {
    const [meets, method] = judged(data, one, question);
    if (meets === null) return null;
    const known = question.rate === data.rate && one.isPlanned !== false;
    const figures = {};
    if (known) for (const name of ["ttft_s", "tpot_s", "e2e_s", "e2e_mean_s", "output_tokens_per_s"]) if (name in one.figures) figures[name] = one.figures[name];
    if (!known && one.curve === undefined) return null;
    if (!known) {
      const [value, slow, fast] = [0, 1, 2].map((speed) => times(data, one, question.rate, speed));
      const curve = data.curves[one.curve];
      const banded = (name) => (Number.isFinite(value[name]) ? [value[name], fast[name], Number.isFinite(slow[name]) ? slow[name] : null] : null);
      figures.ttft_s = banded("ttft");
      figures.tpot_s = banded("tpot");
      figures.e2e_mean_s = [null, null, read(data.plan.points, curve.capacity[1], curve.e2e_mean_s, question.rate / one.count) * one.factors[2]];
      figures.output_tokens_per_s = [0, 1, 2].map((speed) => Math.min(question.rate, curve.capacity[speed] * one.count) * curve.output_of_arrival);
    }
    if (one.curve !== undefined) figures.capacity = capacity(data, one, question);
    const tokens = figures.output_tokens_per_s[0] * 3600;
    return { ...one, figures, meets_slo: meets, how: method, usd_per_million_tokens: one.usd_per_hour === null || tokens <= 0 ? null : (one.usd_per_hour / tokens) * 1e6 };
  }

  // The same replicas in another number.
  function withCount(data, one, count) {
    const curve = data.curves[one.curve], priced = data.prices[curve.prices][count - 1];
    return {
      ...one, count, isPlanned: false, simulated: [], devices: count * curve.devices, devices_text: `${count * curve.devices} ${curve.device}`,
      name: curve.name.join(String(count)), id: curve.id.join(String(count)), layout: `${curve.layout}${count}`,
      usd_per_hour: priced[0], machines: priced[1], prices: priced[2],
    };
  }

  // Of each kind of replica, the fewest that keep the SLO, where the plan has not looked at so many.
  function others(data, question) {
    const kinds = new Map();
    for (const one of data.evaluations) if (one.curve !== undefined) kinds.set(one.curve, [...(kinds.get(one.curve) || []), one]);
    const found = [];
    for (const [number, members] of kinds) {
      const counts = data.prices[data.curves[number].prices].length;
      for (let count = 1; count <= counts; count++) {
        const nearest = members.slice().sort((a, b) => Math.abs(a.count - count) - Math.abs(b.count - count))[0];
        if (nearest.count === count) {
          if (at(data, nearest, question).meets_slo) break;
          continue;
        }
        const made = at(data, withCount(data, nearest, count), question);
        if (made.meets_slo) {
          found.push(made);
          break;
        }
      }
    }
    return found;
  }

  const price = (one) => (one.usd_per_hour === null ? [1, one.devices] : [0, one.usd_per_hour]);

  // The smaller the better, as the planner orders.
  function order(data, one) {
    const latency = one.figures.e2e_mean_s ? (one.figures.e2e_mean_s[2] ?? Infinity) : Infinity;
    const holds = one.figures.capacity ? one.figures.capacity[1] : 0;
    if (data.plan.objective === "latency") return [latency, ...price(one), -holds];
    if (data.plan.objective === "throughput") return [-holds, ...price(one), latency];
    return [...price(one), latency, -holds];
  }

  function compare(a, b) {
    for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] < b[i] ? -1 : 1;
    return 0;
  }

  function recommended(data, evaluations) {
    let best = null;
    evaluations.forEach((one, i) => {
      const isWithin = data.budget === null || (one.usd_per_hour !== null && one.usd_per_hour <= data.budget);
      if (one.meets_slo && isWithin && (best === null || compare(order(data, one), order(data, evaluations[best])) < 0)) best = i;
    });
    return best;
  }

  // Another costs no more and is no slower, by a hair at most.
  function marked(evaluations, chosen) {
    const value = (one, name) => (one.figures[name] ? one.figures[name][0] : Infinity);
    const points = evaluations.map((one) => [...price(one), value(one, "ttft_s"), value(one, "tpot_s")]);
    const beats = (a, b) => a[0] === b[0] && a[1] <= b[1] && a[2] <= b[2] * MARGIN && a[3] <= b[3] * MARGIN;
    const kept = [], dominated = points.map(() => true);
    for (const i of points.map((_, i) => i).sort((a, b) => compare(points[a], points[b]))) {
      if (Number.isFinite(points[i][2]) && (i === chosen || !kept.some((other) => beats(other, points[i])))) {
        dominated[i] = false;
        kept.push(points[i]);
      }
    }
    return evaluations.map((one, i) => ({ ...one, dominated: dominated[i] }));
  }

  // {evaluations, recommended: its place or null, isMoved}
  function answer(data, question) {
    if (isSame(question, asked(data))) return { evaluations: data.evaluations, recommended: data.recommended, roles: data.roles, isMoved: false };
    const known = data.evaluations.map((one) => at(data, one, question)).filter(Boolean);
    const found = [...known, ...others(data, question)];
    const best = recommended(data, found);
    return { evaluations: marked(found, best), recommended: best, roles: {}, isMoved: true };
  }

  function seconds(value) {
    return value >= 1 ? `${Number(value.toPrecision(6))}s` : `${Number((value * 1000).toPrecision(6))}ms`;
  }

  function quoted(word) {
    return /^[A-Za-z0-9_@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, "'\"'\"'")}'`;
  }

  function sloText(data, question) {
    const limits = { ...data.slo.limits, ttft: question.ttft, tpot: question.tpot };
    const at = `@p${Number((data.slo.attainment * 100).toPrecision(6))}`;
    return Object.entries(limits).filter(([, limit]) => limit !== null && limit !== undefined).map(([name, limit]) => `${name}=${seconds(limit)}${at}`).join(",");
  }

  // pick: the id of a deployment, or "" for a plan of all.
  function command(data, question, pick) {
    const { plan } = data, first = asked(data);
    const isMoved = question.ttft !== first.ttft || question.tpot !== first.tpot;
    const rate = question.rate === data.rate ? plan.rate : String(question.rate);
    const slo = isMoved ? sloText(data, question) : plan.slo_text;
    const words = [...plan.command, ...(rate ? ["--rate", rate] : []), ...(slo ? ["--slo", slo] : []), ...(pick ? ["--pick", pick] : []), "-o", "plan.yaml"];
    return words.map(quoted).join(" ");
  }

  // As YAML reads a number: never with an exponent alone.
  function number(value) {
    const text = String(Number(value.toPrecision(7)));
    return text.includes("e") ? value.toFixed(12) : text;
  }

  function planFile(data, one, question) {
    const { plan } = data;
    const line = (name, value) => `  ${name}: ${number(value)}\n`;
    const limits = { ...plan.slo };
    for (const name of ["ttft", "tpot"]) {
      delete limits[`${name}_s`];
      if (question[name] !== null) limits[`${name}_s`] = question[name];
    }
    const slo = ["ttft_s", "tpot_s", "stall_s", "e2e_s", "attainment"].filter((name) => limits[name] !== undefined).map((name) => line(name, limits[name]));
    const tokens = one.figures.output_tokens_per_s ? one.figures.output_tokens_per_s[1] : 0;
    const predicted = Object.entries(one.figures).filter(([, figure]) => figure && figure.every((value) => Number.isFinite(value) && value !== null))
      .map(([name, [value, low, high]]) => `  ${name}:\n    value: ${number(value)}\n    low: ${number(low)}\n    high: ${number(high)}\n`);
    const cost = one.usd_per_hour === null || one.usd_per_million_tokens === null ? "" : `cost:\n${line("usd_per_hour", one.usd_per_hour)}${line("usd_per_million_tokens", one.usd_per_million_tokens)}  machines:\n${one.machines.map(([name, count]) => `    ${JSON.stringify(name)}: ${count}\n`).join("")}`;
    const deployment = data.texts[one.deployment];
    return [
      ...notes(data, one).map((note) => `# ${note}\n`), plan.head, one.count === null ? deployment : deployment.replace(/^( +count:) 1$/m, `$1 ${one.count}`), plan.workload,
      "slo:\n", ...slo, "promise:\n", line("rate", question.rate), ...(tokens > 0 ? [line("output_tokens_per_s", tokens)] : []),
      ...(predicted.length ? ["predicted:\n", ...predicted] : []), cost,
    ].join("");
  }

  // What somebody who deploys it should know.
  function notes(data, one) {
    const found = [];
    if (!one.meets_slo) found.push("This deployment misses the SLO.");
    if (!isSimulated(data, one)) found.push("Its figures are estimates in closed form: 'powerband simulate plan.yaml' simulates them.");
    return found;
  }

  function isSimulated(data, one) {
    return (one.how ?? data.texts[one.method]) === "simulation";
  }

  return { asked, isSame, answer, at, command, planFile, notes, isSimulated, sloText };
})();
