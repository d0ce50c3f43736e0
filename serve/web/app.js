// The page: connects to the service, asks for a key where it wants one, and hands the models to the parts.

import { apiKey, models } from "./api.js";
import { startCaptions, useCaptioners } from "./captions.js";
import { startGallery, useGallery } from "./gallery.js";
import { startImages, useGenerators } from "./images.js";
import { announce, block, byId, clearProblem, countdown, isBlocked, problemOf, showProblem } from "./page.js";
import { startRoutes } from "./routes.js";

const AGAIN_S = 5;

const service = byId("service"), connectButton = byId("connect"), forget = byId("forget");
const form = byId("key-form"), field = byId("key"), use = byId("use-key"), error = byId("key-error");

let attempt = new AbortController();

async function connect() {
  attempt.abort();
  attempt = new AbortController();
  const { signal } = attempt;
  connectButton.hidden = true;
  service.classList.add("busy");
  service.textContent = "Connecting…";
  try {
    connected(await models(signal));
  } catch (thrown) {
    const problem = problemOf(thrown);
    if (problem.aborted) return;
    service.classList.remove("busy");
    block(use, "");
    if (problem.status === 401) {
      wantKey();
      return;
    }
    lead(problem.message);
    connectButton.hidden = false;
    // A service that starts, or a network that is gone for a while: the page comes back by itself.
    await countdown(problem.retryAfter ?? AGAIN_S, () => {}, signal).then(connect, () => {});
  }
}

// Why nothing works now, at everything that would.
function lead(reason) {
  service.textContent = reason;
  useCaptioners([], reason);
  useGenerators([], reason);
}

function wantKey() {
  const refused = apiKey.get() !== null;
  apiKey.forget();
  form.hidden = false;
  forget.hidden = true;
  lead("The service needs a key.");
  if (!refused) return;
  showProblem(error, { message: "The service does not accept this key." });
  field.select();
  field.focus();
}

function connected(list) {
  const focused = form.contains(document.activeElement);
  form.hidden = true;
  field.value = "";
  block(use, "");
  forget.hidden = apiKey.get() === null;
  if (focused) byId("files").focus();
  useModels(list);
  useGallery();
}

// Works with the models that are ready, and asks for the others until they are.
async function useModels(list) {
  const { signal } = attempt;
  for (let known = null; ;) {
    if (JSON.stringify(list) !== known) show(list);
    known = JSON.stringify(list);
    if (list.every(isReady)) return;
    try {
      await countdown(AGAIN_S, () => {}, signal);
      list = await models(signal);
    } catch (thrown) {
      if (problemOf(thrown).aborted || signal.aborted) return;
      connect(); // which says what is wrong
      return;
    }
  }
}

function show(list) {
  const captioners = list.filter(({ kind }) => kind === "captioner");
  const generators = list.filter(({ kind }) => kind === "generator");
  const late = list.filter((model) => !isReady(model)).map(({ id }) => id);
  const counts = `${count(captioners.length, "captioner")}, ${count(generators.length, "generator")}`;
  service.classList.remove("busy");
  service.textContent = `Connected: ${counts}.${late.length > 0 ? ` Not ready: ${late.join(", ")}.` : ""}`;
  // The service asks every captioner, and says of each that is not ready that it is not.
  useCaptioners(captioners.some(isReady) ? captioners.map(({ id }) => id) : [], whyNone(captioners, "captioner"));
  useGenerators(generators.filter(isReady), whyNone(generators, "generator"));
}

function isReady({ ready }) {
  return ready !== false;
}

// Why no model of a list can be used; "" where one can.
function whyNone(list, kind) {
  if (list.length === 0) return `This service has no ${kind}.`;
  return list.some(isReady) ? "" : `No ${kind} is ready yet: ${list.map(({ id }) => id).join(", ")}.`;
}

function count(number, word) {
  return `${number === 0 ? "no" : number} ${number === 1 ? word : `${word}s`}`;
}

startCaptions();
startImages();
startGallery();
startRoutes();
use.addEventListener("click", (event) => { if (isBlocked(use)) event.preventDefault(); });
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearProblem(error);
  const key = field.value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) { // else it cannot be a header
    showProblem(error, { message: "This cannot be a key: it has spaces or letters with accents in it." });
    field.focus();
    return;
  }
  apiKey.set(key);
  block(use, "Asking the service…");
  connect();
});
forget.addEventListener("click", () => {
  apiKey.forget();
  announce("The key is forgotten.");
  connect().then(() => field.focus());
});
connectButton.addEventListener("click", connect);
connect();
