// The chat page. What a model, a task or the server says only ever becomes text nodes:
// nothing here parses HTML, and the page's Content-Security-Policy forbids it.

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(Boolean));
  return node;
}

/* ---- Markdown, as blocks: while an answer streams, only changed blocks are redrawn. */

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const COLUMNS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 8; // levels of lists, quotes and emphasis; deeper ones stay text

const widthOf = (blank) => blank.replace(/\t/g, "    ").length;
const indentOf = (line) => widthOf(line.match(/^[ \t]*/)[0]);
const isTable = (lines, at) =>
  lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && COLUMNS.test(lines[at + 1]);
const begins = (lines, at) =>
  FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at]) || QUOTE.test(lines[at]) ||
  ITEM.test(lines[at]) || isTable(lines, at);

function dedent(line, most) {
  let at = 0;
  for (let width = 0; width < most && /[ \t]/.test(line[at] ?? ""); at++) width += widthOf(line[at]);
  return line.slice(at);
}

const closesFence = (line, mark) => line.trim().startsWith(mark) && !line.replaceAll(mark[0], "").trim();

function endOfFence(lines, at) {
  const mark = lines[at].match(FENCE)[1];
  const end = lines.findIndex((line, n) => n > at && closesFence(line, mark));
  return end < 0 ? lines.length : end + 1;
}

const isNumbered = (line) => /^\s*\d/.test(line);

function endOfList(lines, at) {
  const outer = indentOf(lines[at]) + 2;
  let end = at + 1;
  for (let next = end; next < lines.length; next++) {
    const blank = !lines[next].trim();
    const item = ITEM.test(lines[next]) && isNumbered(lines[next]) === isNumbered(lines[at]);
    const within = item || indentOf(lines[next]) >= outer;
    const continued = next === end && lines[next - 1].trim() && !begins(lines, next);
    if (!blank && !within && !continued) break;
    if (!blank) end = next + 1;
  }
  return end;
}

function endWhile(lines, at, holds) {
  let end = at + 1;
  while (end < lines.length && holds(end)) end++;
  return end;
}

// The end and the kind of the block that starts at a line.
function extent(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return ["code", endOfFence(lines, at)];
  if (HEADING.test(line)) return ["heading", at + 1];
  if (RULE.test(line)) return ["rule", at + 1];
  if (QUOTE.test(line)) return ["quote", endWhile(lines, at, (n) => QUOTE.test(lines[n]))];
  if (ITEM.test(line)) return ["list", endOfList(lines, at)];
  if (isTable(lines, at)) return ["table", endWhile(lines, at, (n) => lines[n].includes("|"))];
  return ["text", endWhile(lines, at, (n) => lines[n].trim() && !begins(lines, n))];
}

function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) { at++; continue; }
    const [kind, end] = extent(lines, at);
    const own = lines.slice(at, end);
    blocks.push({ kind, lines: own, source: `${kind}\n${own.join("\n")}` });
    at = end;
  }
  return blocks;
}

