// The page's data, and the tab "Images": filter, order, baseline and the tiles.

const byId = (id) => document.getElementById(id);
const report = JSON.parse(byId("data").textContent);
const STEP = 96; // tiles that are added at once
const view = { order: [], shown: 0, baseline: null, keys: new Map() };

/** Returns what is known about an image beyond the columns of `report.images`; parsed when it is asked for. */
const infoOf = (image) => JSON.parse(byId(`i${image}`).textContent);

/** Returns what must agree between two images of a pair. */
const keyOf = (image) => `${report.images.prompt[image]} ${report.images.number[image]} ${report.images.seed[image]}`;

/** Returns the baseline's image of the same prompt, number and seed; null if there is none. */
function counterpart(image) {
  if (view.baseline === null || report.images.run[image] === view.baseline) return null;
  const found = view.keys.get(keyOf(image));
  return found === undefined ? null : found;
}

/** Chooses the run that images are paired with; of several particles the heaviest counts. */
function setBaseline(run) {
  view.baseline = run;
  view.keys.clear();
  report.images.run.forEach((each, image) => {
    const known = view.keys.get(keyOf(image));
    if (each === run && (known === undefined || report.images.weight[image] > report.images.weight[known])) view.keys.set(keyOf(image), image);
  });
  byId("grid").classList.toggle("paired", run !== null);
  showRewards(run);
}

const scoreOf = (reward, image) => (image === null ? null : report.images.scores[reward][image]);

/** Returns the number by which images are sorted; null sorts last. */
function sortKey(name) {
  const [kind, index] = name.split(" ");
  if (kind === "reward") return (image) => scoreOf(index, image);
  if (kind === "rows") return (image) => report.images.rows[image];
  if (kind === "seconds") return (image) => report.images.seconds[image];
  if (kind === "gain") {
    return (image) => {
      const [here, there] = [scoreOf(index, image), scoreOf(index, counterpart(image))];
      return here === null || there === null ? null : here - there;
    };
  }
  return null;
}

/** Computes which images are shown, in which order. */
function arrange() {
  const { run, prompt, index, number, particle } = report.images;
  const words = byId("filter").value.toLowerCase(), wanted = byId("run").value, down = byId("order").value === "down";
  const matching = report.prompts.map((text) => text.toLowerCase().includes(words));
  let images = run.map((_, image) => image).filter((image) => matching[prompt[image]]
    && (wanted === "all" ? run[image] !== view.baseline : run[image] === Number(wanted)));
  const key = sortKey(byId("sort").value), ranking = key || sortKey(report.rewards.length ? "reward 0" : "rows");
  const inOrder = (a, b) => index[a] - index[b] || number[a] - number[b] || run[a] - run[b] || (particle[a] || 0) - (particle[b] || 0);
  const ranked = (read, falling) => (a, b) => {
    const [x, y] = [read(a), read(b)];
    if (x === null || y === null) return (x === null) - (y === null) || inOrder(a, b);
    return (falling ? y - x : x - y) || inOrder(a, b);
  };
  const most = Number(byId("best").value);
  if (most) {
    const taken = new Map();
    images = [...images].sort(ranked(ranking, key ? down : true)).filter((image) => {
      const count = taken.get(prompt[image]) || 0;
      taken.set(prompt[image], count + 1);
      return count < most;
    });
  }
  view.order = images.sort(key ? ranked(key, down) : down ? inOrder : (a, b) => inOrder(b, a));
  view.shown = 0;
  byId("grid").replaceChildren();
  showMore();
  const pairs = view.baseline === null ? "" : `, ${view.order.filter((image) => counterpart(image) !== null).length} of them beside the image of ${report.runs[view.baseline].name} with the same prompt, number and seed`;
  byId("count").textContent = `${view.order.length} of ${run.length} images${pairs}`;
}

/** Returns the words for an image that a screen reader says, and that stand in for a missing picture. */
function wordsOf(image) {
  const scores = report.rewards.map((name, r) => [name, report.images.scores[r][image]]).filter(([, score]) => score !== null);
  const texts = [report.prompts[report.images.prompt[image]] || "no prompt", `run ${report.runs[report.images.run[image]].name}`];
  return [...texts, ...scores.map(([name, score]) => `${name} ${format(score)}`)].join(", ");
}

function pictureOf(image, lazy = true) {
  const about = infoOf(image);
  if (!about.thumb) return make("span", { class: "picture missing", role: "img", "aria-label": wordsOf(image) }, "The picture cannot be read");
  const picture = make("img", { class: "picture", alt: wordsOf(image), width: about.width, height: about.height, decoding: "async", loading: lazy ? "lazy" : null });
  picture.src = about.thumb;
  return picture;
}

