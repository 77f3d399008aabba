const COLOURS = 6, DASHES = [null, "7 3", "2 3", "8 3 2 3"], HEIGHT = 210, FEW = 40, PRINTED = 330;
const TICKS = { "%": "~%", e: "~e" };  // of y; any other as D3 likes

function draw(width) {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  for (const chart of charts) {
    const place = document.querySelector(`#${CSS.escape(chart.id)} .plot`);
    place.replaceChildren(plot(chart, runs, width ?? Math.max(240, place.clientWidth)));
  }
}

function plot({ title, form, curves }, runs, width) {
  const say = d3.format(form);
  const lines = curves.map(({ run, points }) => points.map(([step, value]) => ({ run, step, value })));
  const all = lines.flat(), at = { x: "step", y: "value" };
  const svg = Plot.plot({
    width, height: HEIGHT, marginLeft: 58, marginRight: 14, marginTop: 14, marginBottom: 34,
    style: { fontSize: "12px" },
    x: { label: "step", ticks: width < 400 ? 3 : 5, tickFormat: "~s" },
    y: { label: null, grid: true, ticks: 5, tickFormat: TICKS[form.at(-1)], nice: true },
    marks: [
      Plot.ruleX(all, Plot.pointerX({ x: "step", stroke: "var(--quiet)", strokeDasharray: "2 2" })),
      ...lines.flatMap((line) => {
        const { run } = line[0], stroke = `var(--run-${run % COLOURS})`;
        const marks = [Plot.lineY(line, { ...at, stroke, strokeDasharray: DASHES[run % DASHES.length], strokeWidth: 2 })];
        return line.length > FEW ? marks : [...marks, Plot.dot(line, { ...at, fill: stroke, r: 2.5 })];
      }),
      Plot.tip(all, Plot.pointerX({ ...at, title: ({ run, step, value }) => `${runs[run]}\nstep ${step}\n${title}: ${say(value)}` })),
    ],
  });
  svg.setAttribute("aria-hidden", "true");  // what holds it says what it shows
  return svg;
}

draw();
let width = innerWidth;
addEventListener("resize", () => innerWidth !== width && ((width = innerWidth), draw()));
addEventListener("beforeprint", () => draw(PRINTED));
addEventListener("afterprint", () => draw());
