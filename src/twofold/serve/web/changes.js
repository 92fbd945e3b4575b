// What feedback changed: each question that was judged, as the model before answered it and as this one does.

import { element } from "/element.js";

/** `use.shot(item)` draws an item, `use.name(item)` names it, `use.ask(text, like)` asks a question again. */
export function drawChanges(section, answer, use) {
  const { questions, right, rank, first, wrong } = answer;
  const figures = [
    rank && ["mean place of the right one", rank.map((place) => place.toFixed(1))],
    first && ["right one in the first place", first.map((share) => `${Math.round(100 * share)} %`)],
    wrong && ["wrong ones among the first ten", wrong.map((count) => count.toFixed(1))],
  ].filter(Boolean);
  section.replaceChildren(
    element("h2", {}, "What feedback changed"),
    element("p", {}, questions.length
      ? `${plural(questions.length, "question was", "questions were")} judged before the collection got its last model; ${right} of them have an answer that was found right. The new model was trained on these judgements.`
      : "Nothing that was judged has been answered by two models yet."),
    ...(figures.length ? [element("dl", {}, ...figures.map(([name, [before, after]]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, element("span", {}, before), " → ", element("b", {}, after)))))] : []),
    ...questions.toSorted((a, b) => gain(b) - gain(a)).map((one) => question(one, use)),
  );
}

/** How many places the right one of a question has come forward; questions without one stand last. */
function gain({ judged }) {
  const places = judged.filter((item) => item.relevant).map(({ before, after }) => (before ?? 101) - (after ?? 101));
  return places.length ? Math.max(...places) : -101;
}

const plural = (count, one, many) => `${count.toLocaleString()} ${count === 1 ? one : many}`;

function question({ text, like, before, after, judged }, use) {
  const words = [text, ...like.map((id) => `like ${id}`)].filter(Boolean).join(" + ");
  const seen = (rank) => rank != null && rank <= 10;
  const told = (item) => item.before !== item.after && (item.relevant || seen(item.before) !== seen(item.after));
  const moves = judged.filter(told).map((item) =>
    element("li", { class: item.relevant ? "good" : "bad" }, `${item.relevant ? "✓" : "✗"} ${use.name(item)}: ${place(item.before)} → ${place(item.after)}`));
  return element("article", {},
    element("h3", {}, element("button", { class: "link", onclick: () => use.ask(text, like) }, words)),
    element("div", { class: "strips" }, strip("before", before, use), strip("now", after, use)),
    moves.length ? element("ul", { class: "moves" }, ...moves) : null);
}

const place = (rank) => (rank == null ? "beyond 100" : String(rank));

function strip(name, items, use) {
  return element("figure", {}, element("figcaption", {}, name), element("ol", { "aria-label": `${name}` }, ...items.map((item) => {
    const box = use.shot(item);
    if (item.relevant != null) box.append(element("span", { class: `mark ${item.relevant ? "good" : "bad"}` }, item.relevant ? "✓" : "✗"));
    box.title = use.name(item);
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `${use.name(item)}${item.relevant == null ? "" : item.relevant ? ", right" : ", wrong"}`);
    return element("li", {}, box);
  })));
}
