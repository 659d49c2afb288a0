"use strict";
// Draws what the page's data holds: no figure here is computed from measurements, only laid out.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const POINT = { reqs: 0, qo: 1, kv: 2, heldOut: 3, shift: 4, fastest: 5, answer: 6, ambiguous: 7, gain: 8, costs: 9, failures: 10 };
  // Points at which a path failed, and at which one was not timed: neither can be compared.
  const CELL = { reqs: 0, qo: 1, kv: 2, fastest: 3, undecided: 4, us: 5 };

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(at("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  // ---- words -------------------------------------------------------------------------------------------------------
  function tokens(count) {
    for (const [unit, size] of [["M", 1 << 20], ["K", 1 << 10]]) {
      if (count >= size) {
        const scaled = count / size;
        return (Number.isInteger(scaled) ? scaled : Number(scaled.toPrecision(3))) + unit;
      }
    }
    return String(Math.round(count));
  }
  const exact = (count) => (count >= 1024 && Number.isInteger(count) ? `${count.toLocaleString("en-US")} (${tokens(count)})` : String(count));
  function time(us) {
    if (us >= 1e6) return `${Number((us / 1e6).toPrecision(4))} s`;
    if (us >= 1e4) return `${Number((us / 1e3).toPrecision(4))} ms`;
    return `${Number(us.toPrecision(4))} µs`;
  }
  const requests = (low, high) => (low === high ? (low === 1 ? "1 request" : `${low} requests`) : `${low} to ${high} requests`);
  const shape = (reqs, qo, kv) => `${qo.toLocaleString("en-US")} query tokens, ${tokens(kv)} context, ${requests(reqs, reqs)}`;
  const interval = (cost) => `${time(cost[0])}  (95 %: ${time(cost[1])} to ${time(cost[2])})`;

  // ---- state -------------------------------------------------------------------------------------------------------
  const state = { policy: String(data.policies.length - 1), engine: "", site: "", model: "", layer: "", view: "", stage: "", spread: "table" };
  const shown = { areas: true, bracket: true, rules: true, points: true };
  const modelKey = (m) => `${m.model}|${m.h_q ?? ""}`;
  const dimensions = [
    { name: "policy", of: (m) => String(m.policy), words: (m) => data.policies[m.policy].provider },
    { name: "engine", of: (m) => m.engine, words: (m) => m.engine_words },
    { name: "site", of: (m) => m.site, words: (m) => data.words.sites[m.site] },
    { name: "model", of: modelKey, words: (m) => data.words.models[modelKey(m)] },
    { name: "layer", of: (m) => m.layer, words: (m) => (m.layer === "forward" ? "whole forward" : m.layer) },
  ];
  const first = { engine: "sglang", site: "prefill_attention", layer: "forward" };

  function readHash() {
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in state) state[key] = value;
  }
  function writeHash() {
    const text = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== "")).toString();
    history.replaceState(null, "", `#${text}`);
  }

  function settle() {
    let left = data.maps;
    for (const dimension of dimensions) {
      const values = new Map(left.map((m) => [dimension.of(m), dimension.words(m)]));
      if (!values.has(state[dimension.name])) {
        state[dimension.name] = values.has(first[dimension.name]) ? first[dimension.name] : values.keys().next().value;
      }
      const all = new Map(data.maps.map((m) => [dimension.of(m), dimension.words(m)]));
      offer(dimension.name, all, values);
      left = left.filter((m) => dimension.of(m) === state[dimension.name]);
    }
    const map = left[0];
    const views = new Map(map.views.map((v) => [v.num_reqs.join("-"), requests(...v.num_reqs)]));
    if (!views.has(state.view)) state.view = views.keys().next().value;
    offer("view", views, views);
    const stages = stageGroups(map);
    if (!stages.has(state.stage)) state.stage = ["c4a|attention", "dsa|attention"].find((key) => stages.has(key)) ?? [...stages.keys()].find((key) => key.endsWith("|attention")) ?? stages.keys().next().value ?? "";
    offerStages(stages);
    return map;
  }

  // Radio buttons of one dimension; a value without a map for what is chosen before it is disabled.
  function offer(name, all, possible) {
    const box = at(`choose-${name}`);
    const keys = [...all.keys()];
    if (box.dataset.keys !== keys.join("\n")) {
      box.dataset.keys = keys.join("\n");
      box.replaceChildren(...keys.map((key) => {
        const label = document.createElement("label");
        const input = Object.assign(document.createElement("input"), { type: "radio", name, value: key });
        const text = Object.assign(document.createElement("span"), { textContent: all.get(key) });
        input.addEventListener("change", () => { state[name] = key; draw(); });
        label.append(input, text);
        return label;
      }));
    }
    for (const input of box.querySelectorAll("input")) {
      input.disabled = !possible.has(input.value);
      input.parentElement.hidden = input.disabled;
      input.checked = input.value === state[name];
    }
    box.closest("fieldset").hidden = possible.size < 2 && all.size < 2;
  }

  // ---- looks -------------------------------------------------------------------------------------------------------
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  let printing = false;
  const isDark = () => !printing && document.documentElement.dataset.theme === "dark";
  const colour = (candidate) => data.looks[candidate][isDark() ? "dark" : "light"];
  const symbol = (candidate) => data.looks[candidate].symbol;
  const faint = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const narrow = () => (printing ? false : window.innerWidth < 640);

  function ticks(low, high, step) {
    const values = [];
    for (let octave = Math.ceil(Math.log2(low)); octave <= Math.log2(high) + 1e-9; octave += 1) if (octave % step === 0) values.push(2 ** octave);
    return { tickmode: "array", tickvals: values, ticktext: values.map(tokens) };
  }
  const decades = (unit) => {
    const values = [];
    for (let power = -2; power <= 8; power += 1) values.push(10 ** power);
    return { tickmode: "array", tickvals: values, ticktext: values.map(unit) };
  };
  function layout(x, y, extra) {
    const text = css("text"), grid = css("grid");
    const axis = (given) => ({
      type: "log", gridcolor: grid, linecolor: css("edge"), zeroline: false, automargin: true, showline: true, mirror: true, ...given,
    });
    return {
      paper_bgcolor: css("ground"), plot_bgcolor: css("ground"), font: { color: text, size: narrow() ? 12 : 13.5 },
      margin: { l: narrow() ? 50 : 64, r: 12, t: 14, b: 50 }, showlegend: false, hovermode: "closest", dragmode: narrow() ? false : "zoom",
      hoverlabel: { bgcolor: css("raised"), bordercolor: css("edge"), font: { color: text, size: 13 }, align: "left" },
      xaxis: axis(x), yaxis: axis(y), ...extra,
    };
  }
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], displayModeBar: false };

  // Drawn, and then told its own size, so that paper can scale it whatever its width is.
  async function plot(id, traces, shape) {
    await Plotly.react(id, traces, shape, config);
    sized(id);
  }
  function sized(id) {
    const { width, height } = at(id)._fullLayout;
    for (const svg of at(id).querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    at(id).style.setProperty("--ratio", `${width} / ${height}`);
  }

  function swatch(kind, hex, sign) {
    const signs = {
      circle: '<circle cx="8" cy="8" r="5.5"/>', square: '<rect x="3" y="3" width="10" height="10"/>',
      diamond: '<path d="M8 1.5 14.5 8 8 14.5 1.5 8z"/>', "triangle-up": '<path d="M8 2 14.5 13.5h-13z"/>',
      cross: '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>', hexagon: '<path d="M5 2h6l3 6-3 6H5L2 8z"/>', star: '<path d="m8 1 2 5h5l-4 3 2 6-5-4-5 4 2-6-4-3h5z"/>',
    };
    const inner = {
      point: () => `<g fill="${hex}">${signs[sign]}</g>`,
      open: () => `<g fill="none" stroke="${hex}" stroke-width="1.6">${signs[sign]}</g>`,
      ring: () => `<circle cx="8" cy="8" r="5" fill="${faint(hex, 0.25)}" stroke="${hex}" stroke-width="2.4"/>`,
      area: () => `<rect x="0" y="2" width="16" height="12" fill="${faint(hex, 0.3)}"/>`,
      line: () => `<path d="M0 8h16" stroke="${hex}" stroke-width="3"/>`,
      dash: () => `<path d="M0 8h16" stroke="${hex}" stroke-width="2" stroke-dasharray="4 3"/>`,
      dot: () => `<path d="M0 8h16" stroke="${hex}" stroke-width="2.4" stroke-dasharray="1.5 3"/>`,
      plus: () => `<path d="M8 2v12M2 8h12" stroke="${hex}" stroke-width="1.6"/>`,
      times: () => `<path d="M3 3l10 10M13 3 3 13" stroke="${hex}" stroke-width="2.2"/>`,
    }[kind]();
    return `<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">${inner}</svg>`;
  }
  function key(box, entries) {
    box.replaceChildren(...entries.map(([mark, words, toggle]) => {
      const label = document.createElement(toggle ? "label" : "span");
      label.style.cssText = "display:inline-flex;align-items:center;gap:.4rem";
      if (toggle) {
        const input = Object.assign(document.createElement("input"), { type: "checkbox", checked: shown[toggle], className: "screen" });
        input.dataset.toggle = toggle;
        input.addEventListener("change", () => {
          shown[toggle] = input.checked;
          drawMap(current).then(() => box.querySelector(`[data-toggle=${toggle}]`)?.focus());
        });
        label.append(input);
      }
      label.insertAdjacentHTML("beforeend", mark);
      label.append(words);
      return label;
    }));
  }

  // ---- the map -----------------------------------------------------------------------------------------------------
  const inView = (map) => map.views.find((v) => v.num_reqs.join("-") === state.view);
  const pointsOf = (map, view) => map.points.filter((p) => p[POINT.reqs] >= view.num_reqs[0] && p[POINT.reqs] <= view.num_reqs[1]);
  const unit = (map) => (map.layer === "forward" && map.site === "prefill_attention" ? "a forward" : map.site === "prefill_attention" ? "a layer" : "a forward");

  function described(map, p) {
    const lines = [`<b>${shape(p[POINT.reqs], p[POINT.qo], p[POINT.kv])}</b>`];
    const order = map.candidates.map((_, index) => index).filter((index) => p[POINT.costs][index]);
    order.sort((a, b) => p[POINT.costs][a][0] - p[POINT.costs][b][0]);
    for (const index of order) lines.push(`${map.candidates[index]}: ${interval(p[POINT.costs][index])}`);
    if (partly(p)) lines.push("a path was not timed with the launch parameters of this policy");
    for (const text of p[POINT.failures]) lines.push(text.length > 90 ? `${text.slice(0, 87)}...` : text);
    if (p[POINT.ambiguous]) lines.push("cannot be told apart: the intervals overlap");
    else if (whole(p) && order.length > 1) lines.push(`${map.candidates[order[0]]} is faster, ${(p[POINT.costs][order[1]][0] / p[POINT.costs][order[0]][0]).toFixed(2)}x`);
    lines.push(`the policy takes ${map.candidates[p[POINT.answer]]}; ${p[POINT.heldOut] ? "held out, the fit never saw it" : "seen by the fit"}`);
    return lines.join("<br>");
  }
  const failed = (p) => p[POINT.failures].length > 0;
  const partly = (p) => !failed(p) && p[POINT.costs].some((cost) => cost === null);
  const whole = (p) => !failed(p) && !partly(p);
  const clear = (p, index) => whole(p) && p[POINT.fastest] === index && !p[POINT.ambiguous];
  const size = (gain) => 8 + 3.2 * Math.min(Math.abs(Math.log2(gain ?? 1)) * 1.6, 3);
  const aside = (p) => p[POINT.qo] * 1.09 ** p[POINT.shift];

  function pointTraces(map, view) {
    const points = pointsOf(map, view);
    const groups = [];
    map.candidates.forEach((candidate, index) => {
      groups.push([points.filter((p) => clear(p, index)), symbol(candidate), colour(candidate)]);
      groups.push([points.filter((p) => whole(p) && p[POINT.fastest] === index && p[POINT.ambiguous]), `${symbol(candidate)}-open`, css("quiet")]);
    });
    groups.unshift([points.filter(partly), "cross-thin-open", faint(css("quiet"), 0.75)]);
    groups.push([points.filter(failed), "x-thin-open", css("text")]);
    return groups.filter(([members]) => members.length).map(([members, sign, hex]) => ({
      type: "scatter", mode: "markers", x: members.map(aside), y: members.map((p) => p[POINT.kv]),
      text: members.map((p) => described(map, p)), hovertemplate: "%{text}<extra></extra>", meta: "points",
      marker: {
        symbol: sign, color: hex, opacity: 0.95, size: members.map((p) => size(p[POINT.gain]) - (narrow() ? 1.5 : 0)),
        line: {
          color: members.map((p) => (p[POINT.heldOut] ? css("text") : sign.endsWith("open") ? hex : css("ground"))),
          width: members.map((p) => (p[POINT.heldOut] ? 2.4 : sign.endsWith("open") ? 1.6 : 0.8)),
        },
      },
    }));
  }

  function cellTraces(map, view) {
    const traces = [];
    const off = map.noise_band;
    const describe = (c) => [
      `<b>${shape(c[CELL.reqs], c[CELL.qo], c[CELL.kv])}</b>`,
      ...map.candidates.map((name, index) => `${name}: ${time(c[CELL.us][index])} predicted`),
      c[CELL.undecided] ? `undecided: closer than both may be off (${(off * 100).toFixed(0)} %)` : `${map.candidates[c[CELL.fastest]]} is predicted to be faster`,
    ].join("<br>");
    map.candidates.forEach((candidate, index) => {
      for (const undecided of [false, true]) {
        const cells = view.cells.filter((c) => c[CELL.fastest] === index && c[CELL.undecided] === undecided);
        if (cells.length) traces.push({
          type: "scatter", mode: "markers", x: cells.map((c) => c[CELL.qo]), y: cells.map((c) => c[CELL.kv]), meta: "points",
          text: cells.map(describe), hovertemplate: "%{text}<extra></extra>",
          marker: { symbol: undecided ? `${symbol(candidate)}-open` : symbol(candidate), color: undecided ? css("quiet") : colour(candidate), size: 7, opacity: undecided ? 0.8 : 0.7 },
        });
      }
    });
    return traces;
  }

  function areaTraces(map, view) {
    return map.candidates.map((candidate, index) => {
      const x = [], y = [];
      for (const region of view.regions.filter((r) => r.candidate === index)) {
        for (const [qo, kv] of [...region.corners, region.corners[0]]) { x.push(qo); y.push(kv); }
        x.push(null); y.push(null);
      }
      return { type: "scatter", mode: "lines", x, y, fill: "toself", fillcolor: faint(colour(candidate), isDark() ? 0.24 : 0.17), line: { width: 0 }, hoverinfo: "skip" };
    }).filter((trace) => trace.x.length);
  }

  function boundaryTraces(map, view) {
    const traces = [];
    for (const b of view.boundaries) {
      if (shown.bracket && b.bracket.length) {
        const inside = (edge, kv) => Math.max(map.num_qo_tokens[0], Math.min(edge, map.num_qo_tokens[1], kv));
        const low = b.bracket.map(([edge], i) => inside(edge, b.kv_tokens[i])), high = b.bracket.map(([, edge], i) => inside(edge, b.kv_tokens[i]));
        traces.push({
          type: "scatter", mode: "lines", x: [...low, ...high.slice().reverse()], y: [...b.kv_tokens, ...b.kv_tokens.slice().reverse()],
          fill: "toself", fillcolor: faint(isDark() ? "#ffffff" : "#000000", 0.13), line: { width: 0.8, color: css("quiet"), dash: "dot" }, hoverinfo: "skip",
        });
      }
    }
    for (const b of view.boundaries) {
      const text = b.kv_tokens.map((kv, index) => [
        `<b>threshold at ${tokens(kv)} context: ${exact(b.num_qo_tokens[index])} query tokens</b>`,
        `below ${map.candidates[b.before]}, from there up ${map.candidates[b.after]}`,
        b.bracket.length ? `bracket ${exact(b.bracket[index][0])} to ${exact(b.bracket[index][1])}` : "",
        b.win ? `mean win at the edges: ${map.candidates[b.before]} ${(100 * b.win[0]).toFixed(0)} %, ${map.candidates[b.after]} ${(100 * b.win[1]).toFixed(0)} %` : "",
      ].filter(Boolean).join("<br>"));
      traces.push({ type: "scatter", mode: "lines", x: b.num_qo_tokens, y: b.kv_tokens, text, hovertemplate: "%{text}<extra></extra>", line: { color: css("text"), width: 2.6 } });
    }
    return traces;
  }

  function ruleTraces(view) {
    const dashes = ["dash", "dashdot", "dot"];
    return view.typed_rules.map((rule, index) => {
      if (!rule.ends.length) return null;
      const [[x0, y0], [x1, y1]] = rule.ends;
      const steps = [...Array(25).keys()].map((i) => i / 24);
      return {
        type: "scatter", mode: "lines", x: steps.map((s) => x0 * (x1 / x0) ** s), y: steps.map((s) => y0 * (y1 / y0) ** s),
        text: steps.map(() => rule.meaning), hovertemplate: "%{text}<extra></extra>", line: { color: css("quiet"), width: 1.8, dash: dashes[index % 3] },
      };
    }).filter(Boolean);
  }
  function ruleLabels(view, xRange, yRange) {
    const box = at("map").getBoundingClientRect();
    const rise = (box.height - 75) / (yRange[1] - yRange[0]), run = (box.width - (narrow() ? 66 : 90)) / (xRange[1] - xRange[0]);
    const slope = -Math.atan(rise / run) * (180 / Math.PI);  // a ratio is a line of slope 1 on two logarithms
    let uprights = 0;
    return view.typed_rules.filter((rule) => rule.ends.length).map((rule) => {
      const [[x0, y0], [x1, y1]] = rule.ends;
      const upright = x0 === x1;
      const top = upright && uprights++ === 0;
      const place = upright ? (top ? 0.985 : 0.015) : 0.7;
      return {
        x: Math.log10(x0 * (x1 / x0) ** place), y: Math.log10(y0 * (y1 / y0) ** place), text: rule.label, showarrow: false, textangle: upright ? -90 : slope,
        xanchor: upright ? "right" : "center", yanchor: top ? "top" : upright ? "bottom" : "middle", xshift: upright ? 0 : -9 * Math.sin(-slope * Math.PI / 180),
        yshift: upright ? 0 : 9 * Math.cos(-slope * Math.PI / 180), bgcolor: upright ? faint(css("ground"), 0.65) : "rgba(0,0,0,0)",
        font: { size: narrow() ? 10.5 : 12, color: css("quiet") }, borderpad: 1,
      };
    });
  }

  function mapKey(map, view) {
    const modelled = data.policies[map.policy].modelled_from !== null;
    const points = pointsOf(map, view);
    const entries = [];
    map.candidates.forEach((candidate, index) => {
      const any = modelled ? view.cells.some((c) => c[CELL.fastest] === index && !c[CELL.undecided]) : points.some((p) => clear(p, index));
      if (any) entries.push([swatch("point", colour(candidate), symbol(candidate)), `${candidate} ${modelled ? "predicted" : "measured"} faster`]);
    });
    if (points.some((p) => whole(p) && p[POINT.ambiguous])) entries.push([swatch("open", css("quiet"), "circle"), "cannot be told apart"]);
    if (view.cells.some((c) => c[CELL.undecided])) entries.push([swatch("open", css("quiet"), "circle"), "undecided: closer than the model is sure"]);
    if (points.some(failed)) entries.push([swatch("times", css("text")), "a path failed here"]);
    if (points.some(partly)) entries.push([swatch("plus", css("quiet")), "a path was not timed here"]);
    if (points.some((p) => p[POINT.heldOut])) entries.push([swatch("ring", css("text")), "held out: the fit never saw it"]);
    entries.unshift(["", modelled ? "Predictions" : "Points", "points"]);
    const answers = [["", "Policy's answer", "areas"]];
    map.candidates.forEach((candidate, index) => {
      if (view.regions.some((r) => r.candidate === index)) answers.push([swatch("area", colour(candidate)), `takes ${candidate}`]);
    });
    if (view.boundaries.length) answers.push([swatch("line", css("text")), "its threshold"]);
    const bracket = view.boundaries.some((b) => b.bracket.length) ? [[swatch("area", isDark() ? "#ffffff" : "#000000"), "Bracket: the crossing lies inside", "bracket"]] : [];
    const typed = view.typed_rules.some((rule) => rule.ends.length) ? [[swatch("dash", css("quiet")), "Typed constants", "rules"]] : [];
    key(at("map-key"), [...entries, ...answers, ...bracket, ...typed]);
  }

  let current = null;
  let order = [];
  async function drawMap(map) {
    const view = inView(map);
    mapKey(map, view);
    const traces = [...(shown.areas ? areaTraces(map, view) : []), ...boundaryTraces(map, view), ...(shown.rules ? ruleTraces(view) : [])];
    if (shown.points) traces.push(...cellTraces(map, view), ...pointTraces(map, view));
    const x = map.num_qo_tokens, y = view.kv_tokens;
    const pad = (low, high) => [Math.log10(low / 1.35), Math.log10(high * 1.35)];
    const ySpan = y[0] === y[1] ? [y[0] / 8, y[1] * 8] : y;
    const highest = Math.max(x[1], ...pointsOf(map, view).map(aside));
    const spans = [pad(x[0], highest), pad(...ySpan)];
    await plot("map", traces, layout(
      { title: { text: "query tokens of the forward" }, range: spans[0], ...ticks(x[0], highest * 1.3, narrow() ? 4 : 2) },
      { title: { text: "context tokens of the forward" }, range: spans[1], ...ticks(ySpan[0], ySpan[1], 2) },
      { annotations: shown.rules ? ruleLabels(view, ...spans) : [] },
    ));
    order = [];
    traces.forEach((trace, curve) => { if (trace.meta === "points") trace.x.forEach((qo, index) => order.push([qo, trace.y[index], curve, index])); });
    order.sort((a, b) => a[1] - b[1] || a[0] - b[0]);
    at("map").setAttribute("aria-label", `Map of the faster path, ${order.length} shapes. Arrow keys step through them.`);
    mapNotes(map, view);
  }

  function mapNotes(map, view) {
    const origin = data.policies[map.policy];
    const title = [data.words.models[modelKey(map)], map.layer === "forward" ? "whole forward" : `${map.layer} layers`, data.words.sites[map.site].toLowerCase(), requests(...view.num_reqs)];
    at("map-title").textContent = title.join(", ");
    at("map-verdict").textContent = map.win.sentence;
    at("map-where").textContent = `${map.engine_words} chooses; ${origin.provider} run around attention; times are ${origin.regime === "graph" ? "GPU time" : "time with the host's part"} ${unit(map)}. Policy ${origin.file}.`;
    const points = pointsOf(map, view);
    const notes = [];
    if (origin.modelled_from) notes.push(`Modelled from ${origin.modelled_from}: nothing was timed on this GPU. Signs are predictions an octave apart, for ${view.cells.length ? requests(view.cells[0][CELL.reqs], view.cells[0][CELL.reqs]) : "no shape"}.`);
    else {
      const count = (test) => points.filter(test).length;
      notes.push("Larger signs: the engine's default and its best alternative are farther apart.");
      notes.push(`${count(whole)} shapes at which every path was timed, ${count((p) => whole(p) && p[POINT.heldOut])} of them held out; cannot be told apart: ${count((p) => p[POINT.ambiguous])}; a path failed: ${count(failed)}.`);
      if (points.some(partly)) notes.push(`At ${count(partly)} more a path was not timed with the launch parameters of this policy.`);
      if (points.some((p) => p[POINT.shift])) notes.push("Shapes that differ only in their requests are drawn side by side.");
    }
    for (const text of map.censored) notes.push(`Censored: ${text}.`);
    at("map-notes").textContent = notes.join(" ");
    const rows = points.map((p) => {
      const costs = map.candidates.map((_, index) => (p[POINT.costs][index] ? `<td class="number">${interval(p[POINT.costs][index])}</td>` : `<td>${failed(p) ? "failed" : "not timed"}</td>`)).join("");
      const verdict = !whole(p) ? "" : p[POINT.ambiguous] ? "cannot be told apart" : map.candidates[p[POINT.fastest]];
      return `<tr><td class="number">${p[POINT.reqs]}</td><td class="number">${p[POINT.qo]}</td><td class="number">${p[POINT.kv]}</td>${costs}<td>${verdict}</td><td>${map.candidates[p[POINT.answer]]}</td><td>${p[POINT.heldOut] ? "held out" : "fit"}</td></tr>`;
    });
    const heads = ["requests", "query tokens", "context", ...map.candidates, "faster", "policy takes", "role"];
    at("points").innerHTML = `<thead><tr>${heads.map((head) => `<th scope="col">${head}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody>`;
    at("points-box").hidden = !rows.length;
  }

  // Arrow keys step from shape to shape, and say each one.
  let stepped = -1;
  at("map").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !order.length) return;
    event.preventDefault();
    stepped = (stepped + step + order.length) % order.length;
    const [, , curve, index] = order[stepped];
    Plotly.Fx.hover("map", [{ curveNumber: curve, pointNumber: index }]);
    at("said").textContent = at("map").data[curve].text[index].replace(/<br>/g, "; ").replace(/<[^>]+>/g, "");
  });

  // ---- slowdowns ---------------------------------------------------------------------------------------------------
  const dashes = { policy: "solid" };
  function judged(map) {
    if (state.spread === "table") return map.judged;
    const alike = data.maps.filter((m) => m.policy === map.policy && m.engine === map.engine && m.site === map.site && m.layer !== "forward" && m.rules.join() === map.rules.join());
    return alike.flatMap((m) => m.judged.map((p) => [...p, `${data.words.models[modelKey(m)]}, ${m.layer}`]));
  }
  const quantile = (sorted, q) => { const i = (sorted.length - 1) * q, low = Math.floor(i); return sorted[low] + (i - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]); };
  async function drawSpread(map) {
    const points = judged(map);
    at("spread-box").hidden = !map.rules.length;
    if (!map.rules.length) return;
    const style = (rule) => {
      if (rule === "policy") return { color: css("text"), width: 4 };
      const candidate = map.candidates.find((name) => rule === `always ${name}`);
      if (candidate) return { color: colour(candidate), width: 2.4 };
      return { color: css("quiet"), width: 2, dash: rule.startsWith("kv_tokens") ? "dashdot" : "dash" };
    };
    const words = (rule) => {
      if (rule === "policy") return "the policy";
      return rule === `always ${map.candidates[map.incumbent]}` ? `${rule} (the engine's default)` : rule.replaceAll("num_qo_tokens", "query tokens").replace("kv_tokens", "context");
    };
    const rows = [];
    const traces = map.rules.map((rule, index) => {
      const sorted = points.slice().sort((a, b) => a[3][index] - b[3][index]);
      const values = sorted.map((p) => p[3][index]);
      const mean = values.reduce((sum, v) => sum + v, 0) / values.length, geomean = Math.exp(values.reduce((sum, v) => sum + Math.log(v), 0) / values.length);
      rows.push(`<tr><th scope="row">${swatch(style(rule).dash ? "dash" : "line", style(rule).color)} ${words(rule)}</th>${[geomean, mean, quantile(values, 0.95), values.at(-1)].map((v) => `<td class="number">${v.toFixed(3)}</td>`).join("")}</tr>`);
      return {
        type: "scatter", mode: "lines+markers", x: values, y: values.map((_, i) => (100 * (i + 1)) / values.length), line: { ...style(rule), shape: "hv" }, marker: { size: 4, color: style(rule).color },
        text: sorted.map((p) => `<b>${words(rule)}: ${p[3][index].toFixed(3)}x</b><br>${shape(p[0], p[1], p[2])}${p[4] ? `<br>${p[4]}` : ""}`), hovertemplate: "%{text}<extra></extra>",
      };
    }).reverse();
    const most = Math.max(...points.flatMap((p) => p[3]), 1.1);
    at("spread-title").textContent = state.spread === "table" ? `${points.length} held-out shapes of ${at("map-title").textContent.split(",").slice(0, -1).join(",")}` : `${points.length} held-out comparisons, every layer type of every model, each with equal weight`;
    at("spread-table").innerHTML = `<thead><tr><th scope="col">rule</th><th scope="col" class="number">geomean</th><th scope="col" class="number">mean</th><th scope="col" class="number">95 %</th><th scope="col" class="number">worst</th></tr></thead><tbody>${rows.join("")}</tbody>`;
    const marks = [1];  // as many as have room
    for (const v of [1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200]) {
      if (v <= most * 1.05 && Math.log(v / marks.at(-1)) > Math.log(most) * (narrow() ? 0.15 : 0.07)) marks.push(v);
    }
    await plot("spread", traces, layout(
      { title: { text: "time of the rule's path over the faster path" }, range: [Math.log10(0.985), Math.log10(most * 1.08)], tickmode: "array", tickvals: marks, ticktext: marks.map((v) => `${v}x`), tickangle: 0 },
      { title: { text: "share of shapes, %" }, type: "linear", range: [-2, 104] },
    ));
  }

  // ---- stages ------------------------------------------------------------------------------------------------------
  function stageGroups(map) {
    const groups = new Map();
    for (const index of map.stages) {
      const stage = data.stages[index];
      const name = `${stage.layer}|${stage.stage}`;
      groups.set(name, [...(groups.get(name) ?? []), stage]);
    }
    return groups;
  }
  function offerStages(groups) {
    const select = at("choose-stage");
    const keys = [...groups.keys()];
    if (select.dataset.keys !== keys.join("\n")) {
      select.dataset.keys = keys.join("\n");
      select.replaceChildren(...keys.map((k) => Object.assign(document.createElement("option"), { value: k, textContent: `${k.replace("|", ": ").replaceAll("_", " ")} (${groups.get(k).map((s) => s.candidate).join(", ")})` })));
    }
    select.value = state.stage;
    at("stage-box").hidden = !keys.length;
  }
  async function drawStage(map) {
    const members = stageGroups(map).get(state.stage) ?? [];
    if (!members.length) return;
    const traces = [], entries = [];
    const modelled = data.policies[map.policy].modelled_from !== null;
    for (const stage of members) {
      const hex = colour(stage.candidate), x = stage.curve.map((c) => c[0]), y = stage.curve.map((c) => c[1]), off = Math.exp(stage.error);
      traces.push({ type: "scatter", mode: "lines", x: [...x, ...x.slice().reverse()], y: [...y.map((v) => v / off), ...y.map((v) => v * off).reverse()], fill: "toself", fillcolor: faint(hex, 0.14), line: { width: 0 }, hoverinfo: "skip" });
      if (stage.points.length) traces.push({
        type: "scatter", mode: "markers", x: stage.points.map((p) => p[0]), y: stage.points.map((p) => p[1][0]), marker: { size: 6.5, symbol: symbol(stage.candidate), color: hex, opacity: 0.6 },
        text: stage.points.map((p) => `<b>${stage.candidate}, ${stage.stage}: ${interval(p[1])}</b><br>${shape(...p[2])}`), hovertemplate: "%{text}<extra></extra>",
      });
      traces.push({
        type: "scatter", mode: "lines", x, y, line: { color: hex, width: 2.6 },
        text: stage.curve.map((c) => `<b>${stage.candidate}, ${stage.stage}: ${time(c[1])} by the curve</b><br>may be off by ${((off - 1) * 100).toFixed(1)} %${c[2] ? `<br>roofline ${time(c[2])}: ${(100 * c[2] / c[1]).toFixed(0)} % of it reached` : ""}`), hovertemplate: "%{text}<extra></extra>",
      });
      entries.push([swatch("point", hex, symbol(stage.candidate)), `${stage.candidate}: kernel of ${stage.run_by.replace("own", "mla-tune").replace("flash_mla", "FlashMLA").replace("deep_gemm", "DeepGEMM")}, ${stage.often}`]);
    }
    let roofline = false, copied = false;
    const seen = new Set();
    for (const stage of members) {
      for (const [column, dash] of [[2, "dash"], [3, "dot"]]) {
        const curve = stage.curve.filter((c) => c[column] !== null);
        const same = JSON.stringify([column, curve.map((c) => c[column])]);
        if (!curve.length || seen.has(same)) continue;
        seen.add(same);
        if (column === 2) roofline = true; else copied = true;
        traces.push({ type: "scatter", mode: "lines", x: curve.map((c) => c[0]), y: curve.map((c) => c[column]), line: { color: css("text"), width: 1.8, dash }, text: curve.map((c) => `${column === 2 ? "roofline" : "at a copy's bandwidth"}: ${time(c[column])}`), hovertemplate: "%{text}<extra></extra>" });
      }
    }
    if (roofline) entries.push([swatch("dash", css("text")), data.roofline.words]);
    if (copied) entries.push([swatch("dot", css("text")), data.roofline.copy]);
    if (!roofline) entries.push(["", "No roofline: one block does this alone, or its bytes are lost in its launch."]);
    key(at("stage-key"), entries);
    at("stage-note").textContent = `Line: the fitted curve for ${members[0].along}; its band is what it was off by at points left out of it${modelled ? ", and what carrying it to this GPU adds. No points: nobody timed this GPU" : ". Signs: every timing of the stage at any shape"}.`;
    const xs = members.flatMap((s) => [...s.curve.map((c) => c[0]), ...s.points.map((p) => p[0])]);
    const ys = members.flatMap((s) => [...s.curve.flatMap((c) => [c[1], c[2] ?? c[1]]), ...s.points.map((p) => p[1][0])]).filter((v) => v > 0);
    await plot("stage", traces, layout(
      { title: { text: members[0].axis }, range: [Math.log10(Math.min(...xs) / 1.3), Math.log10(Math.max(...xs) * 1.3)], ...ticks(Math.min(...xs), Math.max(...xs), narrow() ? 4 : 2) },
      { title: { text: "time of one run" }, range: [Math.log10(Math.min(...ys) / 1.6), Math.log10(Math.max(...ys) * 1.6)], ...decades(time) },
    ));
  }

  // ---- all of it ---------------------------------------------------------------------------------------------------
  function filterRows() {
    for (const row of document.querySelectorAll("[data-policy]")) row.hidden = row.dataset.policy !== state.policy;
  }
  async function draw() {
    current = settle();
    for (const input of document.querySelectorAll("[name=spread]")) input.checked = input.value === state.spread;
    stepped = -1;
    filterRows();
    await drawMap(current);
    await drawSpread(current);
    await drawStage(current);
    writeHash();
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
  }

  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  let wanted = "auto";
  function theme() {
    document.documentElement.dataset.theme = wanted === "auto" ? (scheme.matches ? "dark" : "light") : wanted;
    at("theme").textContent = `Theme: ${wanted}`;
  }
  at("theme").addEventListener("click", () => { wanted = { auto: "light", light: "dark", dark: "auto" }[wanted]; theme(); draw(); });
  scheme.addEventListener("change", () => { theme(); draw(); });
  at("choose-stage").addEventListener("change", (event) => { state.stage = event.target.value; drawStage(current); writeHash(); });
  for (const input of document.querySelectorAll("[name=spread]")) input.addEventListener("change", () => { state.spread = input.value; drawSpread(current); writeHash(); });
  for (const button of document.querySelectorAll("[data-map]")) {
    button.addEventListener("click", () => {
      const m = data.maps[Number(button.dataset.map)];
      for (const dimension of dimensions) state[dimension.name] = dimension.of(m);
      draw().then(() => at("map-title").scrollIntoView({ block: "start" }));
    });
  }
  const fit = () => Promise.all(["map", "spread", "stage"].filter((id) => at(id).data && at(id).offsetParent).map((id) => Plotly.Plots.resize(at(id)).then(() => sized(id))));
  // On paper everything is on light ground, and as wide as the page.
  const paper = async (on) => {
    printing = on;
    if (on) document.documentElement.dataset.theme = "light"; else theme();
    await draw();
  };
  window.matchMedia("print").addEventListener("change", (event) => paper(event.matches));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if ((width < 640) !== narrow()) { width = window.innerWidth; fit().then(draw); }
  });

  theme();
  readHash();
  try {
    await loadPlotly();
    await draw();
  } catch (error) {
    at("failed").style.display = "block";
    throw error;
  }
})();
