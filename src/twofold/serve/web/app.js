// The page: what is wanted lives in `wanted`, the address bar mirrors it, and every change of it is one search.

import { drawChanges } from "/changes.js";
import { element } from "/element.js";
import { Map2D } from "/map.js";

const $ = (id) => document.getElementById(id);
const PAGE = 48;
const fresh = () => ({ text: "", like: [], unlike: [], where: [], weight: 0.5 });

let wanted = fresh();
let picture = null; // a File to look for the like of; it has no place in the address bar
let hits = [];
let more = false;
let facts = null;
let asked = 0; // searches begun: an answer that was overtaken is dropped
let loading = false; // a further page is on its way
let shown = -1; // the hit in the dialog
let map = null;
let chosen = null; // ids chosen on the map: only these are searched
const names = new Map(); // ids of items that were seen → the items
const said = new Map(); // feedback given on this page: question and id → relevant

// -- talking to the service ---------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const response = await fetch(path, options);
  if (response.status === 401) {
    await askForKey();
    return call(path, options);
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  const problem = await response.json().catch(() => ({ error: `${response.status} ${response.statusText}` }));
  throw new Error(problem.error);
}

const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

let keyAsked = null;
function askForKey() {
  keyAsked ??= new Promise((resolve) => {
    const dialog = $("key");
    dialog.showModal();
    dialog.oncancel = (event) => event.preventDefault();
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      const headers = { Authorization: `Bearer ${$("key-value").value.trim()}` };
      const response = await fetch("/api/v1/session", { method: "POST", headers });
      if (!response.ok) {
        $("key-error").textContent = "This is none of the keys that the service knows.";
        return;
      }
      dialog.close();
      keyAsked = null;
      resolve();
    };
  });
  return keyAsked;
}

// -- from the page to a request -----------------------------------------------------------------------------------------

/** "red boat -people -snow" → words to find and words to lead away from. A hyphen inside a word is a hyphen. */
function parsed(text) {
  const away = [];
  const words = text.replace(/(^|\s)-(?:"([^"]*)"|(\S+))/g, (_, gap, quoted, word) => {
    away.push(quoted ?? word);
    return gap;
  });
  return { text: words.trim().replace(/\s+/g, " ") || null, minus: away.join(" ") || null };
}

function request(offset) {
  const { like, unlike, where, weight } = wanted;
  return { ...parsed(wanted.text), like, unlike, where, weight, within: chosen ? [...chosen] : null, k: PAGE, offset };
}

const asks = () => Boolean(parsed(wanted.text).text || wanted.like.length || picture);

/** The hits of what is wanted; while nothing is asked for, the items as they come. */
function answered(offset) {
  if (!asks()) {
    const { where, within, k } = request(offset);
    return post("/api/v1/items", { where, within, k, offset });
  }
  if (!picture) return post("/api/v1/search", request(offset));
  const form = new FormData();
  form.append("picture", picture);
  form.append("wanted", JSON.stringify(request(offset)));
  return call("/api/v1/search/picture", { method: "POST", body: form });
}

async function search({ keep = false } = {}) {
  if (keep && loading) return;
  const mine = ++asked;
  render();
  if (!keep) say("Searching …");
  $("results").setAttribute("aria-busy", true);
  loading = keep;
  try {
    const answer = await answered(keep ? hits.length : 0);
    if (mine !== asked) return;
    const from = keep ? hits.length : 0;
    hits = keep ? [...hits, ...answer.hits] : answer.hits;
    for (const hit of answer.hits) names.set(hit.id, hit);
    more = answer.more;
    renderHits(from);
    if (!keep) scrollTo(0, 0);
    tell(answer);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  } finally {
    if (mine === asked) {
      loading = false;
      $("results").removeAttribute("aria-busy");
    }
  }
}

