// Images in, captions out: every captioner side by side.

import { captions } from "./api.js";
import {
  announce, byId, clearProblem, element, everySecond, hide, patiently, picture, problemOf, showProblem,
} from "./page.js";

// Requests under way at once: enough that the captioners have a batch, and that one slow image holds up no other.
const WIDTH = 4;
const MOST_FILES = 50;
// The file itself is refused: it would be refused again.
const REFUSED = [400, 413, 422];

const files = byId("files"), drop = byId("drop"), cards = byId("captioned"), news = byId("captions-news");
const error = byId("captions-error"), cancel = byId("captions-cancel"), clear = byId("captions-clear");

let captioners = [];
let whyNot = "Not connected yet.";
let waiting = [];
let running = 0;
let done = 0, failed = 0;
let stopping = new AbortController();

// `models`: names, in the order in which they are shown; `reason`: why there are none.
export function useCaptioners(models, reason) {
  captioners = models;
  whyNot = reason;
}

export function startCaptions() {
  files.addEventListener("change", () => {
    add([...files.files]);
    files.value = ""; // the same file can be chosen again
  });
  // On the whole window: a file that is dropped beside the field must not replace the page.
  window.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  window.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) drop.classList.remove("over");
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length === 0) say("What was dropped is not a file. Save the image first.");
    else add([...event.dataTransfer.files]);
  });
  cancel.addEventListener("click", () => {
    const left = waiting;
    waiting = [];
    stopping.abort();
    stopping = new AbortController();
    for (const card of left) card.fail({ message: "Cancelled." });
    failed += left.length;
    tell();
  });
  clear.addEventListener("click", () => {
    cards.dispatchEvent(new Event("release"));
    cards.replaceChildren();
    done = failed = 0;
    clearProblem(error);
    tell();
    files.focus();
    announce("Captions cleared.");
  });
}

function say(message) {
  showProblem(error, { message });
}

function add(chosen) {
  clearProblem(error);
  if (captioners.length === 0) {
    say(whyNot);
    return;
  }
  if (running === 0 && waiting.length === 0) done = failed = 0;
  if (chosen.length > MOST_FILES) {
    say(`${chosen.length} files are many for a page: these are the first ${MOST_FILES}. For more there is jobs/caption.py.`);
  }
  const made = chosen.slice(0, MOST_FILES).map(newCard);
  cards.prepend(...made.map((card) => card.root));
  waiting.push(...made);
  work();
  tell();
}

function work() {
  while (running < WIDTH && waiting.length > 0) describe(waiting.shift());
}

async function describe(card) {
  running += 1;
  const { signal } = stopping;
  let pausing = false;
  const stop = everySecond((seconds) => { if (!pausing) card.wait(`Waiting for captions, ${seconds} s`); });
  const ask = () => {
    pausing = false;
    return captions(card.file, signal);
  };
  const pause = (left) => {
    pausing = true;
    card.wait(`The service has much to do: this image goes again in ${left} s`);
  };
  try {
    card.fill(await patiently(ask, pause, signal));
    done += 1;
  } catch (thrown) {
    const problem = problemOf(thrown);
    card.fail(problem);
    // A key that is missing is one problem of the page, not one of each image.
    if (problem.status === 401) showProblem(error, problem);
    failed += 1;
  } finally {
    stop();
    running -= 1;
    work();
    tell();
  }
}

// How far all of them are; read aloud, since it changes once an image.
function tell() {
  const left = running + waiting.length;
  const all = done + failed + left;
  if (left > 0) news.textContent = `Captioning: ${done + failed} of ${all} done.`;
  else news.textContent = all === 0 ? "" : `Captioned: ${done} of ${all}.`;
  news.classList.toggle("busy", left > 0);
  if (left > 0) cancel.hidden = false;
  else hide(cancel, files);
  clear.hidden = left > 0 || cards.childElementCount === 0;
}

// The names in it: first the captioners of the service, in its order.
function inOrder(told) {
  const known = captioners.filter((name) => Object.hasOwn(told, name));
  return [...known, ...Object.keys(told).filter((name) => !known.includes(name))];
}

function newCard(file) {
  const preview = picture(file, "");
  const noPreview = () => preview.image.replaceWith(element("span", { className: "soft" }, "no preview"));
  preview.image.addEventListener("error", noPreview, { once: true });
  cards.addEventListener("release", preview.release, { once: true });
  const state = element("p", { className: "state busy" });
  const body = element("div", {}, state);
  const root = element(
    "article", { className: "card" },
    element("div", { className: "preview" }, preview.image),
    element("div", {}, element("h3", {}, file.name), body),
  );
  const card = {
    file,
    root,
    wait: (text) => {
      if (!state.isConnected) body.replaceChildren(state);
      state.textContent = text;
    },
    fill: ({ captions: told, errors = {} }) => {
      const pairs = inOrder({ ...told, ...errors }).map((name) => {
        const said = Object.hasOwn(told, name)
          ? element("dd", {}, told[name])
          : element("dd", { className: "error" }, `No caption: ${errors[name].message}.`);
        return element("div", {}, element("dt", {}, name), said);
      });
      body.replaceChildren(element("dl", { className: "told" }, ...pairs));
    },
    fail: (problem) => {
      body.replaceChildren(element("p", { className: "error" }, problem.message));
      if (REFUSED.includes(problem.status)) return;
      const again = element("button", { type: "button" }, "Try again");
      again.append(element("span", { className: "unseen" }, ` ${file.name}`));
      again.addEventListener("click", () => {
        clearProblem(error);
        failed = Math.max(0, failed - 1);
        card.wait("Waits for its turn");
        files.focus();
        waiting.push(card);
        work();
        tell();
      });
      body.append(again);
    },
  };
  card.wait("Waits for its turn");
  return card;
}
