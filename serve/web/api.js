// Requests to the service. Whatever goes wrong is thrown as a Problem, whose message is for the person.

const KEY = "mmcore-api-key";
const LONGEST_DETAIL = 600;
const MEGABYTE = 1e6;

export class Problem extends Error {
  // `retryAfter`: seconds, where the service said when to come back; `param`: the field of the request that is wrong.
  constructor(message, { status = 0, param = null, retryAfter = null, aborted = false } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter, aborted });
  }
}

// The tab's own storage: gone with the tab, and never sent by the browser itself.
export const apiKey = {
  get: () => sessionStorage.getItem(KEY),
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

export async function models(signal) {
  return (await json("v1/models", { signal })).data;
}

export async function openapi() {
  return json("openapi.json", {});
}

// One image, told by every captioner: {captions: {model: caption}}, with {errors: {model: error}} of those that cannot.
export async function captions(file, signal) {
  const body = new FormData();
  body.append("images", file, file.name);
  return (await json("v1/captions", { method: "POST", body, signal }, file.size)).data[0];
}

export async function galleryPage(limit, cursor, signal) {
  const query = new URLSearchParams({ limit });
  if (cursor !== null) query.set("cursor", cursor);
  return json(`v1/gallery?${query}`, { signal });
}

export async function galleryImage(id, signal) {
  const response = await send(`v1/gallery/${encodeURIComponent(id)}`, { signal });
  return reading(() => response.blob());
}

// Images for a request, whose seed is a BigInt or absent; `on.queued(position)` and `on.progress(step, total)` are called
// as the news come.
export async function generate(request, on, signal) {
  const { seed, ...others } = request;
  const fields = JSON.stringify({ ...others, response_format: "b64_json", stream: true });
  const body = seed === undefined ? fields : `${fields.slice(0, -1)},"seed":${seed}}`;
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await send("v1/images/generations", { method: "POST", headers, body, signal });
  const events = serverSentEvents(response.body);
  for (;;) {
    const { done, value } = await reading(() => events.next());
    if (done) throw new Problem("The connection broke off before the images were finished. Generate again.");
    const data = exact(value.data);
    if (value.event === "queued") on.queued(data.position);
    else if (value.event === "progress") on.progress(data.step, data.total);
    else if (value.event === "done") {
      events.return();
      return data;
    } else if (value.event === "error") {
      events.return();
      throw new Problem(`The service gave up: ${detailOf(data) || "it does not say why"}.`, { param: data.error?.param });
    }
  }
}

async function json(path, options, size) {
  const response = await send(path, options, size);
  return exact(await reading(() => response.text()));
}

// JSON, with seeds as text: they have up to 63 bits, and a number here is exact to 53. Inside a string a quote has a
// backslash before it, so that no text of the service is taken for a seed.
function exact(text) {
  return JSON.parse(text.replace(/("seed"\s*:\s*)(\d+)/g, '$1"$2"'));
}

// Paths are relative, so that the page also works below a prefix. `size`: bytes sent, for what is said when that fails.
async function send(path, options, size = 0) {
  const headers = new Headers(options.headers);
  const key = apiKey.get();
  if (key !== null) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw lost(error, "The service does not answer: it does not run, or the network is gone.", size);
  }
  if (response.ok) return response;
  throw refused(response, await reading(() => response.text()));
}

// Reading an answer, which can break off at any byte.
async function reading(read) {
  try {
    return await read();
  } catch (error) {
    throw lost(error, "The connection broke off before the answer was complete. Try again.", 0);
  }
}

function lost(error, words, size) {
  if (error.name === "AbortError") return new Problem("Cancelled.", { aborted: true });
  // fetch and the stream's reader give a TypeError, and no reason, for everything that the network can do.
  if (!(error instanceof TypeError)) return error;
  if (!navigator.onLine) return new Problem("This device is offline. Try again when the network is back.");
  // A service that refuses a body while it still comes may close before the browser has read the refusal.
  const large = size < MEGABYTE ? "" : ` Or the ${(size / MEGABYTE).toFixed(1)} MB sent are more than it takes.`;
  return new Problem(words + large);
}

function refused(response, text) {
  const { status, headers } = response;
  const body = parsed(text);
  const detail = detailOf(body);
  const because = detail ? `: ${detail}` : "";
  const retryAfter = secondsOf(headers.get("Retry-After"));
  const again = retryAfter === null ? "Try again in a moment." : `Try again in ${retryAfter} s.`;
  const id = headers.get("X-Request-Id");
  const words = {
    400: `The service refused this request${because}.`,
    401: apiKey.get() === null ? "The service needs a key." : "The service does not accept this key.",
    403: `This key may not do that${because}.`,
    404: `Not found${because}.`,
    413: `Too large for this service${because}.`,
    422: `The service refused this request${because}.`,
    429: `Too many requests at once${because}. ${again}`,
    503: `The service is not ready${because}. ${again}`,
  }[status] ?? (status < 500
    ? `The service refused this request (${status})${because}.`
    : `The service failed (${status})${because}.${id ? ` Its log has more under ${id}.` : ""}`);
  return new Problem(words, { status, param: body?.error?.param, retryAfter });
}

// null for what is no JSON: a proxy between here and the service answers with pages of its own.
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function detailOf(body) {
  const message = body?.error?.message;
  return typeof message === "string" ? message.trim().replace(/\.$/, "").slice(0, LONGEST_DETAIL) : "";
}

// Retry-After is a number of seconds or a date.
function secondsOf(header) {
  if (header === null) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}

// EventSource can neither POST nor send a key, so the stream is read by hand:
// https://html.spec.whatwg.org/multipage/server-sent-events.html, without ids, retries and lone carriage returns.
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pieces.push(value);
      // Images are one line of megabytes: looked at once, when it ends.
      if (!value.includes("\n")) continue;
      const blocks = pieces.join("").replaceAll("\r\n", "\n").split("\n\n");
      pieces = [blocks.pop()];
      for (const block of blocks) {
        const event = eventOf(block);
        if (event.data !== "") yield event;
      }
    }
  } finally {
    // Not awaited: the connection may be gone already.
    reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (field === "event") event = value;
    else if (field === "data") data.push(value ?? "");
  }
  return { event, data: data.join("\n") };
}
