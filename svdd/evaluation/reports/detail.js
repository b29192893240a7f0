// The view of one image: picture, prompt, scores, cost and trace.

const detail = { position: -1 };

const LABELS = {
  denoiser_rows: "Denoiser rows", network_rows: "Network rows", gradient_rows: "Gradient rows", decoded_images: "Decoded images",
  reward_calls: "Reward calls", denoiser_seconds: "Seconds in the network", decoder_seconds: "Seconds in the decoder",
  reward_seconds: "Seconds in the reward", total_seconds: "Seconds in all", choices: "Choices", resamplings: "Resamplings",
  spread: "Spread of the last values", ess: "Mean effective sample size, share", alpha: "Mean temperature alpha",
};

/** Returns name and value pairs as a list; empty entries are left out. */
function factsOf(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("dl", { class: "facts" }, ...known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, typeof value === "number" ? format(value) : value)]));
}

/** Returns the picture in full size, or the thumbnail where the file cannot be reached. */
function fullPicture(image) {
  const about = infoOf(image);
  const picture = pictureOf(image, false);
  if (about.full && picture.tagName === "IMG") {
    picture.addEventListener("error", () => {
      if (picture.getAttribute("src") === about.thumb) return;
      picture.src = about.thumb;
      picture.after(make("small", {}, `The full picture was not found at ${decodeURI(about.full)}; this is its thumbnail.`));
    });
    picture.src = about.full;
  }
  return picture;
}

/** Returns the columns of a trace; a column that holds one number has it at every step. */
function traceOf(about) {
  const trace = about.trace;
  if (!trace || !trace.step.length) return null;
  const column = (name) => (trace[name] === undefined ? null : Array.isArray(trace[name]) ? trace[name] : trace.step.map(() => trace[name]));
  return { step: trace.step, column, lineage: trace.lineage || null };
}

function chartsOf(image, about) {
  const trace = traceOf(about);
  if (!trace) return [];
  const figures = [], [chosen, mean, best, spread, ess, candidates, alpha, ancestors] =
    ["value_chosen", "value_mean", "value_max", "value_std", "ess", "candidates", "alpha", "ancestors"].map(trace.column);
  if (mean) {
    const series = [{ name: "mean", index: 7, y: mean, kind: "dash" }];
    const same = best && chosen && best.every((value, k) => value === chosen[k]);
    if (best && !same) series.push({ name: "best", index: 1, y: best, kind: "dash" });
    if (chosen) series.push({ name: same ? "chosen, the best" : "chosen", index: 0, y: chosen });
    const shift = (sign) => mean.map((value, k) => (value === null || spread[k] === null ? null : value + sign * spread[k]));
    const band = spread ? { name: "mean ± standard deviation", low: shift(-1), high: shift(1) } : null;
    figures.push(lineChart("Values of the candidates", trace.step, series, { band }));
  }
  if (ess && finite(ess).length) {
    const most = candidates ? Math.max(...finite(candidates)) : null;
    const series = [{ name: "effective sample size", index: 0, y: ess }];
    if (candidates) series.push({ name: "candidates with a value", index: 7, y: candidates, kind: "dash" });
    figures.push(lineChart("Effective sample size", trace.step, series, { floor: 0, ceiling: most }));
  }
  if (alpha && new Set(finite(alpha)).size > 1) {
    figures.push(lineChart("Temperature alpha", trace.step, [{ name: "alpha", index: 3, y: alpha.map((number) => (Number.isFinite(number) ? number : null)) }]));
  }
  if (ancestors && Math.max(...finite(ancestors)) > 1) {
    figures.push(lineChart("Ancestors", trace.step, [{ name: "starting particles with descendants", index: 2, y: ancestors }],
      { floor: 0, caption: "Starting particles that still have descendants." }));
  }
  if (trace.lineage) figures.push(lineageChart(trace.step, trace.lineage, report.images.particle[image] || 0));
  return figures;
}

