// Which experts an answer chose: a row a layer, a column an expert, the darker the more often.

import { make, number, plural } from "./dom.js";

const LEFT = 30, BOTTOM = 18, EDGE = 3; // room for the axes and around, in CSS pixels
const SMALLEST = 4, LARGEST = 36; // cells

export class HeatMap {
  element = make("details", { className: "experts" });
  #summary = make("summary");
  #canvas = make("canvas", { tabIndex: 0, role: "img" });
  #facts = make("p", { className: "facts" });
  #cell = make("p", { className: "cell", role: "status" });
  #scale = make("span");
  #layers = [];
  #experts = 0;
  #chosen = 0; // experts per token and layer
  #tokens = 0;
  #counts = null; // [layers * experts]
  #size = [0, 0]; // of a cell
  #at = null; // layer and expert looked at
  #watched = new AbortController();

  constructor() {
    const legend = make("p", { className: "legend" }, "never", make("i", { className: "none" }), "less often",
      make("i", { className: "ramp" }), this.#scale);
    const frame = make("div", { className: "frame" }, this.#canvas);
    this.element.append(this.#summary, make("div", {}, this.#facts, frame, this.#cell, legend));
    this.element.addEventListener("toggle", () => this.draw());
    this.#canvas.addEventListener("pointermove", (event) => this.#look(...this.#under(event)));
    this.#canvas.addEventListener("pointerdown", (event) => this.#look(...this.#under(event)));
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    const { signal } = this.#watched;
    addEventListener("resize", () => this.draw(), { signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(), { signal });
  }

  // Count the experts of further tokens, as `routing` of a chunk's choice.
  add({ layers, num_experts: experts, experts: tokens }) {
    if (!this.#counts) {
      this.#layers = layers;
      this.#experts = experts;
      this.#counts = new Uint32Array(layers.length * experts);
    }
    for (const token of tokens) {
      this.#tokens++;
      token.forEach((chosen, row) => {
        this.#chosen = chosen.length;
        for (const expert of chosen) this.#counts[row * experts + expert]++;
      });
    }
  }

  // Forget the answer.
  remove() {
    this.#watched.abort();
    this.element.remove();
  }

  draw() {
    this.#summary.textContent = `Experts of ${plural(this.#tokens, "token")}`;
    if (!this.element.open || !this.#tokens) return;
    const rows = this.#layers.length, columns = this.#experts;
    const room = this.#canvas.parentElement.clientWidth - LEFT - 2 * EDGE;
    const width = Math.max(SMALLEST, Math.min(LARGEST, room / columns));
    const height = Math.max(10, Math.min(Math.floor(width), 22));
    this.#size = [width, height];
    const ratio = devicePixelRatio;
    const [wide, high] = [LEFT + Math.ceil(columns * width), rows * height + BOTTOM];
    Object.assign(this.#canvas, { width: wide * ratio, height: high * ratio });
    Object.assign(this.#canvas.style, { width: `${wide}px`, height: `${high}px` });

    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.#canvas);
    const ramp = ["--heat-low", "--heat-mid", "--heat-high"].map((name) => rgb(style.getPropertyValue(name)));
    const none = style.getPropertyValue("--heat-none");
    const most = this.#counts.reduce((a, b) => Math.max(a, b), 0);
    this.#counts.forEach((count, index) => {
      const [x, y, wide] = this.#place(Math.floor(index / columns), index % columns);
      context.fillStyle = count ? mix(ramp, count / most) : none;
      context.fillRect(x, y, wide - 1, height - 1);
    });
    this.#axes(context, style);
    if (this.#at) {
      const [x, y, wide] = this.#place(...this.#at);
      context.strokeStyle = style.color;
      context.lineWidth = 2;
      context.strokeRect(x - 0.5, y + 0.5, wide, height - 1);
    }
    this.#tell(most);
  }

  // Return where a cell begins, and its width: whole pixels.
  #place(row, column) {
    const [width, height] = this.#size;
    const left = Math.round(column * width);
    return [LEFT + left, row * height, Math.round((column + 1) * width) - left];
  }

  #axes(context, style) {
    const [width, height] = this.#size;
    context.fillStyle = style.getPropertyValue("--muted");
    context.font = `11px ${style.fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const everyRow = Math.ceil(14 / height), everyColumn = [1, 2, 4, 8, 16].find((n) => n * width >= 24) ?? 32;
    this.#layers.forEach((layer, row) => {
      if (row % everyRow === 0) context.fillText(layer, LEFT - 8, row * height + height / 2);
    });
    context.textAlign = "center";
    const y = this.#layers.length * height + BOTTOM / 2 + 2;
    for (let expert = 0; expert < this.#experts; expert += everyColumn)
      context.fillText(expert, LEFT + expert * width + width / 2, y);
  }

  #tell(most) {
    const even = this.#chosen / this.#experts;
    const never = this.#counts.filter((count) => !count).length;
    this.#scale.textContent = `${number(most / this.#tokens / even, 1)} times an even share`;
    this.#facts.textContent =
      `Rows are ${plural(this.#layers.length, "layer")}, columns ${plural(this.#experts, "expert")}; ` +
      `each token takes ${number(this.#chosen)} in each layer. ` +
      (never ? `${number(never)} of ${number(this.#counts.length)} were never chosen.` : "All were chosen.");
    const busiest = this.#counts.indexOf(most);
    this.#canvas.ariaLabel = `Heat map of experts. ${this.#facts.textContent} The busiest: ` +
      this.#words(Math.floor(busiest / this.#experts), busiest % this.#experts);
    this.#cell.textContent = this.#at ? this.#words(...this.#at) : "Point at a cell, or move with the arrow keys.";
  }

  #words(row, column) {
    const count = this.#counts[row * this.#experts + column];
    return `Layer ${this.#layers[row]}, expert ${column}: ${number(count)} of ${plural(this.#tokens, "token")} ` +
      `(${number((100 * count) / this.#tokens, 1)}\u00a0%).`;
  }

  #under(event) {
    const [width, height] = this.#size;
    return [Math.floor(event.offsetY / height), Math.floor((event.offsetX - LEFT) / width)];
  }

  #look(row, column) {
    if (row < 0 || column < 0 || row >= this.#layers.length || column >= this.#experts) return;
    if (this.#at && this.#at[0] === row && this.#at[1] === column) return;
    this.#at = [row, column];
    this.draw();
  }

  #move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    if (!this.#at) return this.#look(0, 0);
    const [row, column] = this.#at;
    this.#look(row + step[0], column + step[1]);
  }
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.trim().slice(at, at + 2), 16));
}

function mix(ramp, part) {
  const place = part * (ramp.length - 1), from = Math.min(Math.floor(place), ramp.length - 2);
  const parts = ramp[from].map((low, i) => Math.round(low + (ramp[from + 1][i] - low) * (place - from)));
  return `rgb(${parts.join(" ")})`;
}
