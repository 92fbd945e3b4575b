// The page: what is wanted lives in `wanted`, the address bar mirrors it, and every change of it is one search.

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
let shown = -1; // the hit in the dialog
let map = null;
let chosen = null; // ids chosen on the map
const names = new Map(); // ids of items that were seen → what they are called
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
export function parsed(text) {
  const away = [];
  const words = text.replace(/(^|\s)-(?:"([^"]*)"|(\S+))/g, (_, gap, quoted, word) => {
    away.push(quoted ?? word);
    return gap;
  });
  return { text: words.trim().replace(/\s+/g, " ") || null, minus: away.join(" ") || null };
}

function request(offset = 0) {
  const { like, unlike, where, weight } = wanted;
  return { ...parsed(wanted.text), like, unlike, where, weight, k: PAGE, offset };
}

const asks = () => Boolean(parsed(wanted.text).text || wanted.like.length || picture);

async function search({ keep = false } = {}) {
  const mine = ++asked;
  render();
  if (!asks()) {
    hits = [];
    more = false;
    renderHits();
    say(facts ? `${facts.items.toLocaleString()} items. Describe what you look for, or drop a picture.` : "");
    return;
  }
  say("Searching …");
  try {
    const body = request(keep ? hits.length : 0);
    let answer;
    if (picture) {
      const form = new FormData();
      form.append("picture", picture);
      form.append("wanted", JSON.stringify(body));
      answer = await call("/api/v1/search/picture", { method: "POST", body: form });
    } else {
      answer = await post("/api/v1/search", body);
    }
    if (mine !== asked) return;
    hits = keep ? [...hits, ...answer.hits] : answer.hits;
    for (const hit of answer.hits) names.set(hit.id, titleOf(hit));
    more = answer.more;
    renderHits(keep ? hits.length - answer.hits.length : 0);
    const none = answer.none_fits ? "Nothing here seems to be what you look for. The nearest:" : "";
    const count = more ? `The first ${hits.length.toLocaleString()}` : `${hits.length.toLocaleString()} found`;
    say(none || `${count} in ${Math.round(answer.milliseconds)} ms`);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
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
  history[replace ? "replaceState" : "pushState"]({}, "", query.size ? `/?${query}` : "/");
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

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made[name] = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export const pictureOf = (id, large = false) => `/api/v1/picture?id=${encodeURIComponent(id)}${large ? "&large=true" : ""}`;
const titleOf = (hit) => String(hit.meta.text ?? hit.meta.name ?? hit.meta.title ?? hit.id);
const scoreOf = (hit) => (hit.probability == null ? hit.score.toFixed(3) : `${Math.round(100 * hit.probability)} % · ${hit.score.toFixed(3)}`);
const question = () => JSON.stringify([parsed(wanted.text).text, wanted.like]);

function render() {
  if (document.activeElement !== $("text")) $("text").value = wanted.text;
  const chip = (sign, kind, label, remove, image) =>
    element("span", { class: `chip ${kind}` }, image ? element("img", { src: image, alt: "" }) : null,
      sign ? element("b", {}, sign) : null, element("span", { title: label }, label),
      element("button", { "aria-label": `Remove ${label}`, onclick: remove }, "×"));
  const without = (name, value) => () => change({ [name]: wanted[name].filter((other) => other !== value) });
  const chips = [
    ...(picture ? [chip("", "plus", picture.name || "picture", () => { picture = null; search(); }, picture.preview)] : []),
    ...wanted.like.map((id) => chip("+", "plus", names.get(id) ?? id, without("like", id), pictureOf(id))),
    ...wanted.unlike.map((id) => chip("−", "minus", names.get(id) ?? id, without("unlike", id), pictureOf(id))),
    ...wanted.where.map((term) => chip("", "filter", term.replace("=", ": "), without("where", term))),
    ...(chosen ? [chip("", "filter", `${chosen.size} chosen on the map`, () => { chosen = null; map?.choose(null); renderHits(); render(); })] : []),
  ];
  $("chips").replaceChildren(...chips);
  $("mix").hidden = !(parsed(wanted.text).text && (wanted.like.length || picture));
  $("weight").value = 1 - wanted.weight;
  for (const box of $("filters").querySelectorAll("input")) box.checked = wanted.where.includes(box.value);
}

/** Examples that came with the address are known by their ids only. */
function nameExamples() {
  for (const id of [...wanted.like, ...wanted.unlike].filter((one) => !names.has(one))) {
    call(`/api/v1/item?id=${encodeURIComponent(id)}`).then((item) => { names.set(id, titleOf(item)); render(); }, () => {});
  }
}

function renderHits(from = 0) {
  const list = $("results");
  if (from === 0) list.replaceChildren();
  hits.slice(from).forEach((hit, place) => {
    if (chosen && !chosen.has(hit.id)) return;
    list.append(element("li", {}, tile(hit, from + place)));
  });
  $("more").hidden = !more;
}

function tile(hit, place) {
  const title = titleOf(hit);
  const shot = element("span", { class: "shot" });
  if (facts?.modality !== "text" || hit.meta.image) {
    const image = element("img", { src: pictureOf(hit.id), alt: "", loading: "lazy", decoding: "async" });
    image.onload = () => image.classList.add("there");
    image.onerror = () => { shot.classList.add("words"); image.replaceWith(title); };
    shot.append(image);
  } else {
    shot.classList.add("words");
    shot.append(title);
  }
  const judged = said.get(question() + hit.id);
  if (judged !== undefined) shot.append(element("span", { class: `mark ${judged ? "good" : "bad"}` }, judged ? "✓" : "✗"));
  return element("button", { class: "hit", onclick: () => open(place), "aria-label": `${title}, score ${scoreOf(hit)}` },
    shot, element("span", { class: "caption" }, title), element("span", { class: "score" }, scoreOf(hit)));
}

function renderFilters() {
  const drawers = Object.entries(facts.columns).map(([name, values]) =>
    element("fieldset", {}, element("legend", {}, name), ...values.map(([value, count]) => {
      const term = `${name}=${value}`;
      const box = element("input", { type: "checkbox", value: term });
      box.onchange = () => change({ where: box.checked ? [...wanted.where, term] : wanted.where.filter((other) => other !== term) });
      return element("label", {}, box, element("span", {}, String(value)), element("small", {}, count.toLocaleString()));
    })));
  $("filters").replaceChildren(...(drawers.length ? drawers : [element("p", {}, "These items have no columns to filter by.")]));
}

// -- one hit, large -----------------------------------------------------------------------------------------------------

function open(place) {
  const hit = hits[place];
  if (!hit) return;
  shown = place;
  $("one-title").textContent = titleOf(hit);
  $("one-score").textContent = hit.probability == null ? `score ${hit.score.toFixed(3)}` : `${Math.round(100 * hit.probability)} % likely meant · score ${hit.score.toFixed(3)}`;
  const image = $("one-picture");
  image.hidden = false;
  $("one-none").hidden = true;
  image.onerror = () => { image.hidden = true; $("one-none").hidden = false; };
  image.onload = null;
  image.src = pictureOf(hit.id, true);
  image.alt = titleOf(hit);
  const rows = [["id", hit.id], ...Object.entries(hit.meta).filter(([name]) => name !== "image")];
  $("one-meta").tBodies[0].replaceChildren(...rows.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value)))));
  $("one-judge").hidden = !facts?.writes || !asks() || Boolean(picture);
  renderJudgement();
  if (!$("one").open) $("one").showModal();
}

