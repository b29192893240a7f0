// The tabs "Rewards" and "Settings and cost".

/** Returns a table in a region that scrolls by itself. rows: [[head, ...cells]]; a cell is a text or an element. */
function tableOf(label, heads, rows, kind = "") {
  const body = rows.map(([head, ...cells]) => make("tr", {}, make("th", { scope: "row" }, head), ...cells.map((cell) => make("td", { class: kind }, cell))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...body));
  return make("div", { class: "tables", role: "region", tabindex: "0", "aria-label": label }, table);
}

function runName(run) {
  return coloured(make("span", { class: "run" }, make("bdi", {}, report.runs[run].name)), run);
}

/** Returns the number of a run's images, and of the particles if they are several for each. */
const countOf = (run) => (run.pictures > run.images ? `${run.images} (${run.pictures} particles)` : String(run.images));

const interval = (entry) => (entry.low === null ? "" : `[${format(entry.low)}, ${format(entry.high)}]`);

function stateOf(run) {
  const words = [];
  if (run.unfinished) words.push("unfinished: still being drawn, or stopped");
  if (run.hidden) words.push(`${run.hidden} more pictures are not in this report (--limit)`);
  return words.join("; ");
}

/** Fills the tab "Rewards": means, differences to the baseline, and histograms. */
function showRewards(baseline) {
  const compared = baseline === null ? null : report.runs[baseline].name;
  const heads = ["Run", "Images", "Prompts", ...report.rewards];
  const rows = report.runs.map((run, k) => [runName(k), countOf(run), String(run.prompts), ...report.rewards.map((name) => {
    const entry = run.means[name];
    if (!entry) return "–";
    const cell = make("span", {}, format(entry.mean), make("small", {}, interval(entry)));
    const change = baseline === null ? null : (report.differences[`${k}-${baseline}`] || {})[name];
    if (change) cell.append(make("small", { class: "change" }, `difference ${signed(change.mean)}`), make("small", {}, change.low === null ? "" : `[${signed(change.low)}, ${signed(change.high)}]`));
    return cell;
  })]);
  const groups = report.rewards.map((name, r) => histogram(name, report.runs.map((run, k) => {
    const members = report.images.run.map((_, image) => image).filter((image) => report.images.run[image] === k && report.images.scores[r][image] !== null);
    return { name: run.name, index: k, values: members.map((image) => report.images.scores[r][image]), weights: members.map((image) => report.images.weight[image]) };
  })));
  const about = "Mean of each run with its 95 % interval, clustered by prompt.";
  const differences = compared === null ? " Choose a run under “Compare with” (tab Images) to see paired differences."
    : Object.keys(report.differences).length ? ` Differences are those to ${compared}, as in “svdd compare”: over the images of equal prompt, number and seed that all runs have; the intervals of all runs together hold with 95 %.`
    : " The runs share no image of equal prompt, number and seed, so there are no differences.";
  const notes = report.notes.map((note) => make("p", {}, `Note: ${note}.`));
  byId("rewards").replaceChildren(make("h2", {}, "Means"), make("p", { class: "note" }, about + differences), ...notes,
    tableOf("Mean rewards", heads, rows), make("h2", {}, "Distributions"), make("div", { class: "charts" }, ...groups));
}

/** Fills the tab "Settings and cost". */
function showRuns() {
  const names = report.runs.map((_, k) => runName(k));
  const parts = [make("h2", {}, "Cost")];
  const costs = [["Sampler", (run) => run.sampler || "–"], ["Images", countOf]];
  for (const [name, label] of Object.entries(report.costs)) {
    costs.push([label, (run) => (run.cost[name] === undefined ? "–" : format(run.cost[name]))]);
  }
  costs.push(["Seconds of all pictures", (run) => (run.cost.total_seconds === undefined ? "–" : format(run.cost.total_seconds * run.pictures))]);
  parts.push(tableOf("Cost", ["", ...names], costs.map(([label, read]) => [label, ...report.runs.map(read)])));
  parts.push(make("h2", {}, report.runs.length > 1 ? "Settings that differ" : "Settings"));
  if (report.runs.length > 1) {
    const { heads, rows } = report.settings;
    parts.push(rows.length ? tableOf("Settings that differ", heads.map((head) => make("bdi", {}, head)), rows, "text")
      : make("p", { class: "note" }, "None, apart from settings that do not change images."));
    parts.push(make("h2", {}, "All settings"));
  }
  report.runs.forEach((run, k) => {
    const state = stateOf(run);
    parts.push(make("details", {}, make("summary", {}, runName(k)),
      make("p", { class: "note" }, "Folder: ", make("bdi", {}, run.folder), state ? ` (${state})` : ""),
      make("pre", { tabindex: "0", "aria-label": `Configuration of ${run.name}` }, run.config || "No configuration is recorded.")));
  });
  parts.push(make("p", { class: "note" }, `Written by svdd ${report.version}.`));
  byId("runs").replaceChildren(...parts);
}
