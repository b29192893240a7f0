// Charts as inline SVG: lines by step, histograms, and the ancestry of particles.

const SVG = "http://www.w3.org/2000/svg";

/** Returns an HTML element; a string among the children becomes text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets the colour that the style sheet knows as --c. */
function coloured(element, index) {
  element.style.setProperty("--c", `var(--c${index % 8})`);
  return element;
}

/** Returns a number with four significant digits and a true minus sign. */
function format(number, digits = 4) {
  if (typeof number !== "number" || !Number.isFinite(number)) return "–";
  const size = Math.abs(number);
  const text = size !== 0 && (size < 1e-4 || size >= 1e7) ? number.toExponential(2)
    : size >= 10 ** digits ? Math.round(number).toString() : Number(number.toPrecision(digits)).toString();
  return text.replace(/-/g, "\u2212");
}

const signed = (number) => (number > 0 ? "+" : "") + format(number, 3);

/** Returns round numbers that cover low .. high. */
function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** Widens an interval so that it is not empty. */
function widened(low, high, share = 0.05) {
  const margin = (high - low) * share || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

const finite = (numbers) => numbers.filter((number) => typeof number === "number" && Number.isFinite(number));

function figureOf(title, description, picture, legend = [], caption = "") {
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `${title}. ${description}`);
  const keys = legend.map(([name, index, kind]) => coloured(make("span", {}, make("i", { class: kind, "aria-hidden": "true" }), name), index));
  return make("figure", {}, make("h3", {}, title), keys.length ? make("div", { class: "legend" }, ...keys) : null, picture,
    caption ? make("figcaption", {}, caption) : null);
}

