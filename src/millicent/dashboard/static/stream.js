// One streamed chat completion over our public API, as events: chunks, then the end. Errors are thrown as Problem.

export class Problem extends Error {
  constructor(message, { status = 0, retryAfterS = null, receipt = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
    this.receipt = receipt;
  }
}

/** Yields {receipt} once the answer's headers are here, then each chunk's JSON. Aborting `signal` ends the work. */
export async function* complete(body, { key, signal }) {
  const headers = { "Content-Type": "application/json", "X-Millicent-Feature": "chat-page" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem("There is no connection to the server. Check that it runs (millicent serve), then try again.");
  }
  const receipt = response.headers.get("X-Millicent-Receipt");
  if (!response.ok) throw await refusal(response, receipt);
  yield { receipt };
  let ended = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(chunk.error.message ?? "The server ended the answer with an error.", { receipt });
    yield { chunk };
  }
  if (!ended) throw new Problem("The connection ended before the answer did. What was done is on its receipt.", { receipt });
}

async function refusal(response, receipt) {
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = (await response.json()).error?.message ?? message;
  } catch {
    // Not our JSON (a proxy's page, say): the status line is all there is to tell.
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfterS = Number.isNaN(seconds) ? null : seconds;
  return new Problem(message, { status: response.status, retryAfterS, receipt });
}

/** The data of each server-sent event. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        return;
      }
      if (part.done) return;
      pending += part.value;
      const lines = pending.split(/\r\n|\n/);
      pending = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // after an abort the stream is already closed
  }
}
