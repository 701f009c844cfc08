// OpenAI's own client: a chat, a stream, a tool, an error.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, toolText] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const asked = { model: "tiny", messages: [{ role: "user", content: "hello" }], max_tokens: 8, temperature: 0 };
const { data: completion, response } = await client.chat.completions
  .create(asked)
  .withResponse();
assert(completion.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert(text);

const called = await client.chat.completions.create({
  ...asked, max_tokens: 200, tools: [JSON.parse(toolText)], tool_choice: "required",
});
assert([1, 2, 3].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).times));

await assert.rejects(
  client.chat.completions.create({ ...asked, model: "nobody" }),
  (error) => error instanceof OpenAI.NotFoundError && error.message.includes("nobody"),
);

console.log(JSON.stringify({ receipt: response.headers.get("x-millicent-receipt"), cost: completion.usage.cost }));