function renderJudgement() {
  const judged = said.get(question() + hits[shown].id);
  $("one-right").setAttribute("aria-pressed", judged === true);
  $("one-wrong").setAttribute("aria-pressed", judged === false);
}

async function judge(relevant) {
  if (shown < 0 || $("one-judge").hidden) return;
  const { id } = hits[shown];
  try {
    await post("/api/v1/feedback", { id, relevant, text: parsed(wanted.text).text, like: wanted.like });
    said.set(question() + id, relevant);
    renderJudgement();
    renderHits();
  } catch (error) {
    say(error.message, true);
  }
}

function example(kind) {
  const { id } = hits[shown];
  $("one").close();
  const other = kind === "like" ? "unlike" : "like";
  const patch = { [kind]: [...wanted[kind].filter((one) => one !== id), id], [other]: wanted[other].filter((one) => one !== id) };
  change(kind === "like" ? { ...patch, text: "", like: [id], unlike: [] } : patch);
}

// -- what people do -----------------------------------------------------------------------------------------------------

let typing;
$("ask").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(typing);
  change({ text: $("text").value.trim() });
};
$("text").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => change({ text: $("text").value.trim() }, { replace: true }), 350);
};
$("file").onchange = () => take($("file").files[0]);
$("pick").onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
$("weight").onchange = () => change({ weight: Math.round(20 * (1 - $("weight").value)) / 20 }, { replace: true });
$("more").onclick = () => search({ keep: true });
new IntersectionObserver(([end]) => { if (end.isIntersecting && more && !$("one").open) search({ keep: true }); }, { rootMargin: "400px" }).observe($("more"));
$("filters-toggle").onclick = () => {
  $("filters").hidden = !$("filters").hidden;
  $("filters-toggle").setAttribute("aria-expanded", !$("filters").hidden);
};
$("one-like").onclick = () => example("like");
$("one-unlike").onclick = () => example("unlike");
$("one-right").onclick = () => judge(true);
$("one-wrong").onclick = () => judge(false);
$("one-close").onclick = () => $("one").close();
$("one").onclick = (event) => { if (event.target === $("one")) $("one").close(); };
$("one").onclose = () => { const back = shown; shown = -1; $("results").querySelectorAll("button.hit")[back]?.focus(); };

