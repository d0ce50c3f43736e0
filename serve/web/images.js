// A prompt in, images out, with progress as the service tells it.

import { generate } from "./api.js";
import {
  announce, block, byId, clearProblem, countdown, downloadLink, element, hide, isBlocked, picture, problemOf,
  showProblem,
} from "./page.js";

const MOST_RESULTS = 30; // older ones leave the page and its memory
const SILENCE_S = 20; // then the person is told that no news came
// An option of a model -> its field in the form, and what is said of it beside the images.
const OPTIONS = {
  num_inference_steps: ["steps", (steps) => `${steps} steps`],
  guidance_scale: ["guidance", (scale) => `guidance ${scale}`],
  guidance_scale_end: ["guidance-end", (scale) => `guidance ${scale} at the end`],
  temperature: ["temperature", (temperature) => `temperature ${temperature}`],
  top_k: ["top-k", (codes) => `top-k ${codes || "all"}`],
  top_p: ["top-p", (share) => `top-p ${share}`],
  negative_prompt: ["negative", (prompt) => `without “${prompt}”`],
};
const FIELDS = { // of the request -> of the form
  prompt: "prompt", model: "model", n: "number", seed: "seed",
  ...Object.fromEntries(Object.entries(OPTIONS).map(([name, [id]]) => [name, id])),
};

const form = byId("images-form"), button = byId("generate"), cancel = byId("cancel"), running = byId("running");
const text = byId("running-text"), bar = byId("bar"), error = byId("images-error"), made = byId("made");
const select = byId("model");

let generators = [];
let stopping = null;

// `models`: as /v1/models lists them; `reason`: why there are none.
export function useGenerators(models, reason) {
  const before = select.value;
  generators = models;
  select.replaceChildren(...models.map(({ id, defaults }) => {
    return element("option", { value: id }, defaults?.size ? `${id} (${defaults.size})` : id);
  }));
  // Another model became ready: what a person has set for the one that is chosen stays.
  if (generators.some(({ id }) => id === before)) select.value = before;
  else showDefaults();
  if (stopping === null) block(button, reason);
}

export function startImages() {
  block(button, "Not connected yet.");
  select.addEventListener("change", showDefaults);
  // Every way to submit a form goes through its button, and only then are its fields checked.
  button.addEventListener("click", (event) => { if (isBlocked(button)) event.preventDefault(); });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  form.addEventListener("input", (event) => event.target.removeAttribute("aria-invalid"));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button.click();
  });
  cancel.addEventListener("click", () => stopping?.abort());
}

// Puts a prompt and a seed into the form, for an image like one that is on the page.
export function reuse(seed, prompt = null) {
  byId("seed").value = seed;
  if (prompt !== null) byId("prompt").value = prompt;
  byId(prompt === null ? "seed" : "prompt").focus();
  announce(prompt === null ? `Seed ${seed} is set.` : `The prompt and seed ${seed} are set.`);
}

function chosen() {
  return generators.find(({ id }) => id === select.value);
}

// The fields of the model's own options. One that it does not have would be refused. Without a model there are none.
function showDefaults() {
  const { defaults = {}, limits } = chosen() ?? {};
  for (const [name, [id]] of Object.entries(OPTIONS)) {
    const field = byId(id);
    field.parentElement.hidden = field.disabled = !(name in defaults);
    if (field.disabled) continue;
    if (id !== "negative") field.value = defaults[name] ?? "";
    if (field.type === "number" && limits?.[name] !== undefined) Object.assign(field, { min: "1", max: limits[name] });
  }
  byId("number").max = limits?.n ?? "";
  byId("number-most").textContent = limits?.n === undefined ? "" : `(at most ${limits.n})`;
}

function requestOfForm() {
  const request = {
    model: select.value,
    prompt: byId("prompt").value,
    n: byId("number").valueAsNumber,
  };
  for (const [name, [id]] of Object.entries(OPTIONS)) {
    const { disabled, type, value, valueAsNumber } = byId(id);
    if (!disabled && value.trim() !== "") request[name] = type === "number" ? valueAsNumber : value;
  }
  // Left empty it is "the same", also where the model's own default is another.
  const end = byId("guidance-end");
  if (!end.disabled && end.value.trim() === "" && (chosen()?.defaults.guidance_scale_end ?? null) !== null) {
    request.guidance_scale_end = request.guidance_scale;
  }
  if (byId("seed").value !== "") request.seed = BigInt(byId("seed").value);
  return request;
}