function scoreFacts(image, other) {
  return report.rewards.map((name, r) => {
    const score = report.images.scores[r][image];
    if (score === null) return [name, null];
    const scores = report.images.scores[r].filter((each, k) => each !== null && report.images.run[k] === report.images.run[image]);
    const cell = make("span", {}, `${format(score, 5)} (rank ${1 + scores.filter((each) => each > score).length} of ${scores.length})`);
    const there = other === null ? null : report.images.scores[r][other];
    if (there !== null && there !== undefined) cell.append(`, ${signed(score - there)} against ${report.runs[report.images.run[other]].name}`);
    return [name, cell];
  });
}

/** Shows the image at a position of the grid's order. */
function showDetail(position) {
  detail.position = position;
  const image = view.order[position], about = infoOf(image), images = report.images;
  const other = counterpart(image), prompt = report.prompts[images.prompt[image]];
  const pictures = make("div", { class: "pictures" });
  if (other !== null) pictures.append(make("span", {}, make("small", {}, runName(images.run[other])), fullPicture(other)));
  pictures.append(make("span", {}, other === null ? null : make("small", {}, runName(images.run[image])), fullPicture(image)));
  const particle = images.particle[image];
  const facts = factsOf([
    ["Run", report.runs.length > 1 ? runName(images.run[image]) : null],
    ["Negative prompt", about.negative ? make("bdi", {}, about.negative) : null],
    ["Prompt number", String(images.index[image])], ["Image number", String(images.number[image])], ["Seed", images.seed[image]],
    ["Particle", particle === null ? null : `${particle}, weight ${format(images.weight[image])}`],
    ["Size", about.width ? `${about.width} x ${about.height} pixels` : null],
    ["File", about.full && !about.full.startsWith("data:") ? make("a", { href: about.full }, make("bdi", {}, about.file)) : make("bdi", {}, about.file)],
    ["Divergence, one draw, in nats", about.kl],
    ...Object.entries(about.columns || {}).map(([name, value]) => [name, make("bdi", {}, value)]),
  ]);
  const labelled = (entries) => factsOf(Object.entries(entries || {}).map(([name, value]) => [LABELS[name] || name, value]));
  const text = make("div", {}, make("h2", { id: "detail-prompt" }, make("bdi", { dir: "auto" }, prompt || "(no prompt)")),
    make("h3", {}, "Scores"), factsOf(scoreFacts(image, other)), make("h3", {}, "Image"), facts);
  const lists = [["Selection", about.selection], ["Cost", about.ledger]].filter(([, entries]) => entries)
    .map(([name, entries]) => make("div", {}, make("h3", {}, name), labelled(entries)));
  const figures = chartsOf(image, about);
  byId("detail-body").replaceChildren(make("div", { class: "top" }, pictures, text), make("h2", {}, "Trace and cost"),
    figures.length ? "" : make("p", { class: "note" }, "There is no trace: the sampler made no selection for this image."),
    make("div", { class: "charts" }, ...figures, ...lists));
  byId("position").textContent = `${position + 1} of ${view.order.length}`;
  byId("previous").disabled = position === 0;
  byId("next").disabled = position === view.order.length - 1;
  if (document.activeElement && document.activeElement.disabled) byId("close").focus(); // else keys would go nowhere
  byId("detail").scrollTop = 0;
  remember(`#image-${image}`);
}

function openDetail(position) {
  showDetail(position);
  if (!byId("detail").open) byId("detail").showModal();
}

function step(by) {
  const position = detail.position + by;
  if (position >= 0 && position < view.order.length) showDetail(position);
}

/** Writes the fragment of the address, where the browser allows it. */
function remember(fragment) {
  try { history.replaceState(null, "", fragment || location.pathname + location.search); } catch { /* some browsers refuse it for files */ }
}

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => byId("detail").close());
byId("detail").addEventListener("click", (event) => { if (event.target === byId("detail")) byId("detail").close(); });
byId("detail").addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
byId("detail").addEventListener("close", () => {
  remember("");
  while (view.shown <= detail.position) showMore();
  const tile = byId("grid").children[detail.position];
  if (tile) tile.firstElementChild.focus();
});