/** In words, what came back. */
function tell(answer) {
  const none = Boolean(answer.none_fits && hits.length);
  const notes = answer.notes ?? [];
  $("verdict").hidden = !none && !notes.length;
  $("verdict").replaceChildren(
    ...(none ? [element("b", {}, "No good match. "), "The nearest are shown, but none of them seems to be what you look for. "] : []), ...notes);
  if (asks()) {
    const count = more ? `The first ${hits.length.toLocaleString()}` : `${hits.length.toLocaleString()} found`;
    say(`${none ? "No good match. " : ""}${count} in ${Math.round(answer.milliseconds)} ms`);
  } else if (wanted.where.length || chosen) {
    say(more ? `The first ${hits.length.toLocaleString()} of this part` : `${hits.length.toLocaleString()} items in this part`);
  } else {
    say(`${facts.items.toLocaleString()} items. Describe what you look for, or drop a picture.`);
  }
  map?.light(asks() ? new Set(hits.map((hit) => hit.id)) : new Set());
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

/** Change what is wanted, remember it in the address bar, and search. */
function change(patch, { replace = false } = {}) {
  wanted = { ...wanted, ...patch };
  const query = new URLSearchParams();
  if (wanted.text) query.set("q", wanted.text);
  for (const name of ["like", "unlike", "where"]) for (const value of wanted[name]) query.append(name, value);
  if (wanted.weight !== 0.5) query.set("weight", wanted.weight);
  const address = query.size ? `/?${query}` : "/";
  if (address !== location.pathname + location.search) history[replace ? "replaceState" : "pushState"]({}, "", address);
  return search();
}

function read() {
  const query = new URLSearchParams(location.search);
  wanted = {
    text: query.get("q") ?? "",
    like: query.getAll("like"),
    unlike: query.getAll("unlike"),
    where: query.getAll("where"),
    weight: Math.min(1, Math.max(0, Number(query.get("weight") ?? 0.5) || 0)),
  };
}

// -- drawing ------------------------------------------------------------------------------------------------------------

const pictureOf = (id, large = false) => `/api/v1/picture?id=${encodeURIComponent(id)}${large ? "&large=true" : ""}`;
const titleOf = (hit) => String(hit.meta.text ?? hit.meta.name ?? hit.meta.title ?? hit.id);
const modalityOf = (item) => (Object.keys(facts?.modalities ?? {}).length > 1 ? item.meta.modality : facts?.modality);
const kindOf = (item) => facts?.modalities[modalityOf(item)];
const isWords = (item) => kindOf(item) === "text" && !item.meta.image; // nothing of it can be shown but what it says
const nameOf = (id) => (names.has(id) ? titleOf(names.get(id)) : id);
const seenAs = (id) => (names.has(id) && !isWords(names.get(id)) ? pictureOf(id) : null);
const percent = (share) => (share < 0.01 ? "< 1 %" : `${Math.round(100 * share)} %`);
/** Where hits of several modalities come in turn, their score is an order: what each scored in its own answer says more. */
const valueOf = (hit) => (hit.spaces?.length && hit.spaces[0].space === hit.meta.modality ? hit.spaces[0].score : hit.score).toFixed(3);
const scoreOf = (hit) => (hit.score == null ? "" : hit.probability == null ? valueOf(hit) : `${percent(hit.probability)} · ${valueOf(hit)}`);
const question = () => JSON.stringify([parsed(wanted.text).text, wanted.like]);
const judges = () => Boolean(facts?.writes && asks() && !picture);

function render() {
  if (document.activeElement !== $("text")) $("text").value = wanted.text;
  const chip = (sign, kind, label, remove, image) =>
    element("span", { class: `chip ${kind}` }, image ? element("img", { src: image, alt: "" }) : null,
      sign ? element("b", {}, sign) : null, element("span", { title: label }, label),
      element("button", { "aria-label": `Remove ${label}`, onclick: remove }, "×"));
  const without = (name, value) => () => change({ [name]: wanted[name].filter((other) => other !== value) });
  const chips = [
    ...(picture ? [chip("", "plus", picture.name || "picture", () => { picture = null; search(); }, picture.preview)] : []),
    ...wanted.like.map((id) => chip("+", "plus", nameOf(id), without("like", id), seenAs(id))),
    ...wanted.unlike.map((id) => chip("−", "minus", nameOf(id), without("unlike", id), seenAs(id))),
    ...wanted.where.map((term) => chip("", "filter", term.replace("=", ": "), without("where", term))),
    ...(chosen ? [chip("", "filter", `${chosen.size.toLocaleString()} chosen on the map`, () => map.choose(null))] : []),
  ];
  const all = chips.length > 1 ? [element("button", { class: "link", onclick: clear }, "Clear all")] : [];
  $("chips").replaceChildren(...chips, ...all);
  $("mix").hidden = !(parsed(wanted.text).text && (wanted.like.length || picture));
  $("weight").value = 1 - wanted.weight;
  $("weight").setAttribute("aria-valuetext", `${Math.round(100 * wanted.weight)} % words, ${Math.round(100 - 100 * wanted.weight)} % looks`);
  $("filters-count").textContent = wanted.where.length ? ` · ${wanted.where.length}` : "";
  for (const box of $("filters").querySelectorAll("input[type=checkbox]")) box.checked = wanted.where.includes(box.value);
}

function clear() {
  picture = null;
  chosen = null;
  map?.choose(null, { quiet: true });
  change({ like: [], unlike: [], where: [] });
}

/** Examples that came with the address are known by their ids only. */
function nameExamples() {
  for (const id of [...wanted.like, ...wanted.unlike].filter((one) => !names.has(one))) {
    call(`/api/v1/item?id=${encodeURIComponent(id)}`).then((item) => { names.set(id, item); render(); }, () => {});
  }
}

function renderHits(from = 0) {
  const list = $("results");
  const tiles = hits.slice(from).map((hit, place) => tile(hit, from + place));
  if (from) list.append(...tiles);
  else list.replaceChildren(...tiles);
  $("more").hidden = !more || list.hidden;
}

/** What stands for an item: its picture, or its words where it has none that can be shown. */
function shot(item) {
  const box = element("span", { class: "shot" });
  const title = titleOf(item);
  if (isWords(item)) {
    box.classList.add("words");
    box.append(title);
    return box;
  }
  const image = element("img", { src: pictureOf(item.id), alt: "", loading: "lazy", decoding: "async" });
  image.onload = () => {
    const ratio = image.naturalWidth / image.naturalHeight;
    box.classList.toggle("whole", ratio < 0.6 || ratio > 1.7); // a panorama is shown whole, the rest fills its square
    image.classList.add("there");
  };
  image.onerror = () => { box.classList.add("words"); image.replaceWith(title); };
  box.append(image);
  if (kindOf(item) === "video") box.append(element("span", { class: "sign", title: "a clip, by one of its frames" }, "▶"));
  return box;
}

function tile(hit, place) {
  const title = titleOf(hit);
  const score = scoreOf(hit);
  const box = shot(hit);
  const judged = said.get(question() + hit.id);
  if (judged !== undefined) box.append(element("span", { class: `mark ${judged ? "good" : "bad"}` }, judged ? "✓" : "✗"));
  const line = element("span", { class: "score" }, score, ...spaces(hit));
  if (hit.probability != null) line.prepend(element("span", { class: "gauge", "aria-hidden": "true" }, gauge(hit.probability)));
  const button = element("button", { class: "hit", onclick: () => open(place), "aria-label": score ? `${title}, score ${score}` : title },
    box, element("span", { class: "caption" }, title), score ? line : null);
  const quick = judges() ? element("span", { class: "quick" },
    element("button", { title: "Right: this was meant", "aria-label": `Right: ${title}`, tabindex: "-1", onclick: () => judge(place, true) }, "✓"),
    element("button", { title: "Wrong: this was not meant", "aria-label": `Wrong: ${title}`, tabindex: "-1", onclick: () => judge(place, false) }, "✗")) : null;
  return element("li", {}, button, quick);
}

function gauge(share) {
  const bar = document.createElement("i");
  bar.style.width = `${Math.round(100 * share)}%`;
  return bar;
}

/** Which spaces an item was found in, where the service asks several: its own, or that of its texts. */
function spaces(hit) {
  const several = Object.keys(facts.modalities).length > 1; // then each has said by which modality first
  return (hit.spaces ?? []).filter(({ space }) => !(several && space === "items")).map(({ space, rank, text }) => {
    const name = space === "texts" ? "text" : space === "items" ? facts.modality : space;
    return element("span", { class: "space", title: `number ${rank} by its ${name}${text ? `: ${text}` : ""}` }, `${name} ${rank}`);
  });
}

function renderFilters() {
  const drawers = Object.entries(facts.columns).map(([name, values]) => {
    const boxes = values.map(([value, count]) => {
      const term = `${name}=${/^["']|\s(and|or)\s/i.test(value) ? JSON.stringify(value) : value}`; // not two conditions
      const box = element("input", { type: "checkbox", value: term });
      box.onchange = () => filter(term, box.checked);
      return element("label", {}, box, element("span", {}, String(value)), element("small", {}, count.toLocaleString()));
    });
    return element("details", { open: values.length <= 12 }, element("summary", {}, name, element("small", {}, String(values.length))), ...boxes);
  });
  $("filters").replaceChildren(...(drawers.length ? drawers : [element("p", {}, "These items have no columns to filter by.")]));
}

function filter(term, on) {
  change({ where: on ? [...wanted.where.filter((other) => other !== term), term] : wanted.where.filter((other) => other !== term) });
}

// -- one hit, large -----------------------------------------------------------------------------------------------------

function open(place) {
  const hit = hits[place];
  if (!hit) return;
  shown = place;
  $("one-title").textContent = titleOf(hit);
  $("one-score").replaceChildren(...(hit.score == null ? [] : [hit.probability == null ? `score ${valueOf(hit)}` : `${percent(hit.probability)} likely meant · score ${valueOf(hit)}`, ...spaces(hit)]));
  const image = $("one-picture");
  image.hidden = isWords(hit);
  $("one-none").hidden = !isWords(hit);
  $("one-none").textContent = isWords(hit) ? titleOf(hit) : "This item has no picture that can be shown.";
  image.onerror = () => { image.hidden = true; $("one-none").hidden = false; };
  if (isWords(hit)) image.removeAttribute("src");
  else image.src = pictureOf(hit.id, true);
  image.alt = titleOf(hit);
  const rows = [["id", hit.id], ...Object.entries(hit.meta).filter(([name]) => name !== "image")];
  $("one-meta").tBodies[0].replaceChildren(...rows.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, cell(name, value)))));
  $("one-judge").hidden = !judges();
  $("one-place").textContent = `${(place + 1).toLocaleString()} of ${hits.length.toLocaleString()}${more ? " …" : ""}`;
  $("one-back").disabled = place === 0;
  $("one-next").disabled = place === hits.length - 1 && !more;
  renderJudgement();
  if (!$("one").open) $("one").showModal();
}

