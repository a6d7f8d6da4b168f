// Build elements without ever parsing text as HTML.

// Return an element; properties are set as they are, children may be strings.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

export const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });

export const plural = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;

// Say how long something took.
export function duration(milliseconds) {
  const seconds = milliseconds / 1000;
  if (seconds < 1) return `${Math.round(milliseconds)}\u00a0ms`;
  if (seconds < 10) return `${number(seconds, 1)}\u00a0s`;
  if (seconds < 60) return `${Math.round(seconds)}\u00a0s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}
