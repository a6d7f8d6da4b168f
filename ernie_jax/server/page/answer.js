// One answer of the model, and the part of the page that shows it.

import { duration, make, number, plural } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { Markdown } from "./markdown.js";

const REASONS = { length: "The answer was cut off: it reached the most tokens that it may have." };

export class Answer {
  element = make("article", { className: "answer", ariaLabel: "Answer" });
  content = "";
  reasoning = "";
  calls = []; // {id, name, arguments}
  results = null; // of the calls, once they are given
  #actions;
  #thoughts = null;
  #text = null;
  #experts = null;
  #shownCalls = [];
  #waiting = make("p", { className: "waiting" }, make("span", { className: "unseen" }, "Waiting for the answer"));
  #pending = { content: "", reasoning: "", calls: [] }; // not shown yet
  #frame = 0;
  #reason = null;
  #passing = []; // elements that only the last answer has
  #usage = null;
  #times = { sent: performance.now(), first: 0, last: 0, thought: 0 };

  // `actions` are called: changed(), retry(), results([text]), key().
  constructor(actions) {
    this.#actions = actions;
    this.element.ariaLive = "polite";
    this.element.ariaBusy = "true"; // read out when it is complete, not word by word
    this.element.append(this.#waiting);
  }

  // Return it as messages of a request.
  get messages() {
    const called = this.#reason === "tool_calls";
    if (!this.content && !called) return [];
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (!called) return [message];
    message.tool_calls = this.calls.map(({ id, name, arguments: args }) => ({
      id, type: "function", function: { name, arguments: args },
    }));
    const results = (this.results ?? []).map((content, i) => ({
      role: "tool", tool_call_id: this.calls[i].id, content,
    }));
    return [message, ...results];
  }

  // Whether it has called tools and waits for their results.
  get waits() {
    return this.#reason === "tool_calls" && !this.results;
  }

  // Take a chunk of the stream.
  take(chunk) {
    this.#usage = chunk.usage ?? this.#usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.#times.last = performance.now();
    this.#times.first ||= this.#times.last;
    const { content, reasoning_content: reasoning, tool_calls: calls = [] } = choice.delta;
    if (reasoning) {
      this.reasoning += reasoning;
      this.#pending.reasoning += reasoning;
    }
    if (this.reasoning && !this.#times.thought && (content || calls.length)) this.#times.thought = this.#times.last;
    if (content) {
      this.content += content;
      this.#pending.content += content;
    }
    for (const call of calls) this.#takeCall(call);
    if (choice.routing?.experts.length) {
      this.#experts ??= new HeatMap();
      this.#experts.add(choice.routing);
    }
    this.#reason = choice.finish_reason ?? this.#reason;
    this.#frame ||= requestAnimationFrame(() => this.#show());
  }

  // End it well.
  finish() {
    this.#end();
    if (REASONS[this.#reason]) this.#note(REASONS[this.#reason]);
    if (this.waits) this.#askForResults();
    if (!this.content && !this.calls.length) this.#note("The answer is empty.");
    this.#addFooter();
  }

  // End it because the user wants no more.
  stop() {
    this.#end();
    this.#note("Stopped.");
    this.#addFooter();
  }

  // End it because of an error, which is shown with what can be done.
  fail(error) {
    this.#end();
    const buttons = [make("button", { type: "button", onclick: this.#actions.retry }, "Try again")];
    if (error.asksForKey) buttons.unshift(make("button", { type: "button", onclick: this.#actions.key }, "Enter a key"));
    this.element.append(make("div", { className: "error", role: "alert" }, make("p", {}, error.message), ...buttons));
    this.#passing.push(...buttons);
  }

  // Take away what only the last answer has.
  settle() {
    this.#experts?.remove();
    this.#experts = null;
    for (const element of this.#passing) element.remove();
  }

  #takeCall({ index, id, function: { name, arguments: args = "" } }) {
    this.calls[index] ??= { id, name, arguments: "" };
    this.#pending.calls[index] ??= "";
    this.calls[index].arguments += args;
    this.#pending.calls[index] += args;
  }

  #show() {
    this.#frame = 0;
    const { content, reasoning, calls } = this.#pending;
    this.#pending = { content: "", reasoning: "", calls: [] };
    if (reasoning || content || calls.length) this.#waiting.remove();
    if (reasoning) this.#showThoughts(reasoning);
    if (this.#times.thought) this.#endThoughts();
    if (content) {
      if (!this.#text) {
        const element = make("div", { className: "markdown" });
        this.element.append(element);
        this.#text = new Markdown(element);
      }
      this.#text.push(content);
    }
    calls.forEach((text, index) => this.#showCall(index, text));
    this.#actions.changed();
  }

  #showThoughts(text) {
    if (!this.#thoughts) {
      const summary = make("summary", {}, "Thinking"), body = make("div", { className: "markdown" });
      const element = make("details", { className: "thoughts" }, summary, body);
      this.element.append(element);
      const since = performance.now();
      const tell = () => (summary.textContent = `Thinking for ${duration(performance.now() - since)}`);
      this.#thoughts = { since, summary, element, text: new Markdown(body), timer: setInterval(tell, 1000) };
      element.classList.add("working");
    }
    this.#thoughts.text.push(text);
  }

  #endThoughts() {
    if (!this.#thoughts?.timer) return;
    const { since, summary, element, text, timer } = this.#thoughts;
    clearInterval(timer);
    this.#thoughts.timer = 0;
    text.end();
    element.classList.remove("working");
    summary.textContent = `Thought for ${duration(this.#times.thought - since)}`;
  }

  #showCall(index, text) {
    if (!this.#shownCalls[index]) {
      const args = make("pre", { tabIndex: 0 });
      const title = make("p", {}, "Calls ", make("code", {}, this.calls[index].name));
      const element = make("section", { className: "call", ariaLabel: `Call of ${this.calls[index].name}` }, title, args);
      this.element.append(element);
      this.#shownCalls[index] = { element, text: args.appendChild(document.createTextNode("")) };
    }
    this.#shownCalls[index].text.appendData(text);
  }

  #end() {
    cancelAnimationFrame(this.#frame);
    this.#times.thought ||= performance.now();
    this.#show();
    this.#text?.end();
    this.#waiting.remove();
    this.calls.forEach((call, index) => {
      try {
        this.#shownCalls[index].text.data = JSON.stringify(JSON.parse(call.arguments), null, 2);
      } catch {
        this.#shownCalls[index].element.append(make("p", { className: "problem" }, "These arguments are no JSON."));
      }
    });
    this.element.ariaBusy = "false";
  }

  #askForResults() {
    const fields = this.calls.map((call, index) => {
      const label = `Result of ${call.name}`;
      const field = make("textarea", { rows: 2, spellcheck: false, ariaLabel: label, placeholder: label });
      this.#shownCalls[index].element.append(field);
      return field;
    });
    const button = make("button", { type: "button", className: "primary" }, "Send results and continue");
    const row = make("div", { className: "row" }, button);
    this.element.append(row);
    button.addEventListener("click", () => {
      this.results = fields.map((field) => field.value);
      row.remove();
      fields.forEach((field) => field.replaceWith(make("pre", { className: "result", tabIndex: 0 }, field.value)));
      this.#actions.results();
    });
    fields[0].focus();
  }

  #note(words) {
    this.element.append(make("p", { className: "note" }, words));
  }

  #addFooter() {
    const footer = make("footer");
    if (navigator.clipboard && this.content) {
      const copy = make("button", { type: "button", className: "quiet" }, "Copy");
      copy.addEventListener("click", async () => {
        await navigator.clipboard.writeText(this.content);
        copy.textContent = "Copied";
      });
      footer.append(copy);
    }
    const again = make("button", { type: "button", className: "quiet", onclick: this.#actions.retry }, "Regenerate");
    footer.append(again);
    this.#passing.push(again);
    if (this.#usage) footer.append(make("p", { className: "usage" }, this.#usageWords()));
    this.element.append(footer);
    if (!this.#experts) return;
    this.element.append(this.#experts.element);
    this.#experts.draw();
  }

  #usageWords() {
    const { prompt_tokens: prompt, completion_tokens: output, prompt_tokens_details: details } = this.#usage;
    const { sent, first, last } = this.#times;
    const words = [`${plural(prompt, "token")} in (${number(details.cached_tokens)} cached)`, `${number(output)} out`];
    if (output > 1 && last > first) words.push(`${number(((output - 1) * 1000) / (last - first), 1)}\u00a0tok/s`);
    words.push(`first after ${duration(first - sent)}`);
    return words.join(" · ");
  }
}
