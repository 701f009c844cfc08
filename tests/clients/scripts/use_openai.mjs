// OpenAI's own client: a chat, a stream, a tool, an error.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, toolText] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const { data: completion, response } = await client.chat.completions
  .create({ model: "tiny", messages, max_tokens: 8 })
  .withResponse();
assert(completion.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, max_tokens: 8, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert(text);

const called = await client.chat.completions.create({
  model: "tiny", messages, max_tokens: 200, tools: [JSON.parse(toolText)], tool_choice: "required",
});
assert([1, 2, 3].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).times));

await assert.rejects(
  client.chat.completions.create({ model: "nobody", messages }),
  (error) => error instanceof OpenAI.NotFoundError && error.message.includes("nobody"),
);

console.log(JSON.stringify({ receipt: response.headers.get("x-millicent-receipt"), cost: completion.usage.cost }));
