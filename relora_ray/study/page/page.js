"use strict";
// Draws the figures of #page-data, in the page's colours, and redraws what a choice changes.
(function () {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const themeChoice = document.getElementById("theme");
  const xChoice = document.getElementById("x");
  const runChoice = document.getElementById("run");
  const hiddenRuns = new Set();
  // Plotly's own button for sharing would send a chart to its makers' server.
  const settings = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
  };
  const variants = page.charts.map(() => 0);

  function colour(name) {
    return getComputedStyle(root).getPropertyValue(name).trim();
  }

  // A layout in the colours of the theme, for this width.
  function dressed(layout, narrow) {
    const copy = JSON.parse(JSON.stringify(layout));
    copy.paper_bgcolor = copy.plot_bgcolor = "rgba(0,0,0,0)";
    copy.font = { color: colour("--text"), family: "system-ui, sans-serif", size: narrow ? 11 : 12 };
    copy.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--soft") };
    copy.hoverlabel = { namelength: 40, align: "left" };
    for (const name of Object.keys(copy).filter((key) => /^[xy]axis/.test(key))) {
      copy[name].gridcolor = copy[name].zerolinecolor = colour("--grid");
      copy[name].linecolor = colour("--line");
      if (/^xaxis/.test(name)) copy[name].nticks = narrow ? 5 : undefined;
    }
    if (narrow && copy.margin) copy.margin.l = Math.min(copy.margin.l || 0, 44);
    if (narrow && copy.margin) copy.margin.r = 8;
    return copy;
  }

  function drawnTrace(trace) {
    const meta = trace.meta || {};
    if (!meta.x) return trace;
    const copy = Object.assign({}, trace);
    copy.x = meta.x[xChoice.value] || meta.x.steps;
    copy.visible = !hiddenRuns.has(meta.run);
    return copy;
  }

  function draw(number) {
    const chart = page.charts[number];
    const place = document.getElementById("chart-" + number);
    if (place.closest("[hidden]")) return;
    const figure = chart.variants[variants[number]];
    const narrow = place.clientWidth < 560;
    const layout = dressed(figure.layout, narrow);
    if (figure.data.some((trace) => trace.meta && trace.meta.x)) {
      layout.xaxis.title.text = page.x_names[xChoice.value];
    }
    const data = figure.data.map((trace) => (chart.run === null ? drawnTrace(trace) : Object.assign(drawnTrace(trace), { visible: true })));
    Plotly.react(place, data, layout, Object.assign({ displayModeBar: narrow ? false : "hover" }, settings));
  }

  function drawAll() {
    page.charts.forEach((_, number) => draw(number));
  }

  function showRun() {
    if (runChoice) {
      for (const part of document.querySelectorAll("section[data-run]")) {
        part.hidden = part.dataset.run !== runChoice.value;
      }
    }
    drawAll();
  }

  themeChoice.addEventListener("change", () => {
    if (themeChoice.value) root.dataset.theme = themeChoice.value;
    else delete root.dataset.theme;
    drawAll();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  if (xChoice) xChoice.addEventListener("change", drawAll);
  if (runChoice) runChoice.addEventListener("change", showRun);
  for (const choice of document.querySelectorAll("select.variant")) {
    choice.addEventListener("change", () => {
      variants[choice.dataset.chart] = Number(choice.value);
      draw(Number(choice.dataset.chart));
    });
  }
  for (const button of document.querySelectorAll("button.run")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      button.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
      drawAll();
    });
  }
  showRun();
  root.dataset.drawn = "yes";
})();
