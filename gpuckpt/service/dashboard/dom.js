// Making elements, and changing those that are there into new ones.
// Everything that comes from the service is put in as text or as an attribute's value: nothing of it is ever parsed.

export const $ = (selector, root = document) => root.querySelector(selector);

const SVG = "http://www.w3.org/2000/svg";

function dress(made, what, children) {
  for (const [name, value] of Object.entries(what)) {
    if (name === "text") made.textContent = value;
    else if (name === "style") for (const [property, held] of Object.entries(value)) made.style.setProperty(property, held);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return made;
}
export const make = (tag, what = {}, ...children) => dress(document.createElement(tag), what, children);
export const drawn = (tag, what = {}, ...children) => dress(document.createElementNS(SVG, tag), what, children);
export const icon = (name) => drawn("svg", {class: `icon ${name}`, "aria-hidden": "true"}, drawn("use", {href: `#i-${name}`}));

// What the reader has set stays: which details are open, where the keyboard is.
const KEPT = new Set(["open", "tabindex", "aria-describedby"]);

/** Make the element's children the wanted ones; those that stay keep their focus, state and listeners. */
export function show(parent, ...wanted) {
  children(parent, wanted.flat(Infinity).filter((node) => node != null && node !== false));
}

function children(parent, wanted) {
  const keys = new Set(wanted.map(key).filter((found) => found !== undefined));
  const keyed = new Map([...parent.childNodes].map((node) => [key(node), node]));
  let at = parent.firstChild;
  for (const node of wanted) {
    // Gone: taken away before the others are moved past it, for what is moved loses its focus.
    while (at && key(at) !== undefined && !keys.has(key(at))) at = drop(at);
    const own = key(node), match = own === undefined ? at : keyed.get(own);
    if (!match || key(match) !== own || match.nodeName !== node.nodeName) {
      parent.insertBefore(typeof node === "string" ? document.createTextNode(node) : node, at);
      continue;
    }
    if (match === at) at = at.nextSibling; else parent.insertBefore(match, at);
    become(match, node);
  }
  while (at) at = drop(at);
}
const key = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") ?? undefined : undefined);
function drop(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

function become(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const {name} of [...old.attributes]) if (!KEPT.has(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of fresh.attributes) {
    if (!KEPT.has(name) && name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  // As an attribute the policy of the page refuses it.
  if (fresh.hasAttribute("style") && old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  if (old.firstChild || fresh.firstChild) children(old, [...fresh.childNodes]);
}
