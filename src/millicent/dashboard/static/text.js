// Model output, shown as text: paragraphs and fenced code, built as nodes, never parsed as HTML.

/** Splits at blank lines and ``` fences; an unclosed fence is code up to the end. */
function blocks(text) {
  const found = [];
  let code = null;
  let lines = [];
  const flush = () => {
    if (lines.length) found.push({ kind: "p", text: lines.join("\n") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (code !== null) {
      if (/^\s*```\s*$/.test(line)) {
        found.push({ kind: "pre", text: code.join("\n") });
        code = null;
      } else code.push(line);
    } else if (/^\s*```/.test(line)) {
      flush();
      code = [];
    } else if (line.trim() === "") flush();
    else lines.push(line);
  }
  flush();
  if (code !== null) found.push({ kind: "pre", text: code.join("\n") });
  return found;
}

/** Makes `element` show `text`, touching only the blocks that changed, so that a long answer streams cheaply. */
export function render(element, text) {
  const wanted = blocks(text);
  wanted.forEach((block, i) => {
    let node = element.children[i];
    if (!node || node.localName !== block.kind) {
      const fresh = document.createElement(block.kind);
      if (block.kind === "pre") {
        fresh.tabIndex = 0;
        fresh.append(document.createElement("code"));
      }
      if (node) node.replaceWith(fresh);
      else element.append(fresh);
      node = fresh;
    }
    const target = block.kind === "pre" ? node.firstChild : node;
    if (target.textContent !== block.text) target.textContent = block.text;
  });
  while (element.children.length > wanted.length) element.lastElementChild.remove();
}
