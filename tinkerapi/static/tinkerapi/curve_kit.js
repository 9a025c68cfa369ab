// What the pages with curves share: numbers for people, smoothing, colours, axes, zoom.
"use strict";

const CurveKit = (() => {
  const PALETTE = [
    "#7c3aed", "#0891b2", "#d97706", "#dc2626", "#16a34a", "#db2777", "#4f46e5", "#65a30d", "#0d9488", "#9f1239",
  ];

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function shortNumber(value, chart) {
    if (value === null || value === undefined) return "–";
    if (chart && chart.percent) return `${(100 * value).toFixed(value && value < 0.1 ? 1 : 0)} %`;
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(2);
    if (size >= 1e4) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
    return String(Number(value.toPrecision(4)));
  }

  // A number at an axis, with as many digits as tell it from its neighbours.
  function tick(value, step, chart, isLog) {
    if (value === null) return "";
    if (chart.percent || isLog || Math.abs(value) >= 1e4 || step < 1e-7) return shortNumber(value, chart);
    const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
    return digits > 4 && Math.abs(value) < 1e-2 ? (value ? value.toExponential(1) : "0") : value.toFixed(digits);
  }

  // A moving average whose weights fall by `weight` at each step, as if it had begun at its mean.
  function smoothed(values, weight) {
    if (!weight) return values;
    let mean = 0;
    let debt = 1;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      mean = mean * weight + value * (1 - weight);
      debt *= weight;
      return mean / (1 - debt);
    });
  }

  function styles() {
    const isDark = document.documentElement.classList.contains("dark");
    return {
      text: isDark ? "#a3a3a3" : "#6b7280",
      grid: isDark ? "#ffffff14" : "#00000010",
      mark: isDark ? "#ffffff55" : "#00000045",
    };
  }

  // uPlot's scales: x as zoomed, or all of it; y logarithmic or a share where the chart says so.
  function scales(chart, isLog, zoom) {
    return {
      x: { time: false, range: (plot, low, high) => zoom() || (low === high ? [low - 1, high + 1] : [low, high]) },
      y: { distr: isLog ? 3 : 1, ...(chart.percent && !isLog ? { range: [0, 1] } : {}) },
    };
  }

  // uPlot's axes; `xLabels` makes the texts of the horizontal one from its numbers.
  function axes(chart, isLog, xLabels) {
    const { text, grid } = styles();
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px Inter, sans-serif" };
    return [
      { ...axis, size: 28, space: 60, values: (plot, values) => xLabels(values) },
      { ...axis, size: 58, values: (plot, values, index, space, step) => values.map((value) => tick(value, step, chart, isLog)) },
    ];
  }

  // The selected part of the x axis; null for a click.
  function selected(plot) {
    const { left, width } = plot.select;
    return width < 4 ? null : [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
  }

  function captionOf(chart) {
    const caption = element("figcaption");
    caption.append(element("strong", "", chart.title), element("span", "console-curve-note", chart.note));
    return caption;
  }

  return { PALETTE, axes, captionOf, element, scales, selected, shortNumber, smoothed, styles };
})();
