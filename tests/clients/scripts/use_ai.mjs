// Vercel's AI SDK with its provider for compatible servers: a text, a stream, a tool, an error.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, streamText, tool } from "ai";

const [url, toolText] = process.argv.slice(2);
const millicent = createOpenAICompatible({ name: "millicent", baseURL: `${url}/v1`, apiKey: "unused", includeUsage: true });
const asked = { model: millicent("tiny"), prompt: "hello", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
const answer = await generateText(asked);
assert(answer.text);

const streamed = streamText(asked);
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert(text);
assert((await streamed.usage).outputTokens <= 8);

const { name, parameters } = JSON.parse(toolText).function;
const called = await generateText({
  ...asked, maxOutputTokens: 200, toolChoice: "required", tools: { [name]: tool({ inputSchema: jsonSchema(parameters) }) },
});
assert([1, 2, 3].includes(called.toolCalls[0].input.times));

await assert.rejects(
  generateText({ ...asked, model: millicent("nobody") }),
  (error) => APICallError.isInstance(error) && error.statusCode === 404 && error.message.includes("nobody"),
);

console.log(JSON.stringify({ receipt: answer.response.headers["x-millicent-receipt"], cost: answer.usage.raw.cost }));
