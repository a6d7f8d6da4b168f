// A model's Markdown as it arrives: paragraphs, headings, lists, code, bold and italic; all else stays as written.
//
// Every character is looked at a bounded number of times, and what is complete is never touched again, so that long
// answers cost no more per chunk than short ones.

import { make } from "./dom.js";

// The start of a line that may still become another kind of line, and what the kinds look like.
const UNDECIDED = /^\s*(?:(?:`{1,2}|#{1,6}|\+|-+|\*+|\d{1,9}[.)]?)\s*)?$/;
const UNDECIDED_CODE = /^\s*(?:`+\s*)?$/;
const LONGEST_START = 200;
const FENCE = /^(\s*)(`{3,})([^`]*)$/;
const HEADING = /^(#{1,6})\s+/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+/;
const RULE = /^\s*(-{3,}|\*{3,})\s*$/;

export class Markdown {
  #root;
  #start = ""; // of a line whose kind is not known yet
  #decided = false;
  #writer = null; // of the open block
  #fence = null; // of open code: {indent, ticks}
  #lists = []; // open lists, outermost first: {indent, list, item}
  #blank = false; // whether the last line was

  constructor(root) {
    this.#root = root;
  }

  push(text) {
    let from = 0;
    for (let end; (end = text.indexOf("\n", from)) >= 0; from = end + 1) {
      this.#feed(text.slice(from, end));
      this.#endLine();
    }
    this.#feed(text.slice(from));
  }

  // Show what was held back, as nothing more comes.
  end() {
    if (!this.#decided && this.#start) this.#open(this.#start);
    this.#close();
  }

  #feed(text) {
    if (this.#decided) return this.#writer?.write(text);
    this.#start += text;
    // What follows a fence is known only with the line's end.
    const waits = this.#fence
      ? UNDECIDED_CODE.test(this.#start)
      : UNDECIDED.test(this.#start) || /^\s*`{3}/.test(this.#start);
    if (!waits || this.#start.length > LONGEST_START) this.#open(this.#start);
  }

  #endLine() {
    if (!this.#decided) this.#open(this.#start);
    this.#decided = false;
    this.#start = "";
  }

  // Begin a line: all of it, or enough to know what it is.
  #open(line) {
    this.#decided = true;
    if (this.#fence) return this.#openCodeLine(line);
    const blank = this.#blank;
    this.#blank = !line.trim();
    if (this.#blank) return this.#close();

    const fence = FENCE.exec(line), heading = HEADING.exec(line), item = ITEM.exec(line);
    if (fence) return this.#openFence(fence[1].length, fence[2].length, fence[3].trim());
    if (RULE.test(line)) {
      this.#leaveLists();
      this.#root.append(make("hr"));
    } else if (heading) {
      this.#leaveLists();
      this.#openBlock(this.#root, make(`h${Math.min(heading[1].length + 2, 6)}`));
      this.#writer.write(line.slice(heading[0].length));
    } else if (item) {
      this.#openItem(item[1].length, item[2]);
      this.#writer.write(line.slice(item[0].length));
    } else if (this.#writer?.continues) {
      this.#writer.write("\n" + line.trimStart());
    } else {
      if (blank && !/^\s/.test(line)) this.#lists = [];
      this.#openBlock(this.#parent, make("p"));
      this.#writer.write(this.#lists.length ? line.trimStart() : line);
    }
    if (heading) this.#writer.continues = false;
  }

  get #parent() {
    return this.#lists.at(-1)?.item ?? this.#root;
  }

  #openBlock(parent, element) {
    this.#close();
    parent.append(element);
    this.#writer = new Inline(element);
  }

  #openItem(indent, digits) {
    this.#close();
    while (this.#lists.length && indent < this.#lists.at(-1).indent) this.#lists.pop();
    const tag = digits ? "OL" : "UL";
    let top = this.#lists.at(-1);
    if (top && indent < top.indent + 2 && top.list.tagName !== tag) {
      this.#lists.pop();
      top = undefined;
    }
    if (!top || indent >= top.indent + 2) {
      const list = make(tag);
      if (digits) list.start = Number(digits);
      this.#parent.append(list);
      top = { indent, list };
      this.#lists.push(top);
    }
    top.item = make("li");
    top.list.append(top.item);
    this.#writer = new Inline(top.item);
  }

  #openFence(indent, ticks, language) {
    if (!indent) this.#leaveLists();
    this.#close();
    const code = make("code");
    const block = make("pre", { tabIndex: 0 }, code);
    if (language) block.dataset.language = language;
    this.#parent.append(block);
    this.#fence = { indent, ticks };
    this.#writer = new Plain(code);
  }

  #openCodeLine(line) {
    const closing = /^\s*(`{3,})\s*$/.exec(line);
    if (closing && closing[1].length >= this.#fence.ticks) {
      this.#fence = null;
      return this.#close();
    }
    const indent = Math.min(this.#fence.indent, line.length - line.trimStart().length);
    this.#writer.line(line.slice(indent));
  }

  #leaveLists() {
    this.#close();
    this.#lists = [];
  }

  #close() {
    this.#writer?.end();
    this.#writer = null;
  }
}

// Code: text as it is.
class Plain {
  #text = document.createTextNode("");
  #empty = true;

  constructor(element) {
    element.append(this.#text);
  }

  line(text) {
    this.#text.appendData(this.#empty ? text : "\n" + text);
    this.#empty = false;
  }

  write(text) {
    this.#text.appendData(text);
  }

  end() {}
}

const MARK = /`+|\*{1,2}/;
const LONGEST = 1000; // from a mark to the end of the one that closes it: beyond, it is text

// Text with code, bold and italic. From an open mark on all is shown as written, until the mark is closed.
class Inline {
  continues = true; // the next line may go on with this one
  #element;
  #tail = "";
  #shown = document.createTextNode("");

  constructor(element) {
    this.#element = element;
    element.append(this.#shown);
  }

  write(text) {
    this.#tail += text;
    this.#settle(false);
  }

  end() {
    this.#settle(true);
    this.#shown.remove();
  }

  #settle(last) {
    while (this.#tail) {
      const mark = MARK.exec(this.#tail);
      if (!mark) {
        this.#emit(this.#tail.length);
        break;
      }
      const [marks] = mark;
      if (mark.index) this.#emit(mark.index);
      const closed = enclosed(this.#tail, marks, last);
      if (closed > 0) {
        this.#element.insertBefore(this.#styled(marks, this.#tail.slice(marks.length, closed)), this.#shown);
        this.#tail = this.#tail.slice(closed + marks.length);
      } else if (closed === 0 || last || this.#tail.length > LONGEST) this.#emit(marks.length);
      else break;
    }
    if (this.#shown.data !== this.#tail) this.#shown.data = this.#tail;
  }

  #emit(length) {
    const text = this.#tail.slice(0, length), before = this.#shown.previousSibling;
    this.#tail = this.#tail.slice(length);
    if (before?.nodeType === Node.TEXT_NODE) before.appendData(text);
    else this.#element.insertBefore(document.createTextNode(text), this.#shown);
  }

  #styled(marks, text) {
    if (marks[0] === "`") return make("code", {}, text.replace(/^ (.*) $/s, "$1"));
    const element = make(marks.length === 2 ? "strong" : "em");
    const inner = new Inline(element);
    inner.write(text);
    inner.end();
    return element;
  }
}

// Return where the mark that the text begins with is closed, 0 if it opens nothing, -1 if that is not known yet.
function enclosed(text, marks, last) {
  if (text.length === marks.length) return last ? 0 : -1;
  if (marks[0] === "*" && /\s/.test(text[marks.length])) return 0;
  for (let at = text.indexOf(marks, marks.length); at > 0; at = text.indexOf(marks, at)) {
    let end = at;
    while (text[end] === marks[0]) end++;
    if (end > LONGEST) break;
    if (end === text.length && !last) return -1;
    const closes = marks[0] === "`" || !/\s/.test(text[at - 1]);
    if (end - at === marks.length && closes) return at;
    // Of *** the last marks close: the first belong to what is inside.
    if (marks[0] === "*" && end - at === 3 && closes) return end - marks.length;
    at = end;
  }
  return -1;
}