/** A value of a column; one that a drawer has is a way to it. */
function cell(name, value) {
  if (!facts.columns[name]?.some(([known]) => known === value)) return String(value);
  return element("button", { class: "link", title: `Only ${name}: ${value}`, onclick: () => { $("one").close(); filter(`${name}=${value}`, true); } }, String(value));
}

async function turn(step) {
  if (shown + step >= hits.length && more) await search({ keep: true });
  open(shown + step);
}

function renderJudgement() {
  const judged = said.get(question() + hits[shown]?.id);
  $("one-right").setAttribute("aria-pressed", judged === true);
  $("one-wrong").setAttribute("aria-pressed", judged === false);
}

async function judge(place, relevant) {
  const hit = hits[place];
  if (!hit || !judges()) return;
  const about = question();
  try {
    await post("/api/v1/feedback", { id: hit.id, relevant, text: parsed(wanted.text).text, like: wanted.like });
  } catch (error) {
    say(error.message, true);
    return;
  }
  said.set(about + hit.id, relevant);
  if (about !== question()) return;
  if (shown === place) renderJudgement();
  const old = $("results").children[place];
  const focused = old?.contains(document.activeElement);
  const drawn = tile(hit, place);
  old?.replaceWith(drawn);
  if (focused) drawn.querySelector("button.hit").focus();
}