function take(file) {
  if (!file) return;
  picture = file;
  picture.preview = URL.createObjectURL(file);
  $("file").value = "";
  search();
}

let over = 0;
addEventListener("dragenter", (event) => { if (event.dataTransfer?.types.includes("Files")) { over += 1; $("drop").hidden = false; } });
addEventListener("dragleave", () => { over = Math.max(0, over - 1); $("drop").hidden = over === 0; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  $("drop").hidden = true;
  take([...event.dataTransfer.files].find((file) => file.type.startsWith("image/")));
});
addEventListener("paste", (event) => take([...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"))));
addEventListener("popstate", () => { read(); search(); });

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("one").open) {
    const act = { ArrowRight: () => open(shown + 1), ArrowLeft: () => open(shown - 1), m: () => example("like"), n: () => example("unlike"),
      "+": () => judge(true), "-": () => judge(false) }[event.key];
    if (act) { event.preventDefault(); act(); }
    return;
  }
  if (event.target.matches("input, textarea")) {
    if (event.key === "ArrowDown" && event.target === $("text")) $("results").querySelector("button.hit")?.focus();
    return;
  }
  if (event.key === "/") { event.preventDefault(); $("text").focus(); $("text").select(); return; }
  const tiles = [...$("results").querySelectorAll("button.hit")];
  const at = tiles.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = getComputedStyle($("results")).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step) { event.preventDefault(); tiles[at + step]?.focus(); }
});

// -- the map ------------------------------------------------------------------------------------------------------------

$("map-toggle").onclick = async () => {
  const on = $("map").hidden;
  $("map-toggle").setAttribute("aria-pressed", on);
  $("map").hidden = !on;
  $("results").hidden = on;
  $("more").hidden = on || !more;
  if (!on) return;
  if (!map) {
    $("map-note").textContent = "Laying out the map …";
    try {
      const layout = await call("/api/v1/map");
      map = new Map2D($("map").querySelector("canvas"), layout, {
        picture: pictureOf,
        onopen: (id) => call(`/api/v1/item?id=${encodeURIComponent(id)}`).then((item) => { hits = [{ ...item, score: 1 }, ...hits]; open(0); }),
        onchoose: (ids) => { chosen = ids; render(); renderHits(); },
      });
      $("map-note").textContent = `${layout.ids.length.toLocaleString()} items; near ones are alike. Scroll to zoom, drag to move, Shift and drag to choose.`;
    } catch (error) {
      $("map-note").textContent = error.message;
      return;
    }
  }
  map.light(new Set(hits.map((hit) => hit.id)));
  map.draw();
};

read();
render();
call("/api/v1/facts").then((found) => {
  facts = found;
  document.title = `${found.items.toLocaleString()} items · twofold`;
  renderFilters();
  nameExamples();
  return search();
}).catch((error) => say(error.message, true));
if (matchMedia("(min-width: 44rem)").matches) $("text").focus();
