// The curves of a run's page: drawn by uPlot, kept up to date, zoomed and smoothed together.
"use strict";

(() => {
  const root = document.getElementById("curves");
  if (!root) return;

  const { PALETTE, axes, captionOf, element, scales, selected, shortNumber, styles } = CurveKit;
  const form = root.querySelector("form");
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const MAX_APPENDED = 400; // then everything is read again, thinned by the server

  let data = null; // {own, client, sampled, groups, checkpoints}
  let detail = null; // own steps of the zoomed part, in more detail
  let zoom = null; // [min, max] on the x axis
  let plots = [];
  let appended = 0;
  let drawnKey = "";

  // --- x axes -----------------------------------------------------------------------------------

  const mode = () => form.elements.x.value;

  // Tokens at a step, between the own steps around it.
  function tokensAt(step) {
    const { steps, tokens } = data.own;
    let low = 0;
    let high = steps.length - 1;
    if (high < 0 || step < steps[0]) return null;
    if (step >= steps[high]) return tokens[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const part = (step - steps[low]) / (steps[high] - steps[low]);
    return tokens[low] === null || tokens[high] === null ? null : tokens[low] + part * (tokens[high] - tokens[low]);
  }

  function timeAt(step) {
    const { steps, times } = data.own;
    const index = steps.findIndex((one) => one >= step);
    return index < 0 ? (times.length ? times[times.length - 1] : null) : times[index];
  }

  function xOf(source) {
    const own = source === "own" ? detail || data.own : null;
    if (own) return { step: own.steps, tokens: own.tokens, time: own.times }[mode()];
    const steps = data[source].steps;
    if (mode() === "step") return steps;
    if (mode() === "tokens") return steps.map(tokensAt);
    return source === "client" ? data.client.times : steps.map(timeAt);
  }

  // uPlot needs x values that rise; points without one are left out.
  function rising(xs, columns) {
    const keep = [];
    let last = -Infinity;
    xs.forEach((x, index) => {
      if (x !== null && x > last) {
        keep.push(index);
        last = x;
      }
    });
    return [keep.map((index) => xs[index]), ...columns.map((column) => keep.map((index) => column[index] ?? null))];
  }

  const smoothed = (values) => CurveKit.smoothed(values, Number(form.elements.smooth.value));

  // --- what is drawn ----------------------------------------------------------------------------

  function column(source, name) {
    if (source === "own") return (detail || data.own).columns[name];
    return data.sampled[name];
  }

  function chartsOf(group) {
    return group.charts
      .map((chart) => {
        const known = chart.columns.filter(([name]) => (column(chart.source, name) || []).some((value) => value !== null));
        return known.length ? { ...chart, columns: known } : null;
      })
      .filter(Boolean);
  }

  // Charts of the client's metrics come first, those of rewards before the others.
  function clientGroup() {
    const values = data.client.values;
    if (!values.length) return null;
    const rank = ([name]) => (/reward|return|score/i.test(name) ? 0 : /correct|accuracy|success/i.test(name) ? 1 : 2);
    const sorted = [...values].sort((a, b) => rank(a) - rank(b));
    const charts = sorted.map(([name, column]) => ({
      title: name, note: "from your program", columns: [[name, name]], source: "client", values: column, may_be_log: true,
    }));
    const more = data.client.more_names;
    return { title: more ? `Your metrics (${more} more are in the downloads)` : "Your metrics", charts };
  }

  function groups() {
    const own = data.groups.map((group) => ({ title: group.title, charts: chartsOf(group) }));
    return [clientGroup(), ...own].filter((group) => group && group.charts.length);
  }

  function seriesOf(chart) {
    const isLog = form.elements.log.checked && chart.may_be_log;
    const shown = (values) => (isLog ? values.map((value) => (value > 0 ? value : null)) : values);
    const columns = [];
    const bands = [];
    chart.columns.forEach(([name, label], index) => {
      const raw = shown(chart.values || column(chart.source, name));
      const colour = PALETTE[index % PALETTE.length];
      if (Number(form.elements.smooth.value)) columns.push({ values: raw, label: "", colour, isFaint: true });
      columns.push({ values: smoothed(raw), label, colour });
    });
    if (chart.band && column(chart.source, chart.band)) {
      const spread = column(chart.source, chart.band);
      const middle = column(chart.source, chart.columns[0][0]);
      const edge = (sign) => middle.map((value, i) => (value === null || spread[i] == null ? null : value + sign * spread[i]));
      columns.push({ values: edge(1), label: "", colour: PALETTE[0], isEdge: true });
      columns.push({ values: edge(-1), label: "", colour: PALETTE[0], isEdge: true });
      bands.push({ series: [columns.length - 1, columns.length], fill: "#7c3aed22" });
    }
    return { columns, bands, isLog };
  }

  // --- numbers for people -----------------------------------------------------------------------

  function shownX(value) {
    if (value === null || value === undefined) return "";
    if (mode() === "time") return new Date(value * 1000).toLocaleTimeString();
    return mode() === "tokens" ? `${shortNumber(value)} tokens` : `step ${Math.round(value).toLocaleString("en")}`;
  }

  // --- drawing ----------------------------------------------------------------------------------

  function markCheckpoints(plot) {
    const { text, mark } = styles();
    const { left, top, width, height } = plot.bbox;
    const context = plot.ctx;
    context.save();
    context.strokeStyle = mark;
    context.fillStyle = text;
    context.setLineDash([3, 3]);
    for (const checkpoint of data.checkpoints) {
      const at = mode() === "step" ? checkpoint.step : mode() === "tokens" ? tokensAt(checkpoint.step) : timeAt(checkpoint.step);
      if (at === null) continue;
      const x = plot.valToPos(at, "x", true);
      if (x < left - 1 || x > left + width + 1) continue;
      context.beginPath();
      context.moveTo(x, top);
      context.lineTo(x, top + height);
      context.stroke();
      context.beginPath();
      context.moveTo(x - 4, top);
      context.lineTo(x + 4, top);
      context.lineTo(x, top + 6);
      context.fill();
    }
    context.restore();
  }

  function checkpointsNear(plot, x) {
    if (x === null || x === undefined) return "";
    const near = data.checkpoints.filter((checkpoint) => {
      const at = mode() === "step" ? checkpoint.step : mode() === "tokens" ? tokensAt(checkpoint.step) : timeAt(checkpoint.step);
      return at !== null && Math.abs(plot.valToPos(at, "x") - plot.valToPos(x, "x")) < 5;
    });
    return near.length ? ` · saved ${near.slice(0, 2).map((one) => one.name).join(", ")}` : "";
  }

  function readout(chart, card) {
    const line = card.querySelector("[data-part=value]");
    const last = (values) => [...values].reverse().find((value) => value !== null);
    return (plot) => {
      const index = plot.cursor.idx;
      const visible = plot.series.slice(1).filter((one) => one.label.trim());
      const parts = visible.map((one) => {
        const values = plot.data[plot.series.indexOf(one)];
        const value = index === null || index === undefined ? last(values) : values[index];
        return visible.length > 1 ? `${one.label} ${shortNumber(value, chart)}` : shortNumber(value, chart);
      });
      line.firstChild.textContent = parts.join("  ");
      const x = index === null || index === undefined ? null : plot.data[0][index];
      line.lastChild.textContent = x === null ? "" : shownX(x) + checkpointsNear(plot, x);
    };
  }

  function optionsOf(chart, card, drawn) {
    const xLabels = (values) =>
      values.map((value) => (mode() === "time"
        ? new Date(value * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false })
        : value % 1 ? "" : shortNumber(value)));
    return {
      width: card.clientWidth - 2,
      height: 190,
      padding: [8, 16, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "run", scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 6 } },
      scales: scales(chart, drawn.isLog, () => zoom),
      axes: axes(chart, drawn.isLog, xLabels),
      series: [{}, ...drawn.columns.map((one) => ({
        label: one.label || " ", // uPlot would call it "Value"
        stroke: one.isFaint ? `${one.colour}40` : one.isEdge ? "transparent" : one.colour,
        width: one.isFaint ? 1 : 1.6,
        spanGaps: true,
        points: { show: one.label && one.values.filter((value) => value !== null).length < 2, size: 6 },
      }))],
      bands: drawn.bands,
      hooks: {
        draw: [markCheckpoints],
        setCursor: [readout(chart, card)],
        setSelect: [zoomed],
      },
    };
  }

  function cardOf(chart) {
    const card = element("figure", "console-curve");
    const value = element("div", "console-curve-value");
    value.dataset.part = "value";
    value.append(element("span", "", ""), element("small", "", ""));
    const canvas = element("div");
    canvas.dataset.part = "canvas";
    card.append(captionOf(chart), value, canvas);
    return card;
  }

  // The same charts are filled with new data; only another set of charts is built anew.
  function draw() {
    const all = groups();
    part("empty").hidden = all.length > 0;
    form.hidden = all.length === 0;
    const key = JSON.stringify([all.map((group) => [group.title, group.charts.map((one) => [one.title, one.note, one.columns])]),
      form.elements.log.checked, Number(form.elements.smooth.value) > 0, document.documentElement.className]);
    if (key !== drawnKey) build(all);
    drawnKey = key;
    const charts = all.flatMap((group) => group.charts);
    plots.forEach(({ plot, update }, index) => update(plot, charts[index]));
  }

  function build(all) {
    plots.forEach(({ plot }) => plot.destroy());
    plots = [];
    const target = part("groups");
    target.replaceChildren();
    for (const group of all) {
      target.append(element("h2", "console-curve-group", group.title));
      const grid = element("div", "console-curve-grid");
      target.append(grid);
      const cards = group.charts.map(cardOf);
      grid.append(...cards); // all of them first: their number decides their width
      for (const [index, chart] of group.charts.entries()) {
        const card = cards[index];
        const drawn = seriesOf(chart);
        const plot = new uPlot(optionsOf(chart, card, drawn), rising(xOf(chart.source), drawn.columns.map((one) => one.values)), card.querySelector("[data-part=canvas]"));
        const show = readout(chart, card);
        plots.push({
          plot, card,
          update: (self, now) => {
            self.setData(rising(xOf(now.source), seriesOf(now).columns.map((one) => one.values)));
            if (self.cursor.idx === null || self.cursor.idx === undefined) show(self);
          },
        });
        show(plot);
      }
    }
  }

  // --- zoom -------------------------------------------------------------------------------------

  function zoomed(plot) {
    const chosen = selected(plot);
    if (!chosen) return;
    zoom = chosen;
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    form.elements.reset.hidden = false;
    draw();
    readDetail();
  }

  // The server leaves steps out of a long curve; a part of it is read again with all of them.
  async function readDetail() {
    if (!data.own.is_thinned) return;
    const xs = xOf("own");
    const first = xs.findIndex((x) => x >= zoom[0]);
    let last = xs.length - 1;
    while (last > 0 && xs[last] > zoom[1]) last -= 1;
    if (first < 0 || last <= first) return;
    const asked = zoom;
    const found = await read({ after: data.own.seq_ids[Math.max(0, first - 1)], until: data.own.seq_ids[last] });
    if (found && zoom === asked && found.own.steps.length) {
      detail = found.own;
      draw();
    }
  }

  function reset() {
    zoom = null;
    detail = null;
    form.elements.reset.hidden = true;
    draw();
  }

  // --- reading ----------------------------------------------------------------------------------

  async function read(parameters) {
    try {
      const answer = await fetch(`${root.dataset.url}?${new URLSearchParams(parameters)}`, { headers: { Accept: "application/json" } });
      return answer.ok ? await answer.json() : null;
    } catch {
      return null; // the server restarts; the next turn asks again
    }
  }

  const last = (list) => (list.length ? list[list.length - 1] : 0);

  function appendOwn(more) {
    const own = data.own;
    const before = own.steps.length;
    const names = new Set([...Object.keys(own.columns), ...Object.keys(more.columns)]);
    for (const name of names) {
      const old = own.columns[name] || Array(before).fill(null);
      own.columns[name] = old.concat(more.columns[name] || Array(more.steps.length).fill(null));
    }
    for (const name of ["steps", "seq_ids", "times", "tokens"]) own[name] = own[name].concat(more[name]);
    own.loss_fns = [...new Set([...own.loss_fns, ...more.loss_fns])];
    appended += more.steps.length;
  }

  // Steps that were read before are replaced.
  function mergeSteps(old, more) {
    if (!more.steps.length) return old;
    const kept = old.steps.findIndex((step) => step >= more.steps[0]);
    const end = kept < 0 ? old.steps.length : kept;
    const joined = { ...more, steps: old.steps.slice(0, end).concat(more.steps) };
    for (const name of Object.keys(more)) {
      if (name !== "steps" && Array.isArray(more[name]) && name !== "values") joined[name] = old[name].slice(0, end).concat(more[name]);
    }
    if (more.values) {
      const before = new Map(old.values);
      const now = new Map(more.values);
      joined.values = [...new Set([...before.keys(), ...now.keys()])].sort().map((name) => [name,
        (before.get(name) || Array(old.steps.length).fill(null)).slice(0, end).concat(now.get(name) || Array(more.steps.length).fill(null))]);
    }
    return joined;
  }

  function showStatus(status) {
    const box = document.getElementById("run-status");
    const find = (name) => box.querySelector(`[data-part="${name}"]`);
    find("sentence").textContent = status.sentence;
    find("state").innerHTML = status.label; // the server's own template, which escapes
    find("figures").replaceChildren(...status.figures.map(([name, value]) => {
      const one = element("div");
      one.append(element("dt", "", name), element("dd", "", value));
      return one;
    }));
  }

  async function turn() {
    const whole = data === null || appended > MAX_APPENDED;
    const found = await read(whole ? {} : {
      after: last(data.own.seq_ids), metrics: last(data.client.steps), sampled: last(data.sampled.steps),
    });
    if (!found) return;
    if (whole) {
      data = found;
      appended = 0;
    } else {
      const isNew = found.own.loss_fns.some((name) => !data.own.loss_fns.includes(name));
      appendOwn(found.own);
      data.client = mergeSteps(data.client, found.client);
      data.sampled = mergeSteps(data.sampled, found.sampled);
      data.checkpoints = found.checkpoints;
      if (isNew) appended = MAX_APPENDED + 1; // the words of the charts change
    }
    showStatus(found.status);
    draw();
  }

  form.addEventListener("input", (event) => {
    if (event.target.name === "x") {
      zoom = null;
      detail = null;
      form.elements.reset.hidden = true;
    }
    draw();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.reset.addEventListener("click", reset);
  root.addEventListener("dblclick", reset);
  new MutationObserver(() => data && draw()).observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
  new ResizeObserver(() => plots.forEach(({ plot, card }) => plot.setSize({ width: card.clientWidth - 2, height: 190 }))).observe(root);

  async function run() {
    if (document.visibilityState === "visible") await turn();
    setTimeout(run, Number(root.dataset.every));
  }
  run();
})();