function tileOf(position) {
  const image = view.order[position], other = counterpart(image), images = report.images;
  const pictures = make("span", { class: "pictures" });
  const framed = (each) => make("span", {}, make("small", {}, runName(images.run[each])), pictureOf(each));
  if (other === null) pictures.append(make("span", {}, pictureOf(image))); else pictures.append(framed(other), framed(image));
  const scores = make("span", { class: "scores" });
  const sorted = byId("sort").value.split(" ");
  const by = sorted.length > 1 ? Number(sorted[1]) : -1;
  const some = [...report.rewards.keys()].sort((a, b) => (b === by) - (a === by)).slice(0, 4);
  for (const r of some) {
    const [here, there] = [images.scores[r][image], scoreOf(r, other)];
    if (here === null) continue;
    const mark = r === by ? "by" : null;
    scores.append(make("span", { class: mark, title: report.rewards[r] }, report.rewards[r]),
      make("span", { class: mark }, format(here) + (there === null ? "" : ` (${signed(here - there)})`)));
  }
  const prompt = make("span", { class: "prompt" }, make("bdi", { dir: "auto" }, report.prompts[images.prompt[image]] || "(no prompt)"));
  const several = other === null && report.runs.length > 1 && byId("run").value === "all";
  const tile = make("button", { type: "button", class: "tile", "data-image": image }, pictures, prompt, several ? runName(images.run[image]) : null, scores);
  tile.addEventListener("click", () => openDetail(position));
  return make("li", {}, tile);
}

function showMore() {
  const end = Math.min(view.order.length, view.shown + STEP), added = document.createDocumentFragment();
  for (let position = view.shown; position < end; position++) added.append(tileOf(position));
  view.shown = end;
  byId("grid").append(added);
  byId("more").hidden = end === view.order.length;
  whenSeen.unobserve(byId("more")); // observed anew, so that it is reported again if it is still in view
  whenSeen.observe(byId("more"));
}

const whenSeen = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) showMore(); }, { rootMargin: "800px" });

/** Moves the focus among the tiles by the arrow keys. */
function moveFocus(event) {
  const tiles = byId("grid").children, here = [...tiles].indexOf(event.target.closest("li"));
  if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  const across = [...tiles].filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -here, End: view.order.length - 1 - here }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  while (here + by >= view.shown && view.shown < view.order.length) showMore();
  const next = byId("grid").children[here + by];
  if (next) next.firstElementChild.focus();
}

function fill(select, entries) {
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

/** Offers differences to the baseline as orders while there is one. */
function fillSort() {
  const gains = view.baseline === null ? [] : report.rewards.map((name, r) => [`gain ${r}`, `${name}, difference`]);
  fill(byId("sort"), [["prompt", "prompt order"], ...report.rewards.map((name, r) => [`reward ${r}`, name]), ...gains, ["rows", "denoiser rows"], ["seconds", "seconds"]]);
}

/** Names the orders and the best images by what is sorted. */
function fillBest() {
  const words = byId("sort").value === "prompt" ? ["first to last", "last to first"] : ["highest first", "lowest first"];
  fill(byId("order"), [["down", words[0]], ["up", words[1]]]);
  const chosen = byId("sort").selectedOptions[0], name = byId("sort").value === "prompt" ? report.rewards[0] || "denoiser rows" : chosen.textContent;
  fill(byId("best"), [["0", "all images"], ...[1, 2, 4, 8].map((k) => [String(k), `first ${k} by ${name}`])]);
}

function selectTab(tab, focus = false) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
  if (focus) tab.focus();
}

function begin() {
  const runs = report.runs.map((run, k) => [String(k), run.name]);
  fill(byId("run"), [["all", "all"], ...runs]);
  fill(byId("baseline"), [["", "none"], ...(runs.length > 1 ? runs : [])]);
  if (report.baseline !== null) byId("baseline").value = String(report.baseline);
  byId("run").closest("label").hidden = byId("baseline").closest("label").hidden = runs.length < 2;
  const states = report.runs.filter(stateOf).map((run) => `${run.name}: ${stateOf(run)}`);
  byId("overview").textContent = [`${report.images.run.length} images, ${report.prompts.length} prompts, ${runs.length} run${runs.length > 1 ? "s" : ""}`, ...states].join(". ");
  setBaseline(report.baseline);
  fillSort();
  fillBest();
  showRuns();
  arrange();
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("filter").addEventListener("input", arrange);
  for (const id of ["run", "order", "best"]) byId(id).addEventListener("change", arrange);
  byId("sort").addEventListener("change", () => { fillBest(); arrange(); });
  byId("baseline").addEventListener("change", () => {
    setBaseline(byId("baseline").value === "" ? null : Number(byId("baseline").value));
    if (byId("run").value === byId("baseline").value) byId("run").value = "all";
    fillSort();
    fillBest();
    arrange();
  });
  byId("more").addEventListener("click", showMore);
  byId("grid").addEventListener("keydown", moveFocus);
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, k) => {
    tab.addEventListener("click", () => selectTab(tab));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) selectTab(tabs[(k + by + tabs.length) % tabs.length], true);
    });
  });
  const named = /^#image-(\d+)$/.exec(location.hash), position = named ? view.order.indexOf(Number(named[1])) : -1;
  if (position >= 0) openDetail(position);
}