/** Look for more like an item, away from it, or for what is wanted and its like. */
function example(place, kind) {
  const id = hits[place]?.id;
  if (id == null) return;
  $("one").close();
  const like = wanted.like.filter((one) => one !== id);
  const unlike = wanted.unlike.filter((one) => one !== id);
  if (kind === "more") {
    picture = null;
    change({ text: "", like: [id], unlike: [] });
  } else if (kind === "not") change({ like, unlike: [...unlike, id] });
  else change({ like: [...like, id], unlike });
}

// -- views --------------------------------------------------------------------------------------------------------------

let view = "results";

async function show(next) {
  view = next;
  for (const name of ["results", "map", "changes"]) $(name).hidden = view !== name;
  for (const name of ["map", "changes"]) $(`${name}-toggle`).setAttribute("aria-pressed", view === name);
  $("more").hidden = !more || view !== "results";
  if (view === "map") await openMap();
  if (view === "changes") await openChanges();
}

async function openMap() {
  if (!map) {
    $("map-note").textContent = "Laying out the map …";
    try {
      const layout = await call("/api/v1/map");
      layout.words = new Set(layout.words);
      map = new Map2D($("map").querySelector("canvas"), layout, {
        picture: (id) => (layout.words.has(id) ? null : pictureOf(id)),
        onopen: (id) => call(`/api/v1/item?id=${encodeURIComponent(id)}`).then((item) => {
          const at = hits.findIndex((hit) => hit.id === id);
          if (at < 0) hits = [{ ...item, score: null }, ...hits];
          open(Math.max(at, 0));
          if (at < 0) renderHits();
        }),
        onchoose: (ids) => { chosen = ids; noteMap(); search(); },
        onlasso: (on) => $("map-lasso").setAttribute("aria-pressed", on),
      });
    } catch (error) {
      $("map-note").textContent = error.message;
      return;
    }
  }
  map.light(asks() ? new Set(hits.map((hit) => hit.id)) : new Set());
  noteMap();
}

