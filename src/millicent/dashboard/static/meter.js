// The meter: tokens, cost, time and speed of one answer, ticking while it is written.

import { cost, count, show } from "/static/figures.js";

const field = (name) => document.getElementById(`meter-${name}`);

export class Meter {
  #root = document.getElementById("meter");
  #startedMs = 0;
  #firstMs = null;
  #endedMs = null;
  #usage = null;
  #timer = null;

  start() {
    this.#startedMs = performance.now();
    this.#firstMs = this.#endedMs = this.#usage = null;
    this.#root.dataset.state = "running";
    this.#timer = setInterval(() => this.#draw(), 100);
    this.#draw();
  }

  /** A chunk arrived, with or without usage. */
  tick(usage) {
    this.#firstMs ??= performance.now();
    if (usage) this.#usage = usage;
    this.#draw();
  }

  /** The answer ended: what stands now stays. */
  stop(state) {
    clearInterval(this.#timer);
    this.#endedMs = performance.now();
    this.#root.dataset.state = state;
    this.#draw();
  }

  /** Back to where no answer was asked for. */
  reset() {
    clearInterval(this.#timer);
    this.#usage = null;
    this.#root.dataset.state = "idle";
    for (const name of ["cost", "tokens", "time", "speed"]) show(field(name), "—");
  }

  /** The receipt's amount, where the stream ended before it could tell one. */
  settle(usd) {
    this.#usage = { ...this.#usage, cost: usd };
    this.#draw();
  }

  get seconds() {
    return ((this.#endedMs ?? performance.now()) - this.#startedMs) / 1000;
  }

  get usage() {
    return this.#usage;
  }

  /** Tokens per second since the first one; null before there is an interval to divide by. */
  get speed() {
    const tokens = this.#usage?.completion_tokens;
    const elapsedMs = this.#firstMs === null ? 0 : (this.#endedMs ?? performance.now()) - this.#firstMs;
    return tokens > 1 && elapsedMs > 0 ? ((tokens - 1) * 1000) / elapsedMs : null;
  }

  #draw() {
    const usage = this.#usage;
    const usd = usage?.cost;
    show(field("cost"), cost(usd), typeof usd === "number" ? `${usd} USD` : null);
    show(field("tokens"), usage ? `${count(usage.prompt_tokens)} in, ${count(usage.completion_tokens)} out` : "—");
    show(field("time"), `${this.seconds.toFixed(1)} s`);
    show(field("speed"), this.speed === null ? "—" : `${this.speed.toFixed(1)} tokens/s`);
  }
}
