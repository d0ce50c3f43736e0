// The images of a sweep, a page at a time.

import { galleryImage, galleryPage } from "./api.js";
import {
  block, byId, clearProblem, downloadLink, element, isBlocked, patiently, picture, problemOf, showProblem,
} from "./page.js";
import { reuse } from "./images.js";

const PAGE = 24;
const WIDTH = 4; // images under way at once

const section = byId("gallery"), news = byId("gallery-news"), error = byId("gallery-error"), grid = byId("swept");
const title = byId("gallery-title");
const paging = byId("paging"), previous = byId("previous"), next = byId("next");

// cursors[i] begins page i; the last one known is where `next` leads.
let cursors = [null];
let place = 0;
let stopping = new AbortController();
let releases = [];

export function startGallery() {
  previous.addEventListener("click", () => { if (!isBlocked(previous)) turn(place - 1); });
  next.addEventListener("click", () => { if (!isBlocked(next)) turn(place + 1); });
}

// Once the service answers: the first page, as soon as a person comes near it.
export function useGallery() {
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    cursors = [null];
    turn(0);
  }, { rootMargin: "300px" });
  near.observe(section);
}

async function turn(to) {
  stopping.abort();
  stopping = new AbortController();
  const { signal } = stopping;
  clearProblem(error);
  busy("Loading…");
  for (const button of [previous, next]) block(button, "Loading…");
  byId("previous-why").textContent = ""; // once is enough
  try {
    const page = await patiently(
      () => galleryPage(PAGE, cursors[to], signal), (left) => busy(`The service has much to do: again in ${left} s.`), signal,
    );
    place = to;
    cursors = [...cursors.slice(0, to + 1), page.next];
    paging.hidden = place === 0 && page.next === null;
    show(page.data, signal);
  } catch (thrown) {
    const problem = problemOf(thrown);
    if (problem.aborted) return;
    news.textContent = "";
    // A service that shows no sweep, which is no failure: it says so itself.
    if (problem.status === 404) news.textContent = problem.message;
    else {
      const again = element("button", { type: "button" }, "Try again");
      again.append(element("span", { className: "unseen" }, " to load the gallery"));
      again.addEventListener("click", () => {
        title.focus(); // the button goes, and the keyboard would be at the top of the page
        turn(to);
      });
      showProblem(error, problem);
      error.append(" ", again);
    }
  }
  news.classList.remove("busy");
  block(previous, place === 0 ? "This is the first page." : "");
  block(next, cursors[place + 1] === null ? "This is the last page." : "");
}

function busy(text) {
  news.textContent = text;
  news.classList.add("busy");
}

function show(rows, signal) {
  for (const release of releases) release();
  releases = [];
  const tiles = rows.map(newTile);
  grid.replaceChildren(...tiles.map((tile) => tile.root));
  const shown = `${rows.length} ${rows.length === 1 ? "image" : "images"}`;
  news.textContent = rows.length === 0 ? "The sweep has no images." : `Page ${place + 1}: ${shown}.`;
  const line = [...tiles];
  for (let lane = 0; lane < WIDTH; lane += 1) load(line, signal);
}

async function load(line, signal) {
  while (line.length > 0 && !signal.aborted) await line.shift().load(signal);
}

// As high from the beginning as with its image, so that nothing moves when the image comes.
function newTile({ image_id: id, prompt, seed }) {
  const frame = element("div", { className: "frame busy" });
  const link = downloadLink("", prompt, seed);
  link.classList.add("later");
  const again = element("button", { type: "button" }, "Use prompt");
  again.append(element("span", { className: "unseen" }, `: ${prompt}`));
  again.addEventListener("click", () => reuse(seed, prompt));
  const root = element(
    "figure", {}, frame,
    element("figcaption", {}, element("p", {}, prompt), element("p", { className: "soft" }, `Seed ${seed}`), link, again),
  );
  async function load(signal) {
    try {
      const blob = await patiently(() => galleryImage(id, signal), () => {}, signal);
      const { image, url, ready, release } = picture(blob, prompt);
      releases.push(release);
      await ready;
      frame.replaceWith(image);
      link.href = url;
      link.classList.remove("later");
    } catch (thrown) {
      const problem = problemOf(thrown);
      if (problem.aborted) return;
      link.remove();
      frame.className = "frame";
      frame.replaceChildren(element("p", { className: "error" }, problem.message));
    }
  }
  return { root, load };
}
