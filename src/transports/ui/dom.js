// Building DOM without markup: text stays text, whoever wrote it.

import { writeJson } from "./json.js";

const graphemes = Intl.Segmenter === undefined ? null : new Intl.Segmenter();
const NEAR = 200;

/**
 * Make an element. properties: `class`, `text`, `on` ({event: listener}), `dataset`; other names are set as attributes,
 * where true means present and false, null and undefined mean absent. children: nodes and strings.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make a decorative icon from icons/<name>.svg; it takes the colour of the text around it. */
export function icon(name) {
  return h("span", { class: `icon icon-${name}`, "aria-hidden": "true" });
}

/** Set the text of an element if it differs: an assignment of the same text would still drop a selection in it. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show any JSON value to a person: strings as they are, everything else indented. */
export function showValue(value) {
  return typeof value === "string" ? value : writeJson(value, 2);
}

/** Return the beginning of a text, `count` UTF-16 units at most, without half a character: emoji and accents stay whole. */
export function beginning(text, count) {
  if (text.length <= count) return text;
  // Looked at from a little before: a character of more than some hundred units is none to any reader.
  const from = Math.max(0, count - NEAR);
  const { index } = graphemes?.segment(text.slice(from, count + NEAR)).containing(count - from) ?? { index: 0 };
  const at = index > 0 ? from + index : count;
  return text.slice(0, isHigh(text.charCodeAt(at - 1)) ? at - 1 : at);
}

function isHigh(unit) {
  return unit >= 0xd800 && unit <= 0xdbff;
}

/** Say in words what is wrong: errors come as a text or as an object with one. */
export function errorText(error) {
  if (typeof error === "string") return error;
  if (error === null || error === undefined) return "";
  return String(error.message ?? error.detail ?? error.title ?? writeJson(error));
}