function noteMap() {
  const count = map.layout.ids.length.toLocaleString();
  $("map-note").replaceChildren(chosen
    ? `${chosen.size.toLocaleString()} of ${count} chosen: searches are among these. `
    : `${count} items; near ones are alike. Scroll or pinch to zoom, drag to move, Lasso to choose.`,
  ...(chosen ? [element("button", { class: "link", onclick: () => show("results") }, "Show them"), " ", element("button", { class: "link", onclick: () => map.choose(null) }, "Choose none")] : []));
}

async function openChanges() {
  try {
    drawChanges($("changes"), await call("/api/v1/corrected"), {
      shot,
      ask: (text, like) => { show("results"); change({ ...fresh(), text: text ?? "", like }); },
      name: titleOf,
    });
  } catch (error) {
    say(error.message, true);
  }
}

// -- what people do -----------------------------------------------------------------------------------------------------

let typing;
let begun = false; // what is typed in one go is one step back, not one a letter
function ask(replace) {
  clearTimeout(typing);
  if (view === "changes") show("results");
  return change({ text: $("text").value.trim() }, { replace });
}
$("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(begun);
  begun = false;
};
$("text").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => { ask(begun); begun = true; }, 300);
};
$("text").onblur = () => { begun = false; };
$("file").onchange = () => take($("file").files[0]);
$("pick").onclick = () => $("file").click();
let sliding;
$("weight").oninput = () => {
  clearTimeout(sliding);
  sliding = setTimeout(() => change({ weight: Math.round(20 * (1 - $("weight").value)) / 20 }, { replace: true }), 120);
};
$("more").onclick = () => search({ keep: true });
new IntersectionObserver(([end]) => { if (end.isIntersecting && more && !$("one").open) search({ keep: true }); }, { rootMargin: "600px" }).observe($("more"));
$("filters-toggle").onclick = () => {
  $("filters").hidden = !$("filters").hidden;
  $("filters-toggle").setAttribute("aria-expanded", !$("filters").hidden);
};
const toggle = (name) => show(view === name ? "results" : name);
$("map-toggle").onclick = () => toggle("map");
$("changes-toggle").onclick = () => toggle("changes");
$("map-in").onclick = () => map?.zoomBy(1.6);
$("map-out").onclick = () => map?.zoomBy(1 / 1.6);
$("map-whole").onclick = () => map?.whole();
$("map-lasso").onclick = () => map?.draws(!map.drawing);
$("one-like").onclick = () => example(shown, "more");
$("one-unlike").onclick = () => example(shown, "not");
$("one-add").onclick = () => example(shown, "add");
$("one-right").onclick = () => judge(shown, true);
$("one-wrong").onclick = () => judge(shown, false);
$("one-back").onclick = () => turn(-1);
$("one-next").onclick = () => turn(1);
$("one-close").onclick = () => $("one").close();
$("help-open").onclick = () => $("help").showModal();
$("help-close").onclick = () => $("help").close();
for (const name of ["one", "help"]) $(name).onclick = (event) => { if (event.target === $(name)) $(name).close(); };
$("one").onclose = () => {
  const back = shown;
  shown = -1;
  if (view === "map") $("map").querySelector("canvas").focus();
  else $("results").children[back]?.querySelector("button.hit").focus();
};