async function run() {
  const request = requestOfForm();
  const progress = newProgress();
  stopping = new AbortController();
  clearProblem(error);
  for (const id of Object.values(FIELDS)) byId(id).removeAttribute("aria-invalid");
  block(button, "One request at a time: this one is still running.");
  cancel.hidden = running.hidden = false;
  byId("images-empty").hidden = true;
  let wait = null;
  try {
    const answer = await generate(request, progress, stopping.signal);
    await show(request, answer, progress.seconds());
  } catch (thrown) {
    const problem = problemOf(thrown);
    tell(problem);
    wait = problem.retryAfter;
  } finally {
    progress.stop();
    stopping = null;
    running.hidden = true;
    hide(cancel, button);
    byId("images-empty").hidden = made.childElementCount > 0;
    block(button, "");
  }
  if (wait === null) return;
  await countdown(wait, (left) => block(button, `The service asked to wait: ${left} s.`));
  block(button, "");
  announce("You can generate again.");
}

function tell(problem) {
  showProblem(error, problem);
  // "body.prompt", "prompt[0]": the field is the last name in it.
  const field = FIELDS[/(\w+)\W*\d*\W*$/.exec(problem.param ?? "")?.[1]];
  if (field === undefined) return;
  byId(field).setAttribute("aria-invalid", "true");
  byId(field).focus();
}

// What a person sees while they wait. Read aloud are only the changes that matter, not every step.
function newProgress() {
  const start = performance.now();
  let news = start, stage = "Sent to the service", first = null, spoken = 0;
  const since = (moment) => Math.round((performance.now() - moment) / 1000);
  const draw = () => {
    const silence = since(news) < SILENCE_S ? "" : ` No news for ${since(news)} s: you can go on waiting, or cancel.`;
    text.textContent = `${stage}. ${since(start)} s so far.${silence}`;
  };
  const say = (words, heard) => {
    news = performance.now();
    stage = words;
    draw();
    if (heard) announce(`${words}.`);
  };
  bar.removeAttribute("value");
  say(stage, true);
  const timer = setInterval(draw, 1000);
  return {
    queued: (position) => say(position > 0 ? `In the queue, place ${position}` : "Next in the queue", true),
    progress: (step, total) => {
      bar.max = total;
      bar.value = step;
      first ??= { step, at: performance.now() };
      const each = (performance.now() - first.at) / (step - first.step);
      const left = Number.isFinite(each) ? `, about ${Math.ceil(each * (total - step) / 1000)} s left` : "";
      const quarter = Math.floor(4 * step / total);
      say(`Step ${step} of ${total}${left}`, quarter > spoken || first.step === step);
      spoken = Math.max(spoken, quarter);
    },
    seconds: () => ((performance.now() - start) / 1000).toFixed(1),
    stop: () => clearInterval(timer),
  };
}

async function show(request, answer, seconds) {
  const settings = [
    answer.model ?? request.model,
    ...Object.entries(OPTIONS).filter(([name]) => name in request).map(([name, [, say]]) => say(request[name])),
    `${seconds} s`,
  ];
  const words = answer.unknown_words ?? [];
  const unknown = words.length === 0 ? "" : `The model does not know: ${words.join(", ")}.`;
  const figures = answer.data.map(({ b64_json: encoded, seed }) => figureOf(pngOf(encoded), request.prompt, seed));
  const result = element(
    "article", { className: "result" },
    element("h3", {}, request.prompt),
    element("p", { className: "soft" }, settings.join(" · ")),
    ...(unknown === "" ? [] : [element("p", {}, unknown)]),
    element("div", { className: "grid" }, ...figures.map((figure) => figure.root)),
  );
  result.addEventListener("release", () => figures.forEach((figure) => figure.release()));
  await Promise.all(figures.map((figure) => figure.ready));
  made.prepend(result);
  while (made.childElementCount > MOST_RESULTS) {
    made.lastElementChild.dispatchEvent(new Event("release"));
    made.lastElementChild.remove();
  }
  announce(`${figures.length} ${figures.length === 1 ? "image is" : "images are"} ready. ${unknown}`.trim());
}

function pngOf(encoded) {
  return new Blob([Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0))], { type: "image/png" });
}

function figureOf(blob, prompt, seed) {
  const { image, url, ready, release } = picture(blob, prompt);
  const again = element("button", { type: "button" }, "Use seed", element("span", { className: "unseen" }, ` ${seed}`));
  again.addEventListener("click", () => reuse(seed));
  const root = element(
    "figure", {}, image,
    element("figcaption", {}, element("p", { className: "soft" }, `Seed ${seed}`), downloadLink(url, prompt, seed), again),
  );
  return { root, ready, release };
}
