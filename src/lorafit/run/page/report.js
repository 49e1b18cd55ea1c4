"use strict";
(() => {
  const told = JSON.parse(document.getElementById("told").textContent);
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  let drawn = [];

  // three significant digits more than the axis needs; exponents where zeros would be counted
  const number = (v) => {
    if (v === null || v === undefined) return "–";
    const size = Math.abs(v);
    if (v !== 0 && (size < 1e-3 || size >= 1e7)) return v.toExponential(2);
    const digits = size < 10 ? 4 : size < 1000 ? 2 : 0;
    return v.toLocaleString("en", { maximumFractionDigits: digits });
  };
  const ticks = (_, values) => values.map((v) => {
    if (v === null) return null;
    if (v === 0) return "0";
    const size = Math.abs(v);
    if (size < 1e-3) return v.toExponential(2).replace(/\.?0*e/, "e");
    if (size >= 1e9) return +(v / 1e9).toPrecision(3) + " G";
    if (size >= 1e6) return +(v / 1e6).toPrecision(3) + " M";
    if (size >= 1e4) return +(v / 1e3).toPrecision(3) + " k";
    return String(+v.toPrecision(6));
  });

  // there is no half step
  const wholes = Array.from({ length: 10 }, (_, n) => [1, 2, 5].map((v) => v * 10 ** n)).flat();

  const line = (s) => {
    const colour = css(s.colour);
    const few = s.points || s.values.filter((v) => v !== null).length < 3;
    return {
      label: s.label, stroke: colour, width: s.width || 1.5, dash: s.dash || undefined,
      spanGaps: true, value: (_, v) => number(v),
      points: { show: few, size: 6, fill: colour, stroke: colour },
    };
  };

  // what was memorised is shaded, the best step a line with its name
  const marks = (figure) => (u) => {
    const { ctx, bbox } = u, dpr = devicePixelRatio || 1;
    ctx.save();
    ctx.font = `${12 * dpr}px system-ui, sans-serif`;
    figure.marks.forEach((m, n) => {
      const from = u.valToPos(m.from, "x", true);
      if (m.to !== undefined && m.to !== null) {
        const to = u.valToPos(m.to, "x", true);
        ctx.fillStyle = css("shade");
        ctx.fillRect(from, bbox.top, to - from, bbox.height);
      }
      ctx.strokeStyle = ctx.fillStyle = css("eval");
      ctx.lineWidth = dpr;
      ctx.setLineDash([4 * dpr, 4 * dpr]);
      ctx.beginPath(); ctx.moveTo(from, bbox.top); ctx.lineTo(from, bbox.top + bbox.height); ctx.stroke();
      ctx.fillStyle = css("ink");
      const room = bbox.left + bbox.width - from > ctx.measureText(m.label).width + 8 * dpr;
      ctx.textAlign = room ? "left" : "right";
      ctx.fillText(m.label, from + (room ? 5 : -5) * dpr, bbox.top + (13 + 15 * n) * dpr);
    });
    ctx.restore();
  };

  const draw = (figure, place, width) => {
    const axis = { stroke: css("soft"), grid: { stroke: css("grid"), width: 1 }, ticks: { stroke: css("line"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
    const series = [{ label: figure.axis, value: (_, v) => number(v) }, ...figure.series.map(line)];
    const data = [figure.x, ...figure.series.map((s) => s.values)];
    const bands = [];
    if (figure.band) {
      const edge = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
      series.push({ ...edge, label: "high", value: (_, v) => number(v) }, { ...edge, label: "low", value: (_, v) => number(v) });
      data.push(figure.band.high, figure.band.low);
      bands.push({ series: [data.length - 2, data.length - 1], fill: css("band") });
    }
    const wide = width > 560, height = Math.round(figure.tall ? Math.min(380, Math.max(240, width * .5)) : 210);
    const plot = new uPlot({
      width, height, series, bands,
      scales: { x: { time: false, distr: figure.log_axis ? 3 : 1 }, y: { distr: figure.log ? 3 : 1, range: figure.zero ? (_, low, high) => [0, high * 1.05 || 1] : undefined } },
      axes: [
        { ...axis, values: ticks, incrs: figure.axis === "step" ? wholes : undefined, space: wide ? 60 : 45, size: 32, ...(figure.tall ? { label: figure.axis, labelSize: 16, labelGap: 0 } : {}) },
        { ...axis, values: ticks, size: 58, label: figure.unit, labelSize: 18, labelGap: 0, space: figure.log ? 20 : 32 },
      ],
      cursor: { drag: { x: true, y: false }, sync: { key: figure.axis }, points: { size: 6 } },
      legend: { live: true, markers: { dash: (u, n) => u.series[n].dash ? "dashed" : "solid" } },
      hooks: { drawClear: [], draw: figure.marks.length ? [marks(figure)] : [] },
    }, data, place);
    if (figure.band) { // the edges are in the band's sentence below, not in the legend
      const rows = place.querySelectorAll(".u-legend .u-series");
      rows[rows.length - 1].style.display = rows[rows.length - 2].style.display = "none";
    }
    return plot;
  };

  const drawAll = (paper) => {
    drawn.forEach((plot) => plot.destroy());
    drawn = told.figures.map((figure) => {
      const place = document.getElementById(figure.id);
      const width = paper ? (place.closest(".small") ? 310 : 640) : place.clientWidth || 320;
      return draw(figure, place, width);
    });
  };
  drawAll();

  let wait;
  let seen = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === seen) return; // a phone's address bar comes and goes
    seen = innerWidth;
    clearTimeout(wait);
    wait = setTimeout(() => drawAll(), 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  addEventListener("beforeprint", () => { root.classList.add("print"); drawAll(true); });
  addEventListener("afterprint", () => { root.classList.remove("print"); drawAll(); });

  // while the run goes: again every few seconds, ever less often where nothing is new
  if (!told.ended) {
    const key = "lorafit:" + location.pathname;
    let kept = {};
    try { kept = JSON.parse(sessionStorage.getItem(key)) || {}; } catch { kept = {}; }
    const fresh = kept.mark !== told.mark;
    const pause = fresh ? 10 : Math.min(600, (kept.pause || 10) * 1.5);
    const idle = fresh ? 0 : (kept.idle || 0) + pause;
    document.querySelectorAll("details").forEach((d, n) => { if ((kept.open || []).includes(n)) d.open = true; });
    if (kept.top) scrollTo(0, kept.top);
    if (idle < 3 * 3600) setTimeout(() => {
      const open = [...document.querySelectorAll("details")].flatMap((d, n) => d.open ? [n] : []);
      try { sessionStorage.setItem(key, JSON.stringify({ mark: told.mark, pause, idle, open, top: scrollY })); } catch { /* not kept */ }
      location.reload();
    }, pause * 1000);
  }
})();
