// The routes and their fields, as the service itself tells them in openapi.json.

import { openapi } from "./api.js";
import { byId, clearProblem, element, problemOf, showProblem } from "./page.js";

const REF = "#/components/schemas/";
const WORDS = { string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "object" };

const all = byId("routes-all"), list = byId("routes"), error = byId("routes-error");

let shown = false;

export function startRoutes() {
  all.addEventListener("toggle", () => { if (all.open && !shown) show(); });
}

async function show() {
  shown = true;
  clearProblem(error);
  try {
    const told = await openapi();
    const routes = Object.entries(told.paths).flatMap(([path, methods]) => {
      return Object.entries(methods).map(([method, route]) => routeOf(method.toUpperCase(), path, route, told));
    });
    list.replaceChildren(...routes);
  } catch (thrown) {
    shown = false; // opened anew it asks again
    showProblem(error, problemOf(thrown));
  }
}

function routeOf(method, path, route, told) {
  const open = route.security?.length === 0;
  const parts = [element("pre", {}, element("code", {}, curlOf(method, path, route, open)))];
  const inQuery = (route.parameters ?? []).filter((each) => each.in === "query");
  if (inQuery.length > 0) {
    const properties = Object.fromEntries(inQuery.map(({ name, description }) => [name, { type: "string", description }]));
    parts.push(...fieldsOf("Query", { properties }, told));
  }
  for (const [media, { schema }] of Object.entries(route.requestBody?.content ?? {})) {
    const title = media === "application/json" ? "Fields of the JSON" : "Fields of a form";
    parts.push(...fieldsOf(title, resolved(schema, told), told));
  }
  const [status, answer] = Object.entries(route.responses)[0];
  const [media, { example }] = Object.entries(answer.content)[0];
  parts.push(
    element("h3", {}, `Answer ${status}${example === undefined ? ` (${media})` : ""}`),
    ...(example === undefined ? [] : [element("pre", {}, element("code", {}, inLine(example)))]),
  );
  return element(
    "details", { className: "route" },
    element(
      "summary", {}, element("code", {}, `${method} ${path}`),
      element("span", { className: "soft" }, ` ${route.summary}${open ? " Needs no key." : ""}`),
    ),
    ...parts,
  );
}

// A command that can be pasted, in a shell that has the key in $KEY.
function curlOf(method, path, route, open) {
  const place = new URL(path.slice(1).replace(/\{(\w+)\}/g, (_, name) => name.toUpperCase()), document.baseURI);
  const example = route.requestBody?.content["application/json"]?.example;
  return [
    "curl",
    ...(method === "DELETE" ? ["-X DELETE"] : []),
    ...(open ? [] : ['-H "Authorization: Bearer $KEY"']),
    place.href,
    ...(example === undefined ? [] : ['-H "Content-Type: application/json"', `-d '${JSON.stringify(example)}'`]),
  ].join(" ");
}

// In one line that can be broken between its parts.
function inLine(example) {
  return JSON.stringify(example, null, 1).replace(/\n\s*/g, " ");
}

function resolved(schema, told) {
  return schema.$ref === undefined ? schema : told.components.schemas[schema.$ref.slice(REF.length)];
}

// A title and a list: first what has an effect, then in one line what is only taken.
function fieldsOf(title, schema, told) {
  const required = schema.required ?? [];
  const fields = Object.entries(schema.properties);
  const rows = fields.filter(([, field]) => !field["x-no-effect"]).flatMap(([name, field]) => [
    element(
      "dt", {}, element("code", {}, name),
      ` ${[typeOf(field), rangeOf(field), required.includes(name) ? "required" : ""].filter(Boolean).join(", ")}`,
    ),
    element("dd", {}, field.description ?? ""),
  ]);
  const without = fields.filter(([, field]) => field["x-no-effect"]).map(([name]) => name).join(", ");
  return [
    element("h3", {}, title),
    element("dl", { className: "fields-told" }, ...rows),
    ...(without ? [element("p", { className: "soft" }, `Taken for other programs' sake, without effect: ${without}.`)] : []),
  ];
}

function typeOf(field) {
  if (field.$ref !== undefined) return field.$ref.slice(REF.length).replace(/^_/, "");
  if (field.enum !== undefined) return field.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (field.anyOf !== undefined) return field.anyOf.map(typeOf).join(" or ");
  if (field.oneOf !== undefined) return field.oneOf.map(typeOf).join(" or ");
  if (field.type === "array") return `list of ${field.items.format === "binary" ? "files" : typeOf(field.items)}`;
  return WORDS[field.type] ?? field.type;
}

function rangeOf({ minimum, maximum, default: usual }) {
  const usually = usual === undefined ? "" : `by default ${JSON.stringify(usual)}`;
  const range = minimum === undefined ? "" : maximum === undefined ? `at least ${minimum}` : `${minimum} to ${maximum}`;
  return [range, usually].filter(Boolean).join(", ");
}