const DRAW = {
  code: (lines) => codeBlock(lines),
  heading: ([line]) => {
    const [, marks, title] = line.match(HEADING);
    return make(`h${Math.min(6, marks.length + 2)}`, {}, ...spans(title.replace(/[ \t]#+[ \t]*$/, "").trim()));
  },
  rule: () => make("hr"),
  quote: (lines, depth) =>
    make("blockquote", {}, ...drawn(lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth)),
  list: (lines, depth) => list(lines, depth),
  table: (lines) => table(lines),
  text: (lines) => make("p", {}, ...spans(lines.map((line) => line.trim()).join("\n"))),
};

function drawn(text, depth = 0) {
  if (depth > DEEPEST) return [make("p", {}, text)];
  return blocksOf(text).map(({ kind, lines }) => DRAW[kind](lines, depth + 1));
}

function codeBlock(lines) {
  const [, mark, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && closesFence(lines.at(-1), mark);
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  return make("figure", { class: "code" },
    make("figcaption", {}, make("span", {}, language || "code"), copyButton(() => code, "Copy code")),
    make("pre", { tabindex: "0", role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, make("code", {}, code)));
}

function list(lines, depth) {
  const ordered = isNumbered(lines[0]);
  const outer = indentOf(lines[0]) + 2;
  const items = [];
  let offset = 0; // of an item's text; its other lines are indented as far
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && indentOf(line) < outer) {
      offset = widthOf(found[0]);
      items.push([line.slice(found[0].length)]);
    } else items.at(-1).push(dedent(line, offset));
  }
  const start = ordered ? parseInt(lines[0], 10) : null;
  return make(ordered ? "ol" : "ul", { start }, ...items.map((item) => make("li", {}, ...inItem(item.join("\n"), depth))));
}

// The first lines of an item stand without a paragraph, as in a tight list.
function inItem(text, depth) {
  const nodes = drawn(text, depth);
  return nodes[0]?.tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...spans(cell))));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

const FARTHEST = 2000; // characters within which a closing mark is searched
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const isWord = (letter) => /[\p{L}\p{N}]/u.test(letter ?? "");

// Text with its line breaks, code, emphasis and links, as nodes.
function spans(text, depth = 0) {
  const nodes = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const found = depth < DEEPEST ? spanAt(text, at, depth) : null;
    if (found === null) { plain += text[at++]; continue; }
    if (plain) nodes.push(plain);
    [plain, at] = ["", found.end];
    nodes.push(found.node);
  }
  return plain ? [...nodes, plain] : nodes;
}

function spanAt(text, at, depth) {
  const letter = text[at];
  if (letter === "\n") return { node: make("br"), end: at + 1 };
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { node: text[at + 1], end: at + 2 };
  if (letter === "`") return codeSpan(text, at);
  if (letter === "[" || (letter === "!" && text[at + 1] === "[")) return linkAt(text, at, depth);
  if (text.startsWith("http", at + (letter === "<"))) return bareLink(text, at);
  return "*_~".includes(letter) ? emphasis(text, at, depth) : null;
}

function codeSpan(text, at) {
  const mark = text.slice(at).match(/^`+/)[0];
  const rest = text.slice(at + mark.length, at + mark.length + FARTHEST);
  const end = rest.search(new RegExp(`(?<!\`)\`{${mark.length}}(?!\`)`));
  if (end < 0) return { node: mark, end: at + mark.length };
  const code = rest.slice(0, end).replace(/^ (.*[^ ].*) $/s, "$1");
  return { node: make("code", {}, code), end: at + end + 2 * mark.length };
}

function emphasis(text, at, depth) {
  const [mark, tag] = MARKS.find(([mark]) => text.startsWith(mark, at)) ?? [];
  const from = at + (mark?.length ?? 0);
  const alone = mark?.includes("_") && isWord(text[at - 1]);
  const end = mark && !alone && /\S/.test(text[from] ?? "") ? closing(text, from, mark) : -1;
  if (end < 0) return { node: mark ?? text[at], end: mark ? from : at + 1 };
  return { node: make(tag, {}, ...spans(text.slice(from, end), depth + 1)), end: end + mark.length };
}

function closing(text, from, mark) {
  const [letter] = mark;
  for (let at = from; at < Math.min(text.length, from + FARTHEST); at++) {
    if (text[at] === "\\") { at++; continue; }
    if (text[at] === "`") { at = codeSpan(text, at).end - 1; continue; }
    if (text[at] !== letter) continue;
    let run = at;
    while (text[run] === letter) run++;
    const fits = mark.length === 1 ? (run - at) % 2 === 1 : run - at >= 2;
    const after = letter === "_" && isWord(text[run]);
    if (fits && at > from && /\S/.test(text[at - 1]) && !after) return run - mark.length;
    at = run - 1;
  }
  return -1;
}

