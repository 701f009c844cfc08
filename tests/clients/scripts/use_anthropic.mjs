// Anthropic's own client: a message, a stream, a tool, an error.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const [url, toolText] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: "unused", maxRetries: 0 });
const asked = { model: "tiny", messages: [{ role: "user", content: "hello" }], max_tokens: 8, temperature: 0 };
const { data: message, response } = await client.messages.create(asked).withResponse();
assert(message.content[0].text);

const streamed = await client.messages.stream(asked).finalMessage();
assert(streamed.content[0].text);

const { name, parameters } = JSON.parse(toolText).function;
const called = await client.messages.create({
  ...asked, max_tokens: 200, tools: [{ name, input_schema: parameters }], tool_choice: { type: "any" },
});
const use = called.content.find((block) => block.type === "tool_use");
assert([1, 2, 3].includes(use.input.times));

await assert.rejects(
  client.messages.create({ ...asked, model: "nobody" }),
  (error) => error instanceof Anthropic.NotFoundError && error.message.includes("nobody"),
);

console.log(JSON.stringify({ receipt: response.headers.get("x-millicent-receipt"), cost: message.usage.cost }));