function take(file) {
  if (!file) return;
  if (picture?.preview) URL.revokeObjectURL(picture.preview);
  picture = file;
  picture.preview = URL.createObjectURL(file);
  $("file").value = "";
  if (view === "changes") show("results");
  search();
}

const pictured = (files) => [...(files ?? [])].find((file) => file.type.startsWith("image/"));
let over = 0;
addEventListener("dragenter", (event) => { if (event.dataTransfer?.types.includes("Files")) { over += 1; $("drop").hidden = false; } });
addEventListener("dragleave", () => { over = Math.max(0, over - 1); $("drop").hidden = over === 0; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  $("drop").hidden = true;
  const file = pictured(event.dataTransfer.files);
  if (file) take(file);
  else if (event.dataTransfer.files.length) say("That is no picture.", true);
});
addEventListener("paste", (event) => take(pictured(event.clipboardData?.files)));
addEventListener("popstate", () => { read(); nameExamples(); search(); });

/** What a key does to the item at `place`, in the dialog and on a tile alike. */
const ITEM_KEYS = {
  m: (place) => example(place, "more"),
  n: (place) => example(place, "not"),
  a: (place) => example(place, "add"),
  "+": (place) => judge(place, true),
  "-": (place) => judge(place, false),
};
const PAGE_KEYS = {
  "/": () => { $("text").focus(); $("text").select(); },
  "?": () => $("help").showModal(),
  f: () => $("filters-toggle").click(),
  v: () => toggle("map"),
  c: () => { if (!$("changes-toggle").hidden) toggle("changes"); },
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("key").open || $("help").open) return;
  const act = (found) => { if (found) { event.preventDefault(); found(); } };
  if ($("one").open) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) act(() => turn(step));
    else if (ITEM_KEYS[event.key]) act(() => ITEM_KEYS[event.key](shown));
    return;
  }
  if (event.target.matches("input:not([type=checkbox]), textarea")) {
    if (event.key === "ArrowDown" && event.target === $("text")) act(() => $("results").querySelector("button.hit")?.focus());
    return;
  }
  const cards = [...$("results").children];
  const at = view === "results" ? cards.findIndex((card) => card.contains(document.activeElement)) : -1;
  if (at >= 0) {
    const columns = getComputedStyle($("results")).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step) return act(() => (at + step < 0 && event.key === "ArrowUp" ? $("text").focus() : cards[at + step]?.querySelector("button.hit").focus()));
    if (event.key === "Escape") return act(() => $("text").focus());
    if (ITEM_KEYS[event.key]) return act(() => ITEM_KEYS[event.key](at));
  }
  if (event.target.matches("canvas") && ["+", "-"].includes(event.key)) return;
  act(PAGE_KEYS[event.key]);
});

read();
render();
call("/api/v1/facts").then((found) => {
  facts = found;
  document.title = `${found.items.toLocaleString()} items · twofold`;
  $("changes-toggle").hidden = !found.corrected;
  $("hints").hidden = !found.hints.length;
  $("hints").textContent = found.hints.join(" ");
  renderFilters();
  nameExamples();
  return search();
}).catch((error) => say(error.message, true));
if (matchMedia("(min-width: 44rem)").matches) $("text").focus();
