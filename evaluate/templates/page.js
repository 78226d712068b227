"use strict";
// What the page does beyond showing itself: sort tables, filter the estimates, browse the replies.
// Without it every table is there all the same. Texts are set as text, never as HTML.

// ---- sorting: a click on a column's head; missing values stay last either way

function sortKey(cell) {
  const text = cell.dataset.v ?? cell.textContent.trim();
  if (text === "" || text === "\u2013") return null;
  const value = Number(text.replace(/,/g, ""));
  return Number.isNaN(value) ? text.toLowerCase() : value;
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
}

function sortBy(table, column, head) {
  const up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const lines = [...body.rows].map((row) => ({ row, key: sortKey(row.cells[column]) }));
  lines.sort((a, b) => compare(a.key, b.key, up ? 1 : -1));
  body.append(...lines.map((line) => line.row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column, head));
    head.append(button);
  });
}

// what is folded for want of room is printed whole; folded replies stay folded
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.sheet")) details.open = true;
});

// ---- filtering the table of estimates

const number = (n) => n.toLocaleString("en");

function watch(form, update) {
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", update);
  update();
}

const estimates = document.getElementById("estimates-form");
if (estimates) {
  const rows = [...document.querySelectorAll("#estimates-table tbody tr")];
  const count = document.getElementById("estimates-count");
  watch(estimates, () => {
    const wanted = [...new FormData(estimates)].filter(([, value]) => value !== "");
    let shown = 0;
    for (const row of rows) {
      row.hidden = !wanted.every(([name, value]) =>
        value === "*headline" ? row.dataset.headline === "yes" : row.dataset[name] === value);
      shown += !row.hidden;
    }
    count.textContent = `${number(shown)} of ${number(rows.length)} estimates`;
  });
}

// ---- the replies

const PAGE = 20;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function card(data, row, foldFrom) {
  const [variant, prompt, draw, score, status, text, judge] = row;
  const [category, question] = data.prompts[prompt];
  const grade = score === null ? data.statuses[status] : `score ${score}`;
  const made = element("article", { class: "reply" },
    element("h3", {},
      element("span", { class: "score" }, grade),
      element("span", {}, data.variants[variant]),
      element("span", { class: "about" }, `${data.categories[category]}, draw ${draw + 1}`)),
    element("p", { class: "asked" }, question));
  const words = [element("blockquote", {}, text || "(nothing)")];
  if (data.judges[judge]) words.push(element("p", { class: "soft" }, "The judge wrote: ", element("code", {}, data.judges[judge])));
  if (score === null || score >= foldFrom) {
    made.append(element("details", {}, element("summary", {}, `Show the reply (${grade})`), ...words));
  } else {
    made.append(...words);
  }
  return made;
}

function browse(data, form, foldFrom) {
  const list = document.getElementById("replies-list");
  const count = document.getElementById("replies-count");
  const more = document.getElementById("replies-more");
  const open = document.getElementById("replies-open");
  const options = (name, values) => {
    for (const [value, label] of values) form.elements[name].append(element("option", { value }, label));
  };
  options("variant", data.variants.map((name, i) => [i, name]));
  options("category", data.categories.map((name, i) => [i, name]));
  const scores = [...new Set(data.rows.map((row) => row[3]))].filter((s) => s !== null).sort((a, b) => b - a);
  options("score", scores.map((s) => [s, `${s}`]));
  data.statuses.forEach((name, i) => { if (name !== "ok") options("score", [[`status ${i}`, name]]); });

  let found = [];
  let shown = 0;
  const showMore = () => {
    const part = found.slice(shown, shown + PAGE).map((row) => card(data, row, foldFrom));
    list.append(...part);
    shown += part.length;
    more.hidden = shown >= found.length;
    open.hidden = !list.querySelector("details");
    count.textContent = `${number(found.length)} replies match, ${number(shown)} shown`;
    return part[0];
  };
  open.addEventListener("click", () => {
    for (const details of list.querySelectorAll("details")) details.open = true;
  });
  more.addEventListener("click", () => {
    const first = showMore();
    if (first) { first.tabIndex = -1; first.focus(); }
  });
  watch(form, () => {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.text.toLowerCase();
    found = data.rows.filter(([variant, prompt, , score, status, text]) =>
      (wanted.variant === "" || variant === Number(wanted.variant)) &&
      (wanted.category === "" || data.prompts[prompt][0] === Number(wanted.category)) &&
      (wanted.score === "" || (wanted.score.startsWith("status ")
        ? status === Number(wanted.score.slice(7)) : score === Number(wanted.score))) &&
      (words === "" || text.toLowerCase().includes(words) || data.prompts[prompt][1].toLowerCase().includes(words)));
    const sign = { worst: -1, best: 1 }[wanted.order];
    if (sign) found = found.slice().sort((a, b) => (a[3] === null) - (b[3] === null) || sign * (a[3] - b[3]));
    list.replaceChildren();
    shown = 0;
    showMore();
  });
}

const packed = document.getElementById("replies-data");
if (packed) {
  const form = document.getElementById("replies-form");
  document.getElementById("replies-without").remove();
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("replies-count").textContent =
      "This browser is too old to unpack the replies; they are in the run folder.";
  } else {
    unpack(packed.textContent).then((data) => browse(data, form, Number(packed.dataset.fold)));
  }
}
