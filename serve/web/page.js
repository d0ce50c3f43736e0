// What every part of the page is made of. Text from the server enters by textContent or as a text node, never as markup.

import { Problem } from "./api.js";

export function byId(id) {
  return document.getElementById(id);
}

// An element with properties (or attributes) and children; a string is text.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// For screen readers only. Emptied first, since the same words twice would be read once.
export function announce(text) {
  byId("announcer").textContent = "";
  setTimeout(() => { byId("announcer").textContent = text; }, 50);
}

// A button that does nothing now and says why beside itself; "" lets it work again.
// aria-disabled and not disabled: the keyboard still reaches it, and so does whoever wants to know the reason.
export function block(button, reason) {
  button.setAttribute("aria-disabled", String(reason !== ""));
  byId(button.getAttribute("aria-describedby")).textContent = reason;
}

// To be asked before a button does its work; says the reason aloud.
export function isBlocked(button) {
  if (button.getAttribute("aria-disabled") !== "true") return false;
  announce(byId(button.getAttribute("aria-describedby")).textContent);
  return true;
}

// Hide a button; if the keyboard was on it, it goes on at `next` and not at the top of the page.
export function hide(button, next) {
  const focused = document.activeElement === button;
  button.hidden = true;
  if (focused) next.focus();
}

export function clearProblem(box) {
  box.replaceChildren();
}

// An error in words in `box`, which is a role=alert.
export function showProblem(box, problem) {
  box.replaceChildren(problem.message);
  if (problem.status !== 401) return;
  const enter = element("button", { type: "button", className: "plain", textContent: "Enter a key" });
  enter.addEventListener("click", () => {
    byId("key-form").hidden = false;
    byId("key").focus();
  });
  box.append(" ", enter);
}

// What anything thrown means to the person: a mistake of our own is told too, and goes to the console whole.
export function problemOf(error) {
  if (error instanceof Problem) return error;
  console.error(error);
  return new Problem(`This page made a mistake: ${error.message}`);
}

// Calls `tick(seconds)` now and every second until the function it returns is called.
export function everySecond(tick) {
  const start = performance.now();
  const now = () => tick(Math.round((performance.now() - start) / 1000));
  const timer = setInterval(now, 1000);
  now();
  return () => clearInterval(timer);
}

// Waits, and calls `tick(seconds left)` every second. By the clock: a tab in the background counts late, not wrong.
export function countdown(seconds, tick, signal) {
  return new Promise((resolve, reject) => {
    const end = performance.now() + seconds * 1000;
    const timer = setInterval(look, 250);
    function look() {
      const left = Math.ceil((end - performance.now()) / 1000);
      if (signal?.aborted) finish(() => reject(new Problem("Cancelled.", { aborted: true })));
      else if (left <= 0) finish(resolve);
      else tick(left);
    }
    function finish(how) {
      clearInterval(timer);
      how();
    }
    look();
  });
}

// `work()` again after each refusal that says when to come back.
const MOST_TRIES = 6;
export async function patiently(work, onWait, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Problem) || error.retryAfter === null || tries === MOST_TRIES) throw error;
      await countdown(error.retryAfter, onWait, signal);
    }
  }
}

// An image from bytes, with `release()` for when it leaves the page. Before `ready` it has no height: shown sooner, it
// would push away what a person is about to press. A broken one is ready too, and the browser shows it as broken.
// Small ones are drawn as the squares that they are, instead of blurred.
const SMALL = 256;
export function picture(blob, alt) {
  const url = URL.createObjectURL(blob);
  const image = element("img", { alt });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < SMALL));
  const ready = new Promise((resolve) => {
    for (const end of ["load", "error"]) image.addEventListener(end, resolve, { once: true });
  });
  image.src = url;
  return { image, url, ready, release: () => URL.revokeObjectURL(url) };
}

// A link that saves the very bytes that came: a PNG's text chunks hold its prompt and settings.
export function downloadLink(url, prompt, seed) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "image";
  return element(
    "a", { className: "button", href: url, download: `${words}-${seed}.png`, title: "PNG with its prompt and settings" },
    "Download", element("span", { className: "unseen" }, ` the image of seed ${seed}`),
  );
}
