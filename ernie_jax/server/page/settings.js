// What the next answer is asked with. Everything is kept for this tab only: it may hold a key.

import { byId, make } from "./dom.js";

const STORED = "ernie_jax settings";
const NUMBERS = ["temperature", "top_p", "max_completion_tokens", "seed", "reasoning_max_tokens"];
const TEXTS = [...NUMBERS, "system", "tools", "tool_choice", "key"];

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Current weather of a city",
      parameters: {
        type: "object",
        properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
        required: ["city"],
      },
    },
  },
];

export class Settings {
  // `onChange` is called with the id of a field whose value is another.
  constructor(onChange) {
    this.#restore();
    for (const id of [...TEXTS, "experts"]) {
      byId(id).addEventListener("input", () => this.#check(id));
      byId(id).addEventListener("change", () => {
        this.#store();
        onChange(id);
      });
    }
    byId("example-tools").addEventListener("click", () => this.#set("tools", JSON.stringify(EXAMPLE, null, 2)));
    byId("reset").addEventListener("click", () => {
      for (const id of TEXTS.filter((id) => id !== "key")) this.#set(id, "");
      byId("experts").checked = true;
      this.#store();
    });
    byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
    for (const id of TEXTS) this.#check(id);
  }

  get key() {
    return byId("key").value.trim();
  }

  get system() {
    return byId("system").value.trim();
  }

  // Show what the server takes where a field is empty.
  showDefaults(card) {
    for (const [id, value] of Object.entries(card.default_sampling)) byId(id).placeholder = value;
    byId("max_completion_tokens").max = card.max_model_len;
    byId("experts-field").hidden = !card.num_experts;
  }

  // Return the id of the first field that is wrong, or undefined.
  get wrong() {
    return TEXTS.find((id) => !this.#check(id));
  }

  // Return the fields of a request.
  get body() {
    const body = {};
    for (const id of NUMBERS) if (byId(id).value !== "") body[id] = Number(byId(id).value);
    if (byId("tools").value.trim()) {
      body.tools = JSON.parse(byId("tools").value);
      if (byId("tool_choice").value) body.tool_choice = byId("tool_choice").value;
    }
    if (!byId("experts-field").hidden && byId("experts").checked) body.include_routing = true;
    return body;
  }

  #set(id, value) {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("input"));
    byId(id).dispatchEvent(new Event("change"));
  }

  #restore() {
    const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
    for (const id of TEXTS) byId(id).value = stored[id] ?? "";
    byId("experts").checked = stored.experts ?? true;
  }

  #store() {
    const values = TEXTS.map((id) => [id, byId(id).value]);
    sessionStorage.setItem(STORED, JSON.stringify({ ...Object.fromEntries(values), experts: byId("experts").checked }));
  }

  // Say beside a field what is wrong with it; return whether nothing is.
  #check(id) {
    const field = byId(id);
    const find = NUMBERS.includes(id) ? numberProblem : PROBLEMS[id];
    const problem = find ? find(field) : "";
    let words = byId(`${id}-problem`);
    if (problem && !words) {
      words = make("p", { id: `${id}-problem`, className: "problem" });
      field.after(words);
    }
    if (words) words.textContent = problem;
    field.ariaInvalid = problem ? "true" : null;
    if (problem) field.setAttribute("aria-describedby", words.id);
    else field.removeAttribute("aria-describedby");
    return !problem;
  }
}

const PROBLEMS = { tools: toolsProblem, key: keyProblem };

function numberProblem(field) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = field.validity;
  if (badInput) return "Give a number.";
  if (stepMismatch) return "Give a whole number.";
  if (rangeUnderflow) return `Give ${field.min} or more.`;
  if (rangeOverflow) return `Give ${field.max} or less.`;
  return "";
}

// Return what is wrong with the tools; the server checks the rest.
function toolsProblem({ value: text }) {
  if (!text.trim()) return "";
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    return `This is no JSON: ${error.message}.`;
  }
  if (!Array.isArray(tools)) return "Give an array: [{\"type\": \"function\", \"function\": {…}}].";
  const wrong = tools.findIndex((tool) => tool?.type !== "function" || typeof tool.function?.name !== "string");
  if (wrong >= 0) return `Tool ${wrong + 1} needs "type": "function" and a "function" with a "name".`;
  return "";
}

function keyProblem({ value: key }) {
  return /^[\x20-\x7e]*$/.test(key) ? "" : "A key has only letters, digits and signs of ASCII.";
}
