// A receipt that is still open follows its answer: asked for again every second while it is seen, until it is closed.

const EVERY_MS = 1000;
let timer = null;

async function update() {
  clearTimeout(timer);
  const response = await fetch(location.href).catch(() => null);
  if (response?.ok) {
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const fresh = page.querySelector("article.receipt");
    if (fresh) document.querySelector("article.receipt").replaceWith(fresh);
    if (fresh?.dataset.open === "false") return;
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(update, EVERY_MS);
}

document.addEventListener("visibilitychange", () => {
  if (document.querySelector("article.receipt").dataset.open === "true") schedule();
});
schedule();
