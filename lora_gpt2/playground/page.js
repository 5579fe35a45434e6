"use strict";

const field = (id) => document.getElementById(id);

/** An element with a text, or with children. */
function made(tag, content = [], className = "") {
  const element = document.createElement(tag);
  element.append(...(Array.isArray(content) ? content : [content]));
  if (className) element.className = className;
  return element;
}

/** A token, the darker the less probable it was. */
function token([text, logProb]) {
  const element = made("span", text === "\n\n" ? "⏎" : text, "token");
  const probability = Math.exp(logProb);
  element.style.setProperty("--doubt", 1 - probability);
  element.title = `${(100 * probability).toFixed(1)} %`;
  return element;
}

function output({ text, score, tokens, missed }) {
  const item = made("li", [made("small", score === null ? "–" : score.toFixed(3)), " "]);
  item.append(...(text ? tokens.filter(([piece]) => piece !== "<|endoftext|>").map(token) : ["(nothing)"]));
  if (missed.length) item.append(made("br"), made("small", "misses "), ...missed.map((slot) => made("del", slot)));
  return item;
}

/** The tree as nested lists: tokens that follow each other without a branch are one run. */
function drawn(tree, all) {
  const children = new Map(), kept = new Set();
  tree.forEach(([, , , rank], i) => {
    for (let at = rank === null ? null : i; at !== null && !kept.has(at); at = tree[at][0]) kept.add(at);
  });
  tree.forEach(([parent], i) => {
    if (all || kept.has(i)) children.set(parent, [...(children.get(parent) ?? []), i]);
  });
  const list = (numbers) => made("ul", numbers.map(run));
  function run(number) {
    const label = made("span", [], "run"), item = made("li", [label], kept.has(number) ? "" : "dropped");
    for (let at = number; ;) {
      const [, text, logProb, rank] = tree[at], next = children.get(at) ?? [];
      label.append(token([text === "<|endoftext|>" ? "∎" : text, logProb]));
      if (rank !== null) label.append(made("span", String(rank + 1), "rank"));
      if (next.length === 1 && kept.has(next[0]) === kept.has(number)) at = next[0];
      else {
        if (next.length) item.append(list(next));
        return item;
      }
    }
  }
  const root = list(children.get(null) ?? []);
  root.className = "tree";
  return made("div", [root], "wide");
}

function shown(name, answer) {
  const outputs = made("ol", answer.outputs.map(output));
  return made("section", [
    made("h2", [name, " ", made("small", `${answer.seconds.toFixed(2)} s`)]),
    outputs, made("h3", "The search"), drawn(answer.tree, field("all").checked),
  ]);
}

async function fetched(path, asked) {
  const sent = asked && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) };
  const response = await fetch(path, sent);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

let answers = [];

function show() {
  field("results").replaceChildren(...answers.map(([name, answer]) => shown(name, answer)));
}

function say(text, isError = false) {
  field("status").textContent = text;
  field("status").className = isError ? "error" : "";
}

async function ask(event) {
  event.preventDefault();
  const button = document.querySelector("button"), names = [field("first").value, field("second").value];
  const decoding = {};
  for (const input of field("settings").querySelectorAll("input")) decoding[input.name] = Number(input.value);
  button.disabled = true;
  say("decoding …");
  try {
    const asked = [...new Set(names.filter(Boolean))].map(async (adapter) =>
      [adapter, await fetched("/decode", { input: field("input").value, adapter, decoding })]);
    answers = await Promise.all(asked);
    show();
    say("");
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
}

async function start() {
  const about = await fetched("/about");
  for (const name of about.adapters) {
    field("first").append(new Option(name));
    field("second").append(new Option(name));
  }
  for (const [name, given] of Object.entries(about.decoding)) {
    const input = Object.assign(made("input"), { type: "number", name, required: true, ...given });
    field("settings").append(made("label", [name.replaceAll("_", " "), input]));
  }
  field("examples").append(...about.examples.map((text) => Object.assign(made("option"), { value: text })));
  field("picking").hidden = !about.examples.length;
  field("input").value = about.examples[0] ?? "";
  field("pick").addEventListener("input", () => {
    if (about.examples.includes(field("pick").value)) {
      field("input").value = field("pick").value;
      field("pick").value = "";
    }
  });
  field("all").addEventListener("change", show);
  field("ask").addEventListener("submit", ask);
}

start().catch((error) => say(error.message, true));