const LINK = /^!?\[((?:\\.|[^\\[\]]|\[[^[\]]*\])*)\]\(\s*<?((?:[^\s<>()]|\([^\s<>()]*\))+)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;

function linkAt(text, at, depth) {
  const found = text.slice(at, at + FARTHEST).match(LINK);
  const address = found && webAddress(found[2]);
  if (!address) return { node: text[at], end: at + 1 };
  const words = spans(found[1] || found[2], Math.max(depth + 1, DEEPEST - 2));
  return { node: link(address, words), end: at + found[0].length };
}

function bareLink(text, at) {
  const found = text.slice(at, at + FARTHEST).match(/^<?(https?:\/\/[^\s<>"]+)>?/);
  if (!found || isWord(text[at - 1])) return null;
  const bare = text[at] !== "<";
  const address = bare ? withoutTail(found[1]) : found[1];
  if (!webAddress(address)) return null;
  return { node: link(webAddress(address), [address]), end: at + (bare ? address.length : found[0].length) };
}

// Punctuation after an address belongs to the sentence, as does an unopened bracket.
function withoutTail(address) {
  const shorter = address.replace(/[.,:;!?*_~'`\]]+$/, "");
  const open = shorter.endsWith(")") && shorter.split("(").length < shorter.split(")").length;
  return open ? withoutTail(shorter.slice(0, -1)) : shorter;
}

function webAddress(text) {
  const url = URL.parse ? URL.parse(text) : URL.canParse(text) ? new URL(text) : null;
  return url && /^https?:$/.test(url.protocol) ? url.href : null;
}

const link = (address, words) =>
  make("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" }, ...words);

// A place whose Markdown grows.
class Growing {
  constructor(node) { this.node = node; this.sources = []; }

  show(text) {
    const blocks = blocksOf(text);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.sources[same]) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map(({ kind, lines }) => DRAW[kind](lines, 0)));
    this.sources = blocks.map((block) => block.source);
  }
}

function copyButton(text, label) {
  const button = make("button", { type: "button", class: "quiet", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no clipboard without https, or no permission
    const holder = make("textarea", { class: "hidden" });
    holder.value = text;
    document.body.append(holder);
    holder.select();
    const done = document.execCommand("copy");
    holder.remove();
    return done;
  }
}

/* ---- Storage: in this tab until it is closed; only the colours for longer. */

function recall(name, otherwise, store = "sessionStorage") {
  try {
    return JSON.parse(window[store].getItem(`ifp.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function remember(name, value, store = "sessionStorage") {
  try {
    window[store].setItem(`ifp.${name}`, JSON.stringify(value));
  } catch { /* full, or forbidden: then a reload forgets */ }
}

/* ---- The server. */

let server = null; // what ifp/state says
let current = false; // whether that is still up to date, as far as known
let key = recall("key", "");

// Ask the server; ask the user for the key if the server requires one.
async function ask(path, options = {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it running?");
    });
    if (response.ok) return response;
    const sentence = await sentenceOf(response);
    if (response.status !== 401 || !(await newKey(used))) throw new Error(sentence);
  }
}

async function sentenceOf(response) {
  const content = await response.json().catch(() => null);
  return content?.error?.message || `The server answered with status ${response.status}.`;
}

let asking = null; // one dialog, however many wait for it

// Return whether there is a new key after one was refused.
function newKey(refused) {
  if (key !== refused) return true; // somebody else has asked meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = $("door");
    $("door-said").textContent = refused && "The server does not take that key.";
    $("api-key").value = dialog.returnValue = "";
    dialog.addEventListener("close", () => { asking = null; resolve(dialog.returnValue === "given"); }, { once: true });
    dialog.showModal();
  });
  return asking;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("api-key").value.trim();
  remember("key", key);
  $("door").close("given");
});
$("door-close").addEventListener("click", () => $("door").close(""));

// The events of a stream, which are separated by blank lines.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke before the answer was complete.");
    });
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    yield* parts;
  }
}

/* ---- The conversation: turns of a question and its answer. */

let turns = recall("turns", []);
let running = null; // the AbortController of the answer that is being written
let finished = null; // the promise of its end

function requestOf(turn) {
  const said = settings();
  const before = turns.slice(0, turns.indexOf(turn)).filter((other) => other.answer);
  const messages = before.flatMap(({ question, answer }) => [
    { role: "user", content: question }, { role: "assistant", content: answer },
  ]);
  messages.push({ role: "user", content: turn.question });
  const instruction = said.instruction;
  if (said.tell && instruction) messages.unshift({ role: "system", content: instruction });
  const ifp = said.task ? { task: said.task } : { ...(instruction && { instruction }), ...(said.keep && { keep: said.keep }) };
  if (said.exact) ifp.check = "exact";
  return {
    model: server.model, messages, stream: true, temperature: said.temperature, ifp,
    ...(said.longest && { max_tokens: said.longest }),
  };
}

async function answer(turn) {
  running = new AbortController();
  Object.assign(turn, { answer: "", thoughts: "", figures: null, error: null, ending: "stopped" });
  const view = views.get(turn) ?? draw(turn);
  view.begin();
  busy(true);
  say("Choosing what to load…", true);
  try {
    if (!current) await refresh();
    turn.by = settings().by;
    await receive(turn, view);
  } catch (error) {
    if (error.name !== "AbortError") Object.assign(turn, { error: error.message, ending: "error" });
    current = false; // perhaps the server was started anew, with another model
  }
  running = null;
  view.end();
  busy(false);
  say({ error: "", stopped: "Stopped.", length: "The answer has reached its greatest length." }[turn.ending] ?? "Answered.");
  remember("turns", turns);
  if (turn.figures) showFigures(turn);
}

async function receive(turn, view) {
  const body = JSON.stringify(requestOf(turn));
  const headers = { "Content-Type": "application/json" };
  const response = await ask("v1/chat/completions", { method: "POST", body, headers, signal: running.signal });
  for await (const event of eventsOf(response)) {
    if (event === "data: [DONE]") return;
    if (event.startsWith(":")) progress(event);
    else if (event.startsWith("data:")) take(JSON.parse(event.slice("data:".length)), turn, view);
  }
  throw new Error("The server ended the answer before it was complete.");
}

function progress(comment) {
  const [, stage, done, total] = comment.match(/^: (\w+) (\d+)\/(\d+)/) ?? [];
  if (stage === "prefill" && done !== total) say(`Reading ${total} tokens…`, true);
  if (stage === "decode") say("Answering…", true);
}

function take(chunk, turn, view) {
  if (chunk.error) throw new Error(chunk.error.message);
  const [choice] = chunk.choices ?? [];
  const { content = "", reasoning = "" } = choice?.delta ?? {};
  turn.answer += content ?? "";
  turn.thoughts += reasoning ?? "";
  if (content || reasoning) say(content ? "Answering…" : "Thinking…", true);
  turn.ending = choice?.finish_reason ?? turn.ending;
  turn.figures = chunk.ifp ?? turn.figures;
  view.grow();
}

function settings() {
  const source = $("source").value;
  const task = server?.tasks.find(({ name }) => source === `task:${name}`);
  const written = source === "first" ? "" : $("instruction").value.trim();
  const instruction = task ? task.instruction ?? "" : written;
  const keep = { auto: "auto", share: chosen.share / 100, default: null }[chosenKeep()];
  return {
    task: task?.name ?? null, instruction, keep, by: task ? task.name : written || turns[0]?.question,
    tell: $("tell").checked, temperature: $("temperature").value === "" ? undefined : Number($("temperature").value),
    longest: Math.round($("longest").value) || null, exact: $("exact").checked,
  };
}

const views = new Map();

// Draw a turn; return the functions that its growing answer needs.
function draw(turn) {
  const text = make("div", { class: "answer" });
  const below = make("div");
  const thoughts = make("details", { class: "thoughts" }, make("summary", {}, "Thoughts"), make("p"));
  const article = make("article", { class: "turn" },
    make("h2", { class: "hidden" }, "You"), make("div", { class: "asked" }, turn.question),
    make("h2", { class: "hidden" }, "The model"), thoughts, text, below);
  let growing = new Growing(text);
  let frame = 0;
  const show = () => {
    frame = 0;
    const end = atEnd();
    thoughts.hidden = !turn.thoughts;
    thoughts.lastChild.textContent = turn.thoughts;
    growing.show(turn.answer);
    if (end) toEnd();
  };
  const view = {
    article,
    begin() {
      growing = new Growing(text);
      text.replaceChildren();
      thoughts.hidden = true;
      below.replaceChildren();
      article.classList.add("waiting");
      article.setAttribute("aria-busy", "true");
      toEnd();
    },
    grow() {
      if (turn.answer) article.classList.remove("waiting");
      frame ||= requestAnimationFrame(show);
      keepSoon();
    },
    end() {
      cancelAnimationFrame(frame);
      article.classList.remove("waiting");
      article.removeAttribute("aria-busy");
      show();
      const end = atEnd();
      below.replaceChildren(...under(turn));
      if (end) toEnd();
    },
  };
  views.set(turn, view);
  $("welcome").hidden = true;
  $("log").append(article);
  return view;
}

function under(turn) {
  const notes = { stopped: "Stopped.", length: "The answer has reached its greatest length." };
  const again = make("button", { type: "button", class: "quiet", click: () => regenerate(turn) }, turn.error ? "Try again" : "Regenerate");
  return [
    turn.error && make("p", { class: "notice", role: "alert" }, turn.error),
    turn.figures && make("p", { class: "figures" }, ...inBrief(turn.figures).map((words) => make("span", {}, words))),
    notes[turn.ending] && make("p", { class: "figures" }, notes[turn.ending]),
    make("p", { class: "buttons" }, turn.answer && copyButton(() => turn.answer, "Copy the answer"), turn === turns.at(-1) && again),
  ].filter(Boolean);
}

const percent = (share) => `${(100 * share).toFixed(share < 0.995 && share > 0 ? 1 : 0).replace(/\.0$/, "")}%`;
const seconds = (s) => (s < 0.1 ? `${Math.ceil(1000 * s)} ms` : s < 10 ? `${s.toFixed(2)} s` : `${Math.round(s)} s`);
const known = (value) => value !== null && value !== undefined;

function inBrief(figures) {
  const { agreement, seconds: took = {}, tokens_per_second: speed } = figures;
  return [
    `${percent(figures.kept_channels / figures.total_channels)} kept`,
    known(agreement) && `agreement ${percent(agreement)}`,
    known(took.ttft) && `first token ${seconds(took.ttft)}`,
    speed > 0 && `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
  ].filter(Boolean);
}

function regenerate(turn) {
  if (running) return;
  $("message").focus();
  finished = answer(turn);
}

function send() {
  const question = $("message").value.trim();
  if (!question || running) return;
  $("message").value = "";
  fit();
  const previous = turns.at(-1);
  turns.push({ question, answer: "", figures: null, error: null, ending: "stopped" });
  if (previous) views.get(previous).end(); // only the last one can be asked again
  finished = answer(turns.at(-1));
}

async function startAfresh() {
  running?.abort();
  await finished;
  turns = [];
  remember("turns", turns);
  for (const { article } of views.values()) article.remove();
  views.clear();
  $("welcome").hidden = false;
  say("");
  selecting(false);
  $("message").focus();
}

const log = $("log");
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

let kept = 0;
function keepSoon() {
  kept ||= setTimeout(() => { kept = 0; remember("turns", turns); }, 500);
}

// Stop before the browser breaks the connection, which would look like a server error.
function leave() {
  running?.abort();
  remember("turns", turns);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (document.activeElement === document.body) $("message").focus();
}

// The line above the message box; a long stage also shows its seconds.
let clock = 0;
function say(words, counting = false) {
  if ($("said").textContent === words) return;
  clearInterval(clock);
  $("said").textContent = words;
  $("clock").textContent = "";
  const start = performance.now();
  if (counting) clock = setInterval(() => { $("clock").textContent = `${Math.round((performance.now() - start) / 1000)} s`; }, 1000);
}

/* ---- The picture: every unit of every layer, and what is new since the last selection. */

const KINDS = ["none", "same", "new", "gone"];
const masks = new Map(); // by mask_id: { bits, layers, units }
let seen = recall("seen", []); // the last two selections, the newest first: { id, by }

async function maskOf(id) {
  if (!masks.has(id)) {
    const mask = await (await ask(`ifp/masks/${encodeURIComponent(id)}`)).json();
    mask.bytes = Uint8Array.from(atob(mask.bits), (letter) => letter.charCodeAt(0));
    masks.set(id, mask);
  }
  return masks.get(id);
}

const keeps = ({ bytes, units }, layer, unit) => {
  const bit = layer * units + unit;
  return (bytes[bit >> 3] >> (bit & 7)) & 1;
};

// The kind of each unit, [layers][units], as an index into KINDS.
function compared(mask, before) {
  const kindOf = (layer, unit) => {
    const now = keeps(mask, layer, unit);
    const then = before ? keeps(before, layer, unit) : now;
    return now ? (then ? 1 : 2) : then ? 3 : 0;
  };
  return Array.from({ length: mask.layers }, (_, layer) => Uint8Array.from({ length: mask.units }, (_, unit) => kindOf(layer, unit)));
}

let shown = null; // { rows, counts, mask, before }

async function showMask() {
  const [now, then] = seen;
  if (!now) return;
  const [mask, old] = await Promise.all([now, then].map((one) => one && maskOf(one.id).catch(() => null)));
  for (const id of masks.keys()) if (!seen.some((one) => one.id === id)) masks.delete(id);
  $("picture").hidden = !mask;
  if (!mask) { $("summary").textContent = "The server no longer has this selection; the next answer shows it."; return; }
  const before = old?.layers === mask.layers && old?.units === mask.units ? old : null;
  const rows = compared(mask, before);
  const counts = rows.map((row) => KINDS.map((_, kind) => row.reduce((sum, one) => sum + (one === kind), 0)));
  shown = { rows, counts, mask, before };
  describe(now, then);
  paint();
}

function describe(now, then) {
  const { counts, mask, before } = shown;
  const sum = (...kinds) => counts.reduce((total, row) => kinds.reduce((part, kind) => part + row[kind], total), 0);
  const units = `${mask.unit}s`;
  const [all, fresh, gone] = [mask.layers * mask.units, sum(2), sum(3)];
  const short = (words) => (words.length > 60 ? `${words.slice(0, 59)}…` : words);
  const first = `${sum(1, 2)} of ${all} ${units} for “${short(now.by)}”.`;
  const second = before ? ` New since “${short(then.by)}”: ${fresh}; gone: ${gone}.` : "";
  $("summary").textContent = first + second;
  $("map").setAttribute("aria-label", `${mask.layers} layers, one row each. ${first}${second}`);
  const names = before ? [["same", "kept before too"], ["new", "new"], ["gone", "gone"], ["none", "left out"]] : [["same", "kept"], ["none", "left out"]];
  $("key").replaceChildren(...names.map(([kind, words]) => make("li", { class: kind }, words)));
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, String(cell))));
  $("layers").replaceChildren(
    make("thead", {}, row(["Layer", "Kept", "Share", "New", "Gone"], "th")),
    make("tbody", {}, ...counts.map(([, same, fresh, gone], layer) => row([layer, same + fresh, percent((same + fresh) / mask.units), fresh, gone], "td"))));
}

// A layer's units, those of one kind beside each other.
function sorted(row, [, same, fresh, gone]) {
  const found = new Uint8Array(row.length).fill(1, 0, same).fill(2, same, same + fresh);
  return found.fill(3, same + fresh, same + fresh + gone);
}

function paletteOf(canvas) {
  return KINDS.map((kind) => {
    canvas.style.color = `var(--${kind})`; // light-dark() is resolved in a colour only
    return getComputedStyle(canvas).color.match(/\d+/g).slice(0, 3).map(Number);
  });
}

// A pixel is the mean colour of the units that it stands for.
function paint() {
  const canvas = $("map");
  if (!shown || !canvas.clientWidth) return;
  const { rows, counts, mask: { layers, units } } = shown;
  const ratio = devicePixelRatio || 1;
  const tall = Math.max(2, Math.round(Math.min(16, Math.max(4, 220 / layers)) * ratio));
  const width = Math.round(canvas.clientWidth * ratio);
  Object.assign(canvas, { width, height: tall * layers });
  const image = canvas.getContext("2d").createImageData(width, canvas.height);
  const palette = paletteOf(canvas);
  rows.forEach((row, layer) => {
    const order = $("placed").checked ? row : sorted(row, counts[layer]);
    const pixels = new Uint8ClampedArray(4 * width).fill(255);
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * units) / width);
      const to = Math.max(from + 1, Math.floor(((x + 1) * units) / width));
      for (const part of [0, 1, 2]) {
        let sum = 0;
        for (let unit = from; unit < to; unit++) sum += palette[order[unit]][part];
        pixels[4 * x + part] = sum / (to - from);
      }
    }
    const gap = tall > 3 ? 1 : 0;
    for (let y = layer * tall; y < (layer + 1) * tall - gap; y++) image.data.set(pixels, 4 * y * width);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function tellLayer(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const { counts, mask } = shown;
  const layer = Math.min(mask.layers - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * mask.layers)));
  const [, same, fresh, gone] = counts[layer];
  $("hover").textContent = `Layer ${layer}: ${same + fresh} of ${mask.units} kept, ${fresh} new, ${gone} gone`;
}

async function showFigures(turn) {
  const { mask_id: id } = turn.figures;
  if (id && id !== seen[0]?.id) seen = [{ id, by: turn.by }, ...seen].slice(0, 2);
  remember("seen", seen);
  await Promise.all([showMask(), refresh()]).catch(() => null); // the answer is shown anyway
}

function listFigures() {
  const figures = turns.findLast((turn) => turn.figures)?.figures;
  const memory = server?.memory;
  const size = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);
  const { seconds: took, check } = figures ?? {};
  const rows = [
    ["Kept", figures && percent(figures.kept_channels / figures.total_channels)],
    ["Agreement with the whole model", known(figures?.agreement) && percent(figures.agreement)],
    ["Promised by the model’s card", known(figures?.promise) && percent(figures.promise)],
    ["Share of the router’s weights", known(figures?.router_mass) && percent(figures.router_mass)],
    ["Checked tokens that stood", check?.drafted > 0 && percent(check.accepted / check.drafted)],
    ["Selecting and loading", took && seconds((took.select ?? 0) + (took.load ?? 0))],
    ["First token after", known(took?.ttft) && seconds(took.ttft)],
    ["Tokens per second", figures?.tokens_per_second > 0 && figures.tokens_per_second.toFixed(1)],
    ["Models in memory", memory && size(memory.compact_models)],
    ["Memory in all", memory && size(memory.active)],
  ];
  $("figures").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

/* ---- Settings beside the conversation. */

const READY = ["Answer questions about countries, cities and nature.", "Write a short Python function.", "You translate English into French.", "Write a story for children at bedtime."];
const STARTERS = ["What is Germany called in French?", "Tell me the currency code of Japan.", "How do you say Norway in Polish?"];
const FIELDS = ["instruction", "temperature", "longest"];
const TICKS = ["tell", "exact", "placed"];

let chosen = recall("settings", {});
const chosenKeep = () => document.querySelector("[name=keep]:checked")?.value ?? "auto";

async function refresh() {
  server = await (await ask("ifp/state")).json();
  current = true;
  const plural = server.unit === "expert" ? "experts" : "channels";
  $("model").textContent = document.title = server.model;
  $("about").textContent = `${server.layers} layers of ${server.units} ${plural}`;
  $("temperature").placeholder = server.temperature;
  const source = $("source").value;
  $("tasks").replaceChildren(...server.tasks.map(({ name }) => make("option", { value: `task:${name}` }, name)));
  $("tasks").hidden = !server.tasks.length;
  choose(source);
  listFigures();
}

function choose(source) {
  const there = [...$("source").options].some(({ value }) => value === source);
  $("source").value = there ? source : "first";
  showSource();
}

// Show the settings that fit the chosen source.
function showSource() {
  const source = $("source").value;
  const task = server?.tasks.find(({ name }) => source === `task:${name}`);
  $("writing").hidden = source !== "own";
  $("task").hidden = !task;
  $("task").textContent = task?.instruction ?? "A task of the library; the text that it was made from is not known.";
  $("telling").hidden = !(source === "own" || task?.instruction);
  $("keeping").disabled = Boolean(task);
  showKeep(task);
}

const NOTES = {
  task: "The task says how much it keeps.",
  auto: "The smallest share for which the model’s card promises good answers. A model’s first request makes the card, which takes a while.",
  share: "Less needs less memory, and agrees less often with the whole model.",
  default: "As much as the server keeps by default.",
};

// The slider shows the share wherever it is known.
function showKeep(task) {
  const own = server?.keep ?? "auto";
  const radios = [...document.querySelectorAll("[name=keep]")];
  radios[0].parentNode.hidden = own === "auto";
  const { keep = "default", share = 75 } = chosen;
  const wanted = keep === "default" && own === "auto" ? "auto" : keep;
  for (const radio of radios) radio.checked = radio.value === wanted;
  const kept = task ? task.kept / task.total : { default: own, share: share / 100, auto: null }[wanted];
  $("share").value = 100 * (kept ?? share / 100);
  $("share").setAttribute("aria-valuetext", kept === null ? "found by itself" : percent(kept));
  $("percent").textContent = kept === null ? "–" : percent(kept);
  $("kept-note").textContent = NOTES[task ? "task" : wanted];
}

function saveSettings() {
  const values = Object.fromEntries([...FIELDS.map((id) => [id, $(id).value]), ...TICKS.map((id) => [id, $(id).checked])]);
  const keep = chosenKeep();
  const share = keep === "share" && !$("keeping").disabled ? Number($("share").value) : chosen.share;
  chosen = { ...values, source: $("source").value, keep, share };
  remember("settings", chosen);
  showSource();
}

function restoreSettings() {
  for (const id of FIELDS) if (known(chosen[id])) $(id).value = chosen[id];
  for (const id of TICKS) if (known(chosen[id])) $(id).checked = chosen[id];
  // The tasks are not loaded yet: show the wanted one until they are.
  const { source = "first" } = chosen;
  if (source.startsWith("task:")) $("tasks").append(make("option", { value: source }, source.slice("task:".length)));
  choose(source);
}

function selecting(is) {
  document.body.classList.toggle("selecting", is);
  $("panel").setAttribute("aria-expanded", is);
  $("panel").textContent = is ? "Chat" : "Selection";
  paint();
}

// The message box is as tall as its text.
function fit() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function colours(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", (theme ?? (dark.matches ? "dark" : "light")) === "dark");
  paint();
}

function onKey(event) {
  if (event.key !== "Escape" || $("door").open) return;
  if (running) running.abort();
  else if (document.body.classList.contains("selecting")) { selecting(false); $("panel").focus(); }
}

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("input", fit);
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => { running?.abort(); $("message").focus(); });
  $("fresh").addEventListener("click", startAfresh);
  $("panel").addEventListener("click", () => selecting(!document.body.classList.contains("selecting")));
  $("theme").addEventListener("click", () => {
    const theme = $("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark";
    remember("theme", theme, "localStorage");
    colours(theme);
  });
  $("source").addEventListener("change", () => {
    const { value } = $("source");
    if (value.startsWith("ready:")) {
      $("instruction").value = value.slice("ready:".length);
      $("source").value = "own";
    }
    saveSettings();
  });
  $("share").addEventListener("input", () => { document.querySelector("[name=keep][value=share]").checked = true; });
  $("side").addEventListener("input", saveSettings);
  $("placed").addEventListener("change", paint);
  $("map").addEventListener("mousemove", tellLayer);
  document.addEventListener("keydown", onKey);
  addEventListener("beforeunload", leave);
  addEventListener("pagehide", leave); // the only event that some phones send
  dark.addEventListener("change", () => colours(recall("theme", null, "localStorage")));
  new ResizeObserver(paint).observe($("side"));
}

function begin() {
  $("ready").append(...READY.map((text) => make("option", { value: `ready:${text}` }, text)));
  $("starters").append(...STARTERS.map((text) => make("button", { type: "button", click: () => { $("message").value = text; send(); } }, text)));
  colours(recall("theme", null, "localStorage"));
  restoreSettings();
  listen();
  for (const turn of turns) draw(turn).end();
  toEnd();
  Promise.all([refresh(), showMask()]).catch((error) => say(error.message));
}

begin();
