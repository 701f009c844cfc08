// The live part of the overview: asked for again every two seconds while someone can see it, replaced only when it
// changed. One timer, one request at a time; nothing is kept between rounds but the last text.

const EVERY_MS = 2000;
const SLOWEST_MS = 30000;
const live = document.getElementById("live");
const state = document.getElementById("live-state");

let shown = "";
let delayMs = EVERY_MS;
let timer = null;
let inFlight = null;

function apply(text) {
  if (text === shown) return;
  const first = shown === "";
  shown = text;
  const fresh = new DOMParser().parseFromString(text, "text/html").body;
  const known = new Set([...live.querySelectorAll("[data-receipt]")].map((row) => row.dataset.receipt));
  if (!first) {
    for (const row of fresh.querySelectorAll("[data-receipt]")) if (!known.has(row.dataset.receipt)) row.classList.add("new");
  }
  const focused = live.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const scrolled = [...live.querySelectorAll(".scroll")].map((table) => table.scrollLeft);
  live.replaceChildren(...fresh.childNodes);
  live.querySelectorAll(".scroll").forEach((table, i) => {
    table.scrollLeft = scrolled[i] ?? 0;
  });
  if (focused) live.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function say(text) {
  if (state.textContent !== text) state.textContent = text;
}

async function update() {
  clearTimeout(timer);
  inFlight?.abort();
  const controller = new AbortController();
  inFlight = controller;
  try {
    const response = await fetch(`/receipts/rows${location.search}`, { signal: controller.signal });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const text = await response.text();
    if (controller !== inFlight) return;
    apply(text);
    delayMs = EVERY_MS;
    say("live");
  } catch (error) {
    if (controller.signal.aborted) return;
    delayMs = Math.min(delayMs * 2, SLOWEST_MS);
    say(`not updating (${error.message}); trying again in ${delayMs / 1000} s`);
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(update, delayMs);
}

// A filter changes the tables and the address, and leaves the chat beside them alone.
live.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (!link || event.defaultPrevented || event.button !== 0) return;
  if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const url = new URL(link.href);
  if (url.origin !== location.origin || url.pathname !== location.pathname) return;
  event.preventDefault();
  history.pushState(null, "", url);
  shown = "";
  update();
});
addEventListener("popstate", () => {
  shown = "";
  update();
});
document.addEventListener("millicent:settled", update);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else update();
});
schedule();
