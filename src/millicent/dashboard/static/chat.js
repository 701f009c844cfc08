// The chat: our own public API, streamed, several turns. The conversation lives in this tab only (sessionStorage), so
// that a look at a receipt and back loses nothing.

import { cost, count } from "/static/figures.js";
import { Meter } from "/static/meter.js";
import { Problem, complete } from "/static/stream.js";
import { render } from "/static/text.js";

const STORE = "millicent.chat";
const at = (id) => document.getElementById(id);
const [transcript, welcome, composer, prompt, send, stop] = ["transcript", "welcome", "composer", "prompt", "send", "stop"].map(at);
const [errorBox, status, model, system, temperature] = ["chat-error", "chat-status", "model", "system", "temperature"].map(at);

const meter = new Meter();
let turns = []; // {role, content, receipt?, figures?}
let running = null; // the AbortController of the answer being written
let key = ""; // pasted by the user when the server asks; kept in memory only
let countdown = null;
let following = true; // the end of the conversation is in sight
let lastTop = 0;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function receiptLink(id, text) {
  const link = make("a", "", text);
  link.href = `/receipts/${encodeURIComponent(id)}`;
  return link;
}

function addTurn(turn) {
  welcome.hidden = true;
  const article = make("article", `turn ${turn.role}`);
  article.append(make("h3", "sr", turn.role === "user" ? "You" : "Answer"));
  const body = make("div", "body");
  render(body, turn.content);
  article.append(body);
  const foot = make("p", "turn-foot");
  article.append(foot);
  if (turn.figures) closeTurn(foot, turn);
  transcript.append(article);
  return { body, foot };
}

function closeTurn(foot, turn) {
  foot.replaceChildren(make("span", "", turn.figures));
  if (turn.receipt) foot.append(" · ", receiptLink(turn.receipt, "receipt"));
}

/** Whether the reader is at the end, or went up. A panel that opens below moves the end away too: that is no wish. */
function look() {
  const top = transcript.scrollTop;
  if (transcript.scrollHeight - top - transcript.clientHeight < 60) following = true;
  else if (top < lastTop) following = false;
  lastTop = top;
}

/** Makes a change and keeps the end in sight, unless the reader scrolled up. */
function followed(change) {
  look();
  change();
  if (following) transcript.scrollTop = transcript.scrollHeight;
  lastTop = transcript.scrollTop;
}

function sentence(text) {
  const ended = /[.!?]$/.test(text) ? text : `${text}.`;
  return ended.charAt(0).toUpperCase() + ended.slice(1);
}

function save() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(turns));
  } catch {
    sessionStorage.removeItem(STORE); // over the browser's quota: the chat goes on, only a reload forgets it
  }
}

function request() {
  const messages = turns.filter((turn) => turn.content).map(({ role, content }) => ({ role, content }));
  if (system.value.trim()) messages.unshift({ role: "system", content: system.value.trim() });
  const body = { model: model.value, messages, stream: true };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  if (temperature.value !== "") body.temperature = Number(temperature.value);
  return body;
}

/** What the meter says, in one line to keep under the answer. */
function figures(note) {
  const usage = meter.usage;
  const parts = [note, usage && `${count(usage.prompt_tokens)} in, ${count(usage.completion_tokens)} out`];
  parts.push(usage && cost(usage.cost), `${meter.seconds.toFixed(2)} s`);
  parts.push(meter.speed !== null && `${meter.speed.toFixed(1)} tokens/s`);
  return parts.filter(Boolean).join(" · ");
}

async function answer() {
  const body = request();
  const turn = { role: "assistant", content: "", receipt: null };
  const { body: element, foot } = addTurn(turn);
  let frame = null;
  const draw = () => followed(() => render(element, turn.content));
  const controller = new AbortController();
  running = controller;
  busy(true);
  meter.start();
  let state = "done";
  let problem = null;
  try {
    for await (const event of complete(body, { key, signal: controller.signal })) {
      if (event.receipt !== undefined) {
        turn.receipt = event.receipt;
        continue;
      }
      if (running !== controller) return; // a new chat began meanwhile
      turn.content += event.chunk.choices?.[0]?.delta?.content ?? "";
      meter.tick(event.chunk.usage);
      frame ??= requestAnimationFrame(() => {
        frame = null;
        draw();
      });
    }
  } catch (error) {
    state = controller.signal.aborted ? "stopped" : "failed";
    problem = state === "failed" ? error : null;
    if (problem instanceof Problem) turn.receipt ??= problem.receipt;
  }
  if (frame !== null) cancelAnimationFrame(frame);
  if (running !== controller) return; // a new chat began meanwhile
  meter.stop(state);
  if (state !== "done" && turn.receipt) await settle(turn.receipt, controller);
  if (running !== controller) return;
  draw();
  finish(turn, foot, state, problem);
}