/** Draws numbers by step. series: [{name, index, y, kind}]; band: {name, low, high} or null. */
function lineChart(title, x, series, { band = null, floor = null, ceiling = null, caption = "" } = {}) {
  const width = 420, height = 230, left = 56, right = 12, top = 10, bottom = 40;
  const all = finite([...series.flatMap((each) => each.y), ...(band ? [...band.low, ...band.high] : [])]);
  let [low, high] = widened(Math.min(...all), Math.max(...all));
  if (floor !== null) low = floor;
  if (ceiling !== null) high = Math.max(high, ceiling * 1.05);
  const first = Math.min(...x), last = Math.max(...x), span = last - first || 1;
  const place = (step) => left + ((step - first) / span) * (width - left - right);
  const level = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const tick of ticks(low, high)) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: level(tick), y2: level(tick) }),
      draw("text", { x: left - 7, y: level(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  for (const tick of ticks(first, last || 1, 6).filter(Number.isInteger)) {
    picture.append(draw("text", { x: place(tick), y: height - bottom + 17, "text-anchor": "middle" }, String(tick)));
  }
  picture.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    draw("text", { class: "strong", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "denoising step"));
  if (band) {
    const known = x.map((_, k) => k).filter((k) => band.low[k] !== null && band.high[k] !== null);
    const points = [...known.map((k) => `${place(x[k])},${level(band.high[k])}`), ...known.reverse().map((k) => `${place(x[k])},${level(band.low[k])}`)];
    picture.append(draw("polygon", { class: "band", points: points.join(" ") }));
  }
  for (const { name, index, y, kind } of series) {
    const known = x.map((_, k) => k).filter((k) => y[k] !== null);
    const line = draw("polyline", { class: `line ${kind || ""}`, points: known.map((k) => `${place(x[k])},${level(y[k])}`).join(" ") });
    const dots = known.map((k) => draw("circle", { class: "dot", r: kind ? 1.5 : 2.6, cx: place(x[k]), cy: level(y[k]) },
      draw("title", {}, `step ${x[k]}, ${name}: ${format(y[k])}`)));
    picture.append(coloured(draw("g", {}, line, ...dots), index));
  }
  const ends = series.map(({ name, y }) => {
    const known = finite(y);
    return `${name} goes from ${format(known[0])} to ${format(known[known.length - 1])}`;
  });
  const legend = series.map(({ name, index, kind }) => [name, index, kind || ""]);
  if (band) legend.push([band.name, 0, "band"]);
  return figureOf(title, `Steps ${first} to ${last}: ${ends.join("; ")}.`, picture, series.length > 1 || band ? legend : [], caption);
}

/** Draws a histogram per run over one axis. groups: [{name, index, values, weights}]. */
function histogram(title, groups) {
  const shown = groups.filter((group) => group.values.length);
  const width = 420, left = 48, right = 12, row = 104, top = 20, bottom = 40;
  const height = top + row * shown.length + bottom - 18;
  const all = shown.flatMap((group) => group.values);
  const least = all.reduce((a, b) => Math.min(a, b)), most = all.reduce((a, b) => Math.max(a, b));
  const largest = Math.max(...shown.map((group) => group.values.length));
  const [low, high] = most > least ? [least, most] : widened(least, most);
  const bins = Math.max(8, Math.min(40, Math.ceil(2 * Math.cbrt(largest)) + 4));
  const place = (value) => left + ((value - low) / (high - low)) * (width - left - right);
  const shares = shown.map(({ values, weights }) => {
    const found = new Array(bins).fill(0), total = weights.reduce((a, b) => a + b, 0) || 1;
    values.forEach((value, k) => { found[Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins))] += weights[k] / total; });
    return found;
  });
  const peak = Math.max(...shares.flat());
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}` });
  const marks = ticks(low, high, 6);
  for (const tick of marks) {
    picture.append(draw("line", { class: "grid", x1: place(tick), x2: place(tick), y1: top, y2: height - bottom }),
      draw("text", { x: place(tick), y: height - bottom + 17, "text-anchor": "middle" }, format(tick)));
  }
  const said = shown.map(({ name, index, values, weights }, k) => {
    const base = top + row * k + row - 18, tall = row - 40, wide = (width - left - right) / bins;
    const total = weights.reduce((a, b) => a + b, 0) || 1;
    const mean = values.reduce((sum, value, j) => sum + value * weights[j], 0) / total;
    const bars = shares[k].map((share, b) => draw("rect", { class: "bar", x: left + b * wide + 0.5, width: Math.max(0.5, wide - 1), y: base - (share / peak) * tall, height: (share / peak) * tall },
      draw("title", {}, `${format(low + (b / bins) * (high - low))} to ${format(low + ((b + 1) / bins) * (high - low))}: ${format(100 * share, 3)} % of ${values.length}`)));
    picture.append(coloured(draw("g", {}, ...bars), index),
      draw("line", { class: "axis", x1: left, x2: width - right, y1: base, y2: base }),
      draw("line", { class: "mean", x1: place(mean), x2: place(mean), y1: base, y2: base - tall - 4 }),
      draw("text", { class: "strong", x: left, y: base - tall - 9 }, `${name}: mean ${format(mean)}`),
      draw("text", { x: left - 7, y: base - tall + 8, "text-anchor": "end" }, `${format(100 * peak, 2)} %`),
      draw("text", { x: left - 7, y: base, "text-anchor": "end" }, "0"));
    return `${name}: ${values.length} images, mean ${format(mean)}`;
  });
  picture.append(draw("text", { class: "strong", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, title));
  return figureOf(title, `Share of the images by ${title}. ${said.join("; ")}.`, picture, [],
    "Share of a run's images in each interval; the line is the mean.");
}

/** Draws which particles descend from which. kept: per selection the row that each particle continues; own: the picture's. */
function lineageChart(steps, kept, own) {
  const width = 420, height = 230, left = 56, right = 12, top = 10, bottom = 40, count = kept[0].length;
  const place = (column) => left + (column / kept.length) * (width - left - right);
  const level = (particle) => top + (count > 1 ? particle / (count - 1) : 0.5) * (height - top - bottom - 6);
  const alive = new Array(kept.length + 1), path = new Array(kept.length + 1);
  alive[kept.length] = new Set(kept[kept.length - 1].keys());
  path[kept.length] = own;
  for (let s = kept.length - 1; s >= 0; s--) {
    alive[s] = new Set([...alive[s + 1]].map((j) => kept[s][j]));
    path[s] = kept[s][path[s + 1]];
  }
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}` }), living = [];
  kept.forEach((rows, s) => rows.forEach((from, to) => {
    const line = draw("line", { class: alive[s + 1].has(to) ? "alive" : "dead", x1: place(s), y1: level(from), x2: place(s + 1), y2: level(to) });
    if (alive[s + 1].has(to)) living.push(line); else picture.append(line);
  }));
  picture.append(...living, coloured(draw("polyline", { class: "own", points: path.map((particle, s) => `${place(s)},${level(particle)}`).join(" ") }), 0));
  for (let particle = 0; particle < count; particle += Math.max(1, Math.ceil(count / 12))) {
    picture.append(draw("text", { x: left - 9, y: level(particle) + 4, "text-anchor": "end" }, String(particle)));
  }
  const every = Math.max(1, Math.ceil(kept.length / 7));
  steps.forEach((step, s) => {
    if (s % every === 0) picture.append(draw("text", { x: place(s + 1), y: height - bottom + 17, "text-anchor": "middle" }, String(step)));
  });
  picture.append(draw("text", { class: "strong", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "denoising step"));
  const text = `Particle ${own} descends from particle ${path[0]}; ${alive[0].size} of ${count} starting particles have descendants.`;
  return figureOf("Ancestry of the particles", text, picture, [["this picture", 0, ""]], text);
}
