// Several runs in the same charts: one line for each run.
"use strict";

(() => {
  const root = document.getElementById("compare");
  if (!root) return;

  const { PALETTE, axes, captionOf, element, scales, selected, shortNumber, smoothed } = CurveKit;
  const form = root.querySelector("form");
  const target = root.querySelector('[data-part="groups"]');
  const runs = [...document.querySelectorAll(".console-legend [data-url]")].map((one, index) => {
    const colour = PALETTE[index % PALETTE.length];
    one.querySelector("i").style.backgroundColor = colour;
    return { name: one.dataset.name, url: one.dataset.url, colour, data: null };
  });
  let zoom = null;
  let plots = [];

  // The own steps' token counts at other steps, such as the client's.
  function tokensAt(own, step) {
    const index = own.steps.findIndex((one) => one >= step);
    return index < 0 ? null : own.tokens[index];
  }

  function xOf(run, source) {
    const { own } = run.data;
    const mode = form.elements.x.value;
    const steps = source === "own" ? own.steps : run.data[source].steps;
    if (mode === "step") return steps;
    if (mode === "tokens") return source === "own" ? own.tokens : steps.map((step) => tokensAt(own, step));
    const begin = own.times[0] ?? 0;
    const times = source === "own" ? own.times : source === "client" ? run.data.client.times : steps.map(() => null);
    return times.map((time) => (time === null ? null : (time - begin) / 60));
  }

  // Chart title -> what to draw, over all runs; the client's metrics first.
  function charts() {
    const found = new Map();
    const add = (key, chart, run, source, values) => {
      if (!values || !values.some((value) => value !== null)) return;
      if (!found.has(key)) found.set(key, { ...chart, lines: [] });
      found.get(key).lines.push({ run, source, values });
    };
    for (const run of runs.filter((one) => one.data)) {
      for (const [name, values] of run.data.client.values) {
        add(`client/${name}`, { title: name, note: "from your programs", may_be_log: true }, run, "client", values);
      }
    }
    for (const run of runs.filter((one) => one.data)) {
      for (const chart of run.data.groups.flatMap((group) => group.charts)) {
        const [name] = chart.columns[0];
        const values = chart.source === "own" ? run.data.own.columns[name] : run.data[chart.source][name];
        add(`${chart.title}/${chart.note}`, chart, run, chart.source, values); // losses of several kinds apart
      }
    }
    return [...found.values()];
  }

  function joined(chart, isLog) {
    const tables = chart.lines.map(({ run, source, values }) => {
      const shown = smoothed(isLog ? values.map((value) => (value > 0 ? value : null)) : values, Number(form.elements.smooth.value));
      const points = xOf(run, source).map((x, index) => [x, shown[index]]).filter(([x]) => x !== null && x !== undefined);
      points.sort((a, b) => a[0] - b[0]);
      const unique = points.filter(([x], index) => index === 0 || x > points[index - 1][0]);
      return [unique.map(([x]) => x), unique.map(([, y]) => y ?? null)];
    });
    return tables.length === 1 ? tables[0] : uPlot.join(tables);
  }

  function draw() {
    plots.forEach((plot) => plot.destroy());
    plots = [];
    target.replaceChildren();
    const grid = element("div", "console-curve-grid");
    target.append(grid);
    const found = charts().map((chart) => ({ chart, card: element("figure", "console-curve") }));
    grid.append(...found.map(({ card }) => card)); // all of them first: their number decides their width
    for (const { chart, card } of found) {
      const isLog = form.elements.log.checked && chart.may_be_log;
      const values = element("div", "console-curve-value is-many");
      const canvas = element("div");
      card.append(captionOf(chart), values, canvas);
      const show = (plot) => {
        values.replaceChildren(...chart.lines.map(({ run }, index) => {
          const column = plot.data[index + 1];
          const at = plot.cursor.idx ?? -1;
          let value = at < 0 ? null : column[at];
          for (let back = at < 0 ? column.length - 1 : at; back >= 0 && (value === null || value === undefined); back -= 1) value = column[back];
          const one = element("span", "", shortNumber(value, chart));
          one.style.borderColor = run.colour;
          one.title = run.name;
          return one;
        }));
      };
      plots.push(new uPlot({
        width: card.clientWidth - 2, height: 220, padding: [8, 16, 0, 0], legend: { show: false },
        cursor: { sync: { key: "compare", scales: ["x", null] }, drag: { x: true, y: false } },
        scales: scales(chart, isLog, () => zoom),
        axes: axes(chart, isLog, (all) => all.map((value) => (value % 1 ? "" : shortNumber(value)))),
        series: [{}, ...chart.lines.map(({ run }) => ({ label: run.name, stroke: run.colour, width: 1.6, spanGaps: true, points: { show: false } }))],
        hooks: {
          setCursor: [show],
          setSelect: [(plot) => {
            const chosen = selected(plot);
            if (!chosen) return;
            zoom = chosen;
            form.elements.reset.hidden = false;
            draw();
          }],
        },
      }, joined(chart, isLog), canvas));
      show(plots[plots.length - 1]);
    }
  }

  function reset() {
    zoom = null;
    form.elements.reset.hidden = true;
    draw();
  }

  form.addEventListener("input", (event) => (event.target.name === "x" ? reset() : draw()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.reset.addEventListener("click", reset);
  target.addEventListener("dblclick", reset);
  new MutationObserver(draw).observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });

  Promise.all(runs.map(async (run) => {
    const answer = await fetch(run.url, { headers: { Accept: "application/json" } });
    if (answer.ok) run.data = await answer.json();
  })).then(draw, draw);
})();