function finish(turn, foot, state, problem) {
  running = null;
  const note = { done: "", stopped: "stopped", failed: "failed" }[state];
  turn.figures = figures(note);
  if (turn.content || state !== "failed") {
    turns.push(turn);
    followed(() => closeTurn(foot, turn));
  } else foot.parentElement.remove();
  save();
  busy(false);
  status.textContent = `Answer ${note || "finished"}: ${turn.figures}`;
  if (problem) explain(problem);
  document.dispatchEvent(new CustomEvent("millicent:settled"));
}

/** After a stop or a break the stream told no final figure: the receipt has it, a moment later. */
async function settle(receipt, controller) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  for (let attempt = 0; attempt < 8 && running === controller; attempt += 1) {
    await new Promise((resolve) => setTimeout(resolve, 100 * (attempt + 1)));
    const response = await fetch(`/v1/receipts/${encodeURIComponent(receipt)}`, { headers }).catch(() => null);
    if (!response?.ok) continue;
    const record = await response.json();
    if (!record.settled_at) continue;
    meter.settle(record.total_usd === null ? null : Number(record.total_usd));
    return;
  }
}

function busy(on) {
  send.hidden = on;
  stop.hidden = !on;
  transcript.setAttribute("aria-busy", String(on));
}

function hideError() {
  clearInterval(countdown);
  errorBox.hidden = true;
  errorBox.replaceChildren();
}

/** The error in words, and what can be done about it. */
function explain(problem) {
  hideError();
  const message = problem instanceof Problem ? problem.message : `The answer could not be read: ${problem.message}`;
  errorBox.append(make("p", "", sentence(message)));
  if (problem.status === 401) errorBox.append(keyField());
  const retry = make("button", "", "Try again");
  retry.type = "button";
  retry.addEventListener("click", () => {
    hideError();
    if (!running && turns.at(-1)?.role === "user") answer();
  });
  const row = make("p", "error-actions");
  row.append(retry);
  if (problem.receipt) row.append(receiptLink(problem.receipt, "Receipt"));
  if (problem.retryAfterS) row.append(wait(problem.retryAfterS, retry));
  if (turns.at(-1)?.role === "user") errorBox.append(row);
  errorBox.hidden = false;
}

function wait(secondsLeft, retry) {
  const note = make("span", "unit");
  const tick = () => {
    retry.disabled = secondsLeft > 0;
    note.textContent = secondsLeft > 0 ? `The server asks to wait ${secondsLeft} s.` : "";
    if (secondsLeft <= 0) clearInterval(countdown);
    secondsLeft -= 1;
  };
  tick();
  countdown = setInterval(tick, 1000);
  return note;
}

function keyField() {
  const label = make("label", "", "API key (kept in this tab's memory only) ");
  const input = make("input");
  input.type = "password";
  input.autocomplete = "off";
  input.value = key;
  input.addEventListener("input", () => {
    key = input.value.trim();
  });
  label.append(input);
  return label;
}

function submit() {
  const text = prompt.value.trim();
  if (!text || running || send.disabled) return;
  hideError();
  if (turns.at(-1)?.role === "user") {
    // It was never answered: the new question takes its place.
    turns.pop();
    transcript.lastElementChild.remove();
  }
  turns.push({ role: "user", content: text });
  following = true;
  lastTop = 0;
  followed(() => addTurn(turns.at(-1)));
  prompt.value = "";
  save();
  answer();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
transcript.addEventListener("scroll", look);
stop.addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", () => {
  const ended = running;
  running = null;
  ended?.abort();
  meter.reset();
  turns = [];
  save();
  hideError();
  busy(false);
  for (const article of transcript.querySelectorAll("article")) article.remove();
  welcome.hidden = false;
  status.textContent = "New chat";
  prompt.focus();
});

try {
  turns = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
} catch {
  turns = []; // not written by this page: begin anew
}
followed(() => turns.forEach(addTurn));
