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
    x: { label: "step", ticks: 5, tickFormat: "~s" },
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

/* Puts a newer page in this one's place: what is open stays open, the focus and the scroll position stay where they are. */
function renew(text) {
  const next = new DOMParser().parseFromString(text, "text/html"), page = document.getElementById("page");
  const open = [...page.querySelectorAll("details[open]")].map((each) => each.id), { scrollX, scrollY } = window;
  const focused = path(document.activeElement, page);
  document.title = next.title;
  page.replaceChildren(...next.getElementById("page").childNodes);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  draw();
  focused && page.querySelector(focused)?.focus({ preventScroll: true });
  scrollTo({ left: scrollX, top: scrollY, behavior: "instant" });
}

/* A selector of what has the focus: links by where they lead, the rest by what holds them. */
function path(element, page) {
  if (!page.contains(element)) return null;
  if (element.hash) return `a[href="${element.getAttribute("href")}"]`;
  return element.matches("summary") ? `#${CSS.escape(element.parentNode.id)} > summary` : `[aria-label="${CSS.escape(element.ariaLabel ?? "")}"]`;
}

async function watch(every = 2000) {
  let tag = null;
  for (;;) {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.ok) {
        const text = await answer.text();
        if (tag) renew(text);
        tag = answer.headers.get("ETag");
      }
      if (answer.ok || answer.status === 304) say("renewed as the run goes on");
      else say(await answer.text());
    } catch {
      say("its server has ended: this is the last page it sent");
    }
    await new Promise((done) => setTimeout(done, every));
  }
}

function say(words) {
  const live = document.getElementById("live");
  if (live.textContent !== words) live.textContent = words;
}

draw();
let width = innerWidth;
addEventListener("resize", () => innerWidth !== width && ((width = innerWidth), draw()));
addEventListener("beforeprint", () => draw(PRINTED));
addEventListener("afterprint", () => draw());
if ("live" in document.body.dataset) watch();
