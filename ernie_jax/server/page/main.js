// The page: a conversation, what it is asked with, and what the keys do.

import { Answer } from "./answer.js";
import { ApiError, fetchModel, streamChat } from "./api.js";
import { byId, make, number } from "./dom.js";
import { Settings } from "./settings.js";

const SUGGESTIONS = [
  "Explain what a mixture of experts is.",
  "Write a haiku about the sea.",
  "Write a Python function that merges two sorted lists.",
];
const WIDE = matchMedia("(min-width: 1100px)"); // settings stand beside the conversation
const NEAR = 60; // pixels from the end that count as being there

const [log, scroller, message, panel] = ["log", "scroller", "message", "settings"].map(byId);
const settings = new Settings((id) => {
  if (id === "key") loadModel();
});

let card = null; // of the model
let turns = []; // user's {element, messages} and Answers, in turn
let running = null; // AbortController of the answer in the making
let following = true; // whether the end is in sight, and stays so
let early = ""; // the message that was sent before the model is known

// Conversation ----------------------------------------------------------------------------------------------------

function say(text) {
  const element = make("article", { className: "user", ariaLabel: "You" }, text);
  turns.push({ element, messages: [{ role: "user", content: text }] });
  log.append(element);
  following = true;
  answer();
}

// Let the model answer the conversation as it is.
async function answer() {
  for (const turn of turns) turn.settle?.();
  const messages = turns.flatMap((turn) => turn.messages);
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const reply = new Answer({ changed: follow, retry: again, results: goOn, key: () => openSettings("key") });
  const control = (running = new AbortController());
  turns.push(reply);
  log.append(reply.element);
  update();
  try {
    const asked = { model: card.id, messages, stream: true, stream_options: { include_usage: true } };
    const chunks = streamChat({ ...asked, ...readSettings() }, settings.key, control.signal);
    for await (const chunk of chunks) reply.take(chunk);
    reply.finish();
  } catch (error) {
    if (control.signal.aborted) reply.stop();
    else {
      reply.fail(error);
      if (!(error instanceof ApiError)) throw error;
    }
  }
  if (running === control) running = null;
  update();
}

// Return the settings as fields of a request; throws ApiError.
function readSettings() {
  const { wrong } = settings;
  if (!wrong) return settings.body;
  openSettings(wrong);
  throw new ApiError(`The setting “${panel.querySelector(`[for=${wrong}]`).textContent}” is not right.`);
}

function again() {
  const reply = turns.pop();
  reply.settle();
  reply.element.remove();
  goOn();
}

function goOn() {
  following = true;
  if (matchMedia("(pointer: fine)").matches) message.focus();
  answer();
}

function begin() {
  running?.abort();
  running = null;
  for (const turn of turns) turn.settle?.();
  turns = [];
  log.replaceChildren();
  update();
  message.focus();
}

function update() {
  const waits = turns.at(-1)?.waits;
  byId("welcome").hidden = turns.length > 0;
  byId("new").disabled = !turns.length;
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  byId("send").disabled = !card || waits || !message.value.trim();
  message.placeholder = waits ? "First give the results of the calls" : "Message";
  follow();
}

function follow() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
  else byId("latest").hidden = atEnd();
}

function atEnd() {
  return scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop < NEAR;
}

// The model ---------------------------------------------------------------------------------------------------------

async function loadModel() {
  byId("notice").replaceChildren();
  try {
    card = await fetchModel(settings.key);
  } catch (error) {
    early = "";
    const button = error.asksForKey
      ? make("button", { type: "button", onclick: () => openSettings("key") }, "Enter a key")
      : make("button", { type: "button", onclick: loadModel }, "Try again");
    byId("notice").append(make("div", { className: "error" }, make("p", {}, error.message), button));
    if (!(error instanceof ApiError)) throw error;
    return;
  } finally {
    update();
  }
  document.title = `${card.id} · Chat`;
  byId("model").textContent = card.id;
  byId("context").textContent = `${number(card.max_model_len)} tokens of context`;
  settings.showDefaults(card);
  if (early && early === message.value.trim()) byId("composer").requestSubmit();
}

// Settings ----------------------------------------------------------------------------------------------------------

function openSettings(field) {
  if (!panel.open) WIDE.matches ? panel.show() : panel.showModal();
  byId("open-settings").ariaExpanded = "true";
  if (field) byId(field).focus();
}

panel.addEventListener("close", () => (byId("open-settings").ariaExpanded = String(panel.open)));
byId("open-settings").addEventListener("click", () => (panel.open ? panel.close() : openSettings()));
byId("close-settings").addEventListener("click", () => panel.close());
WIDE.addEventListener("change", () => {
  if (!panel.open) return;
  panel.close();
  openSettings();
});

// Keys and buttons --------------------------------------------------------------------------------------------------

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  early = card ? "" : text;
  if (running || byId("send").disabled || !text) return;
  message.value = "";
  grow();
  say(text);
});
message.addEventListener("input", () => {
  grow();
  update();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || panel.matches(":modal")) return;
  if (running) running.abort();
  else if (panel.contains(document.activeElement)) panel.close();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", begin);
byId("latest").addEventListener("click", () => {
  following = true;
  byId("latest").hidden = true;
  follow();
});
scroller.addEventListener("scroll", () => {
  following = atEnd();
  byId("latest").hidden = following;
});
for (const text of SUGGESTIONS) {
  const button = make("button", { type: "button" }, text);
  button.addEventListener("click", () => {
    message.value = text;
    grow();
    update();
    message.focus();
  });
  byId("suggestions").append(make("li", {}, button));
}

loadModel();
message.focus();
